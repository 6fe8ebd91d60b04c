"""Rows of patch features for training: resident where they fit, read from the memory map where not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray, IntArray
from models.errors import InvalidInput, TooFewSamples

RESIDENT_BYTES = 2 << 30
BLOCK_ROWS = 8192


class FeatureRows(Protocol):
    """Where training reads features from. `rows` may carry gradients (fine-tuning)."""

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Tensor:
        """(B,) row numbers -> (B, D) float32 features on the training device."""
        ...


class CachedRows:
    """Features computed once. `keep` restricts and renumbers the rows; at most `resident_bytes` are held in memory."""

    def __init__(
        self,
        features: FloatArray,
        keep: IntArray | None = None,
        *,
        device: str = "cpu",
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self._features = features
        self._keep = keep
        self._device = device
        self._n_rows = len(features) if keep is None else len(keep)
        n_bytes = self._n_rows * features.shape[1] * features.dtype.itemsize
        self._resident: Tensor | None = None
        if n_bytes <= resident_bytes:
            # np.array copies: a read-only memory map cannot back a tensor
            held = np.array(features) if keep is None else np.asarray(features[keep])
            self._resident = torch.from_numpy(held).to(device)

    def __len__(self) -> int:
        return self._n_rows

    @property
    def is_resident(self) -> bool:
        return self._resident is not None

    def rows(self, index: Tensor) -> Tensor:
        if self._resident is not None:
            return self._resident.index_select(0, index).to(torch.float32)
        wanted = index.cpu().numpy()
        if self._keep is not None:
            wanted = self._keep[wanted]
        order = np.argsort(wanted, kind="stable")  # ascending reads: each page of the map is touched once
        found = np.empty((len(wanted), self._features.shape[1]), dtype=np.float32)
        found[order] = self._features[wanted[order]]
        return torch.from_numpy(found).to(self._device)


def blocks(n_rows: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Consecutive slices that cover `n_rows`."""
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def feature_statistics(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation (D,) of the columns, float32, block by block.

    Raises TooFewSamples without rows and InvalidInput at the first row that holds NaN or infinity.
    """
    if features.ndim != 2 or len(features) == 0:
        raise TooFewSamples(f"There are no patch features: the table has shape {features.shape}.")
    total = np.zeros(features.shape[1])
    squares = np.zeros(features.shape[1])
    shift = np.asarray(features[0], dtype=np.float64)  # keeps the difference of squares from cancelling
    for block in blocks(len(features)):
        rows = np.asarray(features[block], dtype=np.float64)
        if not np.isfinite(rows).all():
            first = block.start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise InvalidInput(
                f"Patch features hold NaN or infinity, first in row {first}. Extract that image's features again.",
                field="features",
            )
        rows -= shift
        total += rows.sum(axis=0)
        squares += (rows * rows).sum(axis=0)
    mean = total / len(features)
    variance = np.maximum(squares / len(features) - mean * mean, 0)
    return (mean + shift).astype(np.float32), np.sqrt(variance).astype(np.float32)
