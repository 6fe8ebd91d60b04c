"""Patch clustering: an epoch against its matrix products, and how time and memory grow with the number of patches.

    python bench/clustering.py [--patches 20000 200000 2000000] [--dim 512] > clustering.json

Synthetic features in a memory-mapped float16 file, as a job has them; neighbours at random (`bench/neighbours.py`
measures their search). Per number of patches, in a process of its own: CPU seconds of an epoch and of reading the class
embeddings off, the epoch's matrix products alone, and what the process holds beside the file. The Markdown table goes
to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import exponent
from bench.memory import memory_of
from bench.training import Recorder, bound
from models.embedding.heads import seeded_heads
from models.embedding.neighbours import NeighbourLists
from models.embedding.rows import CachedRows, blocks, feature_statistics
from models.embedding.training import PatchSet, class_means, train_epoch
from models.params import ClusteringParams
from service.core.process import COMPUTE_ENVIRONMENT

N_CLASSES, KNOWLEDGE_DIM, PATCHES_PER_IMAGE = 40, 85, 9
EPOCHS = 3


def write_features(path: Path, n_patches: int, dim: int) -> None:
    """A .npy of (n_patches, dim) float16, written block by block."""
    rng = np.random.default_rng(0)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n_patches, dim))
    for block in blocks(n_patches):
        table[block] = rng.random((block.stop - block.start, dim), np.float32)
    table.flush()


def measure(path: Path) -> dict[str, Any]:
    """One row of the table, of the features in `path`."""
    table = np.load(path, mmap_mode="r")
    n_patches = len(table)
    params, chance = ClusteringParams(), torch.Generator().manual_seed(0)
    images = torch.arange(n_patches) // PATCHES_PER_IMAGE
    patches = PatchSet(
        features=CachedRows(table),
        classes=images % N_CLASSES,
        images=images,
        neighbours=NeighbourLists(
            torch.randint(0, n_patches, (n_patches, params.n_neighbors), generator=chance),
            torch.full((n_patches,), params.n_neighbors),
        ),
        knowledge=torch.nn.functional.normalize(torch.rand(N_CLASSES, KNOWLEDGE_DIM, generator=chance)),
    )
    centre, spread = feature_statistics(table)
    heads = seeded_heads(
        torch.from_numpy(centre),
        torch.from_numpy(spread),
        n_clusters=params.n_clusters,
        n_classes=N_CLASSES,
        knowledge_dim=KNOWLEDGE_DIM,
        head_input=params.head_input,
        seed=0,
    )
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    with Recorder() as recorder:  # the first epoch warms up besides
        train_epoch(heads, patches, params, optimizer, chance)
    seconds = []
    for _ in range(EPOCHS):
        began = time.process_time()
        train_epoch(heads, patches, params, optimizer, chance)
        seconds.append(time.process_time() - began)
    began = time.process_time()
    class_means(heads, patches)
    read = time.process_time() - began
    anonymous = memory_of(os.getpid())["anonymous"]
    products, operations = bound(recorder.products, "cpu")
    return {
        "patches": n_patches,
        "file_mib": round(table.nbytes / 2**20),
        "epoch": min(seconds),
        "products": products,
        "gflop": operations / 1e9,
        "class_means": read,
        "anonymous_mib": round(anonymous),
        "neighbours_mib": round(patches.neighbours.index.nbytes / 2**20),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with the exponent of the time from each size to the next."""
    lines = [
        "| patches | features on disk, MiB | an epoch, CPU s | its products | ratio | GFLOP/s | class embeddings, s | "
        "memory, MiB | of it neighbour lists | exponent |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(rows):
        before = rows[i - 1]
        grown = f"{exponent(row['epoch'], row['patches'], before['epoch'], before['patches']):.2f}" if i else ""
        lines.append(
            f"| {row['patches']:,} | {row['file_mib']} | {row['epoch']:.2f} | {row['products']:.2f} | "
            f"{row['epoch'] / row['products']:.2f} | {row['gflop'] / row['epoch']:.0f} | {row['class_means']:.2f} | "
            f"{row['anonymous_mib']} | {row['neighbours_mib']} | {grown} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.of)))
        return
    rows: list[dict[str, Any]] = []
    for n_patches in args.patches:
        with tempfile.TemporaryDirectory(prefix="unseen-clustering-") as folder:
            path = Path(folder) / "features.npy"
            write_features(path, n_patches, args.dim)
            done = subprocess.run(
                [sys.executable, __file__, "--of", str(path)],
                env={**os.environ, **COMPUTE_ENVIRONMENT},
                stdout=subprocess.PIPE,
                check=True,
            )
        rows.append(json.loads(done.stdout))
    print(json.dumps(rows, indent=1))
    print(markdown(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
