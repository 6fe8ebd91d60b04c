"""Which of two methods wins, by how many seen classes they learn from? On seen classes only.

    python bench/seen_classes.py caltech101 minilm-l6-v2 --counts 12 25 50 65 --left-out 15 --draws 4 \\
        --methods psr psr:variant=B1 psr:variant=B2 psr:variant=B3

A draw leaves some seen classes out and learns from some of the others, a fifth of which choose epochs; T1 in percent is
among those left out, on their training images. `--kept` keeps a share of the learned classes' images out of training,
for S, and shows H. `--turned` turns all features about their mean by a random rotation, which leaves distances as they
are and no feature with an end at 0. Every method gets the same draws. Test rows are never read. Features of photos are
kept in bench/out/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.backbones import create_backbone
from models.base import FloatArray, IntArray, LabelledFeatures
from models.catalog import get_method
from models.embedding.extraction import ImageFeatures, extract_features
from models.evaluation import BoolArray, ClassTable, evaluate
from models.params import Params, PatchParams
from models.zero_shot.base import create_classifier

HERE = Path(__file__).resolve().parent
WEIGHTS = "mobilenet_v2-imagenet1k.fp16.safetensors"
EPOCHS = 40


def load_training_rows(folder: Path, weights: Path) -> tuple[FloatArray, IntArray, list[str]]:
    """Features (N, D) and labels (N,) of the training images, and the seen classes; computed the first time."""
    splits = json.loads((folder / "splits.json").read_text())
    seen: list[str] = splits["seen_classes"]
    if (folder / "features.npz").exists():
        stored = np.load(folder / "features.npz")
        names = [str(name) for name in stored["class_names"]]
        rows = np.asarray(splits["train"])
        labels = np.array([seen.index(names[label]) for label in stored["labels"][rows]])
        return stored["features"][rows].astype(np.float32), labels, seen
    kept = HERE / "out" / f"whole-{folder.name}.npy"
    paths = [folder / name for name in splits["train"]]
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        backbone = create_backbone("mobilenet_v2", weights=weights)
        images = ((path.name, path.read_bytes) for path in paths)
        found = extract_features(images, backbone, PatchParams(method="whole"), n_threads=1)
        np.save(kept, np.concatenate([each.features for each in found if isinstance(each, ImageFeatures)]))
    labels = np.array([seen.index(path.parent.name) for path in paths])
    return np.load(kept).astype(np.float32), labels, seen


def load_embeddings(path: Path, names: Sequence[str]) -> FloatArray:
    """Knowledge vectors of `names`, (C, E)."""
    stored = np.load(path)
    vectors: FloatArray = stored[next(key for key in stored if stored[key].ndim == 2)].astype(np.float32)
    known = [str(name) for name in stored[next(key for key in stored if "name" in key and stored[key].ndim == 1)]]
    return vectors[[known.index(name) for name in names]]


def turned(features: FloatArray) -> FloatArray:
    """The features (N, D) about their mean, in the axes of a random rotation."""
    n_features = features.shape[1]
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((n_features, n_features)))[0]
    return np.asarray((features - features.mean(axis=0)) @ axes, np.float32)


def parse_method(text: str) -> tuple[str, Params]:
    """`name:key=value,...` as a method and its parameters; the epochs and the one fold of this bench unless given."""
    name, _, settings = text.partition(":")
    given: dict[str, object] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    schema = get_method(name, "classifier").params
    fixed = {key: value for key, value in (("epochs", EPOCHS), ("folds", 1)) if key in schema.model_fields}
    return name, schema.model_validate({**fixed, **given})


def measure(
    method: str,
    rows: tuple[FloatArray, IntArray, list[str]],
    embeddings: FloatArray,
    count: int,
    left_out: int,
    draw: int,
    kept: float,
) -> tuple[float, float | None]:
    """T1 of one draw, and H if images of the learned classes are kept for it; in percent."""
    features, labels, names = rows
    chance = np.random.default_rng(draw)
    order = chance.permutation(len(names))
    test, train = order[:left_out], order[left_out : left_out + count]
    is_kept = chance.random(len(labels)) < kept

    def part(classes: IntArray, chosen: BoolArray) -> LabelledFeatures:
        number = np.full(len(names), -1)
        number[classes] = np.arange(len(classes))
        of_classes = np.isin(labels, classes) & chosen
        return LabelledFeatures(features[of_classes], number[labels[of_classes]], tuple(names[c] for c in classes))

    learned = part(train, ~is_kept)
    validation = learned.class_names[: max(2, count // 5)]
    name, params = parse_method(method)
    model = create_classifier(name, params, seed=draw).fit(learned, embeddings[train], validation_classes=validation)
    both = np.concatenate([train, test])
    table = ClassTable(tuple(names[c] for c in both), embeddings[both], np.arange(len(both)) < count)
    unseen = part(test, np.ones(len(labels), bool))
    seen = part(train, is_kept) if kept else None
    report = evaluate(model, table, test_unseen=unseen, test_seen=seen, gamma=model.gamma_)
    if report.zsl is None:
        raise SystemExit("The classes left out have no images.")
    return 100 * report.zsl.t1, None if report.gzsl is None else 100 * report.gzsl.h


def main() -> None:
    """Prints one row a number of classes and method: each draw's T1, and H if asked, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("knowledge")
    parser.add_argument("--counts", type=int, nargs="+", required=True, help="seen classes to learn from")
    parser.add_argument("--left-out", type=int, required=True, help="seen classes that play unseen")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument(
        "--kept", type=float, default=0.0, metavar="SHARE", help="of the learned classes' images, for H"
    )
    parser.add_argument("--turned", action="store_true", help="turn the features by a random rotation first")
    parser.add_argument("--methods", nargs="+", required=True, help="name:key=value,...")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights-dir", type=Path, default=Path("../shared/weights"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = asked.data / asked.dataset
    rows = load_training_rows(folder, asked.weights_dir / WEIGHTS)
    if asked.turned:
        rows = (turned(rows[0]), *rows[1:])
    embeddings = load_embeddings(folder / "knowledge" / f"{asked.knowledge}.npz", rows[2])
    for count in asked.counts:
        for method in asked.methods:
            draws = range(asked.draws)
            found = [measure(method, rows, embeddings, count, asked.left_out, d, asked.kept) for d in draws]
            print(f"| {count} | {method} | {_row([t1 for t1, _ in found])} |", end="")
            harmonic = [h for _, h in found if h is not None]
            print(f" {_row(harmonic)} |" if harmonic else "", flush=True)


def _row(numbers: list[float]) -> str:
    return f"{' '.join(f'{each:.1f}' for each in numbers)} | {np.mean(numbers):.1f}"


if __name__ == "__main__":
    main()
