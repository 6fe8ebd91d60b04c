"""DeViSE: bilinear compatibility, learned by the sum of hinges over all wrong classes.

Frome et al., "DeViSE: A Deep Visual-Semantic Embedding Model" (NeurIPS 2013,
https://papers.nips.cc/paper/5204-devise-a-deep-visual-semantic-embedding-model), Eq. 1, on image features as they are
(the paper goes on to fine-tune the network below them):
    loss = mean over images of sum_{y != y_n} [margin - F(x_n, y_n) + F(x_n, y)]+,   F = x^T W phi(y)
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from models.classifier_params import DeViSEParams
from models.params import Params
from models.zero_shot.bilinear import BilinearModel, violations


class DeViSE(BilinearModel):
    """Sum of hinges; scores are the compatibility."""

    method: ClassVar[str] = "devise"
    params_class: ClassVar[type[Params]] = DeViSEParams
    params: DeViSEParams

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        return violations(self._score(features, embeddings), labels, self.params.margin).sum(dim=1).mean()
