"""One network on several threads of a CPU, for one image as for many."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from models.backends.base import Run

PIECES_A_THREAD = 4
"""Of a batch: more even out better, fewer cost less."""


class Spread:
    """One batch on several threads: a small one together, layer by layer; a larger one in pieces of a thread each.

    Threads that share a layer wait for each other at its end, and where anything else needs a core now and then, all
    of them wait for the one that lost it. Pieces only meet at the end of the batch, and whoever is free takes the next.
    Batches of several callers queue up piece by piece, so that the next one fills the threads that the last leaves.

    together: on all `threads`. apart: on one thread, from several at a time.
    """

    def __init__(self, together: Run, apart: Run, threads: int) -> None:
        self._together, self._apart, self._threads = together, apart, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="network")
        self._lock, self._n_running = threading.Lock(), 0

    def __call__(self, images: Tensor) -> Tensor:
        with self._lock:
            is_alone = self._n_running == 0
            self._n_running += 1
        try:
            if is_alone and len(images) < self._threads:
                return self._together(images)
            pieces = torch.split(images, max(1, len(images) // (PIECES_A_THREAD * self._threads)))
            return torch.cat(list(self._pool.map(self._apart, pieces)))
        finally:
            with self._lock:
                self._n_running -= 1
