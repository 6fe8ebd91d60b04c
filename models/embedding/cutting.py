"""From image files to patches of pixels, in threads or in processes, in order and a bounded number ahead.

Decoders, watershed and resizing release the GIL; what of an image's work does not, some tenth, bounds threads at the
speed of about ten cores. A backbone that asks for more, as a GPU's does, is fed by processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.data.images import ImageLimits, decode_image
from models.embedding.patches import WORKING_SIDE, Boxes, cut_patches, patch_boxes
from models.errors import UnreadableImage
from models.params import PatchParams

ReadBytes = Callable[[], bytes]
Source = tuple[str, ReadBytes]
S = TypeVar("S")
T = TypeVar("T")

MAX_DECODED_SIDE = 1024
"""Short side of the decoded picture at most: more would only be thrown away when patches are resized."""
AHEAD = 4
"""Images that wait at each process, done or to be done."""


@dataclass(frozen=True)
class ImageFailure:
    """An image that could not be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class CutImage:
    """A decoded image of `frame` = (height, width), cut: patches (n_patches, 3, size, size) uint8, channels last."""

    key: str
    boxes: Boxes
    frame: tuple[int, int]
    patches: Tensor


def cut_image(key: str, data: bytes, params: PatchParams, limits: ImageLimits) -> CutImage | ImageFailure:
    """One image file, cut; `ImageFailure` if it is none."""
    try:
        image = decode_image(data, limits, target_side=decoded_side(params))
    except UnreadableImage as error:
        return ImageFailure(key, error.reason)
    boxes = patch_boxes(image, params)
    return CutImage(key, boxes, (image.shape[0], image.shape[1]), cut_patches(image, boxes, params.size))


def decoded_side(params: PatchParams) -> int:
    """Short side that a decoded image needs at most, so that an average patch is not enlarged."""
    if params.method == "whole":
        return params.size
    return max(WORKING_SIDE, min(MAX_DECODED_SIDE, params.size * math.isqrt(params.n_patches)))


def cut_in_threads(
    images: Iterable[Source], params: PatchParams, limits: ImageLimits, pool: Executor, n_ahead: int
) -> Generator[CutImage | ImageFailure]:
    """All images in their order, read and cut by the threads of `pool`, at most `n_ahead` of them ahead."""

    def read_and_cut(image: Source) -> CutImage | ImageFailure:
        file = _read(image)
        return file if isinstance(file, ImageFailure) else cut_image(*file, params, limits)

    yield from _in_order(lambda image: pool.submit(read_and_cut, image), images, n_ahead)


def cut_in_processes(
    images: Iterable[Source], params: PatchParams, limits: ImageLimits, n_processes: int
) -> Generator[CutImage | ImageFailure]:
    """The same, cut in processes of their own, which hand the pixels over in shared memory; threads read the files.

    The processes come from a server that never touches this one's memory, threads or GPU. They end with the iterator
    and with this process, whatever ends it. RuntimeError where one is killed.
    """
    # The server loads what each process then has; without it each would load torch, in seconds.
    multiprocessing.set_forkserver_preload([__name__])
    pixels = torch.empty(_shape_of_pixels(params, n_processes), dtype=torch.uint8)
    pixels.share_memory_()  # type: ignore[no-untyped-call]  # torch gives it no types
    free = deque(range(len(pixels)))
    with ThreadPoolExecutor(n_processes, thread_name_prefix="patches") as readers:
        files = _in_order(lambda image: readers.submit(_read, image), images, 2 * n_processes)
        loader = _Loader(
            _Cutting(params, limits, pixels),
            sampler=((free.popleft(), file) for file in files),  # what it gives is what the dataset is asked for
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=n_processes,
            prefetch_factor=AHEAD,
            multiprocessing_context="forkserver",
            worker_init_fn=_end_with_parent,
        )
        for place, found in loader:
            if isinstance(found, _Placed):
                own = pixels[place, : len(found.boxes)].numpy().copy()  # on one thread, without the GIL
                yield CutImage(found.key, found.boxes, found.frame, torch.from_numpy(own).permute(0, 3, 1, 2))
            else:
                yield found
            free.append(place)


def _shape_of_pixels(params: PatchParams, n_processes: int) -> tuple[int, int, int, int, int]:
    """Room for every image under way, and for the one that has come while the next has gone.

    A watershed's markers are up to half as many again as asked for (regular grids of 9 on photos: 6 to 12).
    """
    n_patches = 1 if params.method == "whole" else params.n_patches * 3 // 2 + 1
    return AHEAD * n_processes + 1, n_patches, params.size, params.size, 3


def has_room_for_processes(params: PatchParams, n_processes: int) -> bool:
    """Whether the system's shared memory holds twice the pixels under way; containers are often given 64 MiB of it."""
    try:
        return shutil.disk_usage("/dev/shm").free > 2 * math.prod(_shape_of_pixels(params, n_processes))
    except OSError:
        return False


@dataclass(frozen=True)
class _Placed:
    """A cut image whose pixels lie in shared memory."""

    key: str
    boxes: Boxes
    frame: tuple[int, int]


class _Cutting(Dataset[tuple[int, CutImage | _Placed | ImageFailure]]):
    """Cuts what it is asked for: (place, file); the pixels go to that place of `pixels`, if there are not too many."""

    def __init__(self, params: PatchParams, limits: ImageLimits, pixels: Tensor) -> None:
        self._params, self._limits, self._pixels = params, limits, pixels

    def __getitem__(
        self, asked: tuple[int, tuple[str, bytes] | ImageFailure]
    ) -> tuple[int, CutImage | _Placed | ImageFailure]:
        place, file = asked
        found = file if isinstance(file, ImageFailure) else cut_image(*file, self._params, self._limits)
        if isinstance(found, ImageFailure) or len(found.boxes) > self._pixels.shape[1]:
            return place, found
        self._pixels[place, : len(found.boxes)] = found.patches.permute(0, 2, 3, 1)
        return place, _Placed(found.key, found.boxes, found.frame)


class _Loader(DataLoader[tuple[int, CutImage | _Placed | ImageFailure]]):
    """torch's, without its warning of more processes than cores: who asks for them knows the cores."""

    def check_worker_number_rationality(self) -> None:
        """Anything goes."""


def _end_with_parent(_number: int) -> None:
    """torch's own watch looks at this process's parent, which is the fork server and waits for its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _as_it_is(item: T) -> T:
    return item


def _read(image: Source) -> tuple[str, bytes] | ImageFailure:
    key, read = image
    try:
        return key, read()
    except UnreadableImage as error:
        return ImageFailure(key, error.reason)


def _in_order(start: Callable[[S], Future[T]], inputs: Iterable[S], n_ahead: int) -> Iterator[T]:
    """Results in the order of `inputs`, with at most `n_ahead` of them started and not given out."""
    waiting: deque[Future[T]] = deque()
    for one in inputs:
        waiting.append(start(one))
        if len(waiting) >= n_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
