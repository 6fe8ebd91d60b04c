"""Parts, faces and backgrounds of the demo creatures. A part is a function that draws on the creature's RGBA layer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

from models.data.creature_shapes import (
    BEAK,
    CANVAS,
    HORN,
    INK,
    Body,
    Colour,
    Paint,
    Point,
    bend,
    draw_dot,
    draw_shape,
    draw_stroke,
    mix,
)

Part = Callable[[ImageDraw.ImageDraw, Body, Paint, random.Random], None]

# ---------------------------------------------------------------- on the head


def horns(draw: ImageDraw.ImageDraw, body: Body, _paint: Paint, rng: random.Random) -> None:
    """Two cream horns that bend outwards."""
    x, _ = body.head
    length = rng.uniform(52, 66)
    for side in (-1, 1):
        foot = x + side * 0.52 * body.head_radius
        top = (foot + side * 26, body.crown - length + 14)
        outer = bend((foot + side * 17, body.crown + 20), (foot + side * 38, body.crown - 16), top)
        inner = bend(top, (foot + side * 6, body.crown - 20), (foot - side * 15, body.crown + 16))
        draw_shape(draw, [*outer, *inner], HORN)


def long_ears(draw: ImageDraw.ImageDraw, body: Body, paint: Paint, rng: random.Random) -> None:
    """Two upright ears in the main colour, pink inside."""
    x, _ = body.head
    length = rng.uniform(76, 92)
    for side in (-1, 1):
        foot, lean = x + side * 0.42 * body.head_radius, rng.uniform(8, 20) * side
        base, tip = (foot, body.crown + 18), (foot + lean, body.crown - length + 18)
        draw_stroke(draw, [base, tip], 32, paint.main)
        draw.line([base, (tip[0], tip[1] + 4)], fill=(250, 190, 196), width=14)
        draw_dot(draw, (tip[0], tip[1] + 4), 7, (250, 190, 196), line=0)


def antennae(draw: ImageDraw.ImageDraw, body: Body, paint: Paint, rng: random.Random) -> None:
    """Two thin curved feelers with a ball at the end."""
    x, _ = body.head
    length = rng.uniform(58, 74)
    for side in (-1, 1):
        foot = (x + side * 0.3 * body.head_radius, body.crown + 12)
        tip = (foot[0] + side * rng.uniform(26, 36), body.crown - length + 12)
        draw.line(bend(foot, (foot[0] + side * 2, body.crown - length / 2), tip), fill=INK, width=8, joint="curve")
        draw_dot(draw, tip, 15, paint.accent)


# ---------------------------------------------------------------- on the body


def wings(draw: ImageDraw.ImageDraw, body: Body, _paint: Paint, rng: random.Random) -> None:
    """Two bat-like wings with a scalloped lower edge."""
    spread, lift = rng.uniform(76, 92), rng.uniform(54, 74)
    for side, (x, y) in ((-1, body.left), (1, body.right)):
        tip = (x + side * spread, y - lift)
        edge = [
            *bend((x - side * 6, y - 20), (x + side * 0.5 * spread, y - lift - 16), tip),
            *bend(tip, (x + side * 0.82 * spread, y - 12), (x + side * 0.86 * spread, y + 18)),
            *bend((x + side * 0.86 * spread, y + 18), (x + side * 0.6 * spread, y), (x + side * 0.45 * spread, y + 32)),
            *bend((x + side * 0.45 * spread, y + 32), (x + side * 0.25 * spread, y + 8), (x - side * 6, y + 26)),
        ]
        draw_shape(draw, edge, (214, 232, 246))
        for end in ((0.86, 18), (0.45, 32)):
            draw.line([(x, y - 8), (x + side * end[0] * spread, y + end[1])], fill=INK, width=4)


def spikes(draw: ImageDraw.ImageDraw, body: Body, paint: Paint, rng: random.Random) -> None:
    """Sharp triangles along the sides or the back."""
    length = rng.uniform(36, 46)
    for (x, y), (dx, dy) in body.back:
        feet = ((x - 17 * dy - 6 * dx, y + 17 * dx - 6 * dy), (x + 17 * dy - 6 * dx, y - 17 * dx - 6 * dy))
        draw_shape(draw, [feet[0], (x + length * dx, y + length * dy), feet[1]], paint.accent)


def tail(draw: ImageDraw.ImageDraw, body: Body, paint: Paint, rng: random.Random) -> None:
    """A long curled tail with an arrow tip, to the right."""
    x, y = body.rump
    reach, lift = rng.uniform(72, 88), rng.uniform(76, 98)
    end = (x + reach, y - lift)
    draw_stroke(draw, bend((x, y), (x + 1.2 * reach, y + 26), end, 20), 15, paint.main)
    arrow = [(end[0] - 24, end[1] + 8), (end[0] - 6, end[1] - 34), (end[0] + 22, end[1] + 2)]
    draw_shape(draw, arrow, paint.accent)


def long_legs(draw: ImageDraw.ImageDraw, body: Body, paint: Paint, rng: random.Random) -> None:
    """Long thin legs with big feet."""
    length = rng.uniform(58, 70)
    for index, (x, y) in enumerate(body.feet):
        splay = rng.uniform(-4, 10) * (-1 if index == 0 else 1)
        foot = (x + splay, y + length)
        draw_stroke(draw, [(x, y - 8), foot], 12, paint.deep)
        draw.ellipse((foot[0] - 22, foot[1] - 10, foot[0] + 22, foot[1] + 14), fill=paint.accent, outline=INK, width=5)


def feet(draw: ImageDraw.ImageDraw, body: Body, paint: Paint) -> None:
    """What a creature without long legs stands on."""
    for x, y in body.feet:
        draw.ellipse((x - 20, y - 8, x + 20, y + 18), fill=paint.accent, outline=INK, width=5)


BACK_PARTS: dict[str, Part] = {
    "wings": wings,
    "spikes": spikes,
    "tail": tail,
    "long legs": long_legs,
    "horns": horns,
    "long ears": long_ears,
    "antennae": antennae,
}
"""Drawn behind the body, in this order."""

# ---------------------------------------------------------------- the face


def _eye(draw: ImageDraw.ImageDraw, at: Point, radius: float, gaze: Point) -> None:
    draw_dot(draw, at, radius, (255, 255, 255), line=4)
    x, y = at[0] + gaze[0] * radius * 0.3, at[1] + gaze[1] * radius * 0.3
    draw_dot(draw, (x, y), radius * 0.6, INK, line=0)
    draw_dot(draw, (x - radius * 0.2, y - radius * 0.22), radius * 0.22, (255, 255, 255), line=0)


def eyes(draw: ImageDraw.ImageDraw, body: Body, rng: random.Random, one: bool) -> None:
    """Two round eyes, or a single big one."""
    (x, y), r = body.head, body.head_radius
    gaze = (rng.uniform(-0.8, 0.8), rng.uniform(-0.3, 0.6))
    if one:
        _eye(draw, (x, y - 0.05 * r), 0.46 * r, gaze)
        return
    for side in (-1, 1):
        _eye(draw, (x + side * 0.4 * r, y - 0.08 * r), 0.3 * r, gaze)


def mouth(draw: ImageDraw.ImageDraw, body: Body, rng: random.Random, beak: bool) -> None:
    """A smile, or a large orange beak."""
    (x, y), r = body.head, body.head_radius
    y += 0.5 * r
    if beak:
        half, drop = 0.42 * r, rng.uniform(0.5, 0.62) * r
        draw_shape(draw, [(x - half, y - 0.14 * r), (x, y - 0.3 * r), (x + half, y - 0.14 * r), (x, y + drop)], BEAK)
        draw.line([(x - half, y - 0.14 * r), (x, y + 0.08 * r), (x + half, y - 0.14 * r)], fill=INK, width=4)
        return
    half, drop = rng.uniform(0.2, 0.3) * r, rng.uniform(0.18, 0.34) * r
    draw.chord((x - half, y - drop, x + half, y + drop), 0, 180, fill=(150, 40, 62), outline=INK, width=4)


# ---------------------------------------------------------------- the world


def background(rng: random.Random) -> Image.Image:
    """A pale scene that tells nothing of the class: sky, hills and bubbles in random hues."""
    hue, turn = rng.random(), rng.uniform(0.05, 0.3)
    top, bottom = _pale(hue, rng.uniform(0.78, 0.97)), _pale(hue + turn, rng.uniform(0.78, 0.97))
    ramp = Image.linear_gradient("L").resize((CANVAS, CANVAS))
    scene = Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)
    draw = ImageDraw.Draw(scene)
    kind = rng.choice(("sky", "bubbles", "hills", "wall"))
    if kind == "bubbles":
        for _ in range(7):
            r, x, y = rng.uniform(12, 44), rng.uniform(0, CANVAS), rng.uniform(0, CANVAS)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(bottom, (255, 255, 255), 0.45))
    if kind == "hills":
        for level in (0.5, 0.62):
            x, r = rng.uniform(0, CANVAS), rng.uniform(240, 420)
            y = level * CANVAS + r
            draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(bottom, top, level - 0.1))
    if kind == "sky":
        for _ in range(3):
            _cloud(draw, (rng.uniform(20, CANVAS - 20), rng.uniform(20, 150)), rng.uniform(14, 26))
    ground = CANVAS * rng.uniform(0.72, 0.82)
    draw.rectangle((0, ground, CANVAS, CANVAS), fill=_pale(hue + turn + rng.uniform(0.1, 0.5), rng.uniform(0.68, 0.88)))
    return scene.filter(ImageFilter.GaussianBlur(2))


def _pale(hue: float, value: float) -> Colour:
    """A washed-out colour of the wheel; `hue` in turns."""
    channels = (0.5 + 0.5 * math.cos(2 * math.pi * (hue - k / 3)) for k in range(3))
    r, g, b = (round(255 * value * (0.76 + 0.24 * c)) for c in channels)
    return r, g, b


def _cloud(draw: ImageDraw.ImageDraw, at: Point, size: float) -> None:
    for dx, dy, r in ((-1.2, 0.2, 0.8), (0.0, -0.2, 1.1), (1.2, 0.2, 0.8)):
        x, y = at[0] + dx * size, at[1] + dy * size
        draw.ellipse((x - r * size, y - r * size, x + r * size, y + r * size), fill=(252, 252, 255))
