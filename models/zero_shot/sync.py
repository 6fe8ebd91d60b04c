"""SYNC: classifiers of unseen classes synthesised from those of phantom classes.

Changpinyo, Chao, Gong and Sha, "Synthesized Classifiers for Zero-Shot Learning" (CVPR 2016,
https://arxiv.org/abs/1603.00550), Eq. 2-5, with phantom classes b_r = phi(r), the seen ones (the authors' own choice):
    s_cr = softmax_r(-||phi(c) - b_r||^2 / sigma^2),   w_c = sum_r s_cr v_r,   score(x, c) = w_c . x
    minimise over v:   loss(w_1, ..., w_S) + lambda / 2 sum_c ||w_c||^2,
the sum over the seen classes. Loss and penalty depend on v through w = s v alone, and s (n_seen, n_seen) is regular for
different embeddings; so the minimum is that of seen classes' own linear classifiers w, whatever sigma, and
v = s^-1 w (as in the authors' fast code, with a pseudo-inverse). A sigma therefore costs no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import softmax

from models.base import FloatArray, OnProgress, Progress
from models.classic_params import SynCParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.base import History, Setting
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.linear import Loss, RidgeModel, RidgePath, multiclass_hinge_loss, squared_hinge_loss

_SIGMAS = tuple(float(2.0**power) for power in range(-4, 5))
"""sigma relative to the root mean squared distance between seen classes."""
_DEFAULT_SIGMA = 1.0
_CUTOFF = 1e-8
"""Singular values of s below this share of the largest are rounding; their inverses would drown the rest."""


class SynC(RidgeModel):
    """sigma and lambda given, or chosen on validation classes."""

    method: ClassVar[str] = "sync"
    params_class: ClassVar[type[Params]] = SynCParams
    params: SynCParams
    DEFAULT_RIDGE: ClassVar[float] = 1e-2

    def _new_path(self, train: Rows) -> RidgePath:
        loss = seen_loss(train, self.params.loss)
        return RidgePath(train.features, loss, len(train.embeddings), intercept=False)

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        setting = setting or {"relative_ridge": self.DEFAULT_RIDGE, "relative_sigma": _DEFAULT_SIGMA}
        path = self._path_of(train)
        heads, ridge = self._heads(path, setting["relative_ridge"])
        self._solved = None
        spacing = mean_distance(train.embeddings)
        self._sigma = self.params.sigma or setting["relative_sigma"] * spacing
        self._phantoms = train.embeddings
        inverse = np.linalg.pinv(similarities(self._phantoms, self._phantoms, self._sigma), rcond=_CUTOFF)
        self._bases = np.asarray(inverse @ heads.weight.T.astype(np.float64), np.float32)  # v, (n_seen, feature_dim)
        used = {"relative_ridge": ridge / path.scale, "relative_sigma": self._sigma / spacing}
        used |= {"lamda": ridge, "sigma": self._sigma}
        on_progress(Progress("training", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.lamda is not None and self.params.sigma is not None:
            return []
        path, ridges = self._path_of(train), self._ridges()
        spacing = mean_distance(train.embeddings)
        mixes = {}  # of seen classifiers for the validation classes: s_validation s^-1
        for relative in _SIGMAS if self.params.sigma is None else (_DEFAULT_SIGMA,):
            sigma = self.params.sigma or relative * spacing
            inverse = np.linalg.pinv(similarities(train.embeddings, train.embeddings, sigma), rcond=_CUTOFF)
            mixes[relative] = similarities(validation.embeddings, train.embeddings, sigma) @ inverse
        names = [str(i) for i in range(len(validation.embeddings))]
        history: History = []
        for i, ridge in enumerate(ridges):
            seen_scores = self._heads(path, ridge)[0](validation.features)
            for sigma, mix in mixes.items():
                t1 = zsl_report(seen_scores @ mix.T, validation.labels, names).t1
                history.append({"relative_ridge": ridge, "relative_sigma": sigma, "validation_t1": t1})
            best = max(entry["validation_t1"] for entry in history)
            on_progress(Progress("choosing", i + 1, len(ridges), {"validation_t1": best}))
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return pick_on_grid(tried, ["relative_ridge", "relative_sigma"])

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        weights = similarities(embeddings, self._phantoms, self._sigma) @ self._bases  # (n_classes, feature_dim)
        return np.asarray(features @ weights.T.astype(np.float32), np.float32)

    def _state(self) -> dict[str, FloatArray]:
        return {"bases": self._bases, "phantoms": self._phantoms, "sigma": np.array([self._sigma], np.float64)}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._bases, self._phantoms, self._sigma = state["bases"], state["phantoms"], float(state["sigma"][0])


def seen_loss(train: Rows, kind: str) -> Loss:
    """The paper's losses of the seen classes' scores.

    one_versus_other: squared hinge of each class against the rest. crammer_singer: hinge of the worst wrong class.
    structured: the same, the margin being the distance of the two classes' embeddings, as in the authors' code.
    """
    n_classes = len(train.embeddings)
    if kind == "one_versus_other":
        return squared_hinge_loss((2 * np.eye(n_classes, dtype=np.float32) - 1)[train.labels])
    margins = 1 - np.eye(n_classes)
    if kind == "structured":
        margins = cdist(train.embeddings, train.embeddings)
    return multiclass_hinge_loss(train.labels, margins.astype(np.float32))


def similarities(embeddings: FloatArray, phantoms: FloatArray, sigma: float) -> FloatArray:
    """s: softmax over phantoms of -||phi(c) - b_r||^2 / sigma^2, (n_classes, n_phantoms) float64."""
    squared = cdist(embeddings.astype(np.float64), phantoms.astype(np.float64), "sqeuclidean")
    return np.asarray(softmax(-squared / sigma**2, axis=1))


def mean_distance(embeddings: FloatArray) -> float:
    """Root mean squared distance between two different classes; 1 where all are the same."""
    squared = cdist(embeddings.astype(np.float64), embeddings.astype(np.float64), "sqeuclidean")
    return float(np.sqrt(squared.sum() / (len(squared) * (len(squared) - 1)))) or 1.0
