"""PSR: class embeddings mapped to the visual space such that the relations between classes stay.

Annadani and Biswas, "Preserving Semantic Relations for Zero-Shot Learning" (CVPR 2018,
https://arxiv.org/abs/1803.03049). y_c: class vectors, standardised by the seen classes; x: images; f: encoder from
class vectors to images; g: decoder back; s: cosine; delta_mn = s(y_m, y_n), similar where tau <= delta. For an image
x_i of class r, an image x_j of another, similar class and x_k of a dissimilar one:
    O1 = -s(f(y_r), x_i) + (tau - delta_kr) s(f(y_r), x_k)                          (Eq. 2)
    O2 = [tau - s(f(y_r), x_j)]+ + [s(f(y_r), x_j) - delta_jr]+                     (Eq. 3)
    O3 = ||y_r - g(f(y_r))||^2                                                      (Eq. 4)
    loss = mean over the batch of O1 + lambda1 O2 + lambda2 O3                      (Eq. 5)
    score(x, c) = s(f(y_c), x)                                                      (Eq. 6)
x_j, x_k: of `n_candidates` random images each, the one with the largest O2, the largest second term of O1 (3.3). Terms
for which a class has no similar, no dissimilar class are left out. Baselines of section 4.1: B1 has the mean squared
error of f(y_r) and x_i instead of O1 and O2; B2 treats every other class as dissimilar, with tau = 1 and no O2; B3 has
no O3. Letters in trailing comments: B images of a step, C classes, D features, E embedding, U classes of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.classifier_params import PSRParams
from models.params import Params
from models.zero_shot.gradient import GradientModel, TrainingData
from models.zero_shot.layers import perceptron
from models.zero_shot.tuples import Relations, TupleMiner, dissimilar_term, similar_term


class EncoderDecoder(nn.Module):
    """f and g, with the seen classes' mean and deviation that class vectors are standardised by."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, feature_dim: int, embedding_dim: int, hidden: Sequence[int], output: str, generator: torch.Generator
    ) -> None:
        super().__init__()

        def last() -> nn.Module | None:
            return nn.ELU() if output == "elu" else None

        self.encoder = perceptron([embedding_dim, *hidden, feature_dim], generator, output=last())
        self.decoder = perceptron([feature_dim, *hidden[::-1], embedding_dim], generator, output=last())
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("deviation", torch.ones(embedding_dim))

    def learn_scale(self, seen: Tensor) -> None:
        """Take mean and deviation from the seen classes' embeddings (C, E)."""
        deviation, mean = torch.std_mean(seen, dim=0, correction=0)
        self.mean = mean
        # A dimension that is the same in all seen classes says nothing; rounding may leave a deviation that is none.
        self.deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.ones_like(deviation))

    def standardised(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) / self.deviation


class PSR(GradientModel):
    """Encoder-decoder trained on mined tuples; scores are cosines."""

    method: ClassVar[str] = "psr"
    params_class: ClassVar[type[Params]] = PSRParams
    params: PSRParams
    network: EncoderDecoder

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        return EncoderDecoder(feature_dim, embedding_dim, self.params.hidden_dims, self.params.output, generator)

    def _optimizer(self) -> torch.optim.Optimizer:
        params = self.params
        return torch.optim.Adam(
            self.network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
        )

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        mapped = self.network.encoder(self.network.standardised(embeddings))  # (C, D)
        return functional.normalize(features, dim=1) @ functional.normalize(mapped, dim=1).T

    def _objective(self, data: TrainingData) -> Callable[[Tensor], Tensor]:
        params, network = self.params, self.network
        network.learn_scale(data.embeddings)
        vectors = network.standardised(data.embeddings)  # (C, E)
        relation_loss = self._relation_loss(data, vectors)
        lambda2 = 0.0 if params.variant == "B3" else params.lambda2

        def loss(rows: Tensor) -> Tensor:
            # Images of one class share f(y): each is computed once.
            labels = data.labels[rows]
            is_there = torch.bincount(labels, minlength=len(vectors)) > 0  # (C,)
            classes, position = is_there.nonzero()[:, 0], (is_there.cumsum(0) - 1)[labels]
            mapped = network.encoder(vectors[classes])  # (U, D)
            total = relation_loss(rows, mapped, position)
            if lambda2:
                errors = (vectors[classes] - network.decoder(mapped)).square().sum(dim=1)  # (U,)
                total = total + lambda2 * errors[position].mean()
            return total

        return loss

    def _relation_loss(self, data: TrainingData, vectors: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Mean of O1 + lambda1 O2 (B1: the squared error) of a step's row numbers (B,), f(y) (U, D), own f(y)s (B,)."""
        params = self.params
        if params.variant == "B1":
            return lambda rows, mapped, position: functional.mse_loss(mapped[position], data.features[rows])
        everything_else = params.variant == "B2"
        tau, lambda1 = (1.0, 0.0) if everything_else else (params.tau, params.lambda1)
        relations = Relations.of(vectors, None if everything_else else tau)
        unit = functional.normalize(data.features, dim=1)
        miner = TupleMiner(unit, data.labels, relations, params.n_candidates, data.generator)

        def loss(rows: Tensor, mapped: Tensor, position: Tensor) -> Tensor:
            unit_mapped, labels = functional.normalize(mapped, dim=1), data.labels[rows]
            anchors, cosines = unit_mapped[position], miner.cosines(unit_mapped, position)  # (B, D)
            total = -_cosine(anchors, unit[rows]).mean()
            pushed = miner.hardest_dissimilar(cosines, labels, tau)
            apart = dissimilar_term(_cosine(anchors, unit[pushed.rows]), pushed.delta, tau)
            total = total + (apart * pushed.exists).mean()
            if lambda1:
                kept = miner.hardest_similar(cosines, labels, tau)
                near = similar_term(_cosine(anchors, unit[kept.rows]), kept.delta, tau)
                total = total + lambda1 * (near * kept.exists).mean()
            return total

        return loss


def _cosine(rows: Tensor, others: Tensor) -> Tensor:
    """Row by row, of unit rows, (B,)."""
    return (rows * others).sum(dim=1)
