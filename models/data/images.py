"""From the bytes of an image file to pixels, safely: what an upload may be, and what the backbone gets to see.

The content decides what a file is, never its name. Sizes are checked in the header, before any pixel is decoded.
All functions may be called from several threads. No torch here: the API process imports this file.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.errors import UnreadableImage

MIB = 2**20
MAX_JPEG_SCANS = 500
MAX_SCANNED_PIXELS = 2_000_000_000
"""Progressive scans: each costs a pass over all pixels, so a small file could keep a core busy for hours. Usual files
have about ten; 64 million pixels may have 31, and all together take some two seconds."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_OTHER_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF document"),
    (b"<", "a text document (HTML, XML or SVG)"),
)


@dataclass(frozen=True)
class ImageLimits:
    """What a single image may cost. `max_pixels` above 178 million has no effect (Pillow's own bound)."""

    max_bytes: int = 32 * MIB
    max_pixels: int = 64_000_000
    min_side: int = 1


@dataclass(frozen=True)
class ImageInfo:
    """`format` is one of JPEG, PNG, WEBP, GIF, BMP, TIFF; `width` and `height` are those of the upright image."""

    format: str
    width: int
    height: int


DEFAULT_LIMITS = ImageLimits()


def probe_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> ImageInfo:
    """What image the file holds, having decoded all of it. UnreadableImage if it holds none."""
    with _opened(data, limits) as (image, image_format):
        width, height = image.size
        image.draft(None, (1, 1))  # a JPEG is then read to its end, but at an eighth of the size
        image.load()
        if image_format == "TIFF":
            width, height = image.size
        orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    return ImageInfo(image_format, width, height)


def decode_image(
    data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, target_side: int | None = None
) -> NDArray[np.uint8]:
    """The upright image in RGB, (height, width, 3); transparency lies on white; the first frame of an animation.

    With `target_side` an image whose shorter side is longer than that is reduced, antialiased, so that the shorter
    side is `target_side`; smaller images stay as they are. UnreadableImage if the file cannot be used.
    """
    return np.asarray(_upright_rgb(data, limits, target_side))


def make_thumbnail(data: bytes, side: int, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """A JPEG of the image that fits in `side` x `side` pixels, never enlarged. UnreadableImage as `decode_image`."""
    image = _upright_rgb(data, limits, side)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def sniff_format(data: bytes) -> str:
    """The image format that the first bytes announce. UnreadableImage if it is none of those allowed."""
    if not data:
        raise UnreadableImage("The file is empty (0 bytes).")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    for magic, name in _OTHER_MAGIC:
        if data.lstrip()[: len(magic)] == magic:
            raise UnreadableImage(f"The file is {name}, not an image. Use JPEG, PNG, WEBP, GIF, BMP or TIFF.")
    raise UnreadableImage("The file is not an image of a known kind. Use JPEG, PNG, WEBP, GIF, BMP or TIFF.")


def _upright_rgb(data: bytes, limits: ImageLimits, target_side: int | None) -> Image.Image:
    with _opened(data, limits) as (image, _):
        if target_side is not None:
            image.draft(None, (target_side, target_side))  # JPEG only; both sides stay at least this long
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        if target_side is not None and min(rgb.size) > target_side:
            scale = target_side / min(rgb.size)
            size = (max(target_side, round(rgb.width * scale)), max(target_side, round(rgb.height * scale)))
            rgb = rgb.resize(size, Image.Resampling.BILINEAR)
        method = _TRANSPOSE.get(orientation)
        return rgb if method is None else rgb.transpose(method)


@contextmanager
def _opened(data: bytes, limits: ImageLimits) -> Iterator[tuple[Image.Image, str]]:
    """The image with its header read and its size checked; whatever fails inside becomes UnreadableImage."""
    if len(data) > limits.max_bytes:
        raise UnreadableImage(f"The file has {len(data):,} bytes; at most {limits.max_bytes:,} are allowed.")
    image_format = sniff_format(data)
    if image_format == "WEBP":  # Pillow allocates the whole canvas while it opens the file
        _check_size(*_webp_size(data), limits)
    n_scans = data.count(b"\xff\xda") if image_format == "JPEG" else 1
    if n_scans > MAX_JPEG_SCANS:
        raise UnreadableImage(f"The JPEG has more than {MAX_JPEG_SCANS} scans. Save it again as a usual JPEG.")
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            _check_size(*image.size, limits)
            if n_scans * image.width * image.height > MAX_SCANNED_PIXELS:
                raise UnreadableImage(
                    f"The JPEG has {n_scans} scans over {image.width} x {image.height} pixels, which take too long to "
                    "decode. Save it again as a usual JPEG."
                )
            yield image, image_format
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(_too_large("far more", limits)) from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"The file starts like a {image_format} but its header is damaged or cut off.") from None
    except Exception as error:  # hostile bytes make the decoders raise nearly anything
        raise UnreadableImage(_damage(image_format, error)) from None


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if min(width, height) < max(limits.min_side, 1):
        raise UnreadableImage(f"The image is {width} x {height} pixels; each side needs at least {limits.min_side}.")
    if width * height > limits.max_pixels:
        raise UnreadableImage(_too_large(f"{width} x {height} =", limits, width * height))


def _too_large(what: str, limits: ImageLimits, n_pixels: int | None = None) -> str:
    count = "" if n_pixels is None else f" {n_pixels / 1e6:,.1f} million"
    return f"The image has {what}{count} pixels; at most {limits.max_pixels / 1e6:g} million are allowed. Shrink it."


def _damage(image_format: str, error: Exception) -> str:
    text = str(error)
    if isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "unexpected end", "EOF", "not enough")
    ):
        return f"The {image_format} is truncated: its data ends too early. Upload the whole file."
    return f"The {image_format} is corrupt and cannot be decoded ({text[:120] or type(error).__name__})."


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas width and height from the first chunk (WebP container specification; VP8: RFC 6386 section 9.1)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) == 10:
        if chunk == b"VP8X":
            return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        if chunk == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if chunk == b"VP8 ":
            width, height = struct.unpack("<HH", body[6:10])
            return width & 0x3FFF, height & 0x3FFF
    raise UnreadableImage("The file starts like a WEBP but its header is damaged or cut off.")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a loaded image; 1 where the file has none or its EXIF block is damaged.

    After loading, because Pillow turns a TIFF upright itself while it loads, and a PNG may keep its EXIF at the end.
    """
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block is no reason to refuse good pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _grey_from_deep(np.asarray(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_deep(values: NDArray[np.generic]) -> Image.Image:
    """16-bit integers scaled by their range; wider integers and floats by it if they keep to it, else by their own."""
    if values.dtype == np.uint16:
        return _grey((values.astype(np.uint32) * 255 + 32_767) // 65_535)
    deep = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(deep.min()), float(deep.max())
    is_float = values.dtype.kind == "f"
    top = next((t for t in ((1.0, 255.0) if is_float else (65_535.0,)) if high <= t), None)
    if low >= 0 and top is not None:
        low, high = 0.0, top
    return _grey(np.rint((deep - low) * (255 / max(high - low, 1e-300))))


def _grey(values: NDArray[np.integer | np.floating]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _silence_pillow() -> None:
    """Ignore what Pillow warns and logs (odd EXIF, big pictures): the file's owner gets an error or a usable image.

    `warnings.catch_warnings` is not safe with threads, so the filter is put in place once and stays.
    """
    logger = logging.getLogger("PIL")
    if logger.level != logging.CRITICAL:  # setting it, even to what it is, clears the caches of all loggers
        logger.setLevel(logging.CRITICAL)
    pattern = r"PIL\."
    if not any(
        entry[3] is not None and getattr(entry[3], "pattern", entry[3]) == pattern for entry in warnings.filters
    ):
        warnings.filterwarnings("ignore", module=pattern)
