"""A network and a classifier with exact answers for tests of the inference engine, and hands to wait with."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models.base import FloatArray
from workers.engine import Engine
from workers.predictions import ImageError, Prediction, Resident

NAMES = ("red", "green", "blue", "grey")
EMBEDDINGS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], np.float32)


class MeanColour:
    """Feature = mean of each channel, 0..1. Counts batches; may be told to wait or to fail."""

    queues = False

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def features(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return images.float().mean(dim=(2, 3)) / 255


class Dot:
    """score = feature . embedding."""

    is_joint = False

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        return np.asarray(features @ class_embeddings.T, np.float32)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE = picture((200, 0, 0)), picture((0, 200, 0)), picture((0, 0, 200))


def resident(backbone: MeanColour | None = None) -> Resident:
    seen = np.array([True, False, True, False])
    return Resident(Dot(), backbone or MeanColour(), 32, NAMES, EMBEDDINGS, seen, gamma=0.0, temperature=0.1)


def classified(engine: Engine, *args: Any, **options: Any) -> list[list[Prediction] | ImageError]:
    return engine.classify(*args, **options).result(20)


def labels(answers: list[list[Prediction] | ImageError]) -> list[str | None]:
    return [None if isinstance(answer, ImageError) else answer[0].label for answer in answers]
