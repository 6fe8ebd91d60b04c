"""Where SC-EGG's attention pays: maps in which attributes are planted, at one place each, among clutter. No photos.

    python bench/planted_attention.py [--clutter 0 0.2 0.5] [--own-look 0 1.5] [--cells ...] [--seeds 0 1 2] [--set ...]

An image is a grid of places. Each attribute of its class shows at one place of its own, as the attribute's direction,
turned by `own look`: what it looks like in this class alone, which no attribute tells. At all other places is clutter
of this length: half one direction for the whole image, so that a mean over places does not cancel it, half one for each
place. Everything has noise on it. `sc-egg-one-place` is SC-EGG on maps of one place, the mean of all: the same without
attention.

A row: mean and deviation over seeds, which draw new data, of T1 and H in percent, and `true means`: T1 of linear
discriminants on what the generator learns (g or the pooled features), with means of other images of the unseen classes
in place of generated ones. Where that is high, single images are told apart well enough, and what limits is where
attributes place new classes. Settings other than sizes are defaults; epochs are chosen on seen classes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.base import FloatArray, IntArray, LabelledFeatures
from models.catalog import get_method
from models.evaluation import BoolArray, ClassTable, evaluate, zsl_report
from models.generative_params import GenerativeParams
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.final import Competing, LinearDiscriminants, RealRows
from models.zero_shot.sc_egg import SCEGG
from models.zero_shot.scaling import unit_rows

SEEN, VALIDATION, UNSEEN = 50, 10, 10
ATTRIBUTES, SHOWN, PLACES, CHANNELS = 24, 6, 49, 64
NOISE = 0.3
PER_CLASS = (30, 10, 40)
"""Images of a class: to train on, to test a seen one on, of an unseen one (half of them for the true means)."""
SIZES = {"hidden_dim": 128, "synthetic_per_class": 100, "critic_steps": 2, "epochs": 25, "folds": 1}
CELLS = {"tf-vaegan": "tf_vaegan", "sc-egg-one-place": "sc_egg", "sc-egg": "sc_egg"}


@dataclass(frozen=True)
class Planted:
    """Class embeddings (C, A), and maps (N, places * channels) with labels: training, test of seen, of unseen."""

    embeddings: FloatArray
    maps: tuple[FloatArray, FloatArray, FloatArray]
    labels: tuple[IntArray, IntArray, IntArray]

    @classmethod
    def draw(cls, clutter: float, own_look: float, seed: int) -> Planted:
        """New attributes, classes and images."""
        rng = np.random.default_rng(seed)
        n_classes = SEEN + UNSEEN
        directions = unit_rows(rng.normal(size=(ATTRIBUTES, CHANNELS)))
        chosen: list[FloatArray] = []
        while len(chosen) < n_classes:  # any two classes differ in two attributes or more
            row = np.zeros(ATTRIBUTES, np.float32)
            row[rng.choice(ATTRIBUTES, SHOWN, replace=False)] = 1
            if all(np.abs(row - other).sum() >= 4 for other in chosen):
                chosen.append(row)
        embeddings = np.stack(chosen)
        looks = directions + own_look * rng.normal(size=(n_classes, ATTRIBUTES, CHANNELS)) / CHANNELS**0.5
        looks /= np.linalg.norm(looks, axis=2, keepdims=True)
        labels = (
            np.repeat(np.arange(SEEN), PER_CLASS[0]),
            np.repeat(np.arange(SEEN), PER_CLASS[1]),
            np.repeat(np.arange(SEEN, n_classes), PER_CLASS[2]),
        )
        maps = []
        for of_part in labels:
            n_images = len(of_part)
            images = rng.normal(size=(n_images, PLACES, CHANNELS)) + rng.normal(size=(n_images, 1, CHANNELS))
            images *= clutter / (2 * CHANNELS) ** 0.5
            for image, label in zip(images, of_part, strict=True):
                where = rng.choice(PLACES, SHOWN, replace=False)
                image[where] = looks[label, np.flatnonzero(embeddings[label])]
            images += NOISE / CHANNELS**0.5 * rng.normal(size=images.shape)
            maps.append(images.reshape(n_images, -1).astype(np.float32))
        return cls(embeddings, (maps[0], maps[1], maps[2]), labels)

    def rows(self, part: int, cell: str) -> LabelledFeatures:
        """A part's rows as the cell takes them."""
        features, is_map = self.maps[part], CELLS[cell] == "sc_egg"
        if cell != "sc-egg":
            features = features.reshape(len(features), PLACES, CHANNELS).mean(axis=1)
        names = self.names[:SEEN] if part == 0 else self.names
        return LabelledFeatures(features, self.labels[part], names, CHANNELS if is_map else None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all classes, seen ones first."""
        return tuple(f"class {number}" for number in range(SEEN + UNSEEN))


def measure(planted: Planted, cell: str, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """True means' T1, T1, H, in percent."""
    schema = get_method(CELLS[cell], "classifier").params
    known = {name: value for name, value in {**SIZES, **settings}.items() if name in schema.model_fields}
    train, seen, unseen = (planted.rows(part, cell) for part in range(3))
    model = create_classifier(CELLS[cell], schema.model_validate(known), seed=seed)
    model.fit(train, planted.embeddings[:SEEN], validation_classes=planted.names[:VALIDATION])
    is_test = np.arange(len(unseen.labels)) % 2 == 1
    tested = LabelledFeatures(unseen.features[is_test], unseen.labels[is_test], unseen.class_names, unseen.channels)
    classes = ClassTable(planted.names, planted.embeddings, np.arange(len(planted.names)) < SEEN)
    report = evaluate(model, classes, test_unseen=tested, test_seen=seen, gamma=model.gamma_)
    if report.zsl is None or report.gzsl is None:
        raise SystemExit("A part has no rows.")
    found = {"true means": by_true_means(planted, train, unseen, is_test, model), "T1": report.zsl.t1}
    return {name: 100 * value for name, value in {**found, "H": report.gzsl.h}.items()}


def by_true_means(
    planted: Planted, train: LabelledFeatures, unseen: LabelledFeatures, is_test: BoolArray, model: ZeroShotModel
) -> float:
    """T1 of linear discriminants on the test half, whose classes have the means of the other half."""
    rows, others = (torch.from_numpy(compressed(model, part.features)) for part in (train, unseen))
    final = LinearDiscriminants(GenerativeParams(), 0)
    final.fit(RealRows(rows, torch.from_numpy(train.labels), SEEN))
    of_class = others[~is_test].reshape(UNSEEN, -1, CHANNELS)
    competing = Competing(planted.embeddings[SEEN:], np.full(UNSEEN, -1), lambda numbers: of_class[numbers])
    scores = final.scores(others[is_test], competing).numpy()
    return zsl_report(scores, unseen.labels[is_test] - SEEN, planted.names[SEEN:]).t1


def compressed(model: ZeroShotModel, features: FloatArray) -> FloatArray:
    """g of SC-EGG, (N, D); pooled features as they are."""
    if not isinstance(model, SCEGG):
        return features
    with torch.no_grad():
        found: FloatArray = model.scen.compress(*model.scen.look(torch.from_numpy(features))).numpy()
    return found


def main() -> None:
    """Prints a row a kind of data and cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clutter", type=float, nargs="+", default=[0.0, 0.2, 0.5], help="length of what is around")
    parser.add_argument("--own-look", type=float, nargs="+", default=[0.0, 1.5], help="length of what turns directions")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings in place of defaults")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in asked.set)}
    print("| own look | clutter | | true means | T1 | H |\n|---|---|---|---|---|---|")
    for own_look in asked.own_look:
        for clutter in asked.clutter:
            data = [Planted.draw(clutter, own_look, seed) for seed in asked.seeds]
            for cell in asked.cells:
                runs = zip(data, asked.seeds, strict=True)
                found = [measure(planted, cell, settings, seed) for planted, seed in runs]
                columns = [[each[name] for each in found] for name in found[0]]
                means = " | ".join(f"{np.mean(column):.1f} ± {np.std(column):.1f}" for column in columns)
                print(f"| {own_look:g} | {clutter:g} | {cell} | {means} |", flush=True)


if __name__ == "__main__":
    main()
