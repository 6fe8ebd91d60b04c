"""LATEM: several bilinear maps, of which each image and class use the one that fits them best.

Xian et al., "Latent Embeddings for Zero-shot Classification" (CVPR 2016, https://arxiv.org/abs/1603.08895), Eq. 2-3:
    F(x, y) = max_{1 <= i <= K} x^T W_i phi(y)
    loss = mean over images of sum_{y != y_n} [margin + F(x_n, y) - F(x_n, y_n)]+
The paper takes one random wrong class a step; here every one. Its pruning of rarely used maps is left out: K is a
parameter. Letters in trailing comments: B images of a step, C classes, D features, E embedding, K maps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.classifier_params import LATEMParams
from models.params import Params
from models.zero_shot.bilinear import INITIAL_WEIGHT, violations
from models.zero_shot.gradient import BatchModel


class LatentMaps(nn.Module):
    """x W_i phi(y) of every map, (K, B, C)."""

    def __init__(self, n_maps: int, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        # The maps must start apart: equal ones would stay equal.
        weight = torch.randn(n_maps, feature_dim, embedding_dim, generator=generator) * INITIAL_WEIGHT
        self.weight = nn.Parameter(weight)  # (K, D, E)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return (features @ self.weight @ embeddings.T).float()  # in mixed precision too: losses add them up


class LATEM(BatchModel):
    """Piecewise-linear compatibility; scores are F."""

    method: ClassVar[str] = "latem"
    params_class: ClassVar[type[Params]] = LATEMParams
    params: LATEMParams
    network: LatentMaps

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        return LatentMaps(self.params.n_maps, feature_dim, embedding_dim, generator)

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        return violations(self._score(features, embeddings), labels, self.params.margin).sum(dim=1).mean()

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        best: Tensor = self.network(features, embeddings).max(dim=0).values  # the gradient goes to the best map alone
        return best
