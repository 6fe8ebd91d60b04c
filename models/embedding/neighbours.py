"""Exact nearest neighbours of every patch, mined once before training (VGSE Eq. 2; SCAN's practice).

Blocked matrix products with running lists of the nearest, so that the n x n distances never exist. A block of distances
is computed once and serves the rows on both of its sides: it is read for the minima of groups, and only the groups with
the least are looked into. Where the device has fast bfloat16 the products are bfloat16 and only propose candidates:
distances are then recomputed in float32, and a row whose candidates might miss a true neighbour (judged by its own
measured rounding error) is searched again in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base import FloatArray, OnProgress, Progress, ignore_progress
from models.embedding.rows import CachedRows, blocks, feature_statistics
from models.errors import InvalidInput, TooFewSamples
from models.precision import has_fast_bf16

PRODUCT_ROWS = 4000  # at most, on both sides; columns a power of two apart would share few places of the caches
CONVERTED_ROWS = 128  # a thread; with their float32 copies they fit the cache
RERANK_ROWS = 32  # a thread; fewer would fit the cache, but threads then wait for each other more often
THREADS_OF_GPU = 8  # so many threads' rows at a time
ORIGIN_ROWS = 1024
ALIGNMENT = 8  # columns, for a GPU's matrix units
GROUP = 8
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
    HELD_BYTES at most, and 8 bytes for each of a row's candidates. Raises TooFewSamples (fewer than 2 rows),
    InvalidInput (NaN, squares beyond float32, n_neighbors < 1).
    """
    if n_neighbors < 1:
        raise InvalidInput(f"n_neighbors must be at least 1, not {n_neighbors}.", field="n_neighbors")
    if len(features) < 2:
        raise TooFewSamples(f"Neighbours need at least 2 patches, the table has {len(features)}.")
    bf16 = has_fast_bf16(device) if use_bf16 is None else use_bf16
    search = _Search(features, min(n_neighbors, len(features) - 1), device, bf16)
    index = search.index(on_progress)
    return NeighbourLists(index, torch.full((len(index),), search.k, device=device))


class _Search:
    """Results are written into tensors made before each loop. Collected in lists, they would lie between the loop's
    large blocks, keep the allocator from using these again, and cost hundreds of megabytes.
    """

    def __init__(self, features: FloatArray, k: int, device: str, bf16: bool) -> None:
        self.rows = CachedRows(features, device=device, resident_bytes=HELD_BYTES)
        self.n_rows, self.dim = features.shape
        self.width = _up(self.dim + 4, ALIGNMENT)
        self.k, self.device = k, device
        self.n_candidates = min(k + SPARE_CANDIDATES, self.n_rows - 1)
        self.block_rows = -(-self.n_rows // -(-self.n_rows // PRODUCT_ROWS))  # blocks of one size
        n_threads = torch.get_num_threads() if device == "cpu" else THREADS_OF_GPU
        self.converted_rows, self.rerank_rows = n_threads * CONVERTED_ROWS, n_threads * RERANK_ROWS
        self.dtype = torch.bfloat16 if bf16 and self.n_candidates < self.n_rows - 1 else torch.float32
        # distances do not change with the origin, and rounding errors are least near a mean: some rows' will do
        some = torch.arange(0, len(features), -(-len(features) // ORIGIN_ROWS), device=device)
        self.origin = self.rows.rows(some).mean(dim=0)
        self.norms = torch.empty(len(features), device=device)
        for block in blocks(len(features), self.converted_rows):
            self.norms[block] = self.exact(block).square_().sum(dim=1)
        if not bool((self.norms < torch.finfo(torch.bfloat16).max / 16).all()):
            feature_statistics(features)  # says which row
            raise InvalidInput("Patch features are too large for distances in float32.", field="features")
        # bfloat16 is finest near 0: there its distances, less this, are for the nearest of most rows
        self.level = self.norms.median()

    def exact(self, rows: slice | Tensor) -> Tensor:
        """Centred float32 rows."""
        return self.rows.rows(rows).sub_(self.origin)

    def index(self, on_progress: OnProgress) -> Tensor:
        """(P, k) neighbours of each row, nearest first."""
        index = torch.empty((self.n_rows, self.k), dtype=torch.int64, device=self.device)
        found = self.nothing_found(self.n_rows)
        for query in blocks(self.n_rows, self.block_rows):
            numbers = torch.arange(query.start, query.stop, device=self.device)
            for key, products in self.products(numbers, query.start, self.dtype):
                _find(found[query], products[: len(numbers)], key.start)
                if key != query:
                    _find(found[key], products[:, : key.stop - key.start].T, query.start)
            index[query], doubtful = self.nearest(numbers, found[query])
            if self.dtype == torch.bfloat16 and bool(doubtful.any()):
                again = numbers[doubtful]
                found_again = self.nothing_found(len(again))
                for key, products in self.products(again, 0, torch.float32):
                    _find(found_again, products[: len(again)], key.start)
                index[again], _ = self.nearest(again, found_again)
            on_progress(Progress("neighbours", query.stop, self.n_rows))
        return index

    def nothing_found(self, n_rows: int) -> Tensor:
        return torch.full((n_rows, self.n_candidates), torch.inf, dtype=torch.float64, device=self.device)

    def products(self, numbers: Tensor, first_row: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows from `first_row` on, and (Q, K) squared distances of the rows `numbers` from them.

        In bfloat16 they are less by `level`. Q and K are padded to whole groups, with rows farther than any; so far is
        a row from itself. Each block's products lie where the last one's did.
        """
        queries = self.factor(numbers, dtype)
        queries[:, : self.dim] *= -2
        extra = queries[:, self.dim : self.dim + 4]
        extra.copy_(extra.roll(2, dims=1))  # norms meet ones, and ones norms
        room = torch.empty(len(queries) * _up(self.block_rows, GROUP), dtype=dtype, device=self.device)
        for start in range(first_row, self.n_rows, self.block_rows):
            key = slice(start, min(start + self.block_rows, self.n_rows))
            keys = self.factor(key, dtype)
            products = room[: len(queries) * len(keys)].view(len(queries), len(keys))
            torch.mm(queries, keys.T, out=products)
            inside = ((numbers >= key.start) & (numbers < key.stop)).nonzero()[:, 0]
            products[inside, numbers[inside] - key.start] = torch.finfo(dtype).max
            yield key, products

    def factor(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """(R, W): the rows, their norms in two columns, as one bfloat16 is too coarse, and two columns of ones."""
        norms = self.norms[rows] - (self.level / 2 if dtype == torch.bfloat16 else 0)
        result = torch.zeros((_up(len(norms), GROUP), self.width), dtype=dtype, device=self.device)
        for part in blocks(len(norms), self.converted_rows):
            some = slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
            result[part, : self.dim] = self.exact(some)
        extra = result[:, self.dim :]
        extra[: len(norms), 0] = norms.to(dtype)
        extra[: len(norms), 1] = norms - extra[: len(norms), 0]
        extra[len(norms) :, 0] = torch.finfo(dtype).max / 2
        extra[:, 2:4] = 1
        return result

    def nearest(self, numbers: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, k) nearest of the rows found, by exact distance (ties: the lower row first), and (Q,) what `may_miss`."""
        believed, candidates = _values_and_rows(found)
        candidates, order = candidates.sort(dim=1)
        exact = self.distances(numbers, candidates)
        index = candidates.gather(1, exact.argsort(dim=1, stable=True)[:, : self.k])
        return index, self.may_miss(believed.gather(1, order) + self.level, exact)

    def distances(self, numbers: Tensor, candidates: Tensor) -> Tensor:
        """(Q, m) exact squared distances."""
        result = torch.empty(candidates.shape, device=self.device)
        for part in blocks(len(numbers), self.rerank_rows):
            rows = self.rows.rows(candidates[part].reshape(-1)).view(*candidates[part].shape, -1)
            rows.sub_(self.rows.rows(numbers[part])[:, None, :])
            torch.linalg.vector_norm(rows, dim=2, out=result[part])
        return result.square_()

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


def _find(found: Tensor, distances: Tensor, first_row: int) -> None:
    """Keeps in `found` (Q, m) the least of it and of the numbered `distances` (Q, K).

    These lie in the m groups of columns whose minima are least: all else is read once, for the minima. A group is
    every n-th column, which reduces faster than columns side by side. `distances` may be a transpose: memory is read in
    its own order.
    """
    count = found.shape[1]
    groups = distances.view(len(distances), GROUP, -1)
    minima = torch.amin(groups, 1, out=torch.empty_like(groups[:, 0]))  # of the same order of dimensions
    column = torch.arange(groups.shape[2], device=distances.device)
    _, chosen = _values_and_rows(_least(_numbered(minima, column).contiguous(), count))
    values = groups.gather(2, chosen[:, None].expand(-1, GROUP, -1))
    first = torch.arange(GROUP, device=distances.device)[:, None] * len(column) + first_row
    nearest = _least(_numbered(values, chosen[:, None] + first).flatten(1), count)
    found[:] = _least(torch.cat([found, nearest], dim=1), count)


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
