"""ONNX Runtime on a CPU, always in fp32: more exact than a backbone's precision may ask for, never less."""

from __future__ import annotations

import torch
from torch import Tensor

from models.backbones import Backbone
from models.backends.base import Place, PreparedNetwork
from models.backends.onnx_file import FromONNX, onnx_file, weights_bytes


class ONNXRuntime(FromONNX):
    """Reads the ONNX file."""

    name = "onnxruntime"
    needs = "pip install 'unseen[onnx]'"

    def open(self, backbone: Backbone, place: Place) -> PreparedNetwork:
        """Loads the network; a fraction of a second."""
        import onnxruntime

        file = onnx_file(backbone, place)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = place.threads_a_batch  # callers bring the streams: each runs in its own thread
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others need the cores, too
        options.log_severity_level = 3  # errors; these are raised as well
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {entry.name: images.contiguous().numpy()})[0])

        return PreparedNetwork(self.name, backbone, place.size, run, weights_bytes(file))
