"""SC-EGG on feature maps against TF-VAEGAN on the same network's pooled features, and where SC-EGG looks.

    python bench/sc_egg.py --data FOLDER --weights FILE [--cells tf-vaegan sc-egg ...] [--seeds 0 1 2]
        [--set epochs=20 ...] [--at-most N] [--test] [-o FILE]

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.backbones import SpatialBackbone, create_backbone
from models.base import FloatArray, LabelledFeatures
from models.catalog import get_method
from models.data.overlays import Tile, sheet
from models.embedding.cutting import ImageFailure
from models.embedding.extraction import extract_features
from models.evaluation import ClassTable, evaluate
from models.params import PatchParams
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.sc_egg import SCEGG

OUT = Path(__file__).resolve().parent / "out"
SIDE, IMAGE_SIZE = 112, 224
PARTS = ("train", "test_seen", "test_unseen")


@dataclass(frozen=True)
class Cell:
    """What is measured. unit_places: pooled features are the mean of places of unit length, as SC-EGG sees them."""

    method: str = "sc_egg"
    settings: dict[str, Any] = field(default_factory=dict)
    given: bool = True
    unit_places: bool = False


CELLS = {
    "tf-vaegan": Cell("tf_vaegan"),
    "tf-vaegan-unit": Cell("tf_vaegan", unit_places=True),
    "sc-egg": Cell(),
    "sc-egg-learned-v": Cell(given=False),
    "without-egs": Cell(settings={"guidance_weight": 0}),
    "without-scr": Cell(settings={"compression_epochs": 0}),
    "without-gce": Cell(settings={"global_weight": 0}),
    # p_l is learned by L_LCE: without that loss there is nothing that p_g should be consistent with.
    "without-lce-scr": Cell(settings={"local_weight": 0, "compression_epochs": 0}),
    "code-compat": Cell(settings={"code_compat": True}),
}


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

    def rows(self, part: int, cell: Cell) -> LabelledFeatures:
        """Training rows (0), test rows of seen (1) and of unseen classes (2), as the cell's method takes them."""
        features, channels = self.maps[self.part == part].astype(np.float32), None
        if get_method(cell.method, "classifier").features == "spatial":
            channels = self.channels
        else:
            places = features.reshape(len(features), -1, self.channels)
            if cell.unit_places:
                places /= np.linalg.norm(places, axis=2, keepdims=True).clip(1e-12)
            features = places.mean(axis=1)
        names = self.seen if part == 0 else (*self.seen, *self.unseen)
        return LabelledFeatures(features, self.labels[self.part == part], names, channels)


def trained(photos: Photos, cell: Cell, settings: dict[str, Any], seed: int) -> ZeroShotModel:
    """The cell's classifier, fitted on the seen classes."""
    row = get_method(cell.method, "classifier")
    known = {name: value for name, value in settings.items() if name in row.params.model_fields}
    model = create_classifier(cell.method, row.params.model_validate(known | cell.settings), seed=seed)
    is_given = cell.given and row.takes_dimension_vectors
    more: dict[str, Any] = {"dimension_vectors": photos.dimension_vectors} if is_given else {}
    embeddings = photos.embeddings[: len(photos.seen)]
    return model.fit(photos.rows(0, cell), embeddings, validation_classes=photos.validation, **more)


def tested(photos: Photos, cell: Cell, model: ZeroShotModel) -> dict[str, float]:
    """T1, U, S, H on test rows."""
    names = (*photos.seen, *photos.unseen)
    classes = ClassTable(names, photos.embeddings, np.arange(len(names)) < len(photos.seen))
    seen, unseen = photos.rows(1, cell), photos.rows(2, cell)
    report = evaluate(model, classes, test_unseen=unseen, test_seen=seen, gamma=model.gamma_)
    if report.zsl is None or report.gzsl is None:
        raise SystemExit("There are no test rows of unseen, or of seen, classes.")
    return {"t1": report.zsl.t1, "u": report.gzsl.u, "s": report.gzsl.s, "h": report.gzsl.h}


def draw(photos: Photos, model: SCEGG, path: Path, n_images: int = 5, top: int = 8) -> None:
    """A row an image of a test class: the photo, all dimensions together, and the loudest dimensions of its class."""
    rows = np.flatnonzero(photos.part == 2)
    rows = rows[np.linspace(0, len(rows) - 1, n_images).astype(int)]
    maps = model.attention(photos.maps[rows].astype(np.float32), photos.embeddings[photos.labels[rows]], top=top)
    tiles = []
    for i, row in enumerate(rows):
        photo = Image.open(photos.data / photos.files[row])
        tiles += [Tile(photo, photos.files[row].split("/")[1]), Tile(photo, "all dimensions", maps.whole[i])]
        tiles += [Tile(photo, photos.dimensions[n], maps.local[i, k]) for k, n in enumerate(maps.dimensions[i])]
    sheet(tiles, per_row=2 + top, side=SIDE).save(path, quality=82)


def main() -> None:
    """Measures what the command line asks for; a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["tf-vaegan", "sc-egg"], choices=list(CELLS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings in place of defaults")
    parser.add_argument("--at-most", type=int, metavar="N", help="use N images of each class and part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="draw attention of the first SC-EGG")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in asked.set)}
    photos = Photos(asked.data, asked.weights, asked.at_most)
    for seed in asked.seeds:
        for name in asked.cells:
            started = time.process_time()
            model = trained(photos, CELLS[name], settings, seed)
            found = {key: round(float(model.validation_[key]), 3) for key in ("t1", "h")}
            line = {"cell": name, "seed": seed, "validation": found, "chosen": model.validation_["setting"]}
            line["curve"] = [round(entry["validation_t1"], 2) for entry in model.history_ if "validation_t1" in entry]
            if asked.test:
                line["test"] = {key: round(100 * value, 1) for key, value in tested(photos, CELLS[name], model).items()}
            print(json.dumps({**line, "cpu_s": round(time.process_time() - started), "settings": settings}), flush=True)
            if asked.output and isinstance(model, SCEGG):
                draw(photos, model, asked.output)
                asked.output = None


if __name__ == "__main__":
    main()
