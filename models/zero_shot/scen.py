"""SC-EGG's semantic compression embedding network: a feature for each dimension of a class embedding, and one for all.

Hong et al., "Semantic Compression Embedding for Generative Zero-Shot Learning" (IJCAI 2022,
https://doi.org/10.24963/ijcai.2022/134). r_i: the places of a feature map; v_n: a vector for each dimension
(attribute); phi(y): class embeddings of unit length.
    h_n = sum_i alpha_ni r_i,  alpha_ni = softmax_i(v_n^T W_a r_i)                                        (Eq. 1)
    e_n = h_n^T W_b v_n,  p_l = (e^T phi(y))_y                                                            (Eq. 2-3)
    g = SC(h_1 ... h_A),  p_g = CLS_g(g)                                                                  (Eq. 4-5)
    stage 1: L_LCE + lambda_g L_GCE, cross-entropies of p_l and p_g                                       (Eq. 6-7, 16)
    stage 2: L_SCR = ||p_l - p_g||^2 trains SC and CLS_g alone                                            (Eq. 8, 17)
The paper's cross-entropies run over unseen classes too, which have no images and are not known here: over seen ones.
Letters in trailing comments: B images, A dimensions, R places, D channels, V width of v_n, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import OnProgress, Progress
from models.generative_params import SCEGGParams
from models.zero_shot.epochs import refuse_divergence
from models.zero_shot.generative import Averages
from models.zero_shot.gradient import TrainingData
from models.zero_shot.layers import linear, perceptron
from models.zero_shot.wgan import descend

HEAD_DIM = 1024
"""Hidden units of the classifier that the authors' code puts in CLS_g's place for stage 2."""


class SCEN(nn.Module):
    """Local embedding (attention) and global embedding (compression and classifier) of feature maps."""

    offset: Tensor
    width: Tensor

    def __init__(
        self, channels: int, vectors: Tensor, n_classes: int, params: SCEGGParams, generator: torch.Generator
    ) -> None:
        super().__init__()
        n_dims, vector_dim = vectors.shape
        self.channels, self.unit_places = channels, params.unit_places
        self.vectors = nn.Parameter(functional.normalize(vectors, dim=1))
        self.attend = nn.Parameter(torch.zeros(vector_dim, channels))  # W_a; the code's start: all places alike
        self.embed = nn.Parameter(torch.randn(channels, vector_dim, generator=generator))  # W_b
        self.squeeze = linear(n_dims, max(1, n_dims // 2), generator)
        self.join = linear(max(1, n_dims // 2), 1, generator)
        self.classifier = linear(channels, n_classes, generator)
        # The code leaves SC and CLS_g after stage 1, for a plain mean and a new classifier.
        self.is_averaged = False
        dims = [channels, HEAD_DIM, n_classes]
        self.head = perceptron(dims, generator, hidden=nn.LeakyReLU) if params.code_compat else None
        self.register_buffer("offset", torch.zeros(channels))
        self.register_buffer("width", torch.ones(channels))

    def look(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha (B, A, R) and the places r (B, R, D) of flattened maps (B, R * D); h is their product."""
        places = maps.reshape(len(maps), maps.shape[1] // self.channels, self.channels)  # there may be no maps
        if self.unit_places:
            places = functional.normalize(places, dim=2)
        attention = (places @ (self.vectors @ self.attend).T).transpose(1, 2).softmax(dim=2)
        return attention, places

    def semantic(self, attention: Tensor, places: Tensor) -> Tensor:
        """e (B, A) of alpha (B, A, R) and r (B, R, D): answers of places, weighed, so that h is never held."""
        answers = (places @ (self.embed @ self.vectors.T)).transpose(1, 2)  # (B, A, R)
        return (attention * answers).sum(dim=2)

    def compress(self, attention: Tensor, places: Tensor) -> Tensor:
        """g (B, D) of alpha and r: a perceptron over the dimensions of h, the same for every channel."""
        if self.is_averaged:
            return (attention.mean(dim=1, keepdim=True) @ places)[:, 0]
        # The first layer takes shares of places together before it meets their channels: half of h, and no h.
        before = (self.squeeze.weight @ attention) @ places + self.squeeze.bias[:, None]  # (B, A / 2, D)
        return (self.join.weight @ functional.leaky_relu(before))[:, 0] + self.join.bias

    def classify(self, compressed: Tensor) -> Tensor:
        """p_g (B, C) of g (B, D)."""
        layers = self.classifier if self.head is None or not self.is_averaged else self.head
        scores: Tensor = layers(compressed)
        return scores

    def fit_scale(self, compressed: Tensor) -> None:
        """Remember the range of training images' g (N, D); the generator ends in a sigmoid and wants [0, 1].

        The sign of SC is chance. Channels whose mean lies in the upper half of their range are turned around, so that
        the networks of stage 3 see what pooled features would show them: mostly small numbers, not mostly ones.
        """
        low, high = compressed.amin(dim=0), compressed.amax(dim=0)
        width = torch.where(high > low, high - low, 1)
        is_turned = compressed.mean(dim=0) > (low + high) / 2
        self.offset.copy_(torch.where(is_turned, high, low))
        self.width.copy_(torch.where(is_turned, -width, width))

    def scaled(self, compressed: Tensor) -> Tensor:
        """g (B, D) as the generator sees it."""
        return (compressed - self.offset) / self.width

    def guidance(self, generated: Tensor, labels: Tensor) -> Tensor:
        """L_SCE (Eq. 14): cross-entropy of CLS_g on generated features (B, D) in [0, 1] with labels (B,)."""
        return functional.cross_entropy(self.classify(generated * self.width + self.offset), labels)


def embedding_loss(network: SCEN, params: SCEGGParams, maps: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """Stage 1, Eq. 16: flattened maps (B, R * D), labels (B,), unit embeddings (C, A)."""
    looked = network.look(maps)
    loss = torch.zeros((), device=maps.device)
    if params.local_weight:
        loss = loss + params.local_weight * functional.cross_entropy(network.semantic(*looked) @ embeddings.T, labels)
    if params.global_weight:
        scores = network.classify(network.compress(*looked))
        loss = loss + params.global_weight * functional.cross_entropy(scores, labels)
    return loss


def consistency_loss(network: SCEN, params: SCEGGParams, maps: Tensor, embeddings: Tensor) -> Tensor:
    """Stage 2, Eq. 17; its gradient does not reach the local embedding."""
    with torch.no_grad():
        looked = network.look(maps)
        wanted = network.semantic(*looked) @ embeddings.T  # (B, C)
    squared = (network.classify(network.compress(*looked)) - wanted).square()
    return squared.mean() if params.code_compat else squared.sum(dim=1).mean()


def train_scen(network: SCEN, params: SCEGGParams, data: TrainingData, on_progress: OnProgress) -> None:
    """Stages 1 and 2; afterwards the network is frozen."""
    if params.local_weight or params.global_weight:  # without both there is nothing to learn from labels
        _run_stage(
            "embedding",
            params.embedding_epochs,
            network,
            _optimizer(params, network.parameters()),
            lambda rows: embedding_loss(network, params, data.features[rows], data.labels[rows], data.embeddings),
            params,
            data,
            on_progress,
        )
    if params.compression_epochs:
        network.is_averaged = params.code_compat
        learning = [network.squeeze, network.join, network.classifier] if network.head is None else [network.head]
        _run_stage(
            "compression",
            params.compression_epochs,
            network,
            _optimizer(params, [weight for part in learning for weight in part.parameters()]),
            lambda rows: consistency_loss(network, params, data.features[rows], data.embeddings),
            params,
            data,
            on_progress,
        )
    network.requires_grad_(False)


def _run_stage(
    phase: str,
    epochs: int,
    network: SCEN,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    params: SCEGGParams,
    data: TrainingData,
    on_progress: OnProgress,
) -> None:
    n_rows, device = len(data.features), data.features.device
    for epoch in range(1, epochs + 1):
        averages = Averages()
        order = torch.randperm(n_rows, generator=data.generator, device=device)
        for rows in torch.split(order, params.batch_size):
            loss = loss_of(rows)
            descend(optimizer, loss)
            averages.add(loss=loss)
        losses = averages.means()
        refuse_divergence(losses, epoch, network, "embedding_learning_rate")
        on_progress(Progress(phase, epoch, epochs, losses))


def _optimizer(params: SCEGGParams, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    rate = params.embedding_learning_rate
    if params.code_compat:
        return torch.optim.RMSprop(weights, lr=rate, weight_decay=1e-4, momentum=0.9)
    return torch.optim.Adam(weights, lr=rate, weight_decay=params.weight_decay)
