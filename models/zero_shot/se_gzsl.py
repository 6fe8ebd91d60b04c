"""SE-GZSL: a Wasserstein GAN whose generated features are classified by what classes' embeddings tell of them.

Kim, Shim and Shim, "Semantic Feature Extraction for Generalized Zero-Shot Learning" (AAAI 2022,
https://arxiv.org/abs/2112.14478). First image features are taken apart (see decomposition.py); then, with the semantic
encoder E_s and the compatibility W as they are, x~ = G(eps, a) and z~ = E_s(x~),
    L_G = L_WGAN + lambda_MI (-InfoNCE(z~, a)) + lambda_sim L_sim(z~ against the real z_s)           (Eq. 13-16)
and the final classifier sees E_s(x) of real and generated features (Eq. 17). A loss that the encoders go without
(table 3) is left out here too. Letters in trailing comments: B images of a step, R width of the semantic feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import OnProgress
from models.generative_params import SEGZSLParams
from models.params import Params
from models.zero_shot.decomposition import Decomposition, decompose, info_nce, similarity_loss
from models.zero_shot.generative import Averages, Batches, GenerativeModel, draw, noise_dim
from models.zero_shot.gradient import TrainingData
from models.zero_shot.wgan import Adversary, adam, descend, frozen, perceptron_generator


class SemanticGenerator(nn.Module):
    """The parts: encoders with decoder, and generator."""

    def __init__(self, decomposition: Decomposition, generator: nn.Module) -> None:
        super().__init__()
        self.decomposition, self.generator = decomposition, generator


class SEGZSL(GenerativeModel):
    """Features from noise and class embedding, recognised by their semantic part."""

    method: ClassVar[str] = "se_gzsl"
    params_class: ClassVar[type[Params]] = SEGZSLParams
    params: SEGZSLParams
    signed_scaling = "zscore"
    network: SemanticGenerator

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        params = self.params
        return SemanticGenerator(
            Decomposition(params, feature_dim, embedding_dim, generator),
            perceptron_generator(
                params, feature_dim, embedding_dim, generator, is_signed=self._is_signed, slope=params.slope
            ),
        )

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        noise = draw(len(embeddings), noise_dim(self.params, embeddings.shape[1]), generator)
        features: Tensor = self.network.generator(torch.cat([noise, embeddings], dim=1))
        return features

    def _represent(self, features: Tensor) -> Tensor:
        if self.params.representation == "image":
            return features
        semantic: Tensor = self.network.decomposition.semantic(features)
        return semantic

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        params, chance = self.params, data.generator
        if not data.run.history:  # else a checkpoint brings the encoders back
            decompose(params, self.network.decomposition, data, self.seed, on_progress)
        feature_dim, embedding_dim = data.features.shape[1], data.embeddings.shape[1]
        adversary = Adversary(params, feature_dim, embedding_dim, self.seed, self.device, slope=params.slope)
        optimizer = adam(params, self.network.generator)
        steps = Batches(len(data.features), params.batch_size, chance)
        data.run.resume(**adversary.parts(), optimizer=optimizer, steps=steps)
        while True:
            averages = Averages()
            for _ in range(params.steps_per_epoch):
                rows = adversary.keep_up(data, steps, self._generate, averages)
                embeddings = data.embeddings[data.labels[rows]]
                fake = self._generate(embeddings, chance)
                guidance = self._guidance(fake, data, rows)
                loss = adversary.judge(fake, embeddings) + torch.stack(list(guidance.values())).sum()
                descend(optimizer, loss)
                averages.add(loss=loss, **guidance)
            yield averages.means()

    def _guidance(self, fake: Tensor, data: TrainingData, rows: Tensor) -> dict[str, Tensor]:
        """Weighted losses of Eq. 14 and 15, of features (B, D) generated for the classes of images `rows`.

        Real semantic features are those of the step, not of all images: each generated one has its own among them.
        """
        params, network, labels = self.params, self.network.decomposition, data.labels[rows]
        terms = {"loss_mi": fake.new_zeros(()), "loss_sim": fake.new_zeros(())}
        with frozen(network):
            semantic = network.semantic(fake)  # (B, R)
            if params.use_information:
                told = info_nce(semantic, network.weight, labels, data.embeddings)
                terms["loss_mi"] = -params.generator_information_weight * told
            if params.use_similarity:
                real = network.semantic(data.features[rows])
                alike = similarity_loss(semantic, labels, real, labels)
                terms["loss_sim"] = params.generator_similarity_weight * alike
        return terms
