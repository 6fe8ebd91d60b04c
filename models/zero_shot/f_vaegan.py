"""f-VAEGAN-D2, inductive: a VAE and a Wasserstein GAN that share the network which makes features.

Xian et al., "f-VAEGAN-D2: A Feature Generating Framework for Any-Shot Learning" (CVPR 2019,
https://arxiv.org/abs/1903.10132), without D2, which needs images of unseen classes:
    L_VAE = KL(q(z | x, a) || N(0, I)) - E log p(x | z, a),    min_{E,G} max_D  L_VAE + gamma L_WGAN
with log p the binary cross-entropy of features in [0, 1], summed over dimensions; G ends in a sigmoid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import OnProgress
from models.generative_params import FVAEGANParams
from models.params import Params
from models.zero_shot.generative import Averages, Batches, GenerativeModel, draw, noise_dim
from models.zero_shot.gradient import TrainingData
from models.zero_shot.vaegan import VAEGAN, vae_terms
from models.zero_shot.wgan import Adversary, adam, descend


class FVAEGAN(GenerativeModel):
    """Features from noise and class embedding, by a decoder that is a GAN's generator too."""

    method: ClassVar[str] = "f_vaegan"
    params_class: ClassVar[type[Params]] = FVAEGANParams
    params: FVAEGANParams
    network: VAEGAN

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        width = noise_dim(self.params, embedding_dim)
        return VAEGAN(feature_dim, embedding_dim, width, self.params.hidden_dim, generator)

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        features: Tensor = self.network(draw(len(embeddings), self.network.noise_dim, generator), embeddings)
        return features

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:  # noqa: ARG002 - one stage
        params, network, chance = self.params, self.network, data.generator
        adversary = Adversary(params, data.features.shape[1], data.embeddings.shape[1], self.seed, self.device)
        optimizer = adam(params, network)
        steps = Batches(len(data.features), params.batch_size, chance)
        data.run.resume(**adversary.parts(), optimizer=optimizer, steps=steps)
        while True:
            averages = Averages()
            for _ in range(params.steps_per_epoch):
                rows = adversary.keep_up(data, steps, self._generate, averages)
                embeddings = data.embeddings[data.labels[rows]]
                vae_loss = vae_terms(network, data.features[rows], embeddings, chance)
                judged = adversary.judge(self._generate(embeddings, chance), embeddings)
                loss = vae_loss + params.gan_weight * judged
                descend(optimizer, loss)
                averages.add(loss=loss, vae_loss=vae_loss)
            yield averages.means()
