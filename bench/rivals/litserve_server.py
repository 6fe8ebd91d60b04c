"""The same through LitServe with dynamic batching, as its documentation shows it.

THREADS=2 WEIGHTS=FILE PORT=9002 python bench/rivals/litserve_server.py
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import Response
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import decode, features, load_network


class Features(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """Requests to batches to rows."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - the signature is LitServe's
        """Once in the worker."""
        self.network = load_network()

    def decode_request(self, request: dict[str, str]) -> bytes:
        """The image file: its server takes JSON and forms only."""
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> Tensor:
        """One tensor of many files."""
        return torch.stack([decode(data) for data in inputs])

    def predict(self, x: Any) -> list[list[float]]:
        """Rows of a batch, or of one file."""
        return features(self.network, x if isinstance(x, Tensor) else decode(x)[None])

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """They are rows already."""
        return output

    def encode_response(self, output: list[float]) -> Response:
        """JSON."""
        return Response(str(output), media_type="application/json")


if __name__ == "__main__":
    api = Features(max_batch_size=32, batch_timeout=0.004)
    litserve.LitServer(api, accelerator="cpu", timeout=600).run(
        port=int(os.environ["PORT"]), generate_client_file=False, log_level="error"
    )
