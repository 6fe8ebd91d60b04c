"""Photos with maps of attention laid over them, for people to look at. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.base import FloatArray

SIDE = 168
_TITLE = 18
_PER_ROW = 5


@dataclass(frozen=True)
class Tile:
    """A photo with what stands under it; places: a map (h, w) to lay over it, or None for the photo alone."""

    photo: Image.Image
    title: str
    places: FloatArray | None = None


def sheet(tiles: Sequence[Tile], *, per_row: int = _PER_ROW, side: int = SIDE) -> Image.Image:
    """All tiles in rows of `per_row`, each `side` pixels wide and high; photos are squeezed, as a network sees them."""
    n_rows = -(-len(tiles) // per_row)
    found = Image.new("RGB", (min(per_row, len(tiles)) * side, n_rows * (side + _TITLE)), "white")
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(12)
    for number, tile in enumerate(tiles):
        x, y = number % per_row * side, number // per_row * (side + _TITLE)
        photo = tile.photo.convert("RGB").resize((side, side))
        found.paste(photo if tile.places is None else overlaid(photo, tile.places), (x, y))
        pen.text((x + 3, y + side + 2), _fitting(tile.title, font, side - 6), fill="black", font=font)
    return found


def _fitting(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of the title as `width` pixels hold."""
    if font.getlength(title) <= width:
        return title
    kept = max((n for n in range(len(title)) if font.getlength(title[:n] + "…") <= width), default=0)
    return title[:kept].rstrip() + "…"


def overlaid(photo: Image.Image, places: FloatArray) -> Image.Image:
    """The photo (RGB), red where a map (h, w) is strongest and dark where it is weakest."""
    low, high = float(places.min()), float(places.max())
    grey = ((places - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    mask = Image.fromarray(grey).resize(photo.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.blend(photo, Image.new("RGB", photo.size, "red"), 0.35), photo.point(_dark), mask)


def _dark(value: int) -> float:
    return value * 0.35
