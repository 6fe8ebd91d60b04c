"""SC-EGG on feature maps against TF-VAEGAN on the same network's pooled features, and where SC-EGG looks.

    python bench/sc_egg.py --data FOLDER --weights FILE [--set guidance_weight=0 ...] [--at-most N] [--test] [-o FILE]

FOLDER has `images/<class>/`, `splits.json` (seen, unseen and validation classes; files of train, test_seen and
test_unseen) and `knowledge/attributes.npz`. Settings are compared on validation classes; `--test` measures the test
classes, once, when they are chosen. Features are kept in bench/out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.backbones import SpatialBackbone, create_backbone
from models.base import FloatArray, LabelledFeatures
from models.catalog import get_method
from models.embedding.extraction import ImageFailure, extract_features
from models.evaluation import ClassTable, evaluate
from models.params import PatchParams
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.sc_egg import SCEGG

OUT = Path(__file__).resolve().parent / "out"
SIDE, IMAGE_SIZE, TITLE = 140, 224, 30
PARTS = ("train", "test_seen", "test_unseen")


def load_maps(data: Path, weights: Path, files: list[str]) -> tuple[FloatArray, int]:
    """Feature maps (n_images, places * channels) float16 of MobileNetV2, and its channels."""
    network = SpatialBackbone(create_backbone("mobilenet_v2", weights=weights), IMAGE_SIZE)
    digest = hashlib.sha256("\n".join([network.digest, *files]).encode()).hexdigest()
    kept = OUT / f"maps-{data.name}-{digest[:12]}.npy"
    if not kept.exists():
        sources = ((name, (data / name).read_bytes) for name in files)
        rows = []
        for found in extract_features(sources, network, PatchParams(method="whole", n_patches=1, size=IMAGE_SIZE)):
            if isinstance(found, ImageFailure):
                raise SystemExit(f"{found.key}: {found.reason}")
            rows.append(found.features)
        OUT.mkdir(exist_ok=True)
        np.save(kept, np.concatenate(rows))
    return np.load(kept), network.channels


def first_of_each(files: list[str], at_most: int | None) -> list[str]:
    """The first files of each class, in their order."""
    count: Counter[str] = Counter()
    kept = []
    for name in files:
        count[Path(name).parent.name] += 1
        if at_most is None or count[Path(name).parent.name] <= at_most:
            kept.append(name)
    return kept


class Photos:
    """Everything that is measured on: features of the three kinds of rows, class vectors, names of dimensions."""

    def __init__(self, data: Path, weights: Path, at_most: int | None) -> None:
        splits = json.loads((data / "splits.json").read_text())
        files = [first_of_each(splits[part], at_most) for part in PARTS]
        self.files = [name for part in files for name in part]
        self.data = data
        self.seen, self.unseen = tuple(splits["seen_classes"]), tuple(splits["unseen_classes"])
        self.validation = tuple(splits["validation_classes"])
        names = [*self.seen, *self.unseen]
        table = np.load(data / "knowledge" / "attributes.npz", allow_pickle=False)
        order = [list(table["class_names"]).index(name) for name in names]
        self.embeddings = table["vectors"][order]
        self.dimensions = [str(name) for name in table["attribute_names"]]
        self.dimension_vectors = table.get("attribute_vectors")
        self.maps, self.channels = load_maps(data, weights, self.files)
        self.labels = np.array([names.index(Path(name).parent.name) for name in self.files])
        self.part = np.repeat(np.arange(3), [len(part) for part in files])

    def rows(self, part: int, *, spatial: bool) -> LabelledFeatures:
        """Training rows (0), test rows of seen (1) and of unseen classes (2)."""
        maps = self.maps[self.part == part].astype(np.float32)
        pooled = maps if spatial else maps.reshape(len(maps), -1, self.channels).mean(axis=1)
        names = self.seen if part == 0 else (*self.seen, *self.unseen)
        return LabelledFeatures(pooled, self.labels[self.part == part], names, self.channels if spatial else None)


def trained(photos: Photos, method: str, settings: dict[str, Any], *, given: bool, seed: int) -> ZeroShotModel:
    """A classifier of the method, fitted on the seen classes."""
    row = get_method(method, "classifier")
    known = {name: value for name, value in settings.items() if name in row.params.model_fields}
    model = create_classifier(method, row.params.model_validate(known), seed=seed)
    train, n_seen = photos.rows(0, spatial=row.features == "spatial"), len(photos.seen)
    more = {"dimension_vectors": photos.dimension_vectors} if given and isinstance(model, SCEGG) else {}
    return model.fit(train, photos.embeddings[:n_seen], validation_classes=photos.validation, **more)


def tested(photos: Photos, model: ZeroShotModel) -> dict[str, float]:
    """T1, U, S, H on test rows."""
    names = (*photos.seen, *photos.unseen)
    classes = ClassTable(names, photos.embeddings, np.arange(len(names)) < len(photos.seen))
    spatial = isinstance(model, SCEGG)
    report = evaluate(
        model,
        classes,
        test_unseen=photos.rows(2, spatial=spatial),
        test_seen=photos.rows(1, spatial=spatial),
        gamma=model.gamma_,
    )
    if report.gzsl is None:
        raise SystemExit("There are no test rows of seen classes.")
    return {"t1": report.zsl.t1, "u": report.gzsl.u, "s": report.gzsl.s, "h": report.gzsl.h}


def draw(photos: Photos, model: SCEGG, path: Path, n_images: int = 6, top: int = 5) -> None:
    """A row an image: the photo, where all dimensions look together, and the loudest dimensions, each in its place."""
    rows = np.flatnonzero(photos.part == 2)
    rows = rows[np.linspace(0, len(rows) - 1, n_images).astype(int)]
    maps = model.attention(photos.maps[rows].astype(np.float32), photos.embeddings[photos.labels[rows]], top=top)
    sheet = Image.new("RGB", ((2 + top) * SIDE, n_images * (SIDE + TITLE)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        photo = Image.open(photos.data / photos.files[row]).convert("RGB").resize((SIDE, SIDE))
        local = [(photos.dimensions[n], maps.local[i, k]) for k, n in enumerate(maps.dimensions[i])]
        shown = [(photos.files[row].split("/")[1], None), ("all dimensions", maps.whole[i]), *local]
        for column, (title, places) in enumerate(shown):
            at = (column * SIDE, i * (SIDE + TITLE))
            sheet.paste(photo if places is None else overlaid(photo, places), at)
            pen.text((at[0] + 3, at[1] + SIDE + 3), title, fill="black", font=font)
    sheet.save(path, quality=85)


def overlaid(photo: Image.Image, places: FloatArray) -> Image.Image:
    """The photo, red where attention is strongest and dark where there is none."""
    low, high = places.min(), places.max()
    grey = ((places - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    mask = Image.fromarray(grey).resize(photo.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.blend(photo, Image.new("RGB", photo.size, "red"), 0.35), photo.point(_dark), mask)


def _dark(value: int) -> float:
    return value * 0.35


def main() -> None:
    """Measures what the command line asks for; a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["tf_vaegan", "sc_egg"])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings in place of defaults")
    parser.add_argument("--at-most", type=int, metavar="N", help="use N images of each class and part")
    parser.add_argument("--given", action="store_true", help="start v_n at the word vectors of the attributes' names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in asked.set)}
    photos = Photos(asked.data, asked.weights, asked.at_most)
    for method in asked.methods:
        started = time.process_time()
        model = trained(photos, method, settings, given=asked.given, seed=asked.seed)
        found = {name: round(float(model.validation_[name]), 3) for name in ("t1", "h")}
        line = {"method": method, "validation": found, "epoch": model.best_epoch_, "settings": settings}
        line |= {"given": asked.given, "seed": asked.seed, "cpu_s": round(time.process_time() - started)}
        if asked.test:
            line["test"] = {name: round(100 * value, 1) for name, value in tested(photos, model).items()}
        print(json.dumps(line), flush=True)
        if asked.output and isinstance(model, SCEGG):
            draw(photos, model, asked.output)


if __name__ == "__main__":
    main()
