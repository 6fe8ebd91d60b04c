"""Training at AWA2's scale: seconds and memory of an epoch of each method, beside its matrix products alone.

python bench/training.py [method ...] [--device cuda] > training.json      (the Markdown table goes to standard error)

23,527 rows of 2048 random features, 40 seen classes with 85 attributes; an epoch is one pass over the rows. Where its
steps are many, some are timed and scaled up; feature maps (49 places of 2048) are measured on some images, likewise.
The bound: every matrix product of an epoch, shapes and strides as it had them, timed on its own in the same process. On
a CPU both are seconds of one thread's work, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import LabelledFeatures, Progress
from models.catalog import METHODS, get_method
from models.errors import Cancelled
from models.params import Params
from models.zero_shot.base import create_classifier
from service.core.process import COMPUTE_ENVIRONMENT

N_ROWS, FEATURE_DIM, N_ATTRIBUTES, N_CLASSES = 23_527, 2048, 85, 40
PLACES, N_MAPS = 49, 320
EPOCHS, STEPS = 4, 4
STAGES = {"se_gzsl": ("encoders", "generator"), "sc_egg": ("attention", "compression", "generator")}
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}
Product = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]], torch.dtype]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives its methods no types
    """Counts matrix products by shape and stride of their two factors, and type."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func)
        if first is not None:
            one, other = ((tuple(t.shape), tuple(t.stride())) for t in args[first : first + 2])
            self.products[one, other, args[first].dtype] += 1
        return func(*args, **(kwargs or {}))


class Watch:
    """An `on_progress` that times epochs: of each stage the first warms up, the second is recorded, the rest count."""

    def __init__(self, device: str, n_stages: int) -> None:
        self._clock, self._n_stages = clock_of(device), n_stages
        self._recorder: Recorder | None = None
        self._completed, self._since = 0, 0.0
        self.seconds: list[list[float]] = []
        self.products: list[Counter[Product]] = []

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if not self.seconds or progress.completed <= self._completed:
            self.seconds.append([])
        else:
            self.seconds[-1].append(now - self._since)
        self._completed = progress.completed
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above
            self.products.append(self._recorder.products)
            self.seconds[-1].pop()  # recording takes time
            self._recorder = None
        elif not self.seconds[-1]:
            self._recorder = Recorder()
            self._recorder.__enter__()  # type: ignore[no-untyped-call]  # as above
        if len(self.seconds) == self._n_stages and progress.completed == EPOCHS:
            raise Cancelled
        self._since = self._clock()


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of work: of this process on a CPU, of the wall after all kernels on a GPU."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def bound(products: Counter[Product], device: str) -> tuple[float, float]:
    """Seconds of the matrix products alone, each at its best, and how many floating-point operations they are."""
    clock, seconds, operations = clock_of(device), 0.0, 0.0
    for (one, other, dtype), count in products.items():
        a, b = (like(*layout, dtype, device) for layout in (one, other))
        operations += 2.0 * count * a.numel() * b.shape[-1]
        seconds += count * quickest(a, b, clock)
    return seconds, operations


def like(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """A random factor of that layout; what it repeats (stride 0) lies there once."""
    once = [1 if step == 0 else n for n, step in zip(shape, stride, strict=True)]
    return torch.empty_strided(once, stride, dtype=dtype, device=device).normal_().expand(shape)


def quickest(a: Tensor, b: Tensor, clock: Callable[[], float]) -> float:
    """Least time of a product, over at least 5 tries and a twentieth of a second."""
    out, times = a @ b, [np.inf]
    began = clock()
    while len(times) < 6 or clock() - began < 0.05:
        start = clock()
        torch.matmul(a, b, out=out)
        times.append(clock() - start)
    return float(min(times))


def small(params: type[Params], hidden_dim: int | None) -> Params:
    """The method's defaults, over few epochs of few steps."""
    wanted = {
        "epochs": EPOCHS,
        "steps_per_epoch": STEPS,
        "early_stopping": False,
        "decomposition_epochs": EPOCHS,
        "embedding_epochs": EPOCHS,
        "compression_epochs": EPOCHS,
        "class_epochs": 1,
        "hidden_dim": hidden_dim,
    }
    return params.model_validate({k: v for k, v in wanted.items() if k in params.model_fields and v is not None})


def inputs(*, spatial: bool) -> tuple[LabelledFeatures, np.ndarray[Any, Any]]:
    """Random features of random classes, and random attributes of the classes."""
    rng = np.random.default_rng(0)
    n_rows, width = (N_MAPS, PLACES * FEATURE_DIM) if spatial else (N_ROWS, FEATURE_DIM)
    features = rng.random((n_rows, width), dtype=np.float32)
    labels = np.r_[np.arange(N_CLASSES), rng.integers(0, N_CLASSES, n_rows - N_CLASSES)]
    names = tuple(f"class {i}" for i in range(N_CLASSES))
    attributes = rng.random((N_CLASSES, N_ATTRIBUTES), dtype=np.float32)
    return LabelledFeatures(features, labels, names, FEATURE_DIM if spatial else None), attributes


def rows_of_epoch(params: Any, n_rows: int, stage: str) -> int:
    """Rows that a timed epoch of the stage reads: those of its steps, or all that a trial learns from."""
    if hasattr(params, "steps_per_epoch") and stage not in ("attention", "compression"):
        steps = int(params.steps_per_epoch) * int(params.batch_size)
        return steps * (int(getattr(params, "critic_steps", 1)) if stage != "encoders" else 1)
    return round(0.8 * n_rows)  # a fifth of each class is held out while gamma is chosen


def measure(name: str, device: str, hidden_dim: int | None) -> list[dict[str, Any]]:
    """One row for each stage of the method."""
    method = get_method(name, "classifier")
    features, attributes = inputs(spatial=method.features == "spatial")
    params, stages = small(method.params, hidden_dim), STAGES.get(name, ("",))
    watch = Watch(device, len(stages))
    before = peak_bytes(device)
    with suppress(Cancelled):
        create_classifier(name, params, device=device).fit(features, attributes, on_progress=watch)
    memory = peak_bytes(device) - (before if device == "cpu" else 0)
    rows = []
    for stage, seconds, products in zip(stages, watch.seconds, watch.products, strict=True):
        share = N_ROWS / rows_of_epoch(params, len(features.labels), stage)
        products_s, operations = bound(products, device)
        rows.append(
            {
                "method": f"{name}, {stage}" if stage else name,
                "batch_size": getattr(params, "batch_size", None),
                "seconds": share * min(seconds),
                "bound_s": share * products_s,
                "ratio": min(seconds) / products_s,
                "gflop": share * operations / 1e9,
                "gflop_per_s": operations / products_s / 1e9,
                "memory_bytes": memory,
            }
        )
    return rows


def peak_bytes(device: str) -> int:
    """The most memory so far, of the process or on the GPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.cuda.max_memory_allocated())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the worst ratio first."""
    lines = [
        "| method | an epoch, s | its matrix products, s | ratio | GFLOP | GFLOP/s | memory, MB |",
        "|" + "---|" * 7,
    ]
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        lines.append(
            f"| {row['method']} | {row['seconds']:.2f} | {row['bound_s']:.2f} | {row['ratio']:.2f} | "
            f"{row['gflop']:,.0f} | {row['gflop_per_s']:.0f} | {row['memory_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Each method in a process of its own, for its peak of memory."""
    trained = [m.name for m in METHODS if m.kind == "classifier" and "epochs" in m.params.model_fields]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=trained)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden-dim", type=int, default=None, help="Default: each method's own.")
    parser.add_argument("--one", action="store_true", help="Measure in this process.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.one:
        json.dump(measure(asked.methods[0], asked.device, asked.hidden_dim), sys.stdout)
        return
    rows: list[dict[str, Any]] = []
    for name in asked.methods:
        options = ["--one", "--device", asked.device]
        options += ["--hidden-dim", str(asked.hidden_dim)] if asked.hidden_dim else []
        command = [sys.executable, __file__, name, *options]
        environment = {**os.environ, **COMPUTE_ENVIRONMENT, "OMP_NUM_THREADS": "1"}  # as workers are started
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found = json.loads(done.stdout)
        rows += found
        print("\n".join(table(found).splitlines()[2:]), file=sys.stderr, flush=True)
    print(table(rows), file=sys.stderr)
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
