"""Compositional creatures: small pictures whose unseen classes recombine what seen classes show.

A class is a body, a texture, two colours and two parts; 24 seen and 8 unseen classes share 27 attributes. Every image
has its own seed, from which come pose, scale, proportions, light and background: none of it tells the class.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from models.base import FloatArray
from models.data.creature_parts import BACK_PARTS, background, eyes, feet, mouth
from models.data.creature_shapes import (
    ACCENTS,
    BODIES,
    CANVAS,
    COLOURS,
    INK,
    MIDDLE,
    OUTLINE,
    SIZE,
    STAGE,
    TEXTURES,
    Body,
    Paint,
    jitter,
)
from models.errors import InvalidInput

FACE_PARTS = ("beak", "one eye")
ATTRIBUTE_NAMES: tuple[str, ...] = (*BODIES, *TEXTURES, *COLOURS, *ACCENTS, *BACK_PARTS, *FACE_PARTS)


@dataclass(frozen=True)
class Creature:
    """One class. Its name says everything but the accent colour."""

    texture: str
    colour: str
    accent: str
    body: str
    parts: tuple[str, str]

    def __post_init__(self) -> None:
        unknown = {self.texture, self.colour, self.accent, self.body, *self.parts} - set(ATTRIBUTE_NAMES)
        if unknown:
            raise InvalidInput(
                f"A creature has no such property: {', '.join(sorted(unknown))}. Valid: {', '.join(ATTRIBUTE_NAMES)}."
            )

    @property
    def properties(self) -> tuple[str, ...]:
        """The attributes that are 1."""
        return (self.body, self.texture, self.colour, self.accent, *self.parts)

    @property
    def title(self) -> str:
        """The class in words, for example 'tall striped red creature with horns and tail'."""
        return f"{self.body} {self.texture} {self.colour} creature with {self.parts[0]} and {self.parts[1]}"

    @property
    def name(self) -> str:
        """The title with underscores: folder and class name."""
        return self.title.replace(" ", "_")


SEEN: tuple[Creature, ...] = (
    Creature("checkered", "yellow", "black", "cone-shaped", ("horns", "one eye")),
    Creature("plain", "blue", "white", "tall", ("horns", "long legs")),
    Creature("striped", "red", "black", "square", ("horns", "tail")),
    Creature("spotted", "yellow", "black", "tall", ("long ears", "tail")),
    Creature("spotted", "green", "black", "round", ("long ears", "one eye")),
    Creature("plain", "purple", "pink", "worm-like", ("long ears", "wings")),
    Creature("spotted", "purple", "white", "square", ("antennae", "one eye")),
    Creature("plain", "yellow", "white", "worm-like", ("tail", "one eye")),
    Creature("checkered", "red", "pink", "worm-like", ("long ears", "spikes")),
    Creature("scaly", "green", "pink", "round", ("antennae", "wings")),
    Creature("plain", "blue", "pink", "square", ("antennae", "long legs")),
    Creature("striped", "blue", "pink", "cone-shaped", ("wings", "one eye")),
    Creature("plain", "red", "black", "tall", ("long ears", "beak")),
    Creature("checkered", "red", "pink", "round", ("tail", "beak")),
    Creature("striped", "green", "white", "cone-shaped", ("horns", "tail")),
    Creature("scaly", "blue", "black", "cone-shaped", ("horns", "wings")),
    Creature("striped", "green", "white", "square", ("long ears", "wings")),
    Creature("checkered", "green", "black", "worm-like", ("long legs", "one eye")),
    Creature("scaly", "red", "white", "cone-shaped", ("long ears", "spikes")),
    Creature("spotted", "purple", "pink", "tall", ("horns", "beak")),
    Creature("spotted", "blue", "white", "worm-like", ("spikes", "beak")),
    Creature("plain", "purple", "white", "round", ("horns", "spikes")),
    Creature("striped", "yellow", "black", "round", ("antennae", "spikes")),
    Creature("scaly", "yellow", "white", "square", ("long legs", "beak")),
)
UNSEEN: tuple[Creature, ...] = (
    Creature("checkered", "purple", "pink", "round", ("antennae", "beak")),
    Creature("spotted", "yellow", "black", "square", ("antennae", "tail")),
    Creature("scaly", "green", "black", "cone-shaped", ("horns", "long legs")),
    Creature("plain", "blue", "white", "square", ("spikes", "one eye")),
    Creature("checkered", "yellow", "pink", "worm-like", ("horns", "wings")),
    Creature("striped", "purple", "white", "tall", ("long ears", "long legs")),
    Creature("scaly", "red", "pink", "tall", ("wings", "beak")),
    Creature("striped", "red", "black", "round", ("horns", "spikes")),
)
"""Every property of these is in at least four seen classes, and no property goes with another there."""


def attribute_table(creatures: tuple[Creature, ...]) -> FloatArray:
    """(n_classes, n_attributes) float32 of 0 and 1, columns as `ATTRIBUTE_NAMES`."""
    rows = [[float(name in creature.properties) for name in ATTRIBUTE_NAMES] for creature in creatures]
    return np.asarray(rows, dtype=np.float32)


def draw_creature(creature: Creature, seed: str) -> Image.Image:
    """One (96, 96) RGB picture of `creature`; the same `seed` gives the same pixels."""
    rng = random.Random(seed)
    scene = background(rng)
    layer = _draw_layer(creature, rng)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = _pose(layer, rng)
    shadow = layer.getchannel("A").resize((CANVAS, CANVAS // 5)).filter(ImageFilter.GaussianBlur(6))
    box = layer.getbbox() or (0, 0, CANVAS, CANVAS)
    floor = Image.new("L", scene.size, 0)
    floor.paste(shadow.point(lambda a: a * 0.45), (0, round(box[3] - CANVAS * 0.13)))
    scene.paste(INK, mask=floor)
    scene.paste(layer, mask=layer.getchannel("A"))
    return _light(scene.resize((SIZE, SIZE), Image.Resampling.BOX), rng)


def _draw_layer(creature: Creature, rng: random.Random) -> Image.Image:
    """The creature alone, on a transparent stage, upright."""
    body = BODIES[creature.body](rng)
    paint = Paint(jitter(COLOURS[creature.colour], rng, 26), jitter(ACCENTS[creature.accent], rng, 10))
    layer = Image.new("RGBA", (STAGE, STAGE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for name, part in BACK_PARTS.items():
        if name in creature.parts:
            part(draw, body, paint, rng)
    if "long legs" not in creature.parts:
        feet(draw, body, paint)
    layer.paste(INK, mask=_grown(body.mask))
    layer.paste(_skin(creature, body, paint, rng), mask=body.mask)
    eyes(draw, body, rng, one="one eye" in creature.parts)
    mouth(draw, body, rng, beak="beak" in creature.parts)
    return layer


def _grown(mask: Image.Image) -> Image.Image:
    """`mask` and about `OUTLINE` pixels round it: what a blur of that width leaves above its value at one sigma."""
    return mask.filter(ImageFilter.GaussianBlur(OUTLINE)).point(lambda a: 255 if a > 40 else 0)


def _skin(creature: Creature, body: Body, paint: Paint, rng: random.Random) -> Image.Image:
    """The textured, shaded inside of the body; the face is kept free of texture."""
    pattern = Image.fromarray(TEXTURES[creature.texture](rng).astype(np.uint8) * 255)
    (x, y), r = body.head, body.head_radius
    face = Image.new("L", pattern.size, 255)
    ImageDraw.Draw(face).ellipse((x - 0.8 * r, y - 0.5 * r, x + 0.8 * r, y + 0.85 * r), fill=0)
    skin = Image.new("RGB", pattern.size, paint.main)
    skin.paste(paint.accent, mask=ImageChops.darker(pattern, face))
    rim = ImageChops.invert(body.mask.filter(ImageFilter.GaussianBlur(22)))
    shift = (round(rng.uniform(-14, 14)), round(rng.uniform(-22, -8)))
    rim = ImageChops.offset(rim, *shift).point(lambda a: a * 0.55)
    skin.paste(paint.deep, mask=rim)
    return skin


def _pose(layer: Image.Image, rng: random.Random) -> Image.Image:
    """Turned a little, scaled, and moved, so that the whole creature stays inside the picture."""
    layer = layer.rotate(rng.uniform(-11, 11), Image.Resampling.BICUBIC, center=(MIDDLE, MIDDLE))
    cut = layer.crop(layer.getbbox())
    room = CANVAS * 0.94
    scale = min(rng.uniform(0.92, 1.12), room / cut.width, room / cut.height)
    cut = cut.resize((max(1, int(cut.width * scale)), max(1, int(cut.height * scale))), Image.Resampling.BICUBIC)
    left = rng.uniform(0.25, 0.75) * (CANVAS - cut.width)
    top = rng.uniform(0.35, 0.85) * (CANVAS - cut.height)
    placed = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    placed.paste(cut, (round(left), round(top)))
    return placed


def _light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Brightness and a slight tint, as lamps differ."""
    level = rng.uniform(0.8, 1.1)
    gains = [level * rng.uniform(0.93, 1.07) for _ in range(3)]
    bands = [
        band.point(lambda v, gain=gain: min(255, v * gain)) for band, gain in zip(image.split(), gains, strict=True)
    ]
    return Image.merge("RGB", bands)
