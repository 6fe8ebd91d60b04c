"""End-to-end patch clustering: the backbone learns with the heads, as in the paper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.base import IntArray

ReadPatches = Callable[[IntArray], Tensor]
"""Patch-table row numbers (B,) -> uint8 pixels (B, 3, s, s)."""


@dataclass(frozen=True)
class TrainableBackbone:
    """What fine-tuning needs beside the patch table.

    module: uint8 pixels (B, 3, s, s) -> features (B, D), differentiable in its parameters; it is copied, never changed.
    read_patches: pixels of rows of the patch table.
    learning_rate_factor: the backbone's step size as a part of the heads'.
    chunk: patches through the backbone at a time; activations of one chunk are held, whatever the batch size.
    """

    module: nn.Module
    read_patches: ReadPatches
    learning_rate_factor: float = 0.01
    chunk: int = 64


class BackboneRows:
    """Feature rows that come from the pixels through the backbone at every call, with gradients when they are on."""

    def __init__(self, source: TrainableBackbone, row_numbers: IntArray, *, device: str = "cpu") -> None:
        self.module = copy.deepcopy(source.module).to(device)
        for parameter in self.module.parameters():
            parameter.requires_grad_(True)
        # Batch statistics of nine patches of few images are not those of the data: pretrained ones stay (eval mode).
        # It also makes the recomputed forward pass of a chunk the same as its first.
        self.module.eval()
        self._source = source
        self._row_numbers = row_numbers
        self._device = device

    def __len__(self) -> int:
        return len(self._row_numbers)

    def parameter_group(self, learning_rate: float) -> dict[str, Any]:
        """The backbone's share of the optimiser, given the heads' step size."""
        return {"params": list(self.module.parameters()), "lr": learning_rate * self._source.learning_rate_factor}

    def rows(self, index: Tensor) -> Tensor:
        wanted = self._row_numbers[index.cpu().numpy()]
        features = []
        for start in range(0, len(wanted), self._source.chunk):
            pixels = self._source.read_patches(wanted[start : start + self._source.chunk]).to(self._device)
            if torch.is_grad_enabled():
                # activations of the whole batch would not fit; each chunk is computed again in the backward pass
                features.append(checkpoint(self.module, pixels, use_reentrant=False))
            else:
                features.append(self.module(pixels))
        return torch.cat(features).float()
