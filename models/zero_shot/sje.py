"""SJE: score(x, y) = (x W + b) . phi(y), learned by gradient descent.

Akata et al., "Evaluation of Output Embeddings for Fine-Grained Image Classification" (CVPR 2015,
https://arxiv.org/abs/1409.8403), Eq. 1-4, with the losses in use since: the original structured hinge; the
cross-entropy; and, as in the code of VGSE (CVPR 2022), the cross-entropy of probabilities, that is a second softmax.
Letters in trailing comments: B images of a step, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classifier_params import SJEParams
from models.params import Params
from models.zero_shot.bilinear import Bilinear, BilinearModel


class SJE(BilinearModel):
    """Bilinear compatibility. Scores are `scale` x compatibility; after double_softmax training too."""

    method: ClassVar[str] = "sje"
    params_class: ClassVar[type[Params]] = SJEParams
    params: SJEParams

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        return Bilinear(feature_dim, embedding_dim, generator, bias=True)

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        loss = compatibility_loss(self._score(features, embeddings), labels, self.params.loss)
        if self.params.weight_penalty:
            loss = loss + self.params.weight_penalty * self.network.weight.norm()
        return loss

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return self.params.scale * super()._score(features, embeddings)


def compatibility_loss(scores: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean loss of `scores` (B, C) for `labels` (B,): 'ce', 'double_softmax' or 'hinge'."""
    if kind == "hinge":
        right = scores.gather(1, labels[:, None])
        margins = scores - right + 1  # (B, C); Delta(y, y') = 1 for every wrong class
        margins = margins.scatter(1, labels[:, None], 0.0)  # Delta(y, y) = 0, so the maximum is never negative
        return margins.amax(dim=1).mean()
    if kind == "double_softmax":
        scores = scores.softmax(dim=1)
    return functional.cross_entropy(scores, labels)
