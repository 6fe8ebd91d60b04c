"""Time and memory of indexing and looking up a large word-vector file, made up on the spot.

python bench/knowledge.py                               # 400,000 words x 300 numbers, GloVe text (1.0 GB)
python bench/knowledge.py --words 3000000 --binary      # the size of the Google News vectors
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models.knowledge.word_vectors import INDEX_FILES, WordVectorIndex

_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]


def words(n: int) -> Iterator[str]:
    """Distinct pronounceable words, shortest first."""
    base = len(_SYLLABLES)
    for i in range(base, n + base):
        word = ""
        while i:
            i, digit = divmod(i, base)
            word = _SYLLABLES[digit] + word
        yield word


def make_file(path: Path, n: int, dim: int, *, binary: bool) -> None:
    """Vectors repeat every 1,000 words: formatting numbers would take longer than reading them."""
    pool = np.random.default_rng(0).normal(scale=0.4, size=(1000, dim)).astype("<f4")
    rows = [row.tobytes() if binary else " ".join(f"{x:.5g}" for x in row).encode() + b"\n" for row in pool]
    with path.open("wb") as out:
        if binary:
            out.write(f"{n} {dim}\n".encode())
        for i, word in enumerate(words(n)):
            out.write(word.encode() + b" " + rows[i % 1000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=300)
    parser.add_argument("--binary", action="store_true", help="word2vec binary instead of text")
    parser.add_argument("--directory", type=Path, help="where to put the temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        source = Path(folder) / "words"
        make_file(source, args.words, args.dim, binary=args.binary)
        size = source.stat().st_size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter(), time.process_time()
        WordVectorIndex.build(source, Path(folder) / "index")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        disk = sum((Path(folder) / "index" / name).stat().st_size for name in INDEX_FILES)
        found = {
            "words": args.words,
            "dim": args.dim,
            "binary": args.binary,
            "file_mb": size / 1e6,
            "index_mb": disk / 1e6,
            "index_s": wall,
            "index_cpu_s": cpu,
            "memory_mib": grown,
            **time_lookups(Path(folder) / "index", args.words),
        }
    print(json.dumps(found, indent=1))
    print("\n".join(["| | |", "|---|---|", *(f"| {k} | {v:,.4g} |" for k, v in found.items())]), file=sys.stderr)


def time_lookups(directory: Path, n_words: int) -> dict[str, float]:
    """Milliseconds to open the index, and a name: one word, two words, and unknown ones, 1,000 over the vocabulary."""
    start = time.perf_counter()
    index = WordVectorIndex.open(directory)
    found = {"open_ms": (time.perf_counter() - start) * 1e3}
    every = max(1, n_words // 1000)
    known = [word for i, word in enumerate(words(n_words)) if i % every == 0][:1000]
    pairs = [f"{a}_{b}" for a, b in zip(known, reversed(known), strict=True)]
    typos = [f"{word[:-1]}qx" for word in known[:50]]
    for name, names in {"known": known, "two words": pairs, "with suggestions": typos}.items():
        start = time.perf_counter()
        index.lookup(names)
        found[f"lookup_ms, {name}"] = (time.perf_counter() - start) / len(names) * 1e3
    return found


if __name__ == "__main__":
    main()
