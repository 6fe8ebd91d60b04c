"""The bilinear compatibility x^T W phi(y) that SJE, ALE, DeViSE and the feature-only APN share, and its losses' terms.

Letters in trailing comments: B images of a step, C classes, D features, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.zero_shot.gradient import BatchModel

INITIAL_WEIGHT = 0.02
"""Standard deviation of W's start, as in VGSE's code."""


class Bilinear(nn.Module):
    """x W + b, (B, E); `bias` None where there is none."""

    def __init__(self, feature_dim: int, embedding_dim: int, generator: torch.Generator, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(feature_dim, embedding_dim, generator=generator) * INITIAL_WEIGHT)
        self.bias = nn.Parameter(torch.zeros(embedding_dim)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        projected = (features @ self.weight).float()  # in mixed precision too: losses add up what follows
        return projected if self.bias is None else projected + self.bias


class BilinearModel(BatchModel):
    """score(x, y) = x^T W phi(y); a method adds its loss."""

    network: Bilinear

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        return Bilinear(feature_dim, embedding_dim, generator)

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        scores: Tensor = self.network(features) @ embeddings.T
        return scores.float()


def violations(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """[margin + F(x, y) - F(x, y_n)]+ of every wrong class y, and 0 for the right one, (B, C)."""
    right = scores.gather(1, labels[:, None])
    return (scores - right + margin).clamp(min=0).scatter(1, labels[:, None], 0.0)
