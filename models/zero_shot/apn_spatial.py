"""APN: attributes found at places of a feature map by a prototype each, in a network that may learn with them.

Xu et al., "Attribute Prototype Network for Zero-Shot Learning" (NeurIPS 2020, https://arxiv.org/abs/2008.08290), and
its code. F_ij: places of the last feature map; V, P: a vector for each dimension k of the class embedding phi:
    v_k = V_k . mean_ij F_ij (or max_ij V_k . F_ij),   score(x, c) = v . phi(c),   L_cls = CE(score)         (Eq. 1)
    M^k_ij = P_k . F_ij,   a_k = max_ij M^k_ij,   L_reg = mean (a - phi(y_n))^2                              (Eq. 2)
    L_ad = sum_g sum_d ||(P_kd) of k in group g||_2;   without groups ||P||_F                                (Eq. 3)
    L_cpt = mean_k mean_ij sigmoid(M^k_ij) |ij - argmax_ij M^k_ij|^2                                         (Eq. 4)
    loss = L_cls + regression_weight L_reg + prototype_weight CE(a . phi) + decorrelation_weight (L_ad of P and of V)
           + compactness_weight L_cpt
As the code has it: L_ad is of V too, M in L_cpt passes a sigmoid (without it the loss has no lower bound), and the
prototypes have a cross-entropy. Ours: L_cpt is a mean, so that batch size and map do not weigh; places are centred and
of unit length (`unit_places`); Adam keeps its state between epochs.
V and P share the network alone. On frozen maps the prototypes cannot change what V learns, and count where they score.
Letters in trailing comments: B images, R places, D channels, E embedding, C classes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbone_parts import Tail, TrunkFeatures
from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress, Progress
from models.errors import InvalidInput, ShapeMismatch
from models.params import Params
from models.spatial_params import APNSpatialParams
from models.zero_shot.attention import AttentionMaps, check_pairs, map_channels
from models.zero_shot.bilinear import INITIAL_WEIGHT
from models.zero_shot.checkpoints import Run
from models.zero_shot.folds import Rows
from models.zero_shot.gradient import GradientModel, TrainingData
from models.zero_shot.scaling import Scaling, unit_rows

PART = 64
"""Images through the network at a time where nothing is learned."""
_RECIPE = "tail_recipe"


class PrototypeNetwork(nn.Module):
    """V and P over the places of a map, and the tail of the backbone that makes the map, if that learns."""

    centre: Tensor

    def __init__(
        self, tail: Tail | None, channels: int, embedding_dim: int, params: APNSpatialParams, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.tail, self.channels, self.params = tail, channels, params
        self.whole = nn.Parameter(torch.randn(channels, embedding_dim, generator=generator) * INITIAL_WEIGHT)  # V
        self.prototypes = nn.Parameter(torch.randn(channels, embedding_dim, generator=generator) * INITIAL_WEIGHT)  # P
        self.register_buffer("centre", torch.zeros(channels))

    def places(self, rows: Tensor) -> Tensor:
        """Maps (B, R, D) of features (B, feature_dim)."""
        if self.tail is None:
            return rows.reshape(len(rows), rows.shape[1] // self.channels, self.channels)  # there may be no rows
        maps: Tensor = self.tail(rows)
        return maps

    def attributes(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, E) and M (B, R, E) of maps (B, R, D)."""
        pooled, lengths = places.mean(dim=1), None
        if self.params.unit_places:
            pooled = functional.normalize(pooled - self.centre, dim=1)
            places = places - self.centre
            # Answers are divided, not places: there are fewer of them.
            lengths = torch.linalg.vector_norm(places, dim=2, keepdim=True).clamp(min=1e-12)

        def answers(vectors: Tensor) -> Tensor:
            found = places @ vectors
            return found if lengths is None else found / lengths

        v = pooled @ self.whole if self.params.pooling == "mean" else answers(self.whole).amax(dim=1)
        return v, answers(self.prototypes)

    def forward(self, rows: Tensor) -> Tensor:
        """What is compared with class embeddings, (B, E), of features (B, feature_dim)."""
        v, found = self.attributes(self.places(rows))
        local = found.amax(dim=1)
        return {"global": v, "prototypes": local, "both": v + local}[self.params.scored_by]


class APNSpatial(GradientModel):
    """Scores are v . phi(c). Takes feature maps (`channels` tells their places), in mode finetune `TrunkFeatures`."""

    method: ClassVar[str] = "apn_spatial"
    params_class: ClassVar[type[Params]] = APNSpatialParams
    params: APNSpatialParams
    network: PrototypeNetwork
    _tail: Tail | None = None
    """Where the network's last layers start."""
    _channels: int
    _groups: Tensor | None = None
    """One row a group, 1 where a dimension belongs to it, (G, E)."""
    _after_step: Callable[[Tensor], None]
    """Told the loss of a step that trains the tail: an epoch of those may take minutes, and a cancel should not."""

    # -- training ------------------------------------------------------------------------------------------------------

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:  # noqa: ARG002 - maps have any number of places
        tail = None if self._tail is None else self._tail.copied()
        return PrototypeNetwork(tail, self._channels, embedding_dim, self.params, generator)

    def _optimizer(self) -> torch.optim.Optimizer:
        params, network = self.params, self.network
        groups: list[dict[str, Any]] = [{"params": [network.whole, network.prototypes]}]
        if network.tail is not None:
            # Decay would pull weights that were learned elsewhere to zero.
            tuned = {"params": network.tail.learning(), "lr": params.backbone_learning_rate, "weight_decay": 0.0}
            groups.append(tuned)
        return torch.optim.Adam(groups, lr=params.learning_rate, betas=(0.5, 0.999), weight_decay=params.weight_decay)

    def _epochs(self, train: Rows, run: Run, epochs: int, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        n_steps = math.ceil(len(train.labels) / self.params.batch_size)
        steps = itertools.cycle(range(1, n_steps + 1))

        def after_step(loss: Tensor) -> None:
            done = n_steps * len(run.history) + next(steps)
            on_progress(Progress("training", done, n_steps * epochs, {"loss": float(loss.detach())}))

        self._after_step = after_step
        yield from super()._epochs(train, run, epochs, on_progress)

    def _objective(self, data: TrainingData) -> Callable[[Tensor], Tensor]:
        # Maps of the network as it is: what centres them, and all that is looked at before it learns.
        frozen: list[Tensor] = [self._maps(data.features)]
        self.network.centre.copy_(frozen[0].mean(dim=(0, 1)))
        self._groups = _group_rows(self.params.attribute_groups, data.embeddings.shape[1], self.device)

        def loss(rows: Tensor) -> Tensor:
            if self.network.tail is None or len(data.run.history) < self.params.warmup_epochs:
                places = frozen[0][rows]
            else:
                frozen.clear()
                places = self.network.places(data.features[rows])
            found = self._total(places, data.labels[rows], data.embeddings)
            if not frozen:
                self._after_step(found)
            return found

        return loss

    def _total(self, places: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of maps (B, R, D) with labels (B,) and unit embeddings (C, E)."""
        params, network = self.params, self.network
        v, found = network.attributes(places)
        local = found.amax(dim=1)
        loss = self._cross_entropy(v @ embeddings.T, labels)
        if params.prototype_weight:
            loss = loss + params.prototype_weight * self._cross_entropy(local @ embeddings.T, labels)
        if params.regression_weight:
            loss = loss + params.regression_weight * functional.mse_loss(local, embeddings[labels])
        if params.decorrelation_weight:
            norms = (decorrelation(weights, self._groups) for weights in (network.prototypes, network.whole))
            loss = loss + params.decorrelation_weight * sum(norms)
        if params.compactness_weight:
            loss = loss + params.compactness_weight * compactness(found)
        return loss

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores.softmax(dim=1) if self.params.double_softmax else scores, labels)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        return torch.cat([self.network(part) for part in torch.split(features, PART)]) @ embeddings.T

    def attention(self, features: FloatArray, embeddings: FloatArray, *, top: int = 8) -> AttentionMaps:
        """Where prototypes answer: raw features (B, feature_dim), each image for its row of embeddings (B, E).

        strengths: a_k phi_k. local: M^k above its least place. Raises NotFitted, ShapeMismatch.
        """
        self._require_fitted()
        check_pairs(features, embeddings, self._dims)
        rows = torch.from_numpy(np.ascontiguousarray(self._scaling(features))).to(self.device)
        with torch.no_grad():
            found = self.network.attributes(self._maps(rows))[1].transpose(1, 2)  # (B, E, R)
            # A prototype that answers everywhere alike looks at every place.
            above = found - found.amin(dim=2, keepdim=True) + 1e-6
            shares = (above / above.sum(dim=2, keepdim=True)).cpu().numpy()
        strengths = found.amax(dim=2).cpu().numpy() * unit_rows(embeddings)
        return AttentionMaps.loudest(shares, strengths, top)

    @torch.no_grad()
    def _maps(self, features: Tensor) -> Tensor:
        """(N, R, D) of features (N, feature_dim) as the network is now."""
        if self.network.tail is None:
            return self.network.places(features)
        return torch.cat([self.network.places(part) for part in torch.split(features, PART)])

    # -- what it is given ----------------------------------------------------------------------------------------------

    def _meet(self, features: LabelledFeatures, embeddings: FloatArray) -> None:
        super()._meet(features, embeddings)
        given = features.tail if isinstance(features, TrunkFeatures) else None
        self._tail = given if self.params.mode == "finetune" else None
        self._channels = _checked_channels(features, self._tail, self.params.mode)
        _group_rows(self.params.attribute_groups, embeddings.shape[1], "cpu")

    def _identity(self, raw: Rows, folds: Sequence[tuple[IntArray, FloatArray]]) -> str:
        digest = hashlib.sha256(f"{super()._identity(raw, folds)} {self._channels} ".encode())
        if self._tail is not None:
            for name, tensor in sorted(self._tail.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _trial(
        self, raw: FloatArray, labels: IntArray, embeddings: FloatArray, fold: IntArray, learn_rows: IntArray
    ) -> tuple[Self, Rows, Rows, Rows]:
        trial, rows, train, held = super()._trial(raw, labels, embeddings, fold, learn_rows)
        trial._channels, trial._tail = self._channels, self._tail
        return trial, rows, train, held

    def _scaling_kind(self) -> Scaling:
        return "none" if self.params.mode == "finetune" else self.params.normalize

    # -- saving --------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, FloatArray]:
        recipe: dict[str, Any] = {} if self._tail is None else {_RECIPE: self._tail.recipe()}
        return {**super()._state(), **recipe}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        recipe: Any = state.get(_RECIPE)
        self._tail = None if recipe is None else Tail.rebuilt(recipe)
        self._channels = len(state["centre"])
        super()._restore(state)
        self._tail = self.network.tail  # one copy is enough


def decorrelation(weights: Tensor, groups: Tensor | None) -> Tensor:
    """Eq. 3 of weights (D, E): a channel that serves one group is cheaper than one that serves them all.

    groups: (G, E) of 0 and 1; None: the norm of all weights.
    """
    if groups is None:
        norm: Tensor = torch.linalg.vector_norm(weights)
        return norm
    # The small number keeps the slope of a channel without weights in a group finite.
    return (weights.square() @ groups.T + 1e-12).sqrt().sum()


def compactness(found: Tensor) -> Tensor:
    """Eq. 4 of M (B, R, E): how far from its peak a prototype answers, in squared places. A square grid, else a row."""
    n_places = found.shape[1]
    side = math.isqrt(n_places)
    width = side if side * side == n_places else n_places
    number = torch.arange(n_places, device=found.device)
    grid = torch.stack([number // width, number % width], dim=1).to(found.dtype)  # (R, 2)
    apart = (grid[:, None] - grid).square().sum(dim=2)  # (R, R)
    distance = apart[found.argmax(dim=1)].transpose(1, 2)  # (B, R, E)
    return (found.sigmoid() * distance).mean()


def _group_rows(groups: Sequence[int] | None, embedding_dim: int, device: str) -> Tensor | None:
    if groups is None:
        return None
    if len(groups) != embedding_dim:
        raise ShapeMismatch(
            f"attribute_groups has {len(groups)} numbers and class embeddings have {embedding_dim} dimensions. "
            "Give each dimension its group.",
            field="params/attribute_groups",
        )
    of_dimension = np.unique(np.asarray(groups), return_inverse=True)[1]
    return functional.one_hot(torch.from_numpy(of_dimension)).T.to(device, torch.float32)


def _checked_channels(features: LabelledFeatures, tail: Tail | None, mode: str) -> int:
    """Numbers a place of the maps, where `features` are what the mode takes."""
    if mode == "finetune":
        if tail is None:
            raise InvalidInput(
                "Mode 'finetune' trains a network's last layers, and only features are given. Use a dataset of images, "
                "or mode 'frozen'.",
                field="params/mode",
            )
        width = np.shape(features.features)[1]
        if width != math.prod(tail.shape):
            raise ShapeMismatch(f"{width} features are not what the network's last layers take, {tail.shape}.")
        return tail.channels
    return map_channels(features, "APN on places", "method 'apn'")
