"""What a demo creature is drawn from: colours, strokes, body silhouettes and textures.

Everything is drawn on a canvas four times as large (`CANVAS`) and reduced, which is the antialiasing. Chance comes
from `random.Random` alone, whose streams are the same in all Python versions, so an image depends on its seed only.
A creature stands on a stage of its own (`STAGE` pixels, y down), larger than the canvas, so that no part is cut off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 4
SIZE = 96
CANVAS = OVERSAMPLING * SIZE
STAGE = CANVAS + 96
MIDDLE = STAGE / 2
INK: Colour = (46, 36, 58)
OUTLINE = 5

COLOURS: dict[str, Colour] = {
    "red": (222, 58, 58),
    "yellow": (252, 222, 62),
    "green": (84, 178, 78),
    "blue": (62, 122, 218),
    "purple": (150, 84, 196),
}
ACCENTS: dict[str, Colour] = {"white": (250, 246, 236), "black": (58, 50, 66), "pink": (250, 160, 190)}
HORN: Colour = (240, 226, 190)
BEAK: Colour = (250, 176, 52)


@dataclass(frozen=True)
class Body:
    """Where a body is: `mask` its silhouette, and the anchors that parts hang on."""

    mask: Image.Image
    head: Point
    head_radius: float
    crown: float  # y of the top of the head
    left: Point
    right: Point
    rump: Point  # where a tail starts
    feet: tuple[Point, ...]
    back: tuple[tuple[Point, Point], ...]  # foot of each back spike and its outward direction


@dataclass(frozen=True)
class Paint:
    """The two colours of one image, after its jitter."""

    main: Colour
    accent: Colour

    @property
    def deep(self) -> Colour:
        return mix(self.main, INK, 0.3)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """`a` moved the fraction `t` of the way to `b`."""
    return (byte(a[0] + t * (b[0] - a[0])), byte(a[1] + t * (b[1] - a[1])), byte(a[2] + t * (b[2] - a[2])))


def byte(value: float) -> int:
    return max(0, min(255, round(value)))


def jitter(colour: Colour, rng: random.Random, amount: float) -> Colour:
    """`colour` with each channel moved by up to `amount`."""
    r, g, b = (byte(channel + rng.uniform(-amount, amount)) for channel in colour)
    return r, g, b


# ---------------------------------------------------------------- small strokes


def draw_dot(draw: ImageDraw.ImageDraw, at: Point, radius: float, fill: Colour, line: int = OUTLINE) -> None:
    x, y = at
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=INK if line else None, width=line)


def draw_shape(draw: ImageDraw.ImageDraw, points: Sequence[Point], fill: Colour) -> None:
    """A filled polygon with a dark outline whose corners are round."""
    draw.polygon(list(points), fill=fill)
    draw.line([*points, points[0], points[1]], fill=INK, width=OUTLINE, joint="curve")


def draw_stroke(draw: ImageDraw.ImageDraw, points: Sequence[Point], width: float, fill: Colour) -> None:
    """A thick outlined line with round ends: dark first, then the colour a little thinner."""
    for radius, colour in ((width / 2 + OUTLINE - 1, INK), (width / 2, fill)):
        draw.line(list(points), fill=colour, width=round(2 * radius), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def bend(start: Point, control: Point, end: Point, steps: int = 14) -> list[Point]:
    """A quadratic Bezier curve as points."""

    def at(t: float, axis: int) -> float:
        return (1 - t) ** 2 * start[axis] + 2 * t * (1 - t) * control[axis] + t * t * end[axis]

    return [(at(i / steps, 0), at(i / steps, 1)) for i in range(steps + 1)]


# ---------------------------------------------------------------- bodies


def _silhouette(paint: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    mask = Image.new("L", (STAGE, STAGE), 0)
    paint(ImageDraw.Draw(mask))
    return mask


def _arc_spikes(centre: Point, rx: float, ry: float, degrees: Iterable[float]) -> tuple[tuple[Point, Point], ...]:
    """Feet and directions of spikes on an ellipse; 0 degrees is up, positive to the right."""
    spikes = []
    for degree in degrees:
        dx, dy = math.sin(math.radians(degree)), -math.cos(math.radians(degree))
        spikes.append(((centre[0] + rx * dx * 0.97, centre[1] + ry * dy * 0.97), (dx, dy)))
    return tuple(spikes)


SIDE_DEGREES = (-112, -88, -64, 64, 88, 112)


def ball(rng: random.Random) -> Body:
    """A round body."""
    cx, cy = MIDDLE, 252.0
    rx, ry = 82 * rng.uniform(0.94, 1.06), 80 * rng.uniform(0.94, 1.06)
    mask = _silhouette(lambda d: d.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=255))
    feet = ((cx - 34, cy + ry - 8), (cx + 34, cy + ry - 8))
    back = _arc_spikes((cx, cy), rx, ry, SIDE_DEGREES)
    return Body(
        mask, (cx, cy - 20), 62, cy - ry, (cx - rx + 8, cy), (cx + rx - 8, cy), (cx + rx - 18, cy + 34), feet, back
    )


def box(rng: random.Random) -> Body:
    """A boxy body with barely rounded corners."""
    cx, cy = MIDDLE, 254.0
    w, h = 80 * rng.uniform(0.94, 1.06), 74 * rng.uniform(0.94, 1.06)
    mask = _silhouette(lambda d: d.rounded_rectangle((cx - w, cy - h, cx + w, cy + h), 15, fill=255))
    feet = ((cx - 46, cy + h - 4), (cx + 46, cy + h - 4))
    back = tuple(((cx + s * w, cy + y), (float(s), 0.0)) for s in (-1, 1) for y in (-44, -8, 28))
    return Body(
        mask, (cx, cy - 20), 62, cy - h, (cx - w + 4, cy + 4), (cx + w - 4, cy + 4), (cx + w - 14, cy + 38), feet, back
    )


def tower(rng: random.Random) -> Body:
    """A tall narrow body."""
    cx, cy = MIDDLE, 246.0
    w, h = 50 * rng.uniform(0.94, 1.06), 112 * rng.uniform(0.94, 1.04)
    mask = _silhouette(lambda d: d.rounded_rectangle((cx - w, cy - h, cx + w, cy + h), 46, fill=255))
    feet = ((cx - 24, cy + h - 6), (cx + 24, cy + h - 6))
    back = tuple(((cx + s * w, cy + y), (float(s), 0.0)) for s in (-1, 1) for y in (-40, 0, 40))
    return Body(
        mask,
        (cx, cy - 54),
        46,
        cy - h,
        (cx - w + 4, cy + 14),
        (cx + w - 4, cy + 14),
        (cx + w - 14, cy + 60),
        feet,
        back,
    )


def cone(rng: random.Random) -> Body:
    """A body like a drop: a narrow head on a wide foot."""
    cx, top = MIDDLE, 156.0
    base, w = 332.0, 96 * rng.uniform(0.94, 1.06)

    def paint(draw: ImageDraw.ImageDraw) -> None:
        right = bend((cx + 30, top + 26), (cx + 44, base - 70), (cx + w, base - 26))
        left = [(2 * cx - x, y) for x, y in reversed(right)]
        draw.polygon([*right, *left], fill=255)
        draw.ellipse((cx - 34, top, cx + 34, top + 68), fill=255)
        draw.rounded_rectangle((cx - w - 6, base - 46, cx + w + 6, base), 23, fill=255)

    feet = ((cx - 48, base - 6), (cx + 48, base - 6))
    sides = ((38, 206), (46, 246), (70, 282))
    back = tuple(((cx + s * x, float(y)), (s * 0.86, -0.5)) for s in (-1, 1) for x, y in sides)
    return Body(_silhouette(paint), (cx, top + 62), 40, top, (cx - 46, 254), (cx + 46, 254), (cx + 60, 302), feet, back)


def worm(rng: random.Random) -> Body:
    """A long low body of round segments with its head at the left end."""
    wave = rng.uniform(5, 11)
    joints = [(160.0 + 44 * i, 284.0 + (wave if i % 2 else -wave), 44 - 3.0 * i) for i in range(5)]
    head = (152.0, 244.0)

    def paint(draw: ImageDraw.ImageDraw) -> None:
        for x, y, r in [*joints, (*head, 56.0)]:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)

    feet = tuple((x, y + r - 6) for x, y, r in joints[::2])
    back = tuple(((x + 4.0, y - r + 3), (0.15, -1.0)) for x, y, r in joints[1:])
    shoulders = ((236.0, 250.0), (258.0, 250.0))
    rump = (joints[-1][0], joints[-1][1] - 4)
    return Body(_silhouette(paint), head, 50, head[1] - 56, *shoulders, rump, feet, back)


BODIES: dict[str, Callable[[random.Random], Body]] = {
    "round": ball,
    "square": box,
    "cone-shaped": cone,
    "tall": tower,
    "worm-like": worm,
}

# ---------------------------------------------------------------- textures


def _grid(rng: random.Random, degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Canvas coordinates turned by about `degrees` and shifted at random."""
    angle = math.radians(degrees + rng.uniform(-12, 12))
    y, x = np.mgrid[0:STAGE, 0:STAGE].astype(np.float64)
    u = x * math.cos(angle) + y * math.sin(angle) + rng.uniform(0, 99)
    v = y * math.cos(angle) - x * math.sin(angle) + rng.uniform(0, 99)
    return u, v


def plain(_rng: random.Random) -> NDArray[np.bool_]:
    """No second colour at all."""
    return np.zeros((STAGE, STAGE), dtype=np.bool_)


def striped(rng: random.Random) -> NDArray[np.bool_]:
    """Parallel bands, mostly level."""
    _, v = _grid(rng, 0)
    period = rng.uniform(32, 40)
    return np.asarray(v % period < 0.45 * period)


def spotted(rng: random.Random) -> NDArray[np.bool_]:
    """Round spots on a triangular grid."""
    u, v = _grid(rng, 20)
    step = rng.uniform(38, 46)
    row = np.floor(v / step)
    du = (u + (row % 2) * step / 2) % step - step / 2
    dv = v % step - step / 2
    return np.asarray(du * du + dv * dv < (0.31 * step) ** 2)


def checkered(rng: random.Random) -> NDArray[np.bool_]:
    """A chess board."""
    u, v = _grid(rng, 0)
    side = rng.uniform(24, 29)
    return np.asarray((np.floor(u / side) + np.floor(v / side)) % 2 < 1)


def scaly(rng: random.Random) -> NDArray[np.bool_]:
    """Rows of arcs, each row half a scale further."""
    u, v = _grid(rng, 0)
    step = rng.uniform(36, 44)
    row = np.floor(v / (step / 2))
    du = (u + (row % 2) * step / 2) % step - step / 2
    distance = np.sqrt(du * du + (v % (step / 2)) ** 2)
    return np.asarray((distance > 0.38 * step) & (distance < 0.54 * step))


TEXTURES: dict[str, Callable[[random.Random], NDArray[np.bool_]]] = {
    "plain": plain,
    "striped": striped,
    "spotted": spotted,
    "checkered": checkered,
    "scaly": scaly,
}
