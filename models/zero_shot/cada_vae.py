"""CADA-VAE: two VAEs, of image features and of class embeddings, whose latent spaces are brought together.

Schönfeld et al., "Generalized Zero- and Few-Shot Learning via Aligned Variational Autoencoders" (CVPR 2019,
https://arxiv.org/abs/1812.01784), with v each of features x and embedding a, and w the other:
    L = sum_v |v - D_v(z_v)|_1 + beta KL(q(z | v) || N(0, I))                                               (VAE)
        + gamma sum_v |v - D_v(z_w)|_1 + delta sqrt(|mu_x - mu_a|^2 + |sigma_x - sigma_a|^2)                 (CA, DA)
The final classifier learns from draws, of q(z | x) for training images and of q(z | a) for classes without; an image to
be recognised is its mean mu_x. Losses are sums over dimensions; the authors sum over the batch too, which Adam does not
notice. Letters in trailing comments: B images of a step, D features, E embedding, L latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.base import OnProgress
from models.generative_params import CADAVAEParams
from models.params import Params
from models.zero_shot.final import RealRows
from models.zero_shot.folds import Rows
from models.zero_shot.generative import PART_ROWS, Averages, Batches, GenerativeModel, draw
from models.zero_shot.gradient import TrainingData
from models.zero_shot.layers import perceptron
from models.zero_shot.vaegan import kl_divergence
from models.zero_shot.wgan import descend

Gaussian = tuple[Tensor, Tensor]
"""Mean and log variance, (B, L) each."""


class AlignedVAEs(nn.Module):
    """Encoders and decoders of features and embeddings, one hidden layer each."""

    def __init__(
        self, feature_dim: int, embedding_dim: int, latent_dim: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        of_features, to_features, of_embeddings, to_embeddings = hidden
        self.feature_encoder = _network([feature_dim, of_features, 2 * latent_dim], generator)
        self.feature_decoder = _network([latent_dim, to_features, feature_dim], generator)
        self.embedding_encoder = _network([embedding_dim, of_embeddings, 2 * latent_dim], generator)
        self.embedding_decoder = _network([latent_dim, to_embeddings, embedding_dim], generator)

    def encode_features(self, features: Tensor) -> Gaussian:
        """q(z | x) of (B, D)."""
        mean, log_variance = self.feature_encoder(features).chunk(2, dim=1)
        return mean, log_variance

    def encode_embeddings(self, embeddings: Tensor) -> Gaussian:
        """q(z | a) of (B, E)."""
        mean, log_variance = self.embedding_encoder(embeddings).chunk(2, dim=1)
        return mean, log_variance


class CADAVAE(GenerativeModel):
    """Latents of images and classes in one space."""

    method: ClassVar[str] = "cada_vae"
    params_class: ClassVar[type[Params]] = CADAVAEParams
    params: CADAVAEParams
    signed_scaling = "centered"
    network: AlignedVAEs

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        hidden = self.params.hidden_dims or [self.params.hidden_dim] * 4
        return AlignedVAEs(feature_dim, embedding_dim, self.params.latent_dim, hidden, generator)

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        features: Tensor = self.network.feature_decoder(self._rows_of_classes(embeddings, generator))
        return features

    def _represent(self, features: Tensor) -> Tensor:
        return self.network.encode_features(features)[0]

    def _rows_of_classes(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        return sample(self.network.encode_embeddings(embeddings), generator, code_compat=self.params.code_compat)

    @torch.no_grad()
    def _real(self, train: Rows) -> RealRows:
        # Draws, as classes without images have them: means of a class lie so close together that they mislead.
        chance = torch.Generator(self.device).manual_seed(self.seed)
        labels = torch.from_numpy(train.labels).to(self.device)
        rows_of = [torch.nonzero(labels == c)[:, 0] for c in range(len(train.embeddings))]
        picked = torch.cat([_repeat(rows, self.params.seen_per_class or len(rows)) for rows in rows_of])
        parts = []
        for rows in torch.split(picked, PART_ROWS):
            features = torch.from_numpy(train.features[rows.cpu().numpy()]).to(self.device)
            parts.append(sample(self.network.encode_features(features), chance, code_compat=self.params.code_compat))
        return RealRows(torch.cat(parts), labels[picked], len(train.embeddings))

    def _first_stop(self) -> int:
        # Until then latents of images and classes have little to do with each other, and T1 is near chance.
        return math.ceil(self.params.epochs * max(self.params.cross_ramp[1], self.params.align_ramp[1]))

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:  # noqa: ARG002 - one stage
        params, network, chance = self.params, self.network, data.generator
        optimizer = torch.optim.Adam(
            network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, amsgrad=True, fused=True
        )
        steps = Batches(len(data.features), params.batch_size, chance)
        data.run.resume(optimizer=optimizer, steps=steps)
        epoch = len(data.run.history)
        while True:
            # Shares of the most epochs there can be, so that a refit for fewer goes the same way.
            weights = LossWeights.at(epoch / params.epochs, params)
            averages = Averages()
            for rows in islice(steps, params.steps_per_epoch):
                inputs = data.features[rows], data.embeddings[data.labels[rows]]
                terms = loss_terms(network, *inputs, chance, code_compat=params.code_compat)
                loss = weights.total(terms)
                descend(optimizer, loss)
                averages.add(loss=loss, **terms)
            epoch += 1
            yield averages.means()


@dataclass(frozen=True)
class LossWeights:
    """beta, gamma and delta at one moment of the training."""

    divergence: float
    crossed: float
    distance: float

    @classmethod
    def at(cls, share: float, params: CADAVAEParams) -> LossWeights:
        """At `share` of the longest training: each weight grows along its ramp, linearly, from 0 to its full size."""
        return cls(
            ramp(share, params.kl_ramp) * params.kl_weight,
            ramp(share, params.cross_ramp) * params.cross_weight,
            ramp(share, params.align_ramp) * params.align_weight,
        )

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss of its terms."""
        return (
            terms["rebuilt"]
            + self.divergence * terms["divergence"]
            + self.crossed * terms["crossed"]
            + self.distance * terms["distance"]
        )


def loss_terms(
    network: AlignedVAEs, features: Tensor, embeddings: Tensor, generator: torch.Generator, *, code_compat: bool = False
) -> dict[str, Tensor]:
    """Each part of the loss without its weight, of (B, D) and (B, E): sums over dimensions, means over the batch."""
    of_features, of_embeddings = network.encode_features(features), network.encode_embeddings(embeddings)
    from_features = sample(of_features, generator, code_compat=code_compat)  # (B, L)
    from_embeddings = sample(of_embeddings, generator, code_compat=code_compat)
    # Once through each decoder: with few rows a step, reading the weights is most of the work.
    latents = torch.cat([from_features, from_embeddings])  # (2 B, L)
    features_rebuilt, features_crossed = network.feature_decoder(latents).chunk(2)
    embeddings_crossed, embeddings_rebuilt = network.embedding_decoder(latents).chunk(2)
    return {
        "rebuilt": _missed(features, features_rebuilt) + _missed(embeddings, embeddings_rebuilt),
        "divergence": kl_divergence(*of_features).mean() + kl_divergence(*of_embeddings).mean(),
        "crossed": _missed(features, features_crossed) + _missed(embeddings, embeddings_crossed),
        "distance": distribution_distance(of_features, of_embeddings).mean(),
    }


def distribution_distance(one: Gaussian, other: Gaussian) -> Tensor:
    """2-Wasserstein distance (B,) of Gaussians with diagonal covariances."""
    (mean, log_variance), (other_mean, other_log_variance) = one, other
    deviations = (log_variance / 2).exp() - (other_log_variance / 2).exp()  # (B, L)
    # Without the small number equal Gaussians would have a distance without derivative.
    return ((mean - other_mean).square().sum(dim=1) + deviations.square().sum(dim=1) + 1e-12).sqrt()


def sample(gaussian: Gaussian, generator: torch.Generator, *, code_compat: bool = False) -> Tensor:
    """A draw (B, L) of each row's Gaussian.

    code_compat: as the authors' code draws: exp(log variance) for the deviation, one number a row for all dimensions.
    """
    mean, log_variance = gaussian
    noise = draw(len(mean), 1 if code_compat else mean.shape[1], generator)
    return mean + (log_variance if code_compat else log_variance / 2).exp() * noise


def ramp(share: float, between: tuple[float, float]) -> float:
    """0 before `between`, 1 after, linear inside."""
    start, end = between
    return min(max((share - start) / (end - start), 0.0), 1.0) if end > start else float(share >= start)


def _missed(wanted: Tensor, rebuilt: Tensor) -> Tensor:
    """L1 distance, summed over dimensions, mean over the batch."""
    return (wanted - rebuilt).abs().sum(dim=1).mean()


def _network(dims: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Weights as the authors start them: Xavier's uniform ones at half size, no bias."""
    network = perceptron(dims, generator)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=0.5, generator=generator)
            nn.init.zeros_(layer.bias)
    return network


def _repeat(rows: Tensor, n: int) -> Tensor:
    """`n` of `rows`: all of them over and over until there are enough."""
    return rows.repeat(-(-n // len(rows)))[:n]
