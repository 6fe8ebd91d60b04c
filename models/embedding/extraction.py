"""From image files to patch features: decode, segment, crop and run the backbone in one bounded pipeline.

Images are cut in threads or processes (`cutting.py`). On a GPU a thread of its own runs the backbone on batches of
patches that cross image borders, one batch ahead; on the CPU the threads that cut run the batches too, each on one
thread: two cores then never wait for each other, which one forward pass spread over both does (see bench/).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones import FeatureNetwork
from models.data.images import DEFAULT_LIMITS, ImageLimits
from models.embedding.cutting import CutImage, ImageFailure, Source, cut_in_processes, cut_in_threads
from models.embedding.patches import Boxes
from models.params import PatchParams

Rows = NDArray[np.float16]

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class ImageFeatures:
    """Patch features (n_patches, feature_dim) float16 of one image.

    boxes: (n_patches, 4) left, top, right, bottom, in pixels of a picture of `frame` = (height, width), which is the
    image after EXIF rotation, reduced where it is larger than needed; scale them to show them on the original.
    """

    key: str
    features: NDArray[np.float16]
    boxes: Boxes
    frame: tuple[int, int]


def extract_features(
    images: Iterable[Source],
    backbone: FeatureNetwork,
    patches: PatchParams | None = None,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    batch_size: int = 32,
    n_threads: int = 2,
    n_processes: int = 0,
) -> Iterator[ImageFeatures | ImageFailure]:
    """Features of every image's patches, in the order of `images`; `ImageFailure` for an unreadable one.

    images: (key, function that reads the file's bytes), read when its turn comes, in one of `n_threads` threads.
    batch_size: patches a forward pass on a GPU; on the CPU `backbone.max_batch` bounds it. n_processes: processes that
    cut the images in place of the threads; the features are the same.
    Memory: a few images beyond one batch a thread or process, however many there are. Stopping early (closing the
    iterator) leaves no thread or process behind. Whatever `images` or a reader raises, other than UnreadableImage,
    passes through.
    """
    params = patches or PatchParams()
    on_cpu = backbone.device.type == "cpu"
    size = min(batch_size, backbone.max_batch) if on_cpu else batch_size
    n_running = n_threads + 1 if on_cpu else 2
    n_ahead = n_threads + 1 + (n_threads + 1) * size // params.n_patches
    assembly = _Assembly(size)
    running: deque[Future[Rows]] = deque()
    with ExitStack() as stack:
        pool = stack.enter_context(_threads(n_threads))
        network = pool if on_cpu else stack.enter_context(_threads(1))
        if n_processes:
            cut = cut_in_processes(images, params, limits, n_processes)
        else:
            cut = cut_in_threads(images, params, limits, pool, n_ahead)
        for item in stack.enter_context(closing(cut)):
            assembly.add(item)
            running.extend(network.submit(_run, backbone, batch) for batch in assembly.full_batches())
            while len(running) > n_running:
                assembly.add_rows(running.popleft().result())
            yield from assembly.finished()
        running.extend(network.submit(_run, backbone, batch) for batch in assembly.last_batch())
        while running:
            assembly.add_rows(running.popleft().result())
            yield from assembly.finished()
        yield from assembly.finished()


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Threads that compute on one core each; at the end no work is left to them."""
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="patches", initializer=_use_one_torch_thread)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(torch_threads)  # the initializer's setting is also the default of threads to come


class _Assembly:
    """Patches of consecutive images go out as batches of `size`; their rows come back in the same order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: deque[CutImage | ImageFailure] = deque()  # not given out yet
        self.patches: list[Tensor] = []  # in no batch yet
        self.n_patches = 0
        self.rows: list[Rows] = []  # belong to the first of `items`
        self.n_rows = 0

    def add(self, item: CutImage | ImageFailure) -> None:
        if isinstance(item, CutImage):
            self.patches.append(item.patches)
            self.n_patches += len(item.patches)
        self.items.append(item)

    def full_batches(self) -> Iterator[Tensor]:
        if self.n_patches >= self.size:
            pixels = torch.cat(self.patches)
            n_full = len(pixels) // self.size * self.size
            self.patches, self.n_patches = [pixels[n_full:]], len(pixels) - n_full
            yield from pixels[:n_full].split(self.size)  # type: ignore[no-untyped-call]  # torch gives it no types

    def last_batch(self) -> Iterator[Tensor]:
        if self.n_patches:
            yield torch.cat(self.patches)

    def add_rows(self, rows: Rows) -> None:
        self.rows.append(rows)
        self.n_rows += len(rows)

    def finished(self) -> Iterator[ImageFeatures | ImageFailure]:
        """The oldest images, as far as their rows have come."""
        while self.items:
            item = self.items[0]
            if isinstance(item, ImageFailure):
                yield item
            elif self.n_rows < len(item.boxes):
                return
            else:
                rows = np.concatenate(self.rows)
                features, rest = rows[: len(item.boxes)].copy(), rows[len(item.boxes) :]
                self.rows, self.n_rows = [rest], len(rest)
                yield ImageFeatures(item.key, features, item.boxes, item.frame)
            self.items.popleft()


def _run(backbone: FeatureNetwork, batch: Tensor) -> Rows:
    features = backbone.features(batch).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    return features.to(torch.float16).cpu().numpy()


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a thread's first question sets it up from the default, so it must come before
    torch.set_num_threads(1)
