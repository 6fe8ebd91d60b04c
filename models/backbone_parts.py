"""A network in two parts: a trunk that stays as it is, and a tail, its last layers, that a classifier may train.

The trunk's output is a feature vector like any other: computed once an image, cached, and asked for again when an image
is to be classified. The tail goes with the classifier, which trains and saves it. So a network that learns needs
no pixels in training, and classifiers that trained theirs apart still share one network.
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from models.backbones import Backbone, BackboneView, ToMap, create_backbone
from models.base import IntArray, LabelledFeatures
from models.errors import InvalidInput


class Tail(nn.Module):
    """The last layers of a network, up to its last feature map; in evaluation mode, whatever is asked of it.

    Batch statistics of the few images of a step are not those of the data: pretrained ones stay.
    shape: of the trunk's output for one image. channels: numbers a place of the map.
    """

    def __init__(
        self, layers: nn.Module, to_map: ToMap, shape: Sequence[int], channels: int, recipe: dict[str, Any]
    ) -> None:
        super().__init__()
        self.layers = layers
        self.shape = tuple(shape)
        self.channels = channels
        self._to_map = to_map
        self._recipe = recipe
        self.eval()

    def forward(self, rows: Tensor) -> Tensor:
        """The trunk's features (B, trunk_dim) -> places (B, R, D), row by row from the top left."""
        # A copy, since the first layer may work in place.
        activation = rows.reshape(-1, *self.shape).clone(memory_format=_memory_format(self.shape))
        maps: Tensor = self._to_map(self.layers(activation))
        return maps.float().flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> Tail:  # noqa: ARG002 - the signature is torch's
        """Evaluation mode, always."""
        return super().train(False)

    def learning(self) -> list[nn.Parameter]:
        """The parameters to train."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def copied(self) -> Tail:
        """Another one with the same weights, to be trained apart."""
        return copy.deepcopy(self)

    def recipe(self) -> IntArray:
        """uint8 text of what `rebuilt` needs beside the weights."""
        return np.frombuffer(json.dumps(self._recipe, sort_keys=True).encode(), np.uint8).copy()

    @classmethod
    def rebuilt(cls, recipe: IntArray) -> Tail:
        """A tail of that `recipe` with weights of no meaning; InvalidInput where it is none."""
        try:
            told = json.loads(bytes(recipe.astype(np.uint8)))
            network, size, share = str(told["network"]), int(told["size"]), float(told["share"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"The saved network's last layers cannot be told: {error}. Train it again.") from error
        return Trunk(create_backbone(network, weights=None), size, share).tail()


@dataclass(frozen=True)
class TrunkFeatures(LabelledFeatures):
    """What a trunk made of images, (n_images, trunk_dim), with the `tail` it enters, for a method that trains that."""

    tail: Tail = field(kw_only=True)


@dataclass(frozen=True)
class Trunk(BackboneView):
    """A backbone whose feature of an image is what enters the last `share` of its layers, flattened.

    Parts of one network that are cut alike at one `size` are equal, so that whoever gathers images into batches may
    mix theirs. Only layers up to the last feature map count, and only places where a single array passes are cut.
    size: side in pixels of the images. share: in 0..1; 1: every layer is the tail's, and the feature is the image.
    Raises InvalidInput for networks that take one size only (their places are no map before the end).
    """

    backbone: Backbone
    size: int
    share: float
    feature_dim: int = field(init=False, compare=False)
    digest: str = field(init=False, compare=False)
    _parts: _Parts = field(init=False, compare=False, repr=False)
    _shape: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.backbone.fixed_size:
            raise InvalidInput(
                f"The last layers of {self.backbone.name!r} cannot be trained apart from the others. "
                "Use a convolutional network, or mode 'frozen'.",
                field="params/mode",
            )
        parts = _split(self.backbone, self.share)
        object.__setattr__(self, "_parts", parts)
        probe = torch.zeros((1, 3, self.size, self.size), dtype=torch.uint8)
        object.__setattr__(self, "_shape", tuple(self._forward(probe).shape[1:]))
        object.__setattr__(self, "feature_dim", int(np.prod(self._shape)))
        digest = hashlib.sha256(f"trunk\n{parts.cut}\n{self.backbone.digest}".encode()).hexdigest()
        object.__setattr__(self, "digest", digest)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) on any device -> float32 (B, feature_dim) on the backbone's device."""
        outputs = [
            self._forward(images[start : start + self.max_batch]).flatten(1)
            for start in range(0, len(images), self.max_batch)
        ]
        return torch.cat(outputs) if outputs else torch.empty((0, self.feature_dim), device=self.device)

    def tail(self) -> Tail:
        """The layers after the trunk, a copy of their own, on the backbone's device."""
        recipe = {"network": self.backbone.name, "size": self.size, "share": self.share}
        layers = copy.deepcopy(self._parts.tail).requires_grad_(False)
        for name, parameter in layers.named_parameters():
            parameter.requires_grad_(f"{name}.".startswith(self._parts.learning))
        return Tail(layers, self.backbone.to_map, self._shape, self.backbone.spatial_dim, recipe)

    def _forward(self, images: Tensor) -> Tensor:
        backbone = self.backbone
        is_half = backbone.precision == "bf16"
        with torch.inference_mode(), torch.autocast(backbone.device.type, torch.bfloat16, enabled=is_half):
            output: Tensor = self._parts.trunk(backbone.normalise(images))
            return output.float()


@dataclass(frozen=True)
class _Parts:
    """Both share the backbone's weights. cut: name of the place. learning: beginnings of names of weights to train."""

    trunk: nn.Module
    tail: nn.Module
    cut: str
    learning: tuple[str, ...]


def _split(backbone: Backbone, share: float) -> _Parts:
    """The network's graph cut at the last single array before the last `share` of the layers up to its last map."""
    root = backbone.module
    nodes = _nodes_to_map(root, backbone.spatial_layer)
    layers = [i for i, node in enumerate(nodes) if _has_weights(root, node)]
    first = layers[-max(1, min(len(layers), round(share * len(layers))))]
    position = {node: i for i, node in enumerate(nodes)}
    last_use = [max((position.get(user, -1) for user in node.users), default=-1) for node in nodes]
    cut = max(
        i
        for i in range(first)  # the image itself, at 0, is always alone
        if [j for j in range(i + 1) if last_use[j] > i] == [i] and not _is_tuple(nodes[i])
    )
    learning = tuple(f"{node.target}." for node in nodes[first:] if node.op in ("call_module", "get_attr"))
    trunk = _graph_module(root, nodes[: cut + 1], None)
    return _Parts(trunk, _graph_module(root, nodes[cut + 1 :], nodes[cut]), nodes[cut].name, learning)


def _nodes_to_map(root: nn.Module, spatial_layer: nn.Module) -> list[fx.Node]:
    """The steps of the network in their order, the last of them the one that gives the feature map."""
    name = next(name for name, module in root.named_modules() if module is spatial_layer)
    nodes = list(fx.Tracer().trace(root).nodes)
    inside = [i for i, node in enumerate(nodes) if name in node.meta.get("nn_module_stack", ())]
    return nodes[: inside[-1] + 1]


def _has_weights(root: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and any(True for _ in root.get_submodule(str(node.target)).parameters())


def _is_tuple(node: fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _graph_module(root: nn.Module, nodes: Sequence[fx.Node], entry: fx.Node | None) -> nn.Module:
    """`nodes` as a network of their own, from what `entry` gives (None: they begin with the input)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {} if entry is None else {entry: graph.placeholder("activation")}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(root, graph).eval()


def _memory_format(shape: Sequence[int]) -> torch.memory_format:
    return torch.channels_last if len(shape) == 3 else torch.contiguous_format
