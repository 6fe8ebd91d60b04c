"""Features of images through the cache: computed once for each image, network and way of cutting, in shards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from models.base import Progress
from models.data.images import ImageLimits
from models.embedding.cutting import ImageFailure, has_room_for_processes
from models.embedding.extraction import ImageFeatures, extract_features
from models.params import PatchParams
from service.core import caches
from service.core.artifacts import image_key
from service.core.process import usable_cores
from service.core.tables import FeatureRows
from workers.runner import TaskContext
from workers.sources import fast_backbone

if TYPE_CHECKING:
    from models.backbones import FeatureNetwork

SHARD_IMAGES = 256
WORTH_PREPARING = {"cpu": 1000, "cuda": 100_000}
"""By device: patches in which a faster network makes up for the seconds that its preparation takes."""
WORTH_PROCESSES = 2000
"""Images in which processes that cut them make up for the seconds of their start."""
FORMAT = 1  # grows when the same inputs would give other features


@dataclass
class FeatureTable:
    """Features of images, in the order asked for.

    features: (n_rows, feature_dim) float16, a memory map. boxes: (n_rows, 4) left, top, right, bottom.
    image_index: (n_rows,) which of the images each row was cut from, ascending.
    failures: sha256 -> why that image has no rows. seconds, n_computed: what was not in the cache.
    """

    features: NDArray[np.float16]
    boxes: NDArray[np.int32]
    image_index: NDArray[np.int32]
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    n_computed: int = 0


def feature_spec(backbone: FeatureNetwork, patches: PatchParams) -> str:
    """Digest of all that determines an image's features."""
    text = json.dumps([FORMAT, backbone.digest, patches.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def image_features(
    context: TaskContext, sha256s: Sequence[str], backbone: FeatureNetwork, patches: PatchParams, *, phase: str
) -> FeatureTable:
    """Features of stored images; those that are not cached are computed, shard by shard, and kept.

    A job that is interrupted finds its finished shards again. Memory does not grow with the number of images.
    """
    spec = feature_spec(backbone, patches)
    wanted = list(dict.fromkeys(sha256s))
    with context.database.read() as session:
        cached = caches.features(session, spec, wanted)
    lost = {shard for shard in {row.shard for row in cached.values()} if not context.store.exists(shard)}
    missing = [sha256 for sha256 in wanted if sha256 not in cached or cached[sha256].shard in lost]
    started = time.perf_counter()
    failures, n_rows = _compute(context, spec, missing, backbone, patches, len(wanted), phase)
    seconds = time.perf_counter() - started
    with context.database.read() as session:
        cached = caches.features(session, spec, [sha256 for sha256 in wanted if sha256 not in failures])
    table = _gather(context, sha256s, cached, backbone.feature_dim, context.scratch_dir / f"{phase}.f16")
    table.failures, table.seconds, table.n_computed = failures, seconds, n_rows
    return table


def _compute(
    context: TaskContext,
    spec: str,
    missing: Sequence[str],
    backbone: FeatureNetwork,
    patches: PatchParams,
    total: int,
    phase: str,
) -> tuple[dict[str, str], int]:
    settings = context.settings
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    failures: dict[str, str] = {}
    done, n_rows = total - len(missing), 0
    context.progress(Progress(phase, done, total))
    n_threads = settings.threads or usable_cores()
    n_processes = processes_to_cut(backbone.device.type, patches, len(missing), n_threads)
    n_patches = len(missing) * patches.n_patches
    worth_it = n_patches >= WORTH_PREPARING[backbone.device.type] or settings.backend != "auto"
    network = fast_backbone(backbone, patches.size, settings, streams=n_threads, may_prepare=worth_it)
    sources = _sources(context, missing)
    results = extract_features(sources, network, patches, limits=limits, n_threads=n_threads, n_processes=n_processes)
    with closing(_ShardWriter(context, spec)) as shards:
        for result in results:
            if isinstance(result, ImageFailure):
                failures[result.key] = result.reason
            else:
                shards.add(result)
                n_rows += len(result.features)
            done += 1
            context.progress(Progress(phase, done, total))
        shards.flush()
    return failures, n_rows


def processes_to_cut(device_type: str, patches: PatchParams, n_images: int, n_threads: int) -> int:
    """How many processes cut images beside a network on this device; 0: threads do.

    A CPU that also computes the network needs none: threads keep it busy. A GPU outruns them.
    """
    if device_type == "cpu" or n_images < WORTH_PROCESSES or not has_room_for_processes(patches, n_threads):
        return 0
    return n_threads


def _sources(context: TaskContext, sha256s: Sequence[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for sha256 in sha256s:
        yield sha256, partial(context.store.read_bytes, image_key(sha256))


class _ShardWriter:
    """Writes features of `SHARD_IMAGES` images at a time, in a thread, while the next ones are computed.

    Closed in the middle, it finishes the shard under way and drops the images that fill none.
    """

    def __init__(self, context: TaskContext, spec: str) -> None:
        self._context, self._spec = context, spec
        self._shard: list[ImageFeatures] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._running: Future[None] | None = None

    def add(self, image: ImageFeatures) -> None:
        """Raises what writing the shard before has raised."""
        self._shard.append(image)
        if len(self._shard) == SHARD_IMAGES:
            self._start()

    def flush(self) -> None:
        """Everything is in the store and known."""
        if self._shard:
            self._start()
        self._finish()

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown()

    def _start(self) -> None:
        self._finish()
        self._running = self._thread.submit(_write_shard, self._context, self._spec, self._shard)
        self._shard = []

    def _finish(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None


def _write_shard(context: TaskContext, spec: str, shard: Sequence[ImageFeatures]) -> None:
    """One immutable file; its rows become known in one transaction after it is in the store."""
    path = context.scratch_dir / "shard.safetensors"
    features = np.concatenate([entry.features for entry in shard]).astype(np.float16)
    boxes = np.concatenate([entry.boxes for entry in shard]).astype(np.int32)
    save_file({"features": features, "boxes": boxes}, path)
    key = context.store.put_file(path)
    path.unlink(missing_ok=True)
    starts = np.cumsum([0, *(len(entry.features) for entry in shard)])
    rows = [
        FeatureRows(spec=spec, sha256=entry.key, shard=key, start=int(start), count=len(entry.features))
        for entry, start in zip(shard, starts, strict=False)
    ]
    with context.database.write() as session:
        caches.put_features(session, rows)


def _gather(
    context: TaskContext, sha256s: Sequence[str], cached: dict[str, FeatureRows], dim: int, path: Path
) -> FeatureTable:
    """All rows in the order asked for, written once to a scratch file that is then mapped, not loaded."""
    counts = np.array([cached[s].count if s in cached else 0 for s in sha256s], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    n_rows = int(starts[-1])
    boxes = np.empty((n_rows, 4), dtype=np.int32)
    if n_rows == 0:
        features = np.empty((0, dim), dtype=np.float16)
        return FeatureTable(features, boxes, np.empty(0, dtype=np.int32))
    target = np.memmap(path, dtype=np.float16, mode="w+", shape=(n_rows, dim))
    by_shard: dict[str, list[int]] = {}
    for position, sha256 in enumerate(sha256s):
        if sha256 in cached:
            by_shard.setdefault(cached[sha256].shard, []).append(position)
    for shard, positions in by_shard.items():
        with safe_open(context.store.local_path(shard), framework="numpy") as file:
            rows: dict[str, Any] = {name: file.get_tensor(name) for name in ("features", "boxes")}
        for position in positions:
            entry = cached[sha256s[position]]
            span = slice(int(starts[position]), int(starts[position + 1]))
            target[span] = rows["features"][entry.start : entry.start + entry.count]
            boxes[span] = rows["boxes"][entry.start : entry.start + entry.count]
        context.progress.check()
    target.flush()
    image_index = np.repeat(np.arange(len(sha256s), dtype=np.int32), counts)
    return FeatureTable(np.memmap(path, dtype=np.float16, mode="r", shape=(n_rows, dim)), boxes, image_index)
