"""From image files to patch features: decode, segment, crop and run the backbone in one bounded pipeline.

Images are prepared in a thread pool (decoders, watershed and resizing release the GIL). On a GPU the caller's thread
runs the backbone on batches of patches that cross image borders; on the CPU the same pool runs the batches, each on
one thread: two cores then never wait for each other, which one forward pass spread over both does (see bench/).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones import FeatureNetwork
from models.data.images import DEFAULT_LIMITS, ImageLimits, decode_image
from models.embedding.patches import WORKING_SIDE, Boxes, cut_patches, patch_boxes
from models.errors import UnreadableImage
from models.params import PatchParams

ReadBytes = Callable[[], bytes]
Rows = NDArray[np.float16]
S = TypeVar("S")
T = TypeVar("T")

FLOAT16_MAX = 65504.0

MAX_DECODED_SIDE = 1024
"""Short side of the decoded picture at most: more would only be thrown away when patches are resized."""


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


@dataclass(frozen=True)
class ImageFailure:
    """An image that could not be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class _Prepared:
    """A decoded image, cut: patches (n_patches, 3, size, size) uint8."""

    key: str
    boxes: Boxes
    frame: tuple[int, int]
    patches: Tensor


def extract_features(
    images: Iterable[tuple[str, ReadBytes]],
    backbone: FeatureNetwork,
    patches: PatchParams | None = None,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    batch_size: int = 32,
    n_threads: int = 2,
) -> Iterator[ImageFeatures | ImageFailure]:
    """Features of every image's patches, in the order of `images`; `ImageFailure` for an unreadable one.

    images: (key, function that reads the file's bytes), read when its turn comes, in one of `n_threads` threads.
    batch_size: patches a forward pass on a GPU; on the CPU `backbone.max_batch` bounds it.
    Memory: a few images beyond one batch a thread, however many there are. Stopping early (closing the iterator)
    leaves no thread behind. Whatever `images` or a reader raises, other than UnreadableImage, passes through.
    """
    params = patches or PatchParams()
    on_cpu = backbone.device.type == "cpu"
    size = min(batch_size, backbone.max_batch) if on_cpu else batch_size
    n_running = n_threads + 1 if on_cpu else 0
    n_ahead = n_threads + 1 + (n_threads + 1) * size // params.n_patches
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="patches", initializer=_use_one_torch_thread)

    def prepare(image: tuple[str, ReadBytes]) -> Future[_Prepared | ImageFailure]:
        return pool.submit(_prepare, *image, params, limits)

    def run(batch: Tensor) -> Future[Rows]:
        if on_cpu:
            return pool.submit(_run, backbone, batch)
        done: Future[Rows] = Future()
        done.set_result(_run(backbone, batch))
        return done

    assembly = _Assembly(size)
    running: deque[Future[Rows]] = deque()
    try:
        for item in _in_order(prepare, images, n_ahead):
            assembly.add(item)
            running.extend(run(batch) for batch in assembly.full_batches())
            while len(running) > n_running:
                assembly.add_rows(running.popleft().result())
            yield from assembly.finished()
        running.extend(run(batch) for batch in assembly.last_batch())
        while running:
            assembly.add_rows(running.popleft().result())
            yield from assembly.finished()
        yield from assembly.finished()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(torch_threads)  # the initializer's setting is also the default of threads to come


class _Assembly:
    """Patches of consecutive images go out as batches of `size`; their rows come back in the same order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: deque[_Prepared | ImageFailure] = deque()  # not given out yet
        self.patches: list[Tensor] = []  # in no batch yet
        self.n_patches = 0
        self.rows: list[Rows] = []  # belong to the first of `items`
        self.n_rows = 0

    def add(self, item: _Prepared | ImageFailure) -> None:
        if isinstance(item, _Prepared):
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


def _in_order(start: Callable[[S], Future[T]], inputs: Iterable[S], n_ahead: int) -> Iterator[T]:
    """Results in the order of `inputs`, with at most `n_ahead` of them started and not given out."""
    waiting: deque[Future[T]] = deque()
    for one in inputs:
        waiting.append(start(one))
        if len(waiting) >= n_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _prepare(key: str, read: ReadBytes, params: PatchParams, limits: ImageLimits) -> _Prepared | ImageFailure:
    try:
        image = decode_image(read(), limits, target_side=decoded_side(params))
    except UnreadableImage as error:
        return ImageFailure(key, error.reason)
    boxes = patch_boxes(image, params)
    return _Prepared(key, boxes, (image.shape[0], image.shape[1]), cut_patches(image, boxes, params.size))


def decoded_side(params: PatchParams) -> int:
    """Short side that a decoded image needs at most, so that an average patch is not enlarged."""
    if params.method == "whole":
        return params.size
    return max(WORKING_SIDE, min(MAX_DECODED_SIDE, params.size * math.isqrt(params.n_patches)))


def _run(backbone: FeatureNetwork, batch: Tensor) -> Rows:
    features = backbone.features(batch).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    return features.to(torch.float16).cpu().numpy()


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # a thread's first question sets it up from the default, so it must come before
    torch.set_num_threads(1)
