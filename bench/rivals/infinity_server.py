"""The same through Infinity, which serves models of transformers: the network in the clothes of a CLIP image tower.

THREADS=2 WEIGHTS=FILE NETWORK=mobilenet_v2 PORT=9003 python bench/rivals/infinity_server.py

Its own bounds let in libraries of today with which it does not start, or answers 500. It runs with infinity-emb[all]
0.0.77, transformers 4.47.1, optimum 1.23.3, sentence-transformers 3.3.1, fastapi 0.115.6, starlette 0.41.3,
prometheus-fastapi-instrumentator 7.0.0, pydantic 2.10.6, and without datasets and colpali-engine.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import uvicorn
from infinity_emb import EngineArgs
from infinity_emb.infinity_server import create_server
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from common import PREPARE, load_network


class Config(PretrainedConfig):  # type: ignore[misc]  # not installed where types are checked
    """Nothing to say."""

    model_type = "photo_tower"


class Tower(PreTrainedModel):  # type: ignore[misc]  # not installed where types are checked
    """What Infinity asks of an image model."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network = load_network()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Tower:
        """The weights are those of the environment."""
        return cls(Config()).eval()

    def get_text_features(self, **_: Any) -> Tensor:
        """Infinity tries one text when it starts."""
        return torch.zeros(1, 8)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Rows."""
        rows: Tensor = self.network(pixel_values.contiguous(memory_format=torch.channels_last))[:, :8]
        return rows


class Processor:
    """Images, and the one text, to tensors."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Processor:
        """There is nothing to load."""
        return cls()

    def __call__(self, images: list[Image] | None = None, text: list[str] | None = None, **_: Any) -> dict[str, Tensor]:
        """What the model's two methods take."""
        found: dict[str, Tensor] = {}
        if images:
            found["pixel_values"] = torch.stack([PREPARE(image.convert("RGB")) for image in images])
        if text:
            found |= {name: torch.zeros(len(text), 1, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        return found


def main() -> None:
    """Serves /embeddings and /health."""
    AutoConfig.register(Config.model_type, Config)
    AutoModel.register(Config, Tower)
    AutoProcessor.register(Config, Processor)
    with tempfile.TemporaryDirectory() as folder:
        told = {"model_type": Config.model_type, "architectures": ["Tower"], "vision_config": {"of": "photos"}}
        (Path(folder) / "config.json").write_text(json.dumps(told))
        arguments = EngineArgs(
            model_name_or_path=folder,
            served_model_name="photos",
            batch_size=32,
            device="cpu",
            engine="torch",
            bettertransformer=False,
            model_warmup=False,
        )
        uvicorn.run(create_server(engine_args_list=[arguments]), port=int(os.environ["PORT"]), log_level="error")


if __name__ == "__main__":
    main()
