"""Image features taken apart into what classes' embeddings tell and the rest, as SE-GZSL does it.

Kim, Shim and Shim, "Semantic Feature Extraction for Generalized Zero-Shot Learning" (AAAI 2022,
https://arxiv.org/abs/2112.14478): z_s = E_s(x), z_r = E_r(x), x^ = Dec(z_s, z_r), trained by
    L_total = L_recon + L_MI + lambda_sim L_sim,  L_recon = E |x - x^|^2                                (Eq. 11, 12)
    L_MI = -lambda_s InfoNCE(z_s, a) + lambda_r CLUB(z_r, a)                                            (Eq. 6, 7)
Between the steps a network q(a | z_r) learns to guess embeddings from z_r, which CLUB needs (Cheng et al., ICML 2020,
https://arxiv.org/abs/2006.12013). Letters in trailing comments: B images of a step, A other images, C classes,
D features, E embedding, R width of z_s and of z_r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import OnProgress, Progress
from models.generative_params import SEGZSLParams
from models.precision import full_precision
from models.zero_shot.epochs import refuse_divergence
from models.zero_shot.generative import Averages
from models.zero_shot.gradient import TrainingData
from models.zero_shot.layers import linear, perceptron
from models.zero_shot.wgan import descend, frozen


class Decomposition(nn.Module):
    """Semantic and residual encoder, decoder, and W of the compatibility z_s^T W a; one hidden layer each."""

    def __init__(self, params: SEGZSLParams, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        width, hidden_dim = params.semantic_dim, params.hidden_dim

        def two_layers(n_in: int, n_out: int) -> nn.Sequential:
            return perceptron([n_in, hidden_dim, n_out], generator, hidden=lambda: nn.LeakyReLU(params.slope))

        self.semantic = two_layers(feature_dim, width)
        self.residual = two_layers(feature_dim, width) if params.residual_encoder else None
        self.decoder = two_layers(2 * width if params.residual_encoder else width, feature_dim)
        self.weight = linear(embedding_dim, width, generator).weight  # W, (R, E)

    def rebuild(self, semantic: Tensor, residual: Tensor | None) -> Tensor:
        """x^, (B, D), of z_s and z_r, (B, R) each."""
        parts = [semantic] if residual is None else [semantic, residual]
        features: Tensor = self.decoder(torch.cat(parts, dim=1))
        return features


class Guess(nn.Module):
    """q(a | z_r): a Gaussian with diagonal covariance, by two hidden layers.

    Embeddings are brought to mean 0 and variance 1 over the seen classes first, one scale for all dimensions: the tanh
    that keeps log variances in (-1, 1), as in CLUB's code, would not reach the small numbers of unit vectors.
    """

    def __init__(self, width: int, hidden_dim: int, embeddings: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.network = perceptron([width, hidden_dim, hidden_dim, 2 * embeddings.shape[1]], generator)
        self.mean = embeddings.mean(dim=0)
        self.scale = (embeddings - self.mean).square().mean().sqrt().clamp(min=1e-6)

    def log_likelihood(self, residual: Tensor, embeddings: Tensor) -> Tensor:
        """log q(a_c | z_r), but for a constant, (B, C) of z_r (B, R) and embeddings (C, E)."""
        mean, log_variance = self.network(residual).chunk(2, dim=1)  # (B, E)
        log_variance = log_variance.tanh()
        wanted = (embeddings - self.mean) / self.scale  # (C, E)
        precision = (-log_variance).exp()
        with full_precision(residual.device):  # differences of large numbers follow
            # |a - mu|^2 / sigma^2, multiplied out: no (B, C, E) in memory.
            missed = precision @ wanted.square().T - 2 * (precision * mean) @ wanted.T  # (B, C)
        own = (precision * mean.square() + log_variance).sum(dim=1, keepdim=True)
        likelihood: Tensor = -0.5 * (missed + own)
        return likelihood


def info_nce(semantic: Tensor, weight: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """InfoNCE of z_s (B, R) and the embeddings (C, E) of its classes (B,): log C less the cross-entropy (Eq. 7)."""
    with full_precision(semantic.device):
        scores = semantic @ (weight @ embeddings.T)  # (B, C)
    return math.log(len(embeddings)) - functional.cross_entropy(scores, labels)


def club(guess: Guess, residual: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """CLUB of z_r (B, R) and the embeddings (C, E) of its classes (B,): own less mean log likelihood (Eq. 7)."""
    likelihood = guess.log_likelihood(residual, embeddings)  # (B, C)
    return (likelihood.gather(1, labels[:, None])[:, 0] - likelihood.mean(dim=1)).mean()


def similarity_loss(semantic: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> Tensor:
    """-E log of the share that rows of the own class have in the sum of exp(cosine) (Eq. 10 and 15).

    Of z_s (B, R) against `others` (A, R); Eq. 10 has all rows against all, each against itself too.
    """
    with full_precision(semantic.device):
        cosines = functional.normalize(semantic, dim=1) @ functional.normalize(others, dim=1).T  # (B, A)
    is_own = labels[:, None] == other_labels
    own = cosines.masked_fill(~is_own, -torch.inf).logsumexp(dim=1)
    return (cosines.logsumexp(dim=1) - own).mean()


def balanced_batches(labels: Tensor, size: int, per_class: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of steps, endlessly: up to `per_class` images of each of `size` // `per_class` random classes."""
    order, counts = labels.argsort(stable=True), torch.bincount(labels)
    starts, widest, device = counts.cumsum(0) - counts, int(counts.max()), generator.device
    beyond = torch.arange(widest, device=device) >= counts[:, None]  # (C, widest)
    while True:
        classes = torch.randperm(len(counts), generator=generator, device=device)[: max(2, size // per_class)]
        keys = torch.rand(len(classes), widest, generator=generator, device=device)
        keys.masked_fill_(beyond[classes], torch.inf)
        found = keys.topk(min(per_class, widest), dim=1, largest=False)
        yield order[(starts[classes, None] + found.indices)[found.values.isfinite()]]


class Decomposer:
    """Trains a decomposition and the guess beside it, in turns."""

    def __init__(self, params: SEGZSLParams, network: Decomposition, data: TrainingData, seed: int) -> None:
        self.params, self.network, self.data = params, network, data
        weights = torch.Generator().manual_seed(seed + 2)  # others than the networks' and the critic's
        guess = Guess(params.semantic_dim, params.hidden_dim, data.embeddings, weights)
        self.guess = guess.to(data.embeddings.device)
        self._optimizer, self._guess_optimizer = (
            torch.optim.Adam(
                part.parameters(),
                lr=params.decomposition_learning_rate,
                betas=(0.5, 0.999),
                weight_decay=params.weight_decay,
                fused=True,
            )
            for part in (network, guess)
        )

    def learn_guess(self, rows: Tensor) -> Tensor:
        """(a) A step of q alone, up the likelihood of the right embeddings; that likelihood."""
        assert self.network.residual is not None
        with torch.no_grad():
            residual = self.network.residual(self.data.features[rows])
        likelihood = self.guess.log_likelihood(residual, self.data.embeddings)
        own = likelihood.gather(1, self.data.labels[rows, None]).mean()
        descend(self._guess_optimizer, -own)
        return own.detach()

    def learn(self, rows: Tensor) -> dict[str, Tensor]:
        """(b) A step of all but q; the loss and its terms."""
        terms = self.terms(rows)
        descend(self._optimizer, terms["loss"])
        return terms

    def terms(self, rows: Tensor) -> dict[str, Tensor]:
        """`loss` (L_total, Eq. 11) and the terms that are in it; q stays out of the gradients."""
        params, network, embeddings = self.params, self.network, self.data.embeddings
        features, labels = self.data.features[rows], self.data.labels[rows]
        semantic = network.semantic(features)  # (B, R)
        residual = None if network.residual is None else network.residual(features)
        rebuilt = (features - network.rebuild(semantic, residual)).square().sum(dim=1).mean()
        loss, terms = rebuilt, {"rebuilt": rebuilt}
        if params.use_information:
            terms["information"] = info_nce(semantic, network.weight, labels, embeddings)
            loss = loss - params.information_weight * terms["information"]
            if residual is not None:
                with frozen(self.guess):
                    terms["leaked"] = club(self.guess, residual, labels, embeddings)
                loss = loss + params.leak_weight * terms["leaked"]
        if params.use_similarity:
            terms["similarity"] = similarity_loss(semantic, labels, semantic, labels)
            loss = loss + params.similarity_weight * terms["similarity"]
        return {"loss": loss, **terms}


def decompose(
    params: SEGZSLParams, network: Decomposition, data: TrainingData, seed: int, on_progress: OnProgress
) -> Decomposer:
    """Train `network` for params.decomposition_epochs epochs, each told as `decomposition`."""
    decomposer = Decomposer(params, network, data, seed)
    steps = balanced_batches(data.labels, params.batch_size, params.images_per_class, data.generator)
    needs_guess = params.use_information and params.leak_weight > 0 and network.residual is not None
    for epoch in range(1, params.decomposition_epochs + 1):
        averages = Averages()
        for _ in range(params.steps_per_epoch):
            if needs_guess:
                for rows in islice(steps, params.guess_steps):
                    averages.add(likelihood=decomposer.learn_guess(rows))
            averages.add(**decomposer.learn(next(steps)))
        losses = averages.means()
        refuse_divergence(losses, epoch, network, "decomposition_learning_rate")
        on_progress(Progress("decomposition", epoch, params.decomposition_epochs, losses))
    return decomposer
