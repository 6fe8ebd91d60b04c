"""Exact nearest neighbours of every patch, mined once before training (VGSE Eq. 2; SCAN's practice).

Blocked matrix products with a running top-k, so that the n x n distances never exist. Where the device has fast
bfloat16 the products are bfloat16 and only propose candidates: distances are then recomputed in float32, and a row
whose candidates might miss a true neighbour (judged by its own measured rounding error) is searched again in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import FloatArray, OnProgress, Progress, ignore_progress
from models.embedding.rows import CachedRows, blocks, feature_statistics
from models.errors import InvalidInput, TooFewSamples
from models.precision import has_fast_bf16

QUERY_ROWS = 4096
KEY_ROWS = 2048
RERANK_ROWS = 16  # their candidates fit the cache
SPARE_CANDIDATES = 12
SAFETY_DEVIATIONS = 6.0
HELD_BYTES = 4 << 30


@dataclass(frozen=True)
class NeighbourLists:
    """index: (P, k) int64 neighbours, nearest first. count: (P,) how many of each row may be used."""

    index: Tensor
    count: Tensor

    def restricted(self, keep: Tensor) -> NeighbourLists:
        """The lists among the rows `keep` (ascending) only, renumbered; order is kept, `count` shrinks."""
        new_number = torch.full((len(self.index),), -1, dtype=torch.int64, device=self.index.device)
        new_number[keep] = torch.arange(len(keep), device=self.index.device)
        column = torch.arange(self.index.shape[1], device=self.index.device)
        index = torch.empty((len(keep), len(column)), dtype=torch.int64, device=self.index.device)
        count = torch.empty(len(keep), dtype=torch.int64, device=self.index.device)
        for block in blocks(len(keep)):
            part = new_number[self.index[keep[block]]]
            usable = (part >= 0) & (column < self.count[keep[block], None])
            order = usable.to(torch.int8).argsort(dim=1, descending=True, stable=True)
            index[block], count[block] = part.gather(1, order).clamp_min_(0), usable.sum(dim=1)
        return NeighbourLists(index, count)

    def sample(self, anchors: Tensor, generator: torch.Generator) -> Tensor:
        """One random neighbour of each anchor (B,); an anchor without neighbours is its own."""
        draw = torch.rand(len(anchors), generator=generator, device=generator.device).to(anchors.device)
        count = self.count[anchors]
        column = torch.minimum((draw * count).long(), (count - 1).clamp_min(0))
        return torch.where(count > 0, self.index[anchors, column], anchors)


def nearest_neighbours(
    features: FloatArray,
    n_neighbors: int,
    *,
    device: str = "cpu",
    use_bf16: bool | None = None,
    on_progress: OnProgress = ignore_progress,
) -> NeighbourLists:
    """The `n_neighbors` nearest other rows of each row, by Euclidean distance, nearest first.

    features: (P, D), may be a memory map. `n_neighbors` is clipped to P - 1. Equal rows are neighbours at distance 0;
    only the row itself is left out. `use_bf16`: None decides by the device. Memory: blocks; on a GPU also
    the rows and a compact copy, HELD_BYTES each at most. Raises TooFewSamples (fewer than 2 rows), InvalidInput (NaN,
    n_neighbors < 1).
    """
    if n_neighbors < 1:
        raise InvalidInput(f"n_neighbors must be at least 1, not {n_neighbors}.", field="n_neighbors")
    if len(features) < 2:
        raise TooFewSamples(f"Neighbours need at least 2 patches, the table has {len(features)}.")
    mean, _ = feature_statistics(features)
    bf16 = has_fast_bf16(device) if use_bf16 is None else use_bf16
    search = _Search(features, mean, min(n_neighbors, len(features) - 1), device, bf16)
    index = torch.empty((len(features), search.k), dtype=torch.int64, device=device)
    for query in blocks(len(features), QUERY_ROWS):
        index[query] = search.neighbours(query)
        on_progress(Progress("neighbours", query.stop, len(features)))
    return NeighbourLists(index, torch.full((len(index),), search.k, device=device))


class _Search:
    """Results are written into tensors made before each loop. Collected in lists, they would lie between the loop's
    large blocks, keep the allocator from using these again, and cost hundreds of megabytes.
    """

    def __init__(self, features: FloatArray, mean: FloatArray, k: int, device: str, bf16: bool) -> None:
        self.rows = CachedRows(features, device=device, resident_bytes=HELD_BYTES)
        self.n_rows, self.k, self.device = len(features), k, device
        # distances do not change with the origin, and rounding errors are least around the mean
        self.mean = torch.from_numpy(mean).to(device)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.held: Tensor | None = None
        # On the CPU it would double the memory, and save little: a block is converted once for QUERY_ROWS queries.
        if device != "cpu" and len(features) * features.shape[1] * self.dtype.itemsize <= HELD_BYTES:
            self.held = torch.empty(features.shape, dtype=self.dtype, device=device)
            for block in blocks(len(features)):
                self.held[block] = self.exact(block).to(self.dtype)
        self.norms = torch.empty(len(features), device=device)
        for block in blocks(len(features), KEY_ROWS):
            self.norms[block] = self.exact(block).square_().sum(dim=1)

    def exact(self, rows: slice | Tensor) -> Tensor:
        """Centred float32 rows."""
        return self.rows.rows(rows).sub_(self.mean)

    def keys(self, block: slice, dtype: torch.dtype) -> Tensor:
        if self.held is not None and self.held.dtype == dtype:
            return self.held[block]
        return self.exact(block).to(dtype)

    def neighbours(self, query: slice) -> Tensor:
        numbers = torch.arange(query.start, query.stop, device=self.device)
        n_candidates = min(self.k + SPARE_CANDIDATES, self.n_rows - 1)
        approximate, candidates = self.propose(numbers, self.keys(query, self.dtype), n_candidates)
        index, exact = self.rerank(numbers, candidates)
        if n_candidates < self.n_rows - 1:
            doubtful = self.may_miss(numbers, approximate, candidates, index, exact)
            if bool(doubtful.any()):
                again = numbers[doubtful]
                _, candidates = self.propose(again, self.exact(again), n_candidates)
                index[doubtful] = self.rerank(again, candidates)[0]
        return index[:, : self.k]

    def propose(self, numbers: Tensor, queries: Tensor, n_candidates: int) -> tuple[Tensor, Tensor]:
        """(Q, m) squared distances less the query's own norm, and rows, of the nearest m, in any order."""
        best = torch.full((len(numbers), 0), torch.inf, device=self.device)
        rows = torch.empty((len(numbers), 0), dtype=torch.int64, device=self.device)
        for block in blocks(self.n_rows, KEY_ROWS):
            products = queries @ self.keys(block, queries.dtype).T
            distances = products.float().mul_(-2).add_(self.norms[block])
            inside = (numbers >= block.start) & (numbers < block.stop)
            distances[inside.nonzero()[:, 0], numbers[inside] - block.start] = torch.inf
            values, columns = distances.topk(min(n_candidates, distances.shape[1]), dim=1, largest=False, sorted=False)
            best, rows = torch.cat([best, values], dim=1), torch.cat([rows, columns + block.start], dim=1)
            if best.shape[1] > n_candidates:
                best, columns = best.topk(n_candidates, dim=1, largest=False, sorted=False)
                rows = rows.gather(1, columns)
        return best, rows

    def rerank(self, numbers: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates by exact distance (ties: the lower row first), and those squared distances."""
        candidates = candidates.sort(dim=1).values
        found = torch.empty_like(candidates)
        distances = torch.empty(candidates.shape, device=self.device)
        for part in blocks(len(numbers), RERANK_ROWS):
            rows = self.rows.rows(candidates[part].reshape(-1)).reshape(*candidates[part].shape, -1)
            difference = rows.sub_(self.rows.rows(numbers[part])[:, None, :])
            distance, order = torch.linalg.vecdot(difference, difference).sort(dim=1, stable=True)
            found[part], distances[part] = candidates[part].gather(1, order), distance
        return found, distances

    def may_miss(
        self, numbers: Tensor, approximate: Tensor, candidates: Tensor, index: Tensor, exact: Tensor
    ) -> Tensor:
        """(Q,) rows where a row outside the candidates could be nearer than the k-th found.

        A row outside has an approximate distance above the worst candidate's; its true distance is below the k-th
        true one only if rounding moved it by more than that gap. The row's own candidates tell how large errors are.
        """
        believed = approximate + self.norms[numbers, None]
        true = exact.gather(1, index.argsort(dim=1))
        error = (believed.gather(1, candidates.argsort(dim=1)) - true).square().mean(dim=1).sqrt()
        gap = believed.max(dim=1).values - exact[:, self.k - 1]
        return gap < SAFETY_DEVIATIONS * error
