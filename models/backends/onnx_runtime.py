"""ONNX Runtime on a CPU, always in fp32: more exact than a backbone's precision may ask for, never less."""

from __future__ import annotations

from pathlib import Path

import torch

from models.backbones import Precision
from models.backends.base import Run
from models.backends.onnx_file import FromONNX
from models.errors import EXTRA


class ONNXRuntime(FromONNX):
    """Reads the ONNX file."""

    name = "onnxruntime"
    can_spread = True
    needs = EXTRA.format("onnx")

    def load(self, file: Path, _precision: Precision, threads: int, streams: int) -> Run:
        """A session; callers bring the streams, each of which runs in its own thread."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, threads // streams)
        # Threads that share a layer wait awake, but not between batches: sleeping at each layer's end takes a single
        # image half as long again, and more of the processor's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors; these are raised as well
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        return lambda images: torch.from_numpy(session.run(None, {entry.name: images.contiguous().numpy()})[0])
