"""Rows of patch features for training: resident where they fit, read from the memory map where not."""

from __future__ import annotations

import warnings
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
    """Features computed once. `keep` restricts and renumbers the rows.

    On the CPU the table itself is read, which for a memory map is the kernel's page cache: nothing is copied, and it
    gives way where memory is short. On a GPU at most `resident_bytes` are held there, and larger tables read in parts.
    """

    def __init__(
        self,
        features: FloatArray,
        keep: IntArray | None = None,
        *,
        device: str = "cpu",
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self._device = device
        self._n_rows = len(features) if keep is None else len(keep)
        self._table = _view(features)
        self._keep = None if keep is None else torch.from_numpy(np.asarray(keep, dtype=np.int64))
        n_bytes = self._n_rows * features.shape[1] * features.dtype.itemsize
        if device != "cpu" and n_bytes <= resident_bytes:
            self._table = (self._table if self._keep is None else self._table[self._keep]).to(device)
            self._keep = None

    def __len__(self) -> int:
        return self._n_rows

    def rows(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            if self._keep is None:
                return self._table[index].to(self._device, torch.float32, copy=True)
            return self.rows(torch.arange(index.start, index.stop))
        wanted = index.to(self._table.device)
        if self._keep is not None:
            wanted = self._keep[wanted]
        return self._table.index_select(0, wanted).to(self._device, torch.float32)


def _view(features: FloatArray) -> Tensor:
    """A tensor over the array's own memory, which nothing here writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(features))


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
    for block in blocks(len(features), BLOCK_ROWS // 4):  # in float64
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
