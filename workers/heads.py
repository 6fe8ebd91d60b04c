"""Generative classifiers made ready for the classes that compete, apart from the device's thread.

Features of new classes are generated, and where the final classifier is one for all classes together it is trained anew
for each set of them, which takes seconds to minutes: one thread does so, one set after the other, each once, while the
engine answers for all that is ready. Only the event loop uses what is here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
from starlette.concurrency import run_in_threadpool

from models.base import FloatArray
from models.evaluation import Scorer
from service.core.errors import Unavailable
from workers.predictions import Resident

KEPT_SETS = 4
"""Sets of classes for which a classifier stays prepared."""
MAX_UNPREPARED = 16
"""Sets of classes, of all classifiers, that are being prepared for or wait for it."""


@runtime_checkable
class Preparable(Scorer, Protocol):
    """A classifier that may have much to do before it can score classes: a generative one."""

    def is_ready(self, class_embeddings: FloatArray) -> bool:
        """Whether it can score these classes, (n_classes, embedding_dim), nearly at once."""
        ...

    def prepared(self, class_embeddings: FloatArray) -> Scorer:
        """One that can; takes as long as it takes."""
        ...


class Heads:
    """Residents whose classifier is ready for their classes."""

    def __init__(self) -> None:
        self._at_once: WeakSet[Resident] = WeakSet()
        self._ready: WeakKeyDictionary[Resident, Resident] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[Scorer, OrderedDict[bytes, _Head]] = WeakKeyDictionary()
        self._tasks: SimpleQueue[_Head] = SimpleQueue()
        self._thread: threading.Thread | None = None  # most processes never need it

    def ready(self, resident: Resident) -> Resident | None:
        """The resident if nothing is to be prepared, or what `prepared` gave for this very one."""
        if resident in self._at_once:
            return resident
        if not isinstance(resident.classifier, Preparable):
            self._at_once.add(resident)
            return resident
        return self._ready.get(resident)

    async def prepared(self, resident: Resident) -> Resident:
        """The resident with its classifier ready for its classes; Unavailable where too many sets wait for that.

        What has begun goes on when its callers have gone, for whoever asks next; one that waits is given up.
        """
        if not isinstance(resident.classifier, Preparable):
            return resident
        if await run_in_threadpool(resident.classifier.is_ready, resident.embeddings):
            self._at_once.add(resident)
            return resident
        key = await run_in_threadpool(_digest, resident.embeddings)
        heads = self._heads.setdefault(resident.classifier, OrderedDict())
        head = heads.get(key)
        if head is None or head.is_lost():
            head = heads[key] = self._begin(resident.classifier, resident.embeddings)
        heads.move_to_end(key)
        for old in [other for other in heads if heads[other].future.done()][: max(0, len(heads) - KEPT_SETS)]:
            del heads[old]
        try:
            classifier = await head.result()
        finally:
            if head.is_lost() and heads.get(key) is head:
                del heads[key]
        return self._ready.setdefault(resident, dataclasses.replace(resident, classifier=classifier))

    def _begin(self, classifier: Preparable, embeddings: FloatArray) -> _Head:
        unprepared = sum(not head.future.done() for heads in self._heads.values() for head in heads.values())
        if unprepared >= MAX_UNPREPARED:
            raise Unavailable(
                f"Classifiers are to be prepared for {unprepared} sets of classes already. Try again later.",
                retry_after_s=10,
            )
        head = _Head(classifier, embeddings)
        self._tasks.put(head)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heads", daemon=True)
            self._thread.start()
        return head

    def _run(self) -> None:
        torch.set_num_threads(1)  # the cores are the engine's
        while True:
            self._tasks.get().prepare()


class _Head:
    """A classifier to be prepared for the classes of `embeddings`, and who waits for it."""

    def __init__(self, classifier: Preparable, embeddings: FloatArray) -> None:
        self.future: Future[Scorer] = Future()
        self._task: tuple[Preparable, FloatArray] | None = classifier, embeddings
        self._n_waiting = 0

    def is_lost(self) -> bool:
        """Whether it was given up, or failed."""
        return self.future.done() and (self.future.cancelled() or self.future.exception() is not None)

    async def result(self) -> Scorer:
        """The prepared classifier."""
        self._n_waiting += 1
        try:
            return await asyncio.shield(asyncio.wrap_future(self.future))
        finally:
            self._n_waiting -= 1
            if not self._n_waiting and self.future.cancel():  # one that has begun goes on
                self._task = None

    def prepare(self) -> None:
        """In the thread: do so, unless nobody waits any more."""
        task, self._task = self._task, None  # the classifier must not live for as long as what is known of it
        if task is None or not self.future.set_running_or_notify_cancel():
            return
        classifier, embeddings = task
        try:
            self.future.set_result(classifier.prepared(embeddings))
        except Exception as error:  # whoever waits hears of it
            self.future.set_exception(error)


def _digest(embeddings: FloatArray) -> bytes:
    return hashlib.blake2b(embeddings.tobytes(), digest_size=16).digest()
