"""SSE: classes and images as mixtures of seen classes, compared there.

Zhang and Saligrama, "Zero-Shot Learning via Semantic Similarity Embedding" (ICCV 2015,
https://arxiv.org/abs/1509.04767). A class is its mixture of seen classes s, by simplex coding of its embedding:
    z_y = argmin over a on the simplex of   gamma / 2 ||a||^2 + 1/2 ||phi(y) - sum_s a_s phi(s)||^2.
An image is its similarity with a model v_s of each seen class:
    pi_s(x) = w . psi(x, v_s),   psi = min(x, v_s) feature by feature (intersection),
and score(x, y) = sum_s pi_s(x) z_ys. w has a large margin on seen images:
    minimise lambda / 2 ||w||^2 + mean over images i, wrong seen classes y of max(0, 1 + score(i, y) - score(i, y_i)).
The paper's other psi, max(0, x - v_s) = x - min(x, v_s) (rectified), is the same model with -w: mixtures sum to 1, so
the term w . x is common to all classes.

Simplified from the paper: v_s stays the class's mean feature, where the paper starts (it goes on to alternate between v
and w, with a penalty on v); the second family of margins, between the means of classes, is left out; and w is found by
stochastic subgradients instead of a quadratic program. All settings of the grid learn from the same steps side by side,
for making psi is the costly part and it is theirs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from models.base import FloatArray, IntArray, OnProgress, Progress
from models.classic_params import SSEParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.scaling import Scaling

_GAMMAS = (1e-2, 1e-1, 1.0)
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_DEFAULT = {"gamma": 1.0, "relative_ridge": 1e-5}
_BATCH = 64
_CODING_STEPS, _CODING_TOLERANCE = 3000, 1e-9
_CHUNK = 1 << 22
"""Numbers of psi held at a time, 16 MiB."""


class SSE(ZeroShotModel):
    """gamma and lambda given, or chosen on validation classes."""

    method: ClassVar[str] = "sse"
    params_class: ClassVar[type[Params]] = SSEParams
    params: SSEParams

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        setting = setting or dict(_DEFAULT)
        self._gamma = self.params.gamma or setting["gamma"]
        self._seen, self._models = train.embeddings, class_means(train)
        scale = self._scale(train)
        ridge = self.params.lamda or setting["relative_ridge"] * scale
        codes = simplex_codes(self._seen, self._seen, self._gamma)
        self._weight = self._weights(train, [codes], [ridge], on_progress, "training")[:, 0].astype(np.float32)
        used = {"gamma": self._gamma, "relative_ridge": ridge / scale, "lamda": ridge}
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.gamma is not None and self.params.lamda is not None:
            return []
        self._models = class_means(train)
        scale = self._scale(train)
        gammas = _GAMMAS if self.params.gamma is None else (self.params.gamma,)
        relatives = _RIDGES if self.params.lamda is None else (_DEFAULT["relative_ridge"],)
        grid = [(gamma, relative) for gamma in gammas for relative in relatives]
        of_seen = {gamma: simplex_codes(train.embeddings, train.embeddings, gamma) for gamma in gammas}
        of_held = {gamma: simplex_codes(validation.embeddings, train.embeddings, gamma) for gamma in gammas}
        ridges = [self.params.lamda or relative * scale for _, relative in grid]
        weights = self._weights(train, [of_seen[gamma] for gamma, _ in grid], ridges, on_progress, "choosing")
        mixtures = self._similarities(validation.features, weights)  # (n_images, n_seen, n_settings)
        names = [str(i) for i in range(len(validation.embeddings))]
        history: History = []
        for i, (gamma, relative) in enumerate(grid):
            t1 = zsl_report(mixtures[:, :, i] @ of_held[gamma].T, validation.labels, names).t1
            history.append({"gamma": gamma, "relative_ridge": relative, "validation_t1": t1})
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return pick_on_grid(tried, ["gamma", "relative_ridge"])

    def _weights(
        self, train: Rows, codes: Sequence[FloatArray], ridges: Sequence[float], on_progress: OnProgress, phase: str
    ) -> FloatArray:
        """w for each pair of codes and ridge, (feature_dim, n_settings), by Pegasos with averaging.

        Shalev-Shwartz et al., "Pegasos" (ICML 2007): step 1 / (lambda t); the mean of the second half of the steps.
        """
        generator = np.random.default_rng(self.seed)
        n_images, dim = train.features.shape
        n_settings, steps = len(codes), self.params.steps
        stacked, each = np.stack(codes), np.asarray(ridges)  # (K, S, S), (K,)
        weight, total = np.zeros((dim, n_settings)), np.zeros((dim, n_settings))
        for step in range(1, steps + 1):
            rows = generator.choice(n_images, min(_BATCH, n_images), replace=False)
            psi = self._psi(train.features[rows])  # (B, S, D)
            flat = psi.reshape(-1, dim)
            pi = (flat @ weight.astype(np.float32)).reshape(*psi.shape[:2], n_settings)  # (B, S, K)
            slopes = margin_loss(pi.transpose(2, 0, 1), stacked, train.labels[rows])[1]  # (K, B, S)
            gradient = flat.T @ slopes.transpose(1, 2, 0).reshape(-1, n_settings).astype(np.float32)  # (D, K)
            weight = (1 - 1 / step) * weight - gradient / (each * step)
            if step > steps // 2:
                total += weight
            if step % 10 == 0 or step == steps:
                on_progress(Progress(phase, step, steps))
        return total / (steps - steps // 2)

    def _psi(self, features: FloatArray) -> FloatArray:
        """(n_images, n_seen, feature_dim)."""
        return np.minimum(features[:, None, :], self._models[None, :, :])

    def _similarities(self, features: FloatArray, weights: FloatArray) -> FloatArray:
        """pi, (n_images, n_seen, n_settings), of weights (feature_dim, n_settings)."""
        step = max(1, _CHUNK // self._models.size)
        parts = [self._psi(features[i : i + step]) @ weights for i in range(0, len(features), step)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self._models), weights.shape[1]), np.float32)

    def _scale(self, train: Rows) -> float:
        """Mean squared length of psi over a few images: what relative ridges multiply."""
        psi = self._psi(train.features[:: max(1, len(train.features) // _BATCH)])
        return float(np.square(psi, dtype=np.float64).sum(axis=2).mean()) or 1.0

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        codes = simplex_codes(embeddings, self._seen, self._gamma)
        return np.asarray(self._similarities(features, self._weight[:, None])[:, :, 0] @ codes.T, np.float32)

    def _state(self) -> dict[str, FloatArray]:
        gamma = np.array([self._gamma], np.float64)
        return {"weight": self._weight, "models": self._models, "seen": self._seen, "gamma": gamma}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._weight, self._models, self._seen = state["weight"], state["models"], state["seen"]
        self._gamma = float(state["gamma"][0])

    def _scaling_kind(self) -> Scaling:
        return self.params.normalize


def class_means(train: Rows) -> FloatArray:
    """(n_classes, feature_dim) float32."""
    sums = np.zeros((len(train.embeddings), train.features.shape[1]))
    np.add.at(sums, train.labels, train.features)
    counts = np.bincount(train.labels, minlength=len(sums))
    return np.asarray(sums / counts[:, None], np.float32)


def margin_loss(pi: FloatArray, codes: FloatArray, labels: IntArray) -> tuple[FloatArray, FloatArray]:
    """Mean hinge over images and wrong classes, and its slope by `pi`, for several settings at once.

    pi: (n_settings, n_images, n_seen); codes: (n_settings, n_seen, n_seen). Returns (n_settings,) and pi's shape.
    """
    scores = pi @ codes.transpose(0, 2, 1)  # (K, N, S)
    rows = np.arange(len(labels))
    short = 1 + scores - scores[:, rows, labels][:, :, None]
    short[:, rows, labels] = 0
    share = 1 / (len(labels) * (codes.shape[1] - 1))
    by_score = np.where(short > 0, share, 0.0)
    by_score[:, rows, labels] = -by_score.sum(axis=2)
    return np.maximum(short, 0).sum(axis=(1, 2)) * share, by_score @ codes


def simplex_codes(embeddings: FloatArray, seen: FloatArray, gamma: float) -> FloatArray:
    """z (n_classes, n_seen) float64, rows on the simplex, by accelerated projected gradient with restarts.

    A class's steps depend on no other class, so new classes leave the codes of the others as they are.
    """
    seen = seen.astype(np.float64)
    gram = seen @ seen.T + gamma * np.eye(len(seen))
    target = embeddings.astype(np.float64) @ seen.T
    rate = 1 / float(np.linalg.eigvalsh(gram)[-1])
    code = ahead = np.full(target.shape, 1 / len(seen))
    momentum = np.ones((len(target), 1))
    for _ in range(_CODING_STEPS):
        moved = project_to_simplex(ahead - rate * (ahead @ gram - target))
        if float(np.abs(moved - ahead).max(initial=0)) < _CODING_TOLERANCE:
            break
        # Where the last move points uphill, the momentum starts anew.
        back = np.einsum("cs,cs->c", ahead - moved, moved - code)[:, None] > 0
        momentum = np.where(back, 1.0, momentum)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = np.where(back, moved, moved + (momentum - 1) / following * (moved - code))
        code, momentum = moved, following
    return code


def project_to_simplex(points: FloatArray) -> FloatArray:
    """The nearest point with no negative coordinate and sum 1 to each row."""
    falling = -np.sort(-points, axis=1)
    excess = (np.cumsum(falling, axis=1) - 1) / np.arange(1, points.shape[1] + 1)
    last = np.sum(falling > excess, axis=1) - 1
    return np.asarray(np.maximum(points - excess[np.arange(len(points)), last][:, None], 0))
