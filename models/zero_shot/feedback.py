"""TF-VAEGAN's networks and steps, which SC-EGG's generator shares: semantic decoder, feedback, alternating training.

Narayan et al., "Latent Embedding Feedback and Discriminative Features for Zero-Shot Classification" (ECCV 2020,
https://arxiv.org/abs/2003.07833). Dec: features to class embedding; h: its hidden units; F: feedback module:
    x~ = sigmoid(W_2 (lrelu(W_1 [z; a]) + delta F(h(x~_0)))),  x~_0 = the same without feedback           (Section 3.3)
    L_R = E ||Dec(x) - a||_1 + E ||Dec(x~) - a||_1                                                        (Eq. 4)
    min_{E,G,F} max_D  L_VAE + gamma L_WGAN + beta L_R                                                    (Eq. 5)
Letters in trailing comments: B images of a step, D features, E embedding, H hidden, Z noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.generative_params import TFVAEGANParams
from models.zero_shot.generative import Averages, Batches, draw
from models.zero_shot.gradient import TrainingData
from models.zero_shot.layers import linear, perceptron
from models.zero_shot.vaegan import VAEGAN, kl_divergence, missed
from models.zero_shot.wgan import Adversary, adam, descend, descend_all, frozen

GeneratorLoss = Callable[[Tensor, Tensor], Tensor]
"""(generated features (B, D), labels (B,)) -> what a method adds to the generator's loss."""


class SemanticDecoder(nn.Module):
    """Features to class embeddings of unit length, through one hidden layer with leaky ReLU."""

    def __init__(self, feature_dim: int, embedding_dim: int, hidden_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = linear(feature_dim, hidden_dim, generator)
        self.last = linear(hidden_dim, embedding_dim, generator)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E) and hidden units (B, H)."""
        hidden = functional.leaky_relu(self.first(features), 0.2)
        return functional.normalize(self.last(hidden), dim=1), hidden


class FeedbackVAEGAN(nn.Module):
    """VAE and generator, decoder and feedback module."""

    def __init__(
        self, feature_dim: int, embedding_dim: int, noise_dim: int, hidden_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.vae = VAEGAN(feature_dim, embedding_dim, noise_dim, hidden_dim, generator)
        self.semantic = SemanticDecoder(feature_dim, embedding_dim, hidden_dim, generator)
        self.feedback = perceptron(
            [hidden_dim] * 3, generator, hidden=lambda: nn.LeakyReLU(0.2), output=nn.LeakyReLU(0.2)
        )

    def make(self, noise: Tensor, embeddings: Tensor, feedback_weight: float) -> Tensor:
        """Features (B, D) of noise (B, Z) and embeddings (B, E); a second pass with feedback if it weighs anything."""
        first, activation, last, output = self.vae.decoder
        before = activation(first(torch.cat([noise, embeddings], dim=1)))  # (B, H)
        features: Tensor = output(last(before))
        if feedback_weight:
            hidden = self.semantic(features)[1].detach()
            features = output(last(before + feedback_weight * self.feedback(hidden)))
        return features

    def enhance(self, features: Tensor, hidden_weight: float) -> Tensor:
        """[x; Dec(x); weight h(x)], (B, D + E + H)."""
        decoded, hidden = self.semantic(features)
        return torch.cat([features, decoded, hidden_weight * hidden], dim=1)


def reconstruction_loss(found: Tensor, embeddings: Tensor, kind: str) -> Tensor:
    """L_R of decoded and right embeddings (B, E): 'l1', or 'code', the authors' errors weighted by themselves."""
    errors = (found - embeddings).abs()
    if kind == "code":
        # Their weights e_k^2 / ||e|| are no constants: gradients flow through them.
        weighted = errors**3 / errors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        total: Tensor = weighted.sum(dim=1).mean()
        return total
    return errors.sum(dim=1).mean()


def synthesise(
    network: FeedbackVAEGAN, params: TFVAEGANParams, embeddings: Tensor, generator: torch.Generator
) -> Tensor:
    """Features (B, D) of embeddings (B, E) after training; a feedback module that was not trained has no say."""
    noise = draw(len(embeddings), network.vae.noise_dim, generator)
    return network.make(noise, embeddings, params.synthesis_feedback_weight if params.feedback_weight else 0.0)


def train_with_feedback(
    network: FeedbackVAEGAN,
    params: TFVAEGANParams,
    data: TrainingData,
    seed: int,
    extra_loss: GeneratorLoss | None = None,
) -> Iterator[dict[str, float]]:
    """Epochs without end: half of an epoch's steps without feedback, the others with it; losses after each."""
    chance, device = data.generator, data.features.device
    adversary = Adversary(params, data.features.shape[1], data.embeddings.shape[1], seed, str(device))
    of_vae, of_semantic = adam(params, network.vae), adam(params, network.semantic)
    of_feedback = torch.optim.Adam(
        network.feedback.parameters(),
        lr=params.feedback_learning_rate,
        betas=(0.5, 0.999),
        weight_decay=params.weight_decay,
        fused=True,
    )
    steps = Batches(len(data.features), params.batch_size, chance)
    data.run.resume(**adversary.parts(), vae=of_vae, semantic=of_semantic, feedback=of_feedback, steps=steps)
    half = params.steps_per_epoch // 2
    while True:
        averages = Averages()
        for weight, n_steps in ((0.0, half), (params.feedback_weight, params.steps_per_epoch - half)):
            optimizers = [of_vae, *([of_semantic] if params.train_decoder_on_fake else [])]
            optimizers += [of_feedback] if weight else []
            for _ in range(n_steps):
                for rows in islice(steps, params.critic_steps):
                    real, embeddings = data.features[rows], data.embeddings[data.labels[rows]]
                    decoded = reconstruction_loss(network.semantic(real)[0], embeddings, params.reconstruction)
                    descend(of_semantic, params.reconstruction_weight * decoded)
                    with torch.no_grad():
                        fake = network.make(draw(len(rows), network.vae.noise_dim, chance), embeddings, weight)
                    averages.add(distance=adversary.learn(real, fake, embeddings, chance))
                with ExitStack() as held:
                    if not params.train_decoder_on_fake:
                        held.enter_context(frozen(network.semantic))
                    loss, vae_loss, fake = _generator_loss(network, params, adversary, real, embeddings, weight, chance)
                    if extra_loss is not None:
                        loss = loss + extra_loss(fake, data.labels[rows])
                    descend_all(optimizers, loss)
                averages.add(loss=loss, vae_loss=vae_loss, decoded=decoded)
        yield averages.means()


def _generator_loss(
    network: FeedbackVAEGAN,
    params: TFVAEGANParams,
    adversary: Adversary,
    real: Tensor,
    embeddings: Tensor,
    weight: float,
    chance: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_VAE - gamma E D(x~, a) + beta L_R(x~); L_VAE alone; and x~."""
    mean, log_variance = network.vae.encode(real, embeddings)
    noise = mean + (log_variance / 2).exp() * draw(len(real), network.vae.noise_dim, chance)
    rebuilt = network.make(noise, embeddings, weight)
    vae_loss = missed(rebuilt, real) + kl_divergence(mean, log_variance).mean()
    fake = network.make(draw(len(real), network.vae.noise_dim, chance), embeddings, weight)
    decoded = reconstruction_loss(network.semantic(fake)[0], embeddings, params.reconstruction)
    loss = vae_loss + params.gan_weight * adversary.judge(fake, embeddings) + params.reconstruction_weight * decoded
    return loss, vae_loss, fake
