"""End-to-end patch clustering: the backbone learns with the heads, as in the paper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.base import FloatArray, IntArray

ReadPixels = Callable[[IntArray], Tensor]
"""Row numbers (B,) -> uint8 pixels (B, 3, s, s)."""

ACTIVATION_BYTES = 1 << 30
"""Activations that a step may hold; a step that needs more computes them again in its backward pass."""


def as_floats(pixels: Tensor) -> Tensor:
    """What a network without a preparation of its own reads."""
    return pixels.float()


@dataclass(frozen=True)
class TrainableBackbone:
    """What fine-tuning needs beside the patch table.

    module: prepared pixels (B, 3, s, s) -> features (B, D), differentiable in its parameters; it is copied, never
        changed.
    read_patches: pixels of rows of the patch table.
    read_images: pixels of rows of the image table, whole; None: validation classes are scored by the features given.
    prepare: uint8 pixels -> what `module` takes.
    chunk: patches through the backbone at a time.
    """

    module: nn.Module
    read_patches: ReadPixels
    read_images: ReadPixels | None = None
    prepare: Callable[[Tensor], Tensor] = as_floats
    chunk: int = 64


class BackboneRows:
    """Feature rows that come from the pixels through the backbone at every call, with gradients when they are on."""

    def __init__(
        self, source: TrainableBackbone, row_numbers: IntArray, *, share: float = 1.0, device: str = "cpu"
    ) -> None:
        """share: the last part of the network's layers that learns."""
        self.module = copy.deepcopy(source.module).to(device)
        self._learning = last_layers(self.module, share)
        # Batch statistics of nine patches of few images are not those of the data: pretrained ones stay (eval mode).
        # It also makes the recomputed forward pass of a chunk the same as its first.
        self.module.eval()
        self._source = source
        self._row_numbers = row_numbers
        self._device = device
        self._bytes_per_row: float | None = None

    def __len__(self) -> int:
        return len(self._row_numbers)

    def parameter_group(self, learning_rate: float) -> dict[str, Any]:
        """The backbone's share of the optimiser. Decay would pull weights that were learned elsewhere to zero."""
        return {"params": self._learning, "lr": learning_rate, "weight_decay": 0.0}

    def rows(self, index: Tensor) -> Tensor:
        wanted = self._row_numbers[index.cpu().numpy()]
        return torch.cat([self._forward(part, len(wanted)) for part in self._parts(self._source.read_patches, wanted)])

    def images(self, n_images: int) -> FloatArray | None:
        """Whole-image features (N, D) float32 of the image table as the network is now, if its pixels can be read."""
        if self._source.read_images is None:
            return None
        with torch.no_grad():
            parts = [self.module(part).float() for part in self._parts(self._source.read_images, np.arange(n_images))]
        features: FloatArray = torch.cat(parts).cpu().numpy()
        return features

    def _parts(self, read: ReadPixels, wanted: IntArray) -> Any:
        for start in range(0, len(wanted), self._source.chunk):
            yield self._source.prepare(read(wanted[start : start + self._source.chunk]).to(self._device))

    def _forward(self, pixels: Tensor, n_rows: int) -> Tensor:
        features: Tensor
        if not torch.is_grad_enabled():
            features = self.module(pixels)
        elif self._bytes_per_row is None:
            features, n_bytes = _weighed(self.module, pixels)
            self._bytes_per_row = n_bytes / len(pixels)
        elif self._bytes_per_row * n_rows <= ACTIVATION_BYTES:
            features = self.module(pixels)
        else:
            features = checkpoint(self.module, pixels, use_reentrant=False)
        return features.float()


def last_layers(module: nn.Module, share: float) -> list[nn.Parameter]:
    """The parameters of the last `share` of the layers that have any, in the network's order; the others are fixed."""
    layers = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))]
    n_learning = max(1, round(share * len(layers)))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    learning = [parameter for layer in layers[len(layers) - n_learning :] for parameter in layer.parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    return list(dict.fromkeys(learning))


def _weighed(module: nn.Module, pixels: Tensor) -> tuple[Tensor, int]:
    """Features with gradients, and the bytes of activations held for these."""
    held: dict[int, int] = {}
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features: Tensor = module(pixels)
    return features, sum(held.values())
