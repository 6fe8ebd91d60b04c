"""Looks whether anything became much slower: ratios within one run against those that were recorded, with wide margins.

    python -m bench guard          (a minute or two; exit code 1 if a ratio is past its limit)

Absolute times are never compared, so that any machine will do; the limits leave room for machines of another kind.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import neighbours, smo, training
from models.backbones import create_backbone
from models.base import FloatArray
from workers.engine import Engine
from workers.predictions import Resident

N_IMAGES = 128
IN_FLIGHT = 32


@dataclass(frozen=True)
class Check:
    """What is measured, the ratio found when it was recorded (Intel Xeon), and how far it may go, up or down."""

    name: str
    measure: Callable[[], float]
    recorded: float
    limit: float

    def is_kept(self, found: float) -> bool:
        """A limit above what was recorded is the most, one below it the least."""
        return found <= self.limit if self.limit > self.recorded else found >= self.limit


class _Keep:
    """A classifier that costs nothing."""

    is_joint = False

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        """Any."""
        return np.zeros((len(features), len(class_embeddings)), np.float32)


def engine() -> float:
    """Images a second of the inference engine, from files, over those of its network on decoded batches of 32."""
    backbone = create_backbone("mobilenet_v2", weights=None)
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (240, 320, 3), np.uint8)).save(out, "JPEG")
    batch = torch.randint(0, 256, (32, 3, 224, 224), dtype=torch.uint8)
    alone = 32 / neighbours.least(lambda: backbone.features(batch), "cpu")
    resident = Resident(
        _Keep(), backbone, 224, ("a", "b"), np.zeros((2, 1), np.float32), np.array([True, False]), 0.0, 1.0
    )
    with Engine(decode_threads=2) as running:
        waiting: deque[Future[Any]] = deque()
        began = time.perf_counter()
        for _ in range(N_IMAGES):
            waiting.append(running.classify(resident, [out.getvalue()], top_k=1))
            if len(waiting) == IN_FLIGHT:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        return N_IMAGES / (time.perf_counter() - began) / alone


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other would measure what else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def epoch() -> float:
    """Seconds of an epoch of f-VAEGAN over those of its matrix products, on one thread."""
    with one_thread():
        return float(training.measure("f_vaegan", "cpu", None)[0]["ratio"])


def search() -> float:
    """Seconds of a neighbour search over those of a plain float32 one, on one thread."""
    with one_thread():
        row = neighbours.measure(6000, 512, "cpu")
    if row["recall"] < 1:
        raise SystemExit(f"Neighbours were missed: recall {row['recall']}.")
    return float(row["seconds"] / row["float32"])


CHECKS = (
    Check("SMO: loop of a general QP solver ÷ ours, 150 x 50", lambda: smo.measure(150, 50, 0.0)["ratio"], 135, 40),
    Check("neighbours ÷ float32 search, 6,000 x 512", search, 0.56, 1.0),
    Check("f-VAEGAN's epoch ÷ its matrix products", epoch, 1.92, 4.0),
    Check("inference engine ÷ its network alone", engine, 0.52, 0.25),
)


def main() -> int:
    """Prints JSON, and a table; the number of ratios past their limits."""
    print("| ratio | found | recorded | limit | |\n|---|---|---|---|---|", file=sys.stderr)
    found = {}
    for check in CHECKS:
        found[check.name] = ratio = check.measure()
        verdict = "" if check.is_kept(ratio) else "PAST ITS LIMIT"
        print(f"| {check.name} | {ratio:.2f} | {check.recorded:g} | {check.limit:g} | {verdict} |", file=sys.stderr)
    print(json.dumps(found))
    return sum(not check.is_kept(found[check.name]) for check in CHECKS)


if __name__ == "__main__":
    sys.exit(main())
