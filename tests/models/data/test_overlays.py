"""Sheets of photos with maps of attention over them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from models.data.overlays import SIDE, Tile, sheet

PHOTO = Image.new("RGB", (40, 30), "green")


def test_a_long_title_ends_before_the_next_tile_begins() -> None:
    long, short = (sheet([Tile(PHOTO, title), Tile(PHOTO, "two")]) for title in ("wide name " * 9, "one"))
    assert long.size == short.size == (2 * SIDE, short.height)
    same = np.asarray(long) == np.asarray(short)
    assert same[:, SIDE:].all()
    assert not same[SIDE:, :SIDE].all()


def test_maps_are_red_where_strong_and_dark_where_weak() -> None:
    places = np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)
    found = np.asarray(sheet([Tile(PHOTO, "plain"), Tile(PHOTO, "with a map", places)]), int)[:SIDE, :]
    plain, left, right = found[80, 10], found[80, SIDE + 5], found[80, 2 * SIDE - 5]
    assert left.sum() < plain.sum() / 2
    assert right[0] > plain[0]
