"""TF-VAEGAN: f-VAEGAN-D2 with a decoder back to class embeddings, whose hidden units feed back and enhance features.

Narayan et al., "Latent Embedding Feedback and Discriminative Features for Zero-Shot Classification" (ECCV 2020,
https://arxiv.org/abs/2003.07833); the equations stand in `feedback.py`. The final classifier sees [x; Dec(x); h(x)]
of real and generated features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import OnProgress
from models.generative_params import TFVAEGANParams
from models.params import Params
from models.zero_shot.feedback import FeedbackVAEGAN, synthesise, train_with_feedback
from models.zero_shot.generative import GenerativeModel, noise_dim
from models.zero_shot.gradient import TrainingData


class TFVAEGAN(GenerativeModel):
    """Features from noise and class embedding, made in two passes with feedback from a semantic decoder."""

    method: ClassVar[str] = "tf_vaegan"
    params_class: ClassVar[type[Params]] = TFVAEGANParams
    params: TFVAEGANParams
    network: FeedbackVAEGAN

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        width = noise_dim(self.params, embedding_dim)
        return FeedbackVAEGAN(feature_dim, embedding_dim, width, self.params.hidden_dim, generator)

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        return synthesise(self.network, self.params, embeddings, generator)

    def _represent(self, features: Tensor) -> Tensor:
        return self.network.enhance(features, self.params.hidden_weight) if self.params.enhanced else features

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:  # noqa: ARG002 - one stage
        return train_with_feedback(self.network, self.params, data, self.seed)
