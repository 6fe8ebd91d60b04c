"""Exact nearest neighbours of every patch, mined once before training (VGSE Eq. 2; SCAN's practice).

Blocked matrix products with running lists of the nearest, so that the n x n distances never exist. A block is read
once, for the minima of groups of its columns; only the groups with the least are looked into. Where the device has fast
bfloat16 the products are bfloat16 and only propose candidates: distances are then recomputed in float32, and a row
whose candidates might miss a true neighbour (judged by its own measured rounding error) is searched again in float32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import FloatArray, OnProgress, Progress, ignore_progress
from models.embedding.rows import CachedRows, blocks, feature_statistics
from models.errors import InvalidInput, TooFewSamples
from models.precision import has_fast_bf16

QUERY_ROWS = 4096
KEY_ROWS = 8192
PRODUCT_ROWS = 1024  # queries whose distances to a block of keys exist at a time
CONVERTED_ROWS = 128  # a thread; with their float32 copies they fit the cache
RERANK_ROWS = 32  # a thread; fewer would fit the cache, but threads then wait for each other more often
THREADS_OF_GPU = 8  # so many threads' rows at a time
ORIGIN_ROWS = 1024
ALIGNMENT = 8  # columns, for a GPU's matrix units
GROUP = 16
SPARE_CANDIDATES = 8
SAFETY_DEVIATIONS = 6.0
HELD_BYTES = 4 << 30
ROW_BITS = (1 << 29) - 1  # what a float64 has more than a float32


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
    only the row itself is left out. `use_bf16`: None decides by the device. Memory: blocks; on a GPU also the rows,
    HELD_BYTES at most. Raises TooFewSamples (fewer than 2 rows), InvalidInput (NaN, squares beyond float32,
    n_neighbors < 1).
    """
    if n_neighbors < 1:
        raise InvalidInput(f"n_neighbors must be at least 1, not {n_neighbors}.", field="n_neighbors")
    if len(features) < 2:
        raise TooFewSamples(f"Neighbours need at least 2 patches, the table has {len(features)}.")
    bf16 = has_fast_bf16(device) if use_bf16 is None else use_bf16
    search = _Search(features, min(n_neighbors, len(features) - 1), device, bf16)
    index = torch.empty((len(features), search.k), dtype=torch.int64, device=device)
    for query in blocks(len(features), QUERY_ROWS):
        index[query] = search.neighbours(query)
        on_progress(Progress("neighbours", query.stop, len(features)))
    return NeighbourLists(index, torch.full((len(index),), search.k, device=device))


class _Search:
    """Results are written into tensors made before each loop. Collected in lists, they would lie between the loop's
    large blocks, keep the allocator from using these again, and cost hundreds of megabytes.
    """

    def __init__(self, features: FloatArray, k: int, device: str, bf16: bool) -> None:
        self.rows = CachedRows(features, device=device, resident_bytes=HELD_BYTES)
        self.n_rows, self.dim = features.shape
        self.width = _up(self.dim + 2, ALIGNMENT)
        self.k, self.device = k, device
        n_threads = torch.get_num_threads() if device == "cpu" else THREADS_OF_GPU
        self.converted_rows, self.rerank_rows = n_threads * CONVERTED_ROWS, n_threads * RERANK_ROWS
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        # distances do not change with the origin, and rounding errors are least near a mean: some rows' will do
        some = torch.arange(0, len(features), -(-len(features) // ORIGIN_ROWS), device=device)
        self.origin = self.rows.rows(some).mean(dim=0)
        self.norms = torch.empty(len(features), device=device)
        for block in blocks(len(features), self.converted_rows):
            self.norms[block] = self.exact(block).square_().sum(dim=1)
        if not bool((self.norms < torch.finfo(torch.bfloat16).max / 8).all()):
            feature_statistics(features)  # says which row
            raise InvalidInput("Patch features are too large for distances in float32.", field="features")

    def exact(self, rows: slice | Tensor) -> Tensor:
        """Centred float32 rows."""
        return self.rows.rows(rows).sub_(self.origin)

    def neighbours(self, query: slice) -> Tensor:
        numbers = torch.arange(query.start, query.stop, device=self.device)
        n_candidates = min(self.k + SPARE_CANDIDATES, self.n_rows - 1)
        approximate, candidates = self.propose(numbers, n_candidates, self.dtype)
        exact = self.distances(numbers, candidates)
        index = self.nearest(candidates, exact)
        if n_candidates < self.n_rows - 1 and self.dtype != torch.float32:
            doubtful = self.may_miss(approximate + self.norms[numbers, None], exact)
            if bool(doubtful.any()):
                again = numbers[doubtful]
                _, candidates = self.propose(again, n_candidates, torch.float32)
                index[doubtful] = self.nearest(candidates, self.distances(again, candidates))
        return index

    def queries(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q, W) whose products with `keys` are squared distances less the query's own norm."""
        result = torch.empty((len(numbers), self.width), dtype=dtype, device=self.device)
        for part in blocks(len(numbers), self.converted_rows):
            result[part, : self.dim] = self.exact(numbers[part]).mul_(-2)
        result[:, self.dim :] = 1
        return result

    def keys(self, block: slice, dtype: torch.dtype) -> Tensor:
        """(K, W): the rows, and their norms in two columns, as one bfloat16 is too coarse. K is padded to whole
        groups, with rows farther than any.
        """
        n_rows = block.stop - block.start
        result = torch.empty((_up(n_rows, GROUP), self.width), dtype=dtype, device=self.device)
        for part in blocks(n_rows, self.converted_rows):
            result[part, : self.dim] = self.exact(slice(block.start + part.start, block.start + part.stop))
        result[n_rows:, : self.dim] = 0
        norms = result[:, self.dim :].zero_()
        coarse = self.norms[block].to(dtype)
        norms[:n_rows, 0], norms[:n_rows, 1] = coarse, self.norms[block] - coarse
        norms[n_rows:, 0] = torch.finfo(dtype).max
        return result

    def propose(self, numbers: Tensor, n_candidates: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(Q, m) squared distances less the query's own norm, and rows (ascending), of the nearest m."""
        queries = self.queries(numbers, dtype)
        found = torch.full((len(numbers), n_candidates), torch.inf, dtype=torch.float64, device=self.device)
        n_products = min(PRODUCT_ROWS, len(numbers)) * _up(min(KEY_ROWS, self.n_rows), GROUP)
        room = torch.empty(n_products, dtype=dtype, device=self.device)
        for block in blocks(self.n_rows, KEY_ROWS):
            keys = self.keys(block, dtype)
            for part in blocks(len(numbers), PRODUCT_ROWS):
                own = numbers[part]
                distances = room[: len(own) * len(keys)].view(len(own), len(keys))
                torch.mm(queries[part], keys.T, out=distances)
                inside = (own >= block.start) & (own < block.stop)
                distances[inside.nonzero()[:, 0], own[inside] - block.start] = torch.finfo(dtype).max
                nearest = _nearest(distances, n_candidates, block.start)
                found[part] = _least(torch.cat([found[part], nearest], dim=1), n_candidates)
        values, rows = _values_and_rows(found)
        rows, order = rows.sort(dim=1)
        return values.gather(1, order), rows

    def distances(self, numbers: Tensor, candidates: Tensor) -> Tensor:
        """(Q, m) exact squared distances."""
        result = torch.empty(candidates.shape, device=self.device)
        for part in blocks(len(numbers), self.rerank_rows):
            rows = self.rows.rows(candidates[part].reshape(-1)).view(*candidates[part].shape, -1)
            rows.sub_(self.rows.rows(numbers[part])[:, None, :])
            torch.linalg.vector_norm(rows, dim=2, out=result[part])
        return result.square_()

    def nearest(self, candidates: Tensor, exact: Tensor) -> Tensor:
        """(Q, k) candidates (ascending) by distance; ties: the lower row first."""
        return candidates.gather(1, exact.argsort(dim=1, stable=True)[:, : self.k])

    def may_miss(self, believed: Tensor, exact: Tensor) -> Tensor:
        """(Q,) rows where a row outside the candidates could be nearer than the k-th found.

        A row outside has an approximate distance above the worst candidate's; its true distance is below the k-th
        true one only if rounding moved it by more than that gap. The row's own candidates tell how large errors are.
        """
        error = (believed - exact).square().mean(dim=1).sqrt()
        gap = believed.amax(dim=1) - exact.kthvalue(self.k, dim=1).values
        return gap < SAFETY_DEVIATIONS * error


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _nearest(distances: Tensor, count: int, first_row: int) -> Tensor:
    """(Q, up to count) numbered distances of the least `count` columns.

    These lie in the `count` groups of columns whose minima are least: all else is read once, for the minima. A group
    is every n-th column, which reduces faster than columns side by side.
    """
    groups = distances.view(len(distances), GROUP, -1)
    column = torch.arange(groups.shape[2], device=distances.device)
    _, chosen = _values_and_rows(_least(_numbered(groups.amin(dim=1), column), count))
    values = groups.gather(2, chosen[:, None].expand(-1, GROUP, -1))
    first = torch.arange(GROUP, device=distances.device)[:, None] * len(column) + first_row
    return _least(_numbered(values, chosen[:, None] + first).flatten(1), count)


def _numbered(values: Tensor, rows: Tensor) -> Tensor:
    """float64 numbers in the order of `values` that carry `rows` in the bits that a float32 does not have."""
    return values.double().view(torch.int64).bitwise_or_(rows).view(torch.float64)


def _values_and_rows(numbered: Tensor) -> tuple[Tensor, Tensor]:
    bits = numbered.view(torch.int64)
    return (bits & ~ROW_BITS).view(torch.float64).float(), bits & ROW_BITS


def _least(values: Tensor, count: int) -> Tensor:
    """(Q, up to count) least of each row, in any order; `values` may be reordered."""
    if count >= values.shape[1]:
        return values
    if values.device.type != "cpu":
        return values.topk(count, dim=1, largest=False, sorted=False).values
    # NumPy's takes a seventh of topk's time on a thread, and uses only one
    rows, n_threads = values.numpy(), torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda part: rows[part].partition(count - 1), blocks(len(rows), -(-len(rows) // n_threads))))
    return values[:, :count]
