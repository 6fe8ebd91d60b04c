"""ALE: bilinear compatibility, learned by a ranking loss that weighs the top of the list most.

Akata et al., "Label-Embedding for Image Classification" (TPAMI 2016, https://arxiv.org/abs/1503.08677), Eq. 8-9, with
the WARP weights of Usunier et al. (2009) and Weston et al. (2011). For image n with label y_n, F = x^T W phi(y):
    hinge(y) = [margin + F(x_n, y) - F(x_n, y_n)]+ for y != y_n,   r = number of y with hinge(y) > 0
    loss = mean over n of (l_r / r) sum_y hinge(y),   l_r = 1 + 1/2 + ... + 1/r
The paper draws one violating class at a time to estimate r and the sum; over seen classes both are cheap exactly.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from models.classifier_params import ALEParams
from models.params import Params
from models.zero_shot.bilinear import BilinearModel, violations


class ALE(BilinearModel):
    """Weighted approximate ranking; scores are the compatibility."""

    method: ClassVar[str] = "ale"
    params_class: ClassVar[type[Params]] = ALEParams
    params: ALEParams

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        return ranking_loss(self._score(features, embeddings), labels, self.params.margin)


def ranking_loss(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The loss above for `scores` (B, C) and `labels` (B,); r is a count, so no gradient runs through the weights."""
    hinges = violations(scores, labels, margin)
    ranks = torch.arange(1, scores.shape[1], device=scores.device)
    weight = torch.cat([scores.new_zeros(1), (1 / ranks).cumsum(0) / ranks])  # (C,), l_r / r by r; 0 for r = 0
    return (weight[(hinges > 0).sum(dim=1)] * hinges.sum(dim=1)).mean()
