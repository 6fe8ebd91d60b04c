"""APN on global features: class scores from predicted attributes, which are also regressed onto the class's own.

Xu et al., "Attribute Prototype Network for Zero-Shot Learning" (NeurIPS 2020, https://arxiv.org/abs/2008.08290),
Eq. 1-3 with one position an image, v = V x:
    score(x, c) = v . phi(c)
    loss = CE(score) + regression_weight mean (v - phi(y_n))^2 + decorrelation_weight ||V||_F
The paper's attribute prototypes P read the feature map; with one position max_ij <F_ij, P_k> is <x, P_k>, and P would
share nothing with V that training could change, so here P is V. Its compactness loss is 0 at one position; its
decorrelation by attribute groups needs groups, and the code falls back on ||V||_F without them, as here.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from models.classifier_params import APNParams
from models.params import Params
from models.zero_shot.bilinear import BilinearModel


class APN(BilinearModel):
    """Attribute prediction and classification in one linear map; scores are v . phi(c)."""

    method: ClassVar[str] = "apn"
    params_class: ClassVar[type[Params]] = APNParams
    params: APNParams

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        params = self.params
        attributes = self.network(features)
        scores = attributes @ embeddings.T
        if params.double_softmax:
            scores = scores.softmax(dim=1)
        loss = functional.cross_entropy(scores, labels)
        if params.regression_weight:
            loss = loss + params.regression_weight * functional.mse_loss(attributes, embeddings[labels])
        if params.decorrelation_weight:
            loss = loss + params.decorrelation_weight * self.network.weight.norm()
        return loss
