"""f-CLSWGAN: a conditional Wasserstein GAN that generates features, held to classes by a classification loss.

Xian et al., "Feature Generating Networks for Zero-Shot Learning" (CVPR 2018, https://arxiv.org/abs/1712.00981):
    min_G max_D  L_WGAN + beta L_CLS,  L_CLS = -E log P(y | G(z, a_y))                                   (Eq. 3, 4)
with P a softmax that was trained on real features of the seen classes. Networks as in the authors' code: one hidden
layer with leaky ReLU; G ends in ReLU where the features do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import OnProgress
from models.generative_params import FCLSWGANParams
from models.params import Params
from models.precision import full_precision
from models.zero_shot.final import train_softmax
from models.zero_shot.generative import Averages, Batches, GenerativeModel, draw, noise_dim
from models.zero_shot.gradient import TrainingData
from models.zero_shot.wgan import Adversary, adam, descend, perceptron_generator


class FCLSWGAN(GenerativeModel):
    """Features from noise and class embedding."""

    method: ClassVar[str] = "f_clswgan"
    params_class: ClassVar[type[Params]] = FCLSWGANParams
    params: FCLSWGANParams
    signed_scaling = "zscore"

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        return perceptron_generator(self.params, feature_dim, embedding_dim, generator, is_signed=self._is_signed)

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        noise = draw(len(embeddings), noise_dim(self.params, embeddings.shape[1]), generator)
        features: Tensor = self.network(torch.cat([noise, embeddings], dim=1))
        return features

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:  # noqa: ARG002 - quick
        params, chance = self.params, data.generator
        with full_precision(data.features.device):
            weight, bias = train_softmax(
                data.features,
                data.labels,
                len(data.embeddings),
                epochs=params.class_epochs,
                learning_rate=params.final_learning_rate,
                batch_size=params.batch_size,
                seed=self.seed,
            )
        adversary = Adversary(params, data.features.shape[1], data.embeddings.shape[1], self.seed, self.device)
        optimizer = adam(params, self.network)
        steps = Batches(len(data.features), params.batch_size, chance)
        data.run.resume(**adversary.parts(), optimizer=optimizer, steps=steps)
        while True:
            averages = Averages()
            for _ in range(params.steps_per_epoch):
                rows = adversary.keep_up(data, steps, self._generate, averages)
                embeddings = data.embeddings[data.labels[rows]]
                fake = self._generate(embeddings, chance)
                class_loss = functional.cross_entropy(fake @ weight.T + bias, data.labels[rows])
                loss = adversary.judge(fake, embeddings) + params.class_weight * class_loss
                descend(optimizer, loss)
                averages.add(loss=loss, class_loss=class_loss)
            yield averages.means()
