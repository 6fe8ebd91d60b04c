"""What every rival computes: a network's features of a photo, eager torch, prepared as torchvision prescribes."""

from __future__ import annotations

import io
import os

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms import v2

PREPARE = v2.Compose(
    [
        v2.PILToTensor(),
        v2.Resize((224, 224), antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def load_network() -> nn.Module:
    """NETWORK without its last layer with the weights in the file WEIGHTS, on THREADS threads."""
    torch.set_num_threads(int(os.environ["THREADS"]))
    network = get_model(os.environ["NETWORK"])
    state = {name: tensor.float() for name, tensor in load_file(os.environ["WEIGHTS"]).items()}
    network.load_state_dict(state, strict=False)
    last = "fc" if hasattr(network, "fc") else "classifier"
    setattr(network, last, nn.Identity())
    return network.eval().to(memory_format=torch.channels_last)


def decode(data: bytes) -> Tensor:
    """float32 (3, 224, 224) of an image file."""
    prepared: Tensor = PREPARE(Image.open(io.BytesIO(data)).convert("RGB"))
    return prepared


@torch.inference_mode()
def features(network: nn.Module, images: Tensor) -> list[list[float]]:
    """Rows of (B, 3, 224, 224)."""
    rows: list[list[float]] = network(images.contiguous(memory_format=torch.channels_last))[:, :8].tolist()
    return rows
