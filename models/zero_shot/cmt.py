"""CMT: images regressed onto class embeddings through one tanh layer, and the nearest class taken.

Socher et al., "Zero-Shot Learning Through Cross-Modal Transfer" (NeurIPS 2013, https://arxiv.org/abs/1301.3666):
    z(x) = T1 tanh(T2 x)   (with biases here),   loss = mean over images of ||phi(y_n) - z(x_n)||^2        (Eq. 1)
    score(x, c) = -||phi(c) - z(x)||^2
CMT*, with `novelty`: an image is novel where it is unlikely for every seen class (section 4.2),
    N(z(x); phi(s), sigma_s^2 I) < T_s for all s,
T_s so low that only a chosen share of the class's own training images falls below it. Novel images go to classes that
are not seen, others to seen ones. A class counts as seen where its embedding is that of a training class.
Letters in trailing comments: B images of a step, C classes, S seen classes, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.base import FloatArray
from models.classifier_params import CMTParams
from models.params import Params
from models.zero_shot.base import Setting
from models.zero_shot.folds import Rows
from models.zero_shot.gradient import BatchModel
from models.zero_shot.layers import linear

SAME = 1 - 1e-6
"""Cosine from which two unit embeddings are one; float32 rounding stays far below the difference."""


class CMT(BatchModel):
    """Two-layer regression; scores are minus the squared distance, parted by novelty if the parameters ask for it."""

    method: ClassVar[str] = "cmt"
    params_class: ClassVar[type[Params]] = CMTParams
    params: CMTParams
    _seen: Mapping[str, Tensor] | None = None

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        hidden = self.params.hidden_dim
        return nn.Sequential(
            linear(feature_dim, hidden, generator), nn.Tanh(), linear(hidden, embedding_dim, generator)
        )

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss: Tensor = (embeddings[labels] - self.network(features)).square().sum(dim=1).mean()
        return loss

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        mapped = self.network(features)  # (B, E)
        scores: Tensor = -squared_distances(mapped, embeddings)
        if self._seen is None:
            return scores
        is_seen = (embeddings @ self._seen["embeddings"].T).amax(dim=1) > SAME  # (C,)
        is_novel = (self._log_density(mapped) < self._seen["threshold"]).all(dim=1)  # (B,)
        # Distances of one image to two unit vectors differ by at most 4 ||z||: enough to part the two sides.
        gap = 4 * mapped.norm(dim=1) + 1
        apart: Tensor = scores - gap[:, None] * (is_novel[:, None] == is_seen)
        return apart

    def _settle(self, train: Rows, setting: Setting | None) -> None:  # noqa: ARG002 - the network says it all
        self._seen = None
        if self.params.novelty:
            self._fit_novelty(train)

    def _fit_novelty(self, train: Rows) -> None:
        """sigma_s^2: the mean square about phi(s), a dimension; T_s: a quantile of the class's own log-densities."""
        embeddings = torch.from_numpy(train.embeddings).to(self.device)
        labels = torch.from_numpy(train.labels).to(self.device)
        with torch.no_grad():
            mapped = self.network(torch.from_numpy(train.features).to(self.device))
            own = (mapped - embeddings[labels]).square().mean(dim=1)  # (N,)
            count = torch.bincount(labels, minlength=len(embeddings))
            variance = torch.zeros(len(embeddings), device=self.device).index_add(0, labels, own) / count
            self._seen = {"embeddings": embeddings, "variance": variance.clamp(min=1e-12)}
            density = self._log_density(mapped).gather(1, labels[:, None])[:, 0]
            thresholds = [density[labels == s].quantile(self.params.novelty_share) for s in range(len(embeddings))]
        self._seen = {**self._seen, "threshold": torch.stack(thresholds)}

    def _log_density(self, mapped: Tensor) -> Tensor:
        """log N(z; phi(s), sigma_s^2 I) of each image (B, E) for each seen class, (B, S)."""
        assert self._seen is not None
        variance = self._seen["variance"]
        spread = mapped.shape[1] / 2 * (2 * np.pi * variance).log()
        return -squared_distances(mapped, self._seen["embeddings"]) / (2 * variance) - spread

    def _state(self) -> dict[str, FloatArray]:
        seen = {f"seen_{name}": tensor.cpu().numpy() for name, tensor in (self._seen or {}).items()}
        return {**super()._state(), **seen}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        super()._restore(state)
        names = ("embeddings", "variance", "threshold") if self.params.novelty else ()
        seen = {name: torch.from_numpy(state[f"seen_{name}"]).to(self.device) for name in names}
        self._seen = seen or None


def squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """||row - other||^2 of every pair, (n_rows, n_others), without a (n_rows, n_others, dim) array."""
    squares = rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    return squares - 2 * rows @ others.T
