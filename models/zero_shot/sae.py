"""SAE: a linear autoencoder whose code is the class embedding, in closed form.

Kodirov, Xiang and Gong, "Semantic Autoencoder for Zero-Shot Learning" (CVPR 2017, https://arxiv.org/abs/1704.08345),
Eq. 4-8: minimise ||X - W^T M||_F^2 + lambda ||W X - M||_F^2, with X (feature_dim, n_images) and M (embedding_dim,
n_images) the embedding of each image's class. Its gradient is zero where the Sylvester equation
    (M M^T) W + W (lambda X X^T) = (1 + lambda) M X^T
holds. With M M^T = P diag(p) P^T and X X^T = Q diag(q) Q^T,
    W = P [(1 + lambda) (P^T M X^T Q)_ij / (p_i + lambda q_j)] Q^T,
so one pair of decompositions serves every lambda. Features are compared in the embedding space, cos(W x, phi(y)), or
embeddings in the feature space, cos(x, W^T phi(y)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.base import FloatArray, OnProgress, Progress
from models.classic_params import SAEParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.scaling import Scaling, unit_rows

_GRID = tuple(float(10.0**power) for power in range(-4, 5))
"""lambda relative to tr(M M^T) / tr(X X^T), which makes both terms weigh the same, whatever the scaling."""
_DEFAULT = 1.0
_DIRECTIONS = ("feature_to_semantic", "semantic_to_feature")


@dataclass(frozen=True)
class _Spectrum:
    """p (K,), P (embedding_dim, K), q (feature_dim,), Q (feature_dim, feature_dim), middle = P^T M X^T Q.

    K: the directions that the classes span; in all others M M^T and `middle` are zero, and so is W.
    """

    p: FloatArray
    p_vectors: FloatArray
    q: FloatArray
    q_vectors: FloatArray
    middle: FloatArray

    def core(self, lamda: float) -> FloatArray:
        """W in the bases P and Q, (K, feature_dim)."""
        return (1 + lamda) * self.middle / (self.p[:, None] + lamda * self.q[None, :])

    def balance(self) -> float:
        """tr(M M^T) / tr(X X^T)."""
        return float(self.p.sum() / self.q.sum()) if self.q.sum() > 0 else 1.0


class SAE(ZeroShotModel):
    """Closed form; lambda and the direction of prediction given, or chosen on validation classes."""

    method: ClassVar[str] = "sae"
    params_class: ClassVar[type[Params]] = SAEParams
    params: SAEParams
    _solved: tuple[Rows, _Spectrum] | None = None

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        spectrum = self._spectrum_of(train)
        self._solved = None  # as large as the features' covariance: not kept with the model
        given = self.params.direction
        setting = setting or {
            "relative_lambda": _DEFAULT,
            "semantic_to_feature": float(_DIRECTIONS.index(given or "semantic_to_feature")),
        }
        lamda = self.params.lamda or setting["relative_lambda"] * spectrum.balance()
        self._weight = np.asarray(spectrum.p_vectors @ spectrum.core(lamda) @ spectrum.q_vectors.T, np.float32)
        self._to_feature = setting["semantic_to_feature"] > 0
        used = {**setting, "relative_lambda": lamda / spectrum.balance(), "lamda": lamda}
        on_progress(Progress("solving", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.lamda is not None and self.params.direction is not None:
            return []
        spectrum = self._spectrum_of(train)
        # In the bases P and Q a lambda costs thin products instead of a new W; lengths and angles are the same there.
        features = validation.features.astype(np.float64) @ spectrum.q_vectors
        embeddings = validation.embeddings.astype(np.float64)
        names = [str(i) for i in range(len(embeddings))]
        grid = _GRID if self.params.lamda is None else (_DEFAULT,)
        history: History = []
        for i, relative in enumerate(grid):
            core = spectrum.core(self.params.lamda or relative * spectrum.balance())
            for direction in [self.params.direction] if self.params.direction else _DIRECTIONS:
                to_feature = direction == "semantic_to_feature"
                scores = _cosines(features, embeddings @ spectrum.p_vectors, core, to_feature=to_feature)
                t1 = zsl_report(scores, validation.labels, names).t1
                history.append(
                    {"relative_lambda": relative, "semantic_to_feature": float(to_feature), "validation_t1": t1}
                )
            best = max(entry["validation_t1"] for entry in history)
            on_progress(Progress("choosing", i + 1, len(grid), {"validation_t1": best}))
        return history

    def _pick(self, tried: list[History]) -> Setting:
        # The two directions are no neighbours: lambda is chosen for each, then the better of the two.
        best = []
        for direction in sorted({entry["semantic_to_feature"] for entry in tried[0]}):
            of_direction = [[e for e in history if e["semantic_to_feature"] == direction] for history in tried]
            relative = pick_on_grid(of_direction, ["relative_lambda"])["relative_lambda"]
            reached = [
                e["validation_t1"] for history in of_direction for e in history if e["relative_lambda"] == relative
            ]
            best.append((float(np.mean(reached)), direction, relative))
        _, direction, relative = max(best)  # equal: semantic to feature, usually the better
        return {"relative_lambda": relative, "semantic_to_feature": direction}

    def _spectrum_of(self, train: Rows) -> _Spectrum:
        """Decomposed once for `_try_settings` and the `_learn` with the same rows that follows it."""
        if self._solved is None or self._solved[0] is not train:
            self._solved = (train, _decompose(train))
        return self._solved[1]

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        return np.asarray(_cosines(features, embeddings, self._weight, to_feature=self._to_feature), np.float32)

    def _state(self) -> dict[str, FloatArray]:
        return {"weight": self._weight, "semantic_to_feature": np.array([self._to_feature], np.float32)}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._weight = state["weight"]
        self._to_feature = bool(state["semantic_to_feature"][0] > 0)

    def _scaling_kind(self) -> Scaling:
        return self.params.normalize


def _cosines(features: FloatArray, embeddings: FloatArray, weight: FloatArray, *, to_feature: bool) -> FloatArray:
    """cos(x, W^T phi(y)) or cos(W x, phi(y)), (n_images, n_classes), with W (embedding_dim, feature_dim).

    `embeddings` are unit rows, or such rows in a basis of the part of their space that W reaches: what lies outside
    does not change the ranking by cos(W x, phi(y)).
    """
    if to_feature:
        return unit_rows(features) @ unit_rows(embeddings @ weight).T
    return unit_rows(features @ weight.T) @ embeddings.T


def _decompose(train: Rows) -> _Spectrum:
    features = train.features.astype(np.float64)
    embeddings = train.embeddings.astype(np.float64)
    counts = np.bincount(train.labels, minlength=len(embeddings))
    # M M^T = sum_y n_y phi(y) phi(y)^T, and M X^T = sum_y phi(y) (sum of the class's rows)^T.
    _, roots, transposed = np.linalg.svd(np.sqrt(counts)[:, None] * embeddings, full_matrices=False)
    spans = roots > 1e-7 * roots.max()  # the rest is rounding, and would be divided by its square
    sums = np.zeros((len(embeddings), features.shape[1]))
    np.add.at(sums, train.labels, features)
    q, q_vectors = np.linalg.eigh(features.T @ features)
    p_vectors = transposed[spans].T
    middle = (p_vectors.T @ embeddings.T) @ (sums @ q_vectors)
    # Rounding can leave eigenvalues a hair below zero.
    return _Spectrum(roots[spans] ** 2, p_vectors, np.maximum(q, 0), q_vectors, middle)
