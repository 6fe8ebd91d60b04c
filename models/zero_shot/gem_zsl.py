"""GEM-ZSL on global features: scaled cosine between the projected image and the class embedding.

Liu et al., "Goal-Oriented Gaze Estimation for Zero-Shot Learning" (CVPR 2021, https://arxiv.org/abs/2103.03433), the
branch that its inference uses:
    score(x, c) = s cos(V^T x, phi(c)),   loss = cross-entropy of softmax(score) over seen classes
Its other losses (attribute regression, gaze, decorrelation) train the network below through attention over positions,
which features pooled to one vector do not have.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from models.classifier_params import GEMZSLParams
from models.params import Params
from models.zero_shot.bilinear import BilinearModel


class GEMZSL(BilinearModel):
    """Cosine softmax; scores are `scale` x cosine."""

    method: ClassVar[str] = "gem_zsl"
    params_class: ClassVar[type[Params]] = GEMZSLParams
    params: GEMZSLParams

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        return functional.cross_entropy(self._score(features, embeddings), labels)

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        projected = functional.normalize(self.network(features), dim=1)
        return self.params.scale * (projected @ functional.normalize(embeddings, dim=1).T)
