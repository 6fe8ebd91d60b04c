"""ESZSL: bilinear compatibility in closed form.

Romera-Paredes and Torr, "An embarrassingly simple approach to zero-shot learning" (ICML 2015,
https://proceedings.mlr.press/v37/romera-paredes15.html), Eq. 5:
    W = (X^T X + gamma I)^-1 X^T Y A (A^T A + lambda I)^-1,   score(x, y) = x^T W phi(y)
with X (n_images, feature_dim), Y (n_images, n_classes) of +-1, A (n_classes, embedding_dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.base import FloatArray, OnProgress, Progress
from models.evaluation import zsl_report
from models.params import ESZSLParams, Params
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.grid import best_of_plateau
from models.zero_shot.scaling import Scaling

# Relative to the mean eigenvalue of the matrix that each stiffens, so that one grid serves every feature scaling.
_GRID = tuple(float(10.0**power) for power in range(-4, 5))
_DEFAULT = 1.0


@dataclass(frozen=True)
class _Spectrum:
    """Eigendecompositions X^T X = P diag(x) P^T and A^T A = Q diag(a) Q^T, made once for all gamma, lambda.

    With `middle` = P^T X^T Y A Q, W = P [middle / ((x + gamma)(a + lambda)^T)] Q^T. Q keeps only the at most n_classes
    directions that the classes span: `middle` is 0 in all others.
    """

    x_values: FloatArray
    x_vectors: FloatArray
    a_values: FloatArray
    a_vectors: FloatArray
    middle: FloatArray

    def core(self, gamma: float, lamda: float) -> FloatArray:
        """W in the bases P and Q, (feature_dim, n_directions)."""
        return self.middle / ((self.x_values + gamma)[:, None] * (self.a_values + lamda)[None, :])

    def weight(self, gamma: float, lamda: float) -> FloatArray:
        """W, (feature_dim, embedding_dim) float32."""
        return np.asarray(self.x_vectors @ self.core(gamma, lamda) @ self.a_vectors.T, np.float32)

    def scales(self) -> tuple[float, float]:
        """Mean eigenvalues over all dimensions, (of X^T X, of A^T A): what relative ridges multiply."""
        # Features that are all 0 leave W at 0, whatever the ridge.
        return float(self.x_values.mean()) or 1.0, float(self.a_values.sum() / len(self.a_vectors))


class ESZSL(ZeroShotModel):
    """Closed form; gamma and lambda given, or chosen on validation classes from a 9 x 9 grid."""

    method: ClassVar[str] = "eszsl"
    params_class: ClassVar[type[Params]] = ESZSLParams
    params: ESZSLParams
    _solved: tuple[Rows, _Spectrum] | None = None

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        spectrum = self._spectrum_of(train)
        self._solved = None  # as large as the features' covariance: not kept with the model
        setting = setting or {"relative_gamma": _DEFAULT, "relative_lambda": _DEFAULT}
        x_mean, a_mean = spectrum.scales()
        gamma = self.params.gamma if self.params.gamma is not None else setting["relative_gamma"] * x_mean
        lamda = self.params.lamda if self.params.lamda is not None else setting["relative_lambda"] * a_mean
        self._weight = spectrum.weight(gamma, lamda)
        # Large ridges shrink W by orders of magnitude; its size ranks nothing, and scores of spread 1 are readable.
        self._weight /= np.float32(self._spread(train))
        used = {"relative_gamma": gamma / x_mean, "relative_lambda": lamda / a_mean, "gamma": gamma, "lamda": lamda}
        on_progress(Progress("solving", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.gamma is not None and self.params.lamda is not None:
            return []
        spectrum = self._spectrum_of(train)
        x_mean, a_mean = spectrum.scales()
        # In the bases P and Q, every pair of the grid costs one thin product instead of a new W.
        features = validation.features.astype(np.float64) @ spectrum.x_vectors
        embeddings = validation.embeddings.astype(np.float64) @ spectrum.a_vectors
        names = [str(i) for i in range(len(embeddings))]
        history: History = []
        for i, gamma in enumerate(_GRID):
            for lamda in _GRID:
                core = spectrum.core(self.params.gamma or gamma * x_mean, self.params.lamda or lamda * a_mean)
                t1 = zsl_report(features @ (core @ embeddings.T), validation.labels, names).t1
                history.append({"relative_gamma": gamma, "relative_lambda": lamda, "validation_t1": t1})
            on_progress(
                Progress("choosing", i + 1, len(_GRID), {"validation_t1": max(e["validation_t1"] for e in history)})
            )
        return history

    def _spectrum_of(self, train: Rows) -> _Spectrum:
        """Decomposed once for `_try_settings` and the `_learn` with the same rows that follows it."""
        if self._solved is None or self._solved[0] is not train:
            self._solved = (train, _decompose(train))
        return self._solved[1]

    def _pick(self, tried: list[History]) -> Setting:
        t1 = np.mean([[entry["validation_t1"] for entry in history] for history in tried], axis=0)
        i, j = best_of_plateau(t1.reshape(len(_GRID), len(_GRID)))
        return {"relative_gamma": _GRID[i], "relative_lambda": _GRID[j]}

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        return np.asarray(features @ self._weight @ embeddings.T, np.float32)

    def _state(self) -> dict[str, FloatArray]:
        return {"weight": self._weight}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._weight = state["weight"]

    def _scaling_kind(self) -> Scaling:
        return self.params.normalize


def _decompose(train: Rows) -> _Spectrum:
    features = train.features.astype(np.float64)
    embeddings = train.embeddings.astype(np.float64)
    x_values, x_vectors = np.linalg.eigh(features.T @ features)
    _, a_roots, a_transposed = np.linalg.svd(embeddings, full_matrices=False)
    a_values, a_vectors = a_roots**2, a_transposed.T  # (K,), (embedding_dim, K) with K = min of both dims
    # X^T Y with Y = +-1: twice the sum of each class's rows minus the sum of all.
    sums = np.zeros((len(embeddings), features.shape[1]))
    np.add.at(sums, train.labels, features)
    signed = (2 * sums - sums.sum(axis=0)).T  # (feature_dim, n_classes)
    middle = (x_vectors.T @ signed) @ (embeddings @ a_vectors)
    # Rounding can leave eigenvalues a hair below zero.
    return _Spectrum(np.maximum(x_values, 0), x_vectors, a_values, a_vectors, middle)
