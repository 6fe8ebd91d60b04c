"""The conditional VAE whose decoder is a GAN's generator too, as f-VAEGAN-D2 and what builds on it share it.

Letters in trailing comments: B images of a step, D features, E embedding, Z noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.precision import full_precision
from models.zero_shot.generative import draw
from models.zero_shot.layers import perceptron


class VAEGAN(nn.Module):
    """Encoder q(z | x, a) and generator G(z, a)."""

    def __init__(
        self, feature_dim: int, embedding_dim: int, noise_dim: int, hidden_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.noise_dim = noise_dim

        def two_layers(n_in: int, n_out: int, output: nn.Module | None = None) -> nn.Sequential:
            dims = [n_in, hidden_dim, n_out]
            return perceptron(dims, generator, hidden=lambda: nn.LeakyReLU(0.2), output=output)

        self.encoder = two_layers(feature_dim + embedding_dim, 2 * noise_dim)
        self.decoder = two_layers(noise_dim + embedding_dim, feature_dim, nn.Sigmoid())

    def encode(self, features: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, (B, Z) each."""
        mean, log_variance = self.encoder(torch.cat([features, embeddings], dim=1)).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, noise: Tensor, embeddings: Tensor) -> Tensor:
        """G(z, a), (B, D)."""
        features: Tensor = self.decoder(torch.cat([noise, embeddings], dim=1))
        return features


def vae_terms(network: VAEGAN, real: Tensor, embeddings: Tensor, chance: torch.Generator) -> Tensor:
    """L_VAE: sums over dimensions, mean over the batch."""
    mean, log_variance = network.encode(real, embeddings)
    noise = draw(len(mean), mean.shape[1], chance)
    rebuilt = network(mean + (log_variance / 2).exp() * noise, embeddings)
    return missed(rebuilt, real) + kl_divergence(mean, log_variance).mean()


def missed(rebuilt: Tensor, real: Tensor) -> Tensor:
    """Binary cross-entropy of features in [0, 1], (B, D) each: sum over dimensions, mean over the batch."""
    with full_precision(real.device):  # torch refuses this loss in mixed precision
        # Of NaN, which a training that diverges makes, torch raises on a CPU and loses a GPU for the whole process.
        rebuilt = rebuilt.nan_to_num(nan=0.5)
        # Training features lie in [0, 1] but for rounding.
        return functional.binary_cross_entropy(rebuilt, real.clamp(0, 1), reduction="none").sum(dim=1).mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) of each row, (B,)."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1)
