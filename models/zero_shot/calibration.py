"""From scores to calibrated stacking's gamma and a temperature, on validation classes and held-out seen images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from models.base import FloatArray, IntArray
from models.evaluation import calibrated_stacking, choose_gamma, zsl_report


@dataclass(frozen=True)
class Calibration:
    """gamma and temperature on the scale of scores whose spread was `spread`; `report` says how they were found."""

    gamma: float
    temperature: float
    spread: float
    report: dict[str, Any]


def calibrate(
    scores: FloatArray, labels: IntArray, *, n_seen: int, validation_names: Sequence[str], spread: float
) -> Calibration:
    """Choose gamma by H, then the temperature by likelihood.

    scores: (n_images, n_seen + n_validation), the validation classes last and standing in for unseen ones.
    The temperature serves both questions put to a classifier: among unseen classes alone, and among all.
    """
    is_seen = np.arange(scores.shape[1]) < n_seen
    of_seen = is_seen[labels]
    report: dict[str, Any] = {
        "classes": list(validation_names),
        "n_images": int((~of_seen).sum()),
        "n_held_out_seen_images": int(of_seen.sum()),
    }
    questions: list[tuple[FloatArray, IntArray]] = []
    gamma = 0.0
    if not validation_names:
        report["reason"] = "No validation classes were named: default settings, gamma 0."
    elif not of_seen.any():
        report["reason"] = "No seen class has an image to spare, so gamma stays 0."
    else:
        gamma, found = choose_gamma(scores, labels, is_seen)
        report |= {"u": found.u, "s": found.s, "h": found.h, "gamma": gamma}
        report["reason"] = (
            f"Of {len(validation_names)} seen classes treated as unseen: settings by T1, gamma by the harmonic mean, "
            "temperature by likelihood; then refitted on all seen classes."
        )
    if len(validation_names) > 1:
        among = scores[~of_seen][:, n_seen:]
        report["t1"] = zsl_report(among, labels[~of_seen] - n_seen, validation_names).t1
        questions.append((among, labels[~of_seen] - n_seen))
    if of_seen.any():
        questions.append((calibrated_stacking(scores, is_seen, gamma), labels))
    temperature = fit_temperature(questions)
    report["temperature"] = temperature
    return Calibration(gamma, temperature, spread, report)


def fit_temperature(questions: Sequence[tuple[FloatArray, IntArray]]) -> float:
    """The T that makes softmax(scores / T) likeliest on (scores, labels) pairs, each pair weighing the same.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017). 1 where there is nothing to fit on.
    """
    questions = [(np.asarray(scores, np.float64), labels) for scores, labels in questions if len(labels)]
    if not questions:
        return 1.0
    size = float(np.mean([np.std(scores) for scores, _ in questions])) or 1.0

    def loss(log_temperature: float) -> float:
        per_temperature = np.exp(-log_temperature) / size
        total = 0.0
        for scores, labels in questions:
            scaled = scores * per_temperature
            total += float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))
        return total

    # Bounds relative to the scores' own size: from one-hot to even, whatever the scale.
    found = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x) * size)
