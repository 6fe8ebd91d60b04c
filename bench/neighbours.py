"""Nearest neighbours of patches against the matrix products that they need.

    python bench/neighbours.py [--rows 2000 6000 20000] [--dim 1280] [--device cuda] > neighbours.json

Features like a network's: half of the numbers 0, rows in overlapping groups. Per number of rows: seconds of ours, of
a plain float32 search (blocked products and top-k, nothing else), and of the products alone, at the blocks and in the
type in use; how often the neighbours found are those of float64. Ratios are within one process; least of three runs.
The Markdown table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import exponent
from models.embedding.neighbours import PRODUCT_ROWS, nearest_neighbours
from models.embedding.rows import blocks
from models.precision import has_fast_bf16

K = 20
CHECKED_ROWS = 256
PLAIN_QUERIES, PLAIN_KEYS = 4096, 2048


def features(n_rows: int, dim: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """(n_rows, dim) like a network's last layer after its ReLU."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(8, n_rows // 100), dim), np.float32)
    rows = centres[rng.integers(0, len(centres), n_rows)] + rng.standard_normal((n_rows, dim), np.float32)
    found: np.ndarray[Any, np.dtype[np.float16]] = np.maximum(rows, 0).astype(np.float16)
    return found


def least(work: Callable[[], Any], device: str, runs: int = 3) -> float:
    """Seconds."""
    took = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took)


def products(rows: torch.Tensor) -> None:
    """Of each two blocks once; nothing is kept."""
    room = torch.empty(PRODUCT_ROWS**2, dtype=rows.dtype, device=rows.device)
    for query in blocks(len(rows), PRODUCT_ROWS):
        for key in blocks(len(rows) - query.start, PRODUCT_ROWS):
            keys = rows[query.start :][key]
            shape = len(rows[query]), len(keys)
            torch.mm(rows[query], keys.T, out=room[: shape[0] * shape[1]].view(shape))


def plain_search(rows: torch.Tensor) -> torch.Tensor:
    """(P, K) nearest others of float32 rows, by blocked products and a running top-k."""
    norms = rows.square().sum(dim=1)
    index = torch.empty((len(rows), K), dtype=torch.int64, device=rows.device)
    for query in blocks(len(rows), PLAIN_QUERIES):
        best = torch.empty((len(rows[query]), 0), device=rows.device)
        found = torch.empty_like(best, dtype=torch.int64)
        for key in blocks(len(rows), PLAIN_KEYS):
            distances = (rows[query] @ rows[key].T).mul_(-2).add_(norms[key])
            distances.diagonal(query.start - key.start).fill_(torch.inf)
            values, columns = distances.topk(K, dim=1, largest=False, sorted=False)
            found, best = torch.cat([found, columns + key.start], dim=1), torch.cat([best, values], dim=1)
            best, columns = best.topk(K, dim=1, largest=False)
            found = found.gather(1, columns)
        index[query] = found
    return index


def recall(table: np.ndarray[Any, Any], index: torch.Tensor) -> float:
    """Share of the true neighbours, by distances in float64, that were found, over some rows."""
    rows = table.astype(np.float64)
    norms = (rows**2).sum(axis=1)
    some = np.random.default_rng(1).choice(len(rows), min(CHECKED_ROWS, len(rows)), replace=False)
    distances = norms[some, None] + norms[None] - 2 * rows[some] @ rows.T
    distances[np.arange(len(some)), some] = np.inf
    true = np.argsort(distances, axis=1, kind="stable")[:, :K]
    found = index.cpu().numpy()[some]
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(true, found, strict=True)]))


def measure(n_rows: int, dim: int, device: str) -> dict[str, Any]:
    """One row of the table."""
    table = features(n_rows, dim)
    bf16 = has_fast_bf16(device)
    found = nearest_neighbours(table, K, device=device)
    exact = torch.from_numpy(table).to(device).float()
    bound = least(lambda: products(exact.to(torch.bfloat16 if bf16 else torch.float32)), device)
    return {
        "rows": n_rows,
        "bf16": bf16,
        "seconds": least(lambda: nearest_neighbours(table, K, device=device), device),
        "float32": least(lambda: plain_search(torch.from_numpy(table).to(device).float()), device),
        "products": bound,
        "recall": recall(table, found.index),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with the exponent of the time from each size to the next."""
    lines = [
        "| rows | products in | seconds | float32 search | products | ÷ products | ÷ float32 | recall | exponent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(rows):
        before = rows[i - 1]
        grown = f"{exponent(row['seconds'], row['rows'], before['seconds'], before['rows']):.2f}" if i else ""
        lines.append(
            f"| {row['rows']:,} | {'bfloat16' if row['bf16'] else 'float32'} | {row['seconds']:.2f} | "
            f"{row['float32']:.2f} | {row['products']:.2f} | {row['seconds'] / row['products']:.2f} | "
            f"{row['seconds'] / row['float32']:.2f} | {row['recall']:.4f} | {grown} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 6000, 20_000])
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [measure(n_rows, args.dim, args.device) for n_rows in args.rows]
    print(json.dumps(rows, indent=1))
    print(markdown(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
