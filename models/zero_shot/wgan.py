"""The conditional Wasserstein GAN that feature generators share: generator, critic, gradient penalty, steps in turn.

Xian et al., "Feature Generating Networks for Zero-Shot Learning" (CVPR 2018, https://arxiv.org/abs/1712.00981), Eq. 1:
    min_G max_D  E D(x, a) - E D(x~, a) - lambda E (||grad_x^ D(x^, a)||_2 - 1)^2,  x~ = G(z, a),
with x^ between x and x~ at random. Weights start as torch's layers do: the authors' N(0, 0.02) fits layers of 4096 and
starves narrow ones. Letters in trailing comments: B images of a step, D features, E embedding, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.generative_params import GANParams
from models.precision import full_precision
from models.zero_shot.checkpoints import Stateful
from models.zero_shot.generative import Averages, noise_dim
from models.zero_shot.gradient import TrainingData
from models.zero_shot.layers import linear, perceptron

Make = Callable[[Tensor, torch.Generator], Tensor]
"""(embeddings (B, E), chance) -> generated features (B, D)."""


def perceptron_generator(
    params: GANParams,
    feature_dim: int,
    embedding_dim: int,
    generator: torch.Generator,
    *,
    is_signed: bool,
    slope: float = 0.2,
) -> nn.Sequential:
    """G: [z; a] to features through one hidden layer with leaky ReLU; weights from `generator`.

    It ends in ReLU where no scaled feature is negative; is_signed: whether one is before it is scaled.
    """
    is_positive = params.normalize == "minmax" or (params.normalize == "none" and not is_signed)
    return perceptron(
        [noise_dim(params, embedding_dim) + embedding_dim, params.hidden_dim, feature_dim],
        generator,
        hidden=lambda: nn.LeakyReLU(slope),
        output=nn.ReLU() if is_positive else None,
    )


class Critic(nn.Module):
    """D(x, a): features and class embedding, one hidden layer with leaky ReLU, one number."""

    def __init__(
        self, feature_dim: int, embedding_dim: int, hidden_dim: int, generator: torch.Generator, *, slope: float = 0.2
    ) -> None:
        super().__init__()
        self.feature_dim, self.slope = feature_dim, slope
        self.hidden = linear(feature_dim + embedding_dim, hidden_dim, generator)
        self.output = linear(hidden_dim, 1, generator)

    def forward(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """(B,) of (B, D) and (B, E)."""
        return self._after(self._before(features, embeddings))

    def compare(
        self, real: Tensor, fake: Tensor, embeddings: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """E D(x, a) - E D(x~, a) of `real` and `fake`, (B, D) each, and the gradient penalty between them.

        The penalty is the mean of (||grad_x D(x^, a)||_2 - 1)^2, in closed form: grad_x D = W_x^T (w * slope at the
        hidden units), and the slopes, being constant nearly everywhere, have no gradient themselves. Hidden units see
        between two points what lies between what they see at these. Same numbers as a second pass of autograd.
        """
        of_real, of_fake = self._before(real, embeddings), self._before(fake, embeddings)  # (B, H)
        distance = self._after(of_real).mean() - self._after(of_fake).mean()
        share = torch.rand(len(real), 1, generator=generator, device=real.device)
        with full_precision(real.device):
            with torch.no_grad():
                is_positive = share * of_real + (1 - share) * of_fake > 0
            slopes = torch.where(is_positive, 1.0, self.slope) * self.output.weight[0]
            gradient = slopes @ self.hidden.weight[:, : self.feature_dim]  # (B, D)
            # Without the small number a gradient of 0 would have a norm without derivative.
            penalty: Tensor = ((gradient.square().sum(dim=1) + 1e-12).sqrt() - 1).square().mean()
        return distance, penalty

    def _before(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Input of the hidden units, (B, H)."""
        before: Tensor = self.hidden(torch.cat([features, embeddings], dim=1))
        return before

    def _after(self, before: Tensor) -> Tensor:
        """Output (B,)."""
        value: Tensor = self.output(functional.leaky_relu(before, self.slope))[:, 0]
        return value


class Adversary:
    """A critic with its optimizer."""

    def __init__(
        self, params: GANParams, feature_dim: int, embedding_dim: int, seed: int, device: str, *, slope: float = 0.2
    ) -> None:
        weights = torch.Generator().manual_seed(seed + 1)  # others than the generator's
        self.critic = Critic(feature_dim, embedding_dim, params.hidden_dim, weights, slope=slope).to(device)
        self._penalty_weight, self._critic_steps = params.penalty_weight, params.critic_steps
        self._optimizer = adam(params, self.critic)

    def learn(self, real: Tensor, fake: Tensor, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """One step; its estimate of the Wasserstein distance."""
        distance, penalty = self.critic.compare(real, fake, embeddings, generator)
        descend(self._optimizer, self._penalty_weight * penalty - distance)
        return distance.detach()

    def keep_up(self, data: TrainingData, steps: Iterator[Tensor], make: Make, averages: Averages) -> Tensor:
        """Its steps for one of the generator, which makes the features without learning; the rows of the last."""
        for rows in islice(steps, self._critic_steps):
            embeddings = data.embeddings[data.labels[rows]]
            with torch.no_grad():
                fake = make(embeddings, data.generator)
            averages.add(distance=self.learn(data.features[rows], fake, embeddings, data.generator))
        return rows

    def parts(self) -> dict[str, Stateful]:
        """What it learns."""
        return {"critic": self.critic, "of_critic": self._optimizer}

    def judge(self, fake: Tensor, embeddings: Tensor) -> Tensor:
        """What a generator minimises: -E D(x~, a). The critic's own weights get no gradient."""
        with frozen(self.critic):
            judged: Tensor = -self.critic(fake, embeddings).mean()
        return judged


def adam(params: GANParams, *networks: nn.Module) -> torch.optim.Adam:
    """The optimizer of the networks' weights."""
    weights = [weight for network in networks for weight in network.parameters()]
    return torch.optim.Adam(
        weights, lr=params.learning_rate, betas=(0.5, 0.999), weight_decay=params.weight_decay, fused=True
    )


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the loss."""
    descend_all([optimizer], loss)


def descend_all(optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
    """One step of each optimizer down the loss; gradients have the precision of what they are gradients of."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    with full_precision(loss.device):
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    for optimizer in optimizers:
        optimizer.step()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Leaves the network's weights out of the gradients of what is computed inside; its inputs keep theirs."""
    for weight in network.parameters():
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in network.parameters():
            weight.requires_grad_(True)
