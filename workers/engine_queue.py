"""What the inference engine's queue is made of: requests, their images that are ready, and a batch's forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray, IntArray
from models.data.images import DEFAULT_LIMITS, ImageLimits, decode_image
from models.embedding.cutting import decoded_side
from models.embedding.extraction import FLOAT16_MAX
from models.embedding.patches import cut_patches, patch_boxes
from models.params import PatchParams
from workers.predictions import FeatureExtractor, ImageError, Resident, Scope

GIVEN_UP = ImageError("The request was given up.")


class EngineBusy(Exception):
    """As many images as the engine takes are waiting; nothing of the request was started."""


class EngineClosed(Exception):
    """The engine is shut down."""


class EngineTooLate(Exception):
    """The request's time was over before its last image had run."""


class EngineSick(Exception):
    """The device does not compute as it should."""


@dataclass(frozen=True)
class EngineStats:
    """Since the start: images and batches run; and images waiting now."""

    n_images: int
    n_batches: int
    n_waiting: int


@dataclass(frozen=True)
class Question:
    """What is asked of images: `tell` of them, with its options, among `classes` of the resident.

    Equal ones are answered together: `classes` follow from scope and names.
    """

    tell: Callable[..., Sequence[Any]]
    resident: Resident
    scope: Scope
    class_names: tuple[str, ...] | None
    options: tuple[tuple[str, float | None], ...]
    classes: IntArray = field(compare=False)

    def __call__(self, rows: FloatArray) -> Sequence[Any]:
        """An answer for each row of features."""
        return self.tell(self.resident, rows, self.classes, **dict(self.options))


@dataclass(eq=False)
class Request:
    """Images on their way, the rows they have so far, and the future of all their answers.

    question: rows of features -> an answer for each. deadline: on the monotonic clock.
    """

    backbone: FeatureExtractor
    size: int
    question: Callable[[FloatArray], Sequence[Any]]
    rows: list[FloatArray | ImageError | None]
    n_left: int
    deadline: float = math.inf
    future: Future[list[Any]] = field(default_factory=Future)

    def is_over(self) -> bool:
        """Whether nobody waits for the answer any more: it was given up, has failed, or is too late."""
        return self.future.done() or time.monotonic() > self.deadline


@dataclass(frozen=True)
class Pulse:
    """Stands in for a network that nobody has used yet, when the device is probed."""

    device: str

    def features(self, images: Tensor) -> Tensor:
        """Mean colours, computed on the device."""
        return images.to(self.device).float().mean(dim=(2, 3))


@dataclass(frozen=True)
class Ready:
    """One decoded image: uint8 (3, size, size), and where its answer belongs."""

    pixels: Tensor
    request: Request
    position: int


def prepare_image(data: bytes, size: int, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
    """An image file as the backbone saw it in training: the whole of it, uint8 (3, size, size)."""
    params = PatchParams(method="whole", size=size)
    image = decode_image(data, limits, target_side=decoded_side(params))
    return cut_patches(image, patch_boxes(image, params), size)[0]


def forward(batch: Sequence[Ready]) -> FloatArray:
    """Features (B, feature_dim) float32, rounded to float16 in between as the stored training features were."""
    images = torch.stack([item.pixels for item in batch]).contiguous(memory_format=torch.channels_last)
    features = batch[0].request.backbone.features(images).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return np.asarray(features.to(torch.float16).cpu().numpy(), np.float32)


def answers(requests: Sequence[Request]) -> list[list[Any]]:
    """What their question, the same for all, says of each request's images, with the errors in their places."""
    rows = [row for request in requests for row in request.rows if isinstance(row, np.ndarray)]
    told = iter(requests[0].question(np.stack(rows)) if rows else ())
    return [[row if isinstance(row, ImageError) else next(told) for row in request.rows] for request in requests]


def queues(item: Ready) -> bool:
    """Whether the image's network takes batches of several threads at a time; one that does not say so takes none."""
    return getattr(item.request.backbone, "queues", False)


def alike(one: Request, other: Request) -> bool:
    """Whether images of both may share a batch."""
    return one.backbone == other.backbone and one.size == other.size
