"""OpenVINO on a CPU: fp32, or bfloat16 where a backbone's precision allows it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbones import Precision
from models.backends.base import Run
from models.backends.onnx_file import FromONNX
from models.errors import EXTRA


class OpenVINO(FromONNX):
    """Reads the ONNX file; bfloat16 runs on the processor's own instructions, where it has them."""

    name = "openvino"
    # Shared out among a pool's threads, networks that ended with it hung a process once, and crashed one once, of some
    # hundreds. Why is not known.
    can_spread = False
    needs = EXTRA.format("openvino")

    def load(self, file: Path, precision: Precision, threads: int, streams: int) -> Run:
        """A compiled network."""
        options = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
        }
        return _Requests(_import_openvino().Core().compile_model(file, "CPU", options))


class _Requests:
    """Runs a compiled network; each thread has a request of its own, which serves one at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._of_thread = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._compiled.create_infer_request()
        return torch.from_numpy(self._of_thread.request.infer([images.contiguous().numpy()])[0])


def _import_openvino() -> Any:
    # It reports its use to its makers over the network, from the moment it is imported, unless this is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not to be found
    import openvino

    return openvino
