"""The few types that all of `models` shares. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Progress:
    """One report of a long computation: `completed` of `total` items of `phase` (total None: unknown).

    note: a sentence for whoever waits, where something went otherwise than asked for; it is never left out.
    """

    phase: str
    completed: int
    total: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


OnProgress = Callable[[Progress], None]
"""Called often (between steps). It may raise `Cancelled`; models let that pass."""


def ignore_progress(progress: Progress) -> None:
    """The default `OnProgress`: does nothing."""


@dataclass(frozen=True)
class PatchTable:
    """Patch features of labelled images.

    features: (n_patches, feature_dim) float16 or float32, may be a read-only memory map.
    image_index: (n_patches,) ascending row of `labels` that each patch was cut from.
    labels: (n_images,) index of each image's class into `class_names`.
    class_names: the classes, in the order of `labels`.
    """

    features: FloatArray
    image_index: IntArray
    labels: IntArray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class LabelledFeatures:
    """One feature vector an image: (n_images, feature_dim), with `labels` (n_images,) into `class_names`.

    channels: where a vector is a feature map, place after place: the numbers of one place. None: it is pooled.
    """

    features: FloatArray
    labels: IntArray
    class_names: tuple[str, ...]
    channels: int | None = None
