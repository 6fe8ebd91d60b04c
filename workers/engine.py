"""The inference engine: many small requests become few large batches on one device.

Images are decoded in a thread pool; one thread runs the backbone on whatever is ready, images of different requests
together; where a network queues batches up, further threads bring it the next ones. Each request is answered as soon as
its own images are done, those that ask the same together. No HTTP and no database here.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray
from models.data.images import DEFAULT_LIMITS, ImageLimits
from models.errors import UnreadableImage
from workers.engine_queue import (
    GIVEN_UP,
    EngineBusy,
    EngineClosed,
    EngineSick,
    EngineStats,
    EngineTooLate,
    Pulse,
    Question,
    Ready,
    Request,
    alike,
    answers,
    forward,
    prepare_image,
    queues,
)
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

__all__ = [
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "EngineSick",
    "EngineStats",
    "EngineTooLate",
    "ImageError",
    "Prediction",
    "Resident",
    "prepare_image",
]

Answer = list[Prediction] | ImageError
FRESH_S = 5.0
"""How long a batch that went well proves that the device does."""


class Engine:
    """Classifies images with whichever residents it is given; safe to call from many threads.

    device: for reports and probes; the residents' backbones and classifiers say where they run.
    max_batch: images a forward pass. max_wait_ms: how long a batch that is not full waits for images still being
    decoded; with none on the way it never waits. batches_ahead: how many may be under way beside the one that is
    computed, where networks queue them up. max_pending: images accepted and not yet answered.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        max_batch: int = 32,
        max_wait_ms: float = 4.0,
        batches_ahead: int = 0,
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
        self._ready: deque[Ready] = deque()
        self._open: set[Request] = set()
        self._n_pending = 0
        self._n_decoding = 0
        self._closed = False
        self._n_images = self._n_batches = 0
        self._pulse = Pulse(device)
        self._last_network: tuple[weakref.ref[FeatureExtractor], int] = (weakref.ref(self._pulse), 32)
        self._last_end = self._last_success = -math.inf
        self._decoders = _started_pool(decode_threads)
        # All networks run in the first thread: torch's would slow down with threads of several callers.
        tasks = [(lambda _: True, torch.get_num_threads()), *[(queues, 1)] * batches_ahead]
        self._threads = [threading.Thread(target=self._run, args=task, daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

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
        timeout_s: float = math.inf,
    ) -> Future[list[Answer]]:
        """For each image file the `top_k` classes, best first, or why this image could not be read.

        scope, class_names: which classes compete. gamma: handicap of seen classes; None: the resident's.
        Raises EngineBusy, EngineClosed, and InvalidInput for classes that cannot compete. The future fails with
        EngineTooLate after `timeout_s`; that, and cancelling it, spares the images that have not run yet.
        """
        return self._submit(rank, resident, images, scope, class_names, timeout_s, k=top_k, gamma=gamma)

    def infer(
        self,
        resident: Resident,
        images: Sequence[bytes],
        *,
        tau: float = 0.0,
        top_k: int = 10,
        class_names: Sequence[str] | None = None,
        timeout_s: float = math.inf,
    ) -> Future[list[Relatives | ImageError]]:
        """For each image file the classes that it is most like and most unlike; as `classify` otherwise."""
        return self._submit(relate, resident, images, "all", class_names, timeout_s, tau=tau, k=top_k)

    def look(
        self,
        resident: Resident,
        images: Sequence[bytes],
        *,
        top_k: int = 8,
        class_names: Sequence[str] | None = None,
        timeout_s: float = math.inf,
    ) -> Future[list[Look | ImageError]]:
        """For each image file where the classifier looks; the future fails with InvalidInput where it cannot."""
        return self._submit(look, resident, images, "all", class_names, timeout_s, k=top_k)

    def probe(self, timeout_s: float = 30.0) -> None:
        """Have the device compute: one image through the network used last, unless a batch went well just now.

        Raises EngineSick where that fails, gives no numbers, or nothing comes to an end within `timeout_s`, and
        EngineClosed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosed("The inference engine is shut down.")
            if time.monotonic() - self._last_success < FRESH_S:
                return
            network, size = self._last_network
        future = self.grey(network() or self._pulse, size)  # it may have been thrown out
        since = time.monotonic()
        while not wait_for([future], timeout=max(0.0, since + timeout_s - time.monotonic())).done:
            since = max(since, self._last_end)  # a long queue is no illness
            if time.monotonic() - since > timeout_s or not all(thread.is_alive() for thread in self._threads):
                future.cancel()
                raise EngineSick(f"The device has not finished a batch for {timeout_s:g} s.")
        try:
            [row] = future.result()
        except EngineClosed:
            raise
        except Exception as error:
            raise EngineSick(f"The device failed: {error}") from error
        if not np.isfinite(row).all():
            raise EngineSick("The device gives features that are no numbers.")

    def grey(self, network: FeatureExtractor, size: int) -> Future[list[FloatArray]]:
        """The row of features of one grey image; it passes by the decoders."""
        request = Request(network, size, list, [None], 1)
        with self._changed:
            if self._closed:
                raise EngineClosed("The inference engine is shut down.")
            self._open.add(request)
            self._n_pending += 1
            self._ready.append(Ready(torch.full((3, size, size), 128, dtype=torch.uint8), request, 0))
            self._changed.notify_all()
        return request.future

    def _submit(
        self,
        tell: Callable[..., Sequence[Any]],
        resident: Resident,
        images: Sequence[bytes],
        scope: Scope,
        class_names: Sequence[str] | None,
        timeout_s: float,
        **options: float | None,
    ) -> Future[list[Any]]:
        names = None if class_names is None else tuple(class_names)
        classes = competing(resident, scope, names)
        question = Question(tell, resident, scope, names, tuple(options.items()), classes)
        deadline = time.monotonic() + timeout_s
        request = Request(resident.backbone, resident.size, question, [None] * len(images), len(images), deadline)
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

    def stats(self) -> EngineStats:
        """Counters for the metrics page."""
        with self._changed:
            return EngineStats(self._n_images, self._n_batches, self._n_pending)

    def close(self) -> None:
        """Stop after the running batch; requests that are not answered fail with EngineClosed."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            unanswered = list(self._open)
            self._changed.notify_all()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()
        for request in unanswered:
            self._fail(request, EngineClosed("The inference engine was shut down before it answered this request."))

    # -- decoding, in the pool -----------------------------------------------------------------------------------------

    def _decode(self, data: bytes, request: Request, position: int) -> None:
        pixels: Tensor | None = None
        outcome: ImageError | None = None
        try:
            if not request.is_over():
                pixels = prepare_image(data, request.size, self._limits)
        except UnreadableImage as error:
            outcome = ImageError(error.reason)
        except Exception as error:  # a decoder's own bug must not leave the request unanswered
            self._fail(request, error)
        with self._changed:
            self._n_decoding -= 1
            if pixels is not None:
                self._ready.append(Ready(pixels, request, position))
            self._changed.notify_all()
        if pixels is None:
            self._settle([(request, position, outcome or GIVEN_UP)])

    # -- the device's thread -------------------------------------------------------------------------------------------

    def _run(self, takes: Callable[[Ready], bool], torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)  # the decoders' 1 is partly the whole process's
        while True:
            batch, dropped = self._next_batch(takes)
            self._settle([(item.request, item.position, GIVEN_UP) for item in dropped])
            if not batch:
                if self._closed:
                    return
                continue
            rows: FloatArray | None = None
            try:
                rows = forward(batch)
            except Exception as error:  # out of memory, a sick device: these requests fail, the thread lives on
                for item in batch:
                    self._fail(item.request, error)
            with self._changed:
                self._n_batches += 1
                self._n_images += len(batch)
                self._last_end = time.monotonic()
                self._last_network = weakref.ref(batch[0].request.backbone), batch[0].request.size
                if rows is not None and np.isfinite(rows).all():
                    self._last_success = self._last_end
            gone = ImageError("The network failed on this image.")
            found = [gone] * len(batch) if rows is None else rows
            self._settle([(item.request, item.position, row) for item, row in zip(batch, found, strict=True)])

    def _next_batch(self, takes: Callable[[Ready], bool]) -> tuple[list[Ready], list[Ready]]:
        """Images for one forward pass, of one backbone and size, the oldest first; and those nobody waits for.

        Both may be empty, and are when the engine closes.
        """
        with self._changed:
            while (first := next(filter(takes, self._ready), None)) is None:
                if self._closed:
                    return [], []
                self._changed.wait()
            deadline = time.monotonic() + self._max_wait_s
            while not self._closed and self._n_decoding and self._n_like(first) < self._max_batch:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return [], []
            batch: list[Ready] = []
            dropped: list[Ready] = []
            others: deque[Ready] = deque()
            for item in self._ready:
                if item.request.is_over():
                    dropped.append(item)
                elif len(batch) < self._max_batch and alike(item.request, first.request):
                    batch.append(item)
                else:
                    others.append(item)
            self._ready = others
            return batch, dropped

    def _n_like(self, first: Ready) -> int:
        return sum(alike(item.request, first.request) for item in self._ready)

    def _settle(self, outcomes: Sequence[tuple[Request, int, FloatArray | ImageError]]) -> None:
        """Enter rows or errors of requests' images; the last ones of a request answer it."""
        with self._changed:
            for request, position, outcome in outcomes:
                request.rows[position] = outcome
                request.n_left -= 1
            self._n_pending -= len(outcomes)
            whole = [request for request in dict.fromkeys(outcome[0] for outcome in outcomes) if request.n_left == 0]
        asking: dict[Callable[[FloatArray], Sequence[Any]], list[Request]] = {}
        for request in whole:
            if not self._claim(request):
                continue
            if time.monotonic() > request.deadline:
                late = EngineTooLate("The request's time was over before its last image had run.")
                request.future.set_exception(late)
            else:
                asking.setdefault(request.question, []).append(request)
        for same in asking.values():
            self._answer(same)

    def _answer(self, requests: Sequence[Request]) -> None:
        """Answer requests of one question together; where that fails, each alone, so that none spoils another's."""
        try:
            found = answers(requests)
        except Exception as error:  # the classifier's own; it belongs to the caller
            if len(requests) == 1:
                requests[0].future.set_exception(error)
            else:
                for request in requests:
                    self._answer([request])
        else:
            for request, told in zip(requests, found, strict=True):
                request.future.set_result(told)

    def _fail(self, request: Request, error: Exception) -> None:
        """End the request with `error`, unless it has ended."""
        if self._claim(request):
            request.future.set_exception(error)

    def _claim(self, request: Request) -> bool:
        """True for the first who asks to end this request, if anybody still waits for it."""
        with self._changed:
            if request not in self._open:
                return False
            self._open.discard(request)
        return request.future.set_running_or_notify_cancel()


def _started_pool(n_threads: int) -> ThreadPoolExecutor:
    """A pool all of whose threads run already, each with one torch thread: images, not pixels, go in parallel."""
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="decode", initializer=torch.set_num_threads, initargs=(1,))
    everyone = threading.Barrier(n_threads + 1)
    for _ in range(n_threads):
        pool.submit(everyone.wait)
    everyone.wait()
    return pool
