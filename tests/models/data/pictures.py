"""Image files in memory, for the tests of this folder."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """A smooth colourful picture: no flat regions, few sharp edges (so lossy formats stay close)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [128 + 100 * np.sin(x / 9 + c + seed) * np.cos(y / 7 - c) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.int64]:
    """RGB values as signed numbers, so that differences do not wrap."""
    return np.asarray(image.convert("RGB")).astype(np.int64)
