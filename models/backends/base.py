"""What every backend offers: it prepares a backbone once, and opens what then computes its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.backbones import Backbone, BackboneView, FeatureNetwork
from models.errors import ShapeMismatch

Run = Callable[[Tensor], Tensor]
"""uint8 (B, 3, size, size) -> float32 (B, feature_dim), from any thread."""


@dataclass(frozen=True)
class Place:
    """Where and how a network is to run.

    size: side of the images in pixels. directory: of what backends keep for later processes. threads: of the CPU, by
    default as many as torch uses. streams: batches that run at a time, sharing the threads.
    """

    size: int
    directory: Path
    threads: int = field(default_factory=torch.get_num_threads)
    streams: int = 1

    @property
    def threads_a_batch(self) -> int:
        """What one batch gets of the threads."""
        return max(1, self.threads // self.streams)

    def folder(self, backbone: Backbone) -> Path:
        """Where all about this network at this size is kept. What another torch exported may differ."""
        version = torch.__version__.partition("+")[0]
        return self.directory / f"{backbone.digest[:32]}-{self.size}-torch{version}"


class Backend(Protocol):
    """One way to compute features."""

    name: str
    needs: str
    """How to get it."""

    def version(self) -> str:
        """Of the library; ImportError where it is not installed."""

    def is_prepared(self, backbone: Backbone, place: Place, /) -> bool:
        """Whether `open` takes moments: `prepare` was called, by this process or another."""

    def prepare(self, backbone: Backbone, place: Place, /) -> None:
        """Does once what takes seconds."""

    def open(self, backbone: Backbone, place: Place, /) -> FeatureNetwork:
        """What computes the features. Raises whatever the library raises for a network it cannot run."""


@dataclass(frozen=True)
class PreparedNetwork(BackboneView):
    """A backbone whose features a backend computes, for images of one `size`. Views of one network are equal.

    run: takes 1 <= B <= max_batch. n_bytes: of its own copies of the weights. queues: whether batches of several
    callers share its threads without disturbing each other.
    """

    backend: str
    backbone: Backbone
    size: int
    run: Run = field(compare=False, repr=False)
    n_bytes: int = field(compare=False, default=0)
    queues: bool = field(compare=False, default=False)

    @property
    def feature_dim(self) -> int:
        """Length of the vector."""
        return self.backbone.feature_dim

    @property
    def digest(self) -> str:
        """The backbone's own: rounding apart, the features are the same."""
        return self.backbone.digest

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) -> float32 (B, feature_dim)."""
        self.backbone.check(images)
        if images.shape[2:] != (self.size, self.size):
            raise ShapeMismatch(
                f"The network was prepared for images of {self.size} pixels, not {tuple(images.shape[2:])}."
            )
        rows = [self.run(part) for part in torch.split(images, self.max_batch) if len(part)]
        return torch.cat(rows) if rows else torch.empty((0, self.feature_dim), device=self.device)


class Whole(nn.Module):
    """A network with the preparation of its images: uint8 (B, 3, h, w) -> (B, feature_dim)."""

    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        self.register_buffer("offset", torch.tensor(backbone.mean, device=backbone.device).view(1, 3, 1, 1) * 255)
        self.register_buffer("scale", torch.tensor(backbone.std, device=backbone.device).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.module((images.float() - self.offset) / self.scale)
        return features
