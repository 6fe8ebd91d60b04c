"""torch.compile: kernels made for this network and device; on a GPU its launches are recorded once as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from models.backbones import Backbone
from models.backends.base import Place, PreparedNetwork, Whole

BUCKETS = (1, 4, 8, 16, 32)
"""Batch sizes that are compiled: a smaller batch is filled up to the next one, a larger one is cut."""


class Compiled:
    """Compiles anew in every process, for some ten seconds a bucket; needs a C++ compiler."""

    name = "compile"
    needs = "install a C++ compiler and a newer torch"

    def version(self) -> str:
        """torch's."""
        return torch.__version__

    def is_prepared(self, _backbone: Backbone, _place: Place) -> bool:
        """Never: what is compiled lives in its process."""
        return False

    def prepare(self, _backbone: Backbone, _place: Place) -> None:
        """Nothing that would outlast this process."""

    def open(self, backbone: Backbone, place: Place) -> PreparedNetwork:
        """Compiles the network for every bucket, so that no request waits for it."""
        run = _Buckets(backbone, place.threads_a_batch)
        run.compile(place.size)
        return PreparedNetwork(self.name, backbone, place.size, run)


class _Buckets:
    """Runs a compiled network, always in the same thread: CUDA graphs belong to the one that recorded them."""

    def __init__(self, backbone: Backbone, threads: int) -> None:
        self._backbone = backbone
        self._sizes = [size for size in BUCKETS if size <= backbone.max_batch]
        # Each network has its own count of compilations: past the limit torch goes back to eager without a word.
        self._network: Callable[[Tensor], Tensor] = torch.compile(  # type: ignore[call-overload]  # the stubs lack some
            Whole(backbone).eval(),
            mode="reduce-overhead",
            dynamic=False,
            recompile_limit=len(self._sizes),
            isolate_recompiles=True,
        )
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="compiled", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._has_failed = False

    def compile(self, size: int) -> None:
        """One run of each bucket with images of `size` pixels; raises what the compiler raises."""
        for n in self._sizes:
            self._thread.submit(self._run, torch.zeros((n, 3, size, size), dtype=torch.uint8)).result()

    def __call__(self, images: Tensor) -> Tensor:
        if not self._has_failed:
            try:
                parts = torch.split(images, self._sizes[-1])
                return torch.cat([self._thread.submit(self._run, part).result() for part in parts])
            except Exception as error:  # whatever the compiled code raises; if the device is sick, so does the next
                self._has_failed = True
                warnings.warn(f"Compiled {self._backbone.name!r} failed, eager torch goes on: {error}", stacklevel=2)
        return self._backbone.features(images)

    def _run(self, images: Tensor) -> Tensor:
        backbone, n = self._backbone, len(images)
        bucket = next(size for size in self._sizes if size >= n)
        padded = torch.zeros((bucket, *images.shape[1:]), dtype=torch.uint8, device=backbone.device)
        padded = padded.contiguous(memory_format=torch.channels_last)
        padded[:n] = images
        is_bf16 = backbone.precision == "bf16"
        with torch.inference_mode(), torch.autocast(backbone.device.type, torch.bfloat16, enabled=is_bf16):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch gives it no types
            # A copy: the next run of the graph overwrites what this one returned.
            return self._network(padded)[:n].to(torch.float32, copy=True)
