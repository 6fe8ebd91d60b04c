"""From scores to calibrated stacking's gamma and a temperature, on validation classes and held-out seen images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from models.base import FloatArray, IntArray
from models.evaluation import calibrated_stacking, choose_common_gamma, zsl_report


@dataclass(frozen=True)
class FoldScores:
    """One trial's scores (n_images, n_seen + n_held), divided by their spread; the fold's classes `held` come last."""

    scores: FloatArray
    labels: IntArray
    n_seen: int
    held: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """gamma and temperature for scores of spread 1; `report` says how they were found."""

    gamma: float
    temperature: float
    report: dict[str, Any]


def calibrate(folds: Sequence[FoldScores]) -> Calibration:
    """gamma: the one with the best H over all folds. Temperature: the likeliest over all folds.

    The temperature serves both questions put to a classifier: among unseen classes alone, and among all.
    """
    rankings = []
    for fold in folds:
        is_seen = np.arange(fold.scores.shape[1]) < fold.n_seen
        if 0 < is_seen[fold.labels].sum() < len(fold.labels):
            rankings.append((fold.scores, fold.labels, is_seen))
    gamma, gzsl = choose_common_gamma(rankings) if rankings else (0.0, None)
    report: dict[str, Any] = {"classes": list(folds[0].held), "folds": [list(fold.held) for fold in folds if fold.held]}
    questions: list[tuple[FloatArray, IntArray]] = []
    t1 = []
    for fold in folds:
        is_seen = np.arange(fold.scores.shape[1]) < fold.n_seen
        of_seen = is_seen[fold.labels]
        if len(fold.held) > 1:
            among = fold.scores[~of_seen][:, fold.n_seen :]
            t1.append(zsl_report(among, fold.labels[~of_seen] - fold.n_seen, fold.held).t1)
            questions.append((among, fold.labels[~of_seen] - fold.n_seen))
        if of_seen.any():
            questions.append((calibrated_stacking(fold.scores, is_seen, gamma), fold.labels))
    if t1:
        report |= {"t1": float(np.mean(t1)), "t1_per_fold": t1}
    if gzsl is not None:
        report |= {"u": gzsl.u, "s": gzsl.s, "h": gzsl.h}
    temperature = fit_temperature(questions)
    report |= {"relative_gamma": gamma, "relative_temperature": temperature, "reason": _reason(folds, bool(rankings))}
    return Calibration(gamma, temperature, report)


def _reason(folds: Sequence[FoldScores], has_gamma: bool) -> str:
    if not folds[0].held:
        return "No validation classes were named: default settings, gamma 0."
    if not has_gamma:
        return "No seen class has an image to spare, so gamma stays 0; settings were chosen by T1 on the folds."
    n_classes = sum(len(fold.held) for fold in folds)
    return (
        f"Over {len(folds)} fold(s) of together {n_classes} seen classes treated as unseen: settings by T1, gamma by "
        "the harmonic mean, temperature by likelihood; then refitted on all seen classes."
    )


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
