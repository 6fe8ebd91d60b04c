"""The inference engine: many small requests become few large batches on one device.

Images are decoded in a thread pool; one thread owns the device and runs the backbone on whatever is ready, images of
different requests together; each request is answered as soon as its own images are done. No HTTP and no database here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray
from models.data.images import DEFAULT_LIMITS, ImageLimits, decode_image
from models.embedding.extraction import FLOAT16_MAX, decoded_side
from models.embedding.patches import cut_patches, patch_boxes
from models.errors import UnreadableImage
from models.params import PatchParams
from workers.predictions import (
    FeatureExtractor,
    ImageError,
    Look,
    Prediction,
    Relatives,
    Resident,
    Scope,
    competing,
    look,
    rank,
    relate,
)

__all__ = ["Engine", "EngineBusy", "EngineClosed", "EngineStats", "ImageError", "Prediction", "Resident"]

Answer = list[Prediction] | ImageError


class EngineBusy(Exception):
    """As many images as the engine takes are waiting; nothing of the request was started."""


class EngineClosed(Exception):
    """The engine is shut down."""


@dataclass(frozen=True)
class EngineStats:
    """Since the start: images and batches run, seconds the device worked; and images waiting now."""

    n_images: int
    n_batches: int
    busy_s: float
    n_waiting: int


@dataclass(eq=False)
class _Request:
    """Images on their way, the rows they have so far, and the future of all their answers."""

    backbone: FeatureExtractor
    size: int
    finish: Callable[[FloatArray], Sequence[Any]]
    rows: list[FloatArray | ImageError | None]
    n_left: int
    future: Future[list[Any]] = field(default_factory=Future)

    def give_up(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.cancelled()


@dataclass(frozen=True)
class _Ready:
    """One decoded image: uint8 (3, size, size), and where its answer belongs."""

    pixels: Tensor
    request: _Request
    position: int


class Engine:
    """Classifies images with whichever residents it is given; safe to call from many threads.

    device: a label for reports; the residents' backbones and classifiers say where they run.
    max_batch: images a forward pass. max_wait_ms: how long a batch that is not full waits for images still being
    decoded; with none on the way it never waits. max_pending: images accepted and not yet answered.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        max_batch: int = 32,
        max_wait_ms: float = 4.0,
        max_pending: int = 1024,
        decode_threads: int = 2,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.device = device
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_pending = max_pending
        self._limits = limits
        self._changed = threading.Condition()
        self._ready: deque[_Ready] = deque()
        self._open: set[_Request] = set()
        self._n_pending = 0
        self._n_decoding = 0
        self._closed = False
        self._n_images = self._n_batches = 0
        self._busy_s = 0.0
        self._torch_threads = torch.get_num_threads()
        self._decoders = _started_pool(decode_threads)
        self._thread = threading.Thread(target=self._run, name=f"inference-{device}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def classify(
        self,
        resident: Resident,
        images: Sequence[bytes],
        *,
        scope: Scope = "all",
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        gamma: float | None = None,
    ) -> list[Answer]:
        """The answers of `submit`, waited for."""
        return self.submit(resident, images, scope=scope, class_names=class_names, top_k=top_k, gamma=gamma).result()

    def submit(
        self,
        resident: Resident,
        images: Sequence[bytes],
        *,
        scope: Scope = "all",
        class_names: Sequence[str] | None = None,
        top_k: int = 5,
        gamma: float | None = None,
    ) -> Future[list[Answer]]:
        """For each image file the `top_k` classes, best first, or why this image could not be read.

        scope, class_names: which classes compete. gamma: handicap of seen classes; None: the resident's.
        Raises EngineBusy, EngineClosed, and InvalidInput for classes that cannot compete; cancelling the future
        spares the images that have not run yet.
        """
        classes = competing(resident, scope, class_names)
        return self._submit(resident, images, lambda rows: rank(resident, rows, classes, k=top_k, gamma=gamma))

    def infer(
        self,
        resident: Resident,
        images: Sequence[bytes],
        *,
        tau: float = 0.0,
        top_k: int = 10,
        class_names: Sequence[str] | None = None,
    ) -> list[Relatives | ImageError]:
        """For each image file the classes that it is most like and most unlike, or why it could not be read."""
        classes = competing(resident, "all", class_names)
        return self._submit(resident, images, lambda rows: relate(resident, rows, classes, tau=tau, k=top_k)).result()

    def look(
        self, resident: Resident, images: Sequence[bytes], *, top_k: int = 8, class_names: Sequence[str] | None = None
    ) -> list[Look | ImageError]:
        """For each image file where the classifier looks, or why it could not be read; InvalidInput where it cannot."""
        classes = competing(resident, "all", class_names)
        return self._submit(resident, images, lambda rows: look(resident, rows, classes, k=top_k)).result()

    def _submit(
        self, resident: Resident, images: Sequence[bytes], finish: Callable[[FloatArray], Sequence[Any]]
    ) -> Future[list[Any]]:
        request = _Request(resident.backbone, resident.size, finish, [None] * len(images), len(images))
        if not images:
            request.future.set_result([])
            return request.future
        with self._changed:
            if self._closed:
                raise EngineClosed("The inference engine is shut down.")
            # A request larger than the limit may run alone, or it could never run.
            if self._n_pending and self._n_pending + len(images) > self._max_pending:
                raise EngineBusy(
                    f"{self._n_pending} images are waiting and at most {self._max_pending} may. Try again shortly."
                )
            self._n_pending += len(images)
            self._n_decoding += len(images)
            self._open.add(request)
        try:
            for position, data in enumerate(images):
                self._decoders.submit(self._decode, data, request, position)
        except RuntimeError:  # closed a moment ago by another thread, which fails this request, too
            pass
        return request.future

    def is_alive(self) -> bool:
        """Whether the thread that owns the device still runs."""
        return self._thread.is_alive() and not self._closed

    def stats(self) -> EngineStats:
        """Counters for the metrics page."""
        with self._changed:
            return EngineStats(self._n_images, self._n_batches, self._busy_s, self._n_pending)

    def close(self) -> None:
        """Stop after the running batch; requests that are not answered fail with EngineClosed."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            unanswered = list(self._open)
            self._changed.notify_all()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._thread.join()
        for request in unanswered:
            self._fail(request, EngineClosed("The inference engine was shut down before it answered this request."))

    # -- decoding, in the pool -----------------------------------------------------------------------------------------

    def _decode(self, data: bytes, request: _Request, position: int) -> None:
        pixels: Tensor | None = None
        outcome: ImageError | None = None
        try:
            if not request.give_up():
                pixels = prepare_image(data, request.size, self._limits)
        except UnreadableImage as error:
            outcome = ImageError(error.reason)
        except Exception as error:  # a decoder's own bug must not leave the request unanswered
            self._fail(request, error)
        with self._changed:
            self._n_decoding -= 1
            if pixels is not None:
                self._ready.append(_Ready(pixels, request, position))
            self._changed.notify_all()
        if pixels is None:
            self._settle(request, [(position, outcome or ImageError("The request was given up."))])

    # -- the device's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._torch_threads)  # the decoders' 1 is partly the whole process's
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            started = time.monotonic()
            rows: FloatArray | None = None
            try:
                rows = _forward(batch)
            except Exception as error:  # out of memory, a sick device: these requests fail, the thread lives on
                for item in batch:
                    self._fail(item.request, error)
            with self._changed:
                self._n_batches += 1
                self._n_images += len(batch)
                self._busy_s += time.monotonic() - started
            for request in dict.fromkeys(item.request for item in batch):
                mine = [(item.position, i) for i, item in enumerate(batch) if item.request is request]
                gone = ImageError("The network failed on this image.")
                self._settle(request, [(position, gone if rows is None else rows[i]) for position, i in mine])

    def _next_batch(self) -> list[_Ready] | None:
        """Images for one forward pass: of one backbone and size, the oldest first. None when the engine closes."""
        with self._changed:
            while not self._ready:
                if self._closed:
                    return None
                self._changed.wait()
            deadline = time.monotonic() + self._max_wait_s
            while not self._closed and self._n_decoding and self._n_alike() < self._max_batch:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return None
            batch: list[_Ready] = []
            others: deque[_Ready] = deque()
            first = self._ready[0].request
            for item in self._ready:
                alike = _alike(item.request, first) and len(batch) < self._max_batch
                (batch if alike else others).append(item)
            self._ready = others
            return batch

    def _n_alike(self) -> int:
        first = self._ready[0].request
        return sum(_alike(item.request, first) for item in self._ready)

    def _settle(self, request: _Request, outcomes: Sequence[tuple[int, FloatArray | ImageError]]) -> None:
        """Enter rows or errors of a request's images; the last ones answer it."""
        with self._changed:
            for position, outcome in outcomes:
                request.rows[position] = outcome
            request.n_left -= len(outcomes)
            self._n_pending -= len(outcomes)
            is_last = request.n_left == 0
        if is_last and self._claim(request):
            try:
                answers = _answers(request)
            except Exception as error:  # the classifier's own; it belongs to the caller
                request.future.set_exception(error)
            else:
                request.future.set_result(answers)

    def _fail(self, request: _Request, error: Exception) -> None:
        """End the request with `error`, unless it has ended."""
        if self._claim(request):
            request.future.set_exception(error)

    def _claim(self, request: _Request) -> bool:
        """True for the first who asks to end this request, if anybody still waits for it."""
        with self._changed:
            if request not in self._open:
                return False
            self._open.discard(request)
        return request.future.set_running_or_notify_cancel()


def prepare_image(data: bytes, size: int, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
    """An image file as the backbone saw it in training: the whole of it, uint8 (3, size, size)."""
    params = PatchParams(method="whole", size=size)
    image = decode_image(data, limits, target_side=decoded_side(params))
    return cut_patches(image, patch_boxes(image, params), size)[0]


def _forward(batch: Sequence[_Ready]) -> FloatArray:
    """Features (B, feature_dim) float32, rounded to float16 in between as the stored training features were."""
    images = torch.stack([item.pixels for item in batch]).contiguous(memory_format=torch.channels_last)
    features = batch[0].request.backbone.features(images).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return np.asarray(features.to(torch.float16).cpu().numpy(), np.float32)


def _answers(request: _Request) -> list[Any]:
    rows = [row for row in request.rows if isinstance(row, np.ndarray)]
    ranked = iter(request.finish(np.stack(rows)) if rows else ())
    return [row if isinstance(row, ImageError) else next(ranked) for row in request.rows if row is not None]


def _alike(one: _Request, other: _Request) -> bool:
    return one.backbone == other.backbone and one.size == other.size


def _started_pool(n_threads: int) -> ThreadPoolExecutor:
    """A pool all of whose threads run already, each with one torch thread: images, not pixels, go in parallel."""
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,))
    everyone = threading.Barrier(n_threads + 1)
    for _ in range(n_threads):
        pool.submit(everyone.wait)
    everyone.wait()
    return pool
