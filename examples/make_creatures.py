"""Makes the demo data: `python examples/make_creatures.py [OUT]` (default: examples/creatures). About a minute.

The same seed gives the same pictures, bit for bit with the pinned Pillow. The text vectors are the stored result of a
sentence encoder, which is too large to ship; `--text-encoder FOLDER` (a sentence-transformers model, extra 'text')
makes them again.
`--sheet FILE` draws the contact sheet.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.data.creatures import (  # noqa: E402 - found by the line above
    ATTRIBUTE_NAMES,
    SEEN,
    UNSEEN,
    Creature,
    attribute_table,
    draw_creature,
)

SEED = 0
IMAGES_PER_CLASS = 30
TRAIN_PER_CLASS = 24
VALIDATION = slice(2, None, 5)
"""Every fifth seen class, to choose parameters on."""
JPEG = {"quality": 85, "optimize": True}
TEXT_FILE = "minilm-l6-v2.npz"


def image_path(creature: Creature, index: int) -> str:
    """Where a picture lies, relative to the data's folder."""
    return f"images/{creature.name}/{index:02d}.jpg"


def picture(creature: Creature, index: int) -> Image.Image:
    """Picture `index` of a class: its seed is its own, so that adding one changes no other."""
    return draw_creature(creature, f"{SEED}/{creature.name}/{index}")


def write_images(out: Path) -> None:
    """All pictures as JPEG."""
    for creature in (*SEEN, *UNSEEN):
        for index in range(IMAGES_PER_CLASS):
            path = out / image_path(creature, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(creature, index).save(path, "JPEG", **JPEG)


def splits() -> dict[str, list[str]]:
    """The content of splits.json."""
    train = range(TRAIN_PER_CLASS)
    test = range(TRAIN_PER_CLASS, IMAGES_PER_CLASS)
    return {
        "seen_classes": [c.name for c in SEEN],
        "unseen_classes": [c.name for c in UNSEEN],
        "validation_classes": [c.name for c in SEEN[VALIDATION]],
        "train": [image_path(c, i) for c in SEEN for i in train],
        "test_seen": [image_path(c, i) for c in SEEN for i in test],
        "test_unseen": [image_path(c, i) for c in UNSEEN for i in range(IMAGES_PER_CLASS)],
    }


def write_attributes(path: Path) -> None:
    """The attribute table of all classes."""
    creatures = (*SEEN, *UNSEEN)
    np.savez_compressed(
        path,
        class_names=np.array([c.name for c in creatures]),
        vectors=attribute_table(creatures),
        attribute_names=np.array(ATTRIBUTE_NAMES),
    )


def write_text_vectors(path: Path, model: str) -> None:
    """Vectors of the class names as words, by a sentence encoder."""
    from models.knowledge.text_encoder import TextEncoder

    names = [c.name for c in (*SEEN, *UNSEEN)]
    vectors = TextEncoder(model, "{}", device="cpu").lookup(names).vectors
    np.savez_compressed(path, class_names=np.array(names), vectors=vectors)


def contact_sheet() -> Image.Image:
    """One picture of every class; the unseen ones in the last row, apart."""
    columns, cell, gap, margin = 8, 96, 4, 14
    rows = [SEEN[i : i + columns] for i in range(0, len(SEEN), columns)] + [UNSEEN]
    width = 2 * margin + columns * cell + (columns - 1) * gap
    height = 3 * margin + len(rows) * cell + (len(rows) - 2) * gap
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for r, row in enumerate(rows):
        top = margin + r * (cell + gap) + (margin - gap if row is rows[-1] else 0)
        for c, creature in enumerate(row):
            sheet.paste(picture(creature, 0), (margin + c * (cell + gap), top))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Makes the demo data.")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "examples" / "creatures")
    parser.add_argument("--text-encoder", metavar="FOLDER", help="also make the text vectors again")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw the contact sheet")
    arguments = parser.parse_args()
    knowledge = arguments.out / "knowledge"
    knowledge.mkdir(parents=True, exist_ok=True)
    write_images(arguments.out)
    (arguments.out / "splits.json").write_text(json.dumps(splits(), indent=1) + "\n", encoding="utf-8")
    write_attributes(knowledge / "attributes.npz")
    if arguments.text_encoder:
        write_text_vectors(knowledge / TEXT_FILE, arguments.text_encoder)
    if arguments.sheet:
        contact_sheet().save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
