"""Do visual properties beat the raw knowledge vectors, and which class relation carries over? On seen classes only.

    python bench/relations.py --sets animals caltech101 tiny188

Groups of seen classes play unseen in turn. For each, clusters are learned without their photos, and their vectors are
composed of the other classes'. A closed form (ESZSL) on centred whole-image features then recognises their photos; its
ridge on the class vectors is varied, since that is where raw vectors and composed ones differ most. Prints T1 in
percent, mean over the groups; `oracle` takes the left-out classes' vectors from their own photos, which shows what a
perfect relation could reach. Test rows are never read. Patch features are kept in bench/out/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.backbones import Backbone, create_backbone
from models.base import FloatArray, IntArray, LabelledFeatures, PatchTable
from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.clustering import PatchClustering
from models.embedding.extraction import ImageFeatures, extract_features
from models.embedding.relations import unit_rows
from models.embedding.selection import select_relation
from models.params import ALL_NEIGHBORS, ClusteringParams, PatchParams, RelationParams

HERE = Path(__file__).resolve().parent
WEIGHTS = "mobilenet_v2-imagenet1k.fp16.safetensors"
FEATURE_RIDGE = 1.0
RIDGES = (0.1, 1.0, 10.0)
EPOCHS = 20
LOSSES: dict[str, dict[str, float]] = {
    "clu+pel": {"class_weight": 0.0, "semantic_weight": 0.0},
    "+cls": {"semantic_weight": 0.0},
    "VGSE": {},
}
SAME = "SMO α=0, ridge 1"
"""The relation with which embeddings are compared."""

RELATIONS: dict[str, tuple[Relation, RelationParams]] = {
    "SMO α=0": ("smo", RelationParams(form="centred")),
    "SMO α=0, ridge 1": ("smo", RelationParams(form="centred", ridge=1.0)),
    "SMO α=-1, ridge 0.1": ("smo", RelationParams(form="centred", alpha=-1, ridge=0.1)),
    "WAvg 5": ("wavg", RelationParams(form="centred")),
    "WAvg all, η=10": ("wavg", RelationParams(form="centred", n_neighbors=ALL_NEIGHBORS, eta=10.0)),
    "SMO α=0, ridge 1, fused": ("smo", RelationParams(form="fused", ridge=1.0)),
    "WAvg all, η=10, fused": ("wavg", RelationParams(form="fused", n_neighbors=ALL_NEIGHBORS, eta=10.0)),
}


@dataclass(frozen=True)
class Photos:
    """Training photos of seen classes: patches with their image's row, whole-image features, class of each image."""

    patches: FloatArray
    image_index: IntArray
    whole: FloatArray
    labels: IntArray
    class_names: tuple[str, ...]

    def of(self, classes: IntArray) -> tuple[PatchTable, LabelledFeatures]:
        """The photos of `classes`, numbered 0, 1, ... in that order."""
        number = np.full(len(self.class_names), -1)
        number[classes] = np.arange(len(classes))
        keep = number[self.labels] >= 0
        rows = np.cumsum(keep) - 1
        of_patch = keep[self.image_index]
        names, labels = tuple(self.class_names[c] for c in classes), number[self.labels[keep]]
        table = PatchTable(
            np.ascontiguousarray(self.patches[of_patch]),
            rows[self.image_index[of_patch]].astype(np.int32),
            labels,
            names,
        )
        return table, LabelledFeatures(self.whole[keep], labels, names)


def load(folder: Path, weights: Path) -> Photos:
    """Features of the set's training photos; extracted the first time."""
    splits = json.loads((folder / "splits.json").read_text())
    names = tuple(splits["seen_classes"])
    kept = HERE / "out" / f"features-{folder.name}.npz"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        paths = [folder / name for name in splits["train"]]
        backbone = create_backbone("mobilenet_v2", weights=weights)
        patches = list(_extract(paths, backbone, PatchParams()))
        whole = np.concatenate(list(_extract(paths, backbone, PatchParams(method="whole"))))
        counts = [len(rows) for rows in patches]
        labels = np.array([names.index(path.parent.name) for path in paths])
        index = np.repeat(np.arange(len(paths)), counts)
        np.savez(kept, patches=np.concatenate(patches), image_index=index, whole=whole, labels=labels)
    stored = np.load(kept)
    return Photos(stored["patches"], stored["image_index"], stored["whole"], stored["labels"], names)


def _extract(paths: Sequence[Path], backbone: Backbone, params: PatchParams) -> Iterator[FloatArray]:
    images = ((path.name, path.read_bytes) for path in paths)
    for number, result in enumerate(extract_features(images, backbone, params, n_threads=1)):
        if not isinstance(result, ImageFeatures):
            raise SystemExit(f"{paths[number]} could not be read: {result}")
        if number % 500 == 0:
            print(f"{params.method}: {number} of {len(paths)} photos", file=sys.stderr)
        yield result.features.astype(np.float16)


class ClosedForm:
    """Accuracy on the photos of classes left out, for any class vectors; the half that no vector changes is kept."""

    def __init__(self, kept: LabelledFeatures, left_out: LabelledFeatures) -> None:
        count = np.bincount(kept.labels)
        mean = kept.features.mean(axis=0, dtype=np.float64)
        features = unit_rows(kept.features - mean)
        targets = np.eye(len(count))[kept.labels] / count
        weighted = features / np.sqrt(count[kept.labels])[:, None]
        square = weighted.T @ weighted
        square += FEATURE_RIDGE * np.trace(square) / len(square) * np.eye(len(square))
        targets -= targets.mean(axis=1, keepdims=True)
        self._responses = unit_rows(left_out.features - mean) @ np.linalg.solve(square, features.T @ targets)
        self._labels = left_out.labels

    def __call__(self, kept: FloatArray, left_out: FloatArray, ridge: float) -> float:
        """T1 in percent with vectors (S, E) of the classes learned from and (U, E) of those left out."""
        gram = kept @ kept.T
        gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        scores = self._responses @ np.linalg.solve(gram, kept @ left_out.T)
        right = scores.argmax(axis=1) == self._labels
        return 100 * float((np.bincount(self._labels, weights=right) / np.bincount(self._labels)).mean())


def groups(n_classes: int, n_groups: int) -> list[IntArray]:
    """Classes that play unseen together: about a fifth at a time, all in turn (twice round where there are few)."""
    found: list[IntArray] = []
    for seed in range(2 if n_classes < 50 else 1):
        parts = 4 if n_classes < 50 else 6
        found += [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(n_classes), parts)]
    return found[:n_groups]


class Group:
    """One group of classes left out: composes vectors for them and scores these."""

    def __init__(self, photos: Photos, left_out: IntArray, seed: int) -> None:
        self._left_out = left_out
        self._kept = np.setdiff1d(np.arange(len(photos.class_names)), left_out)
        self.patches, self.images = photos.of(self._kept)
        self._asked_patches, asked_images = photos.of(left_out)
        self._judge = ClosedForm(self.images, asked_images)
        self._seed = seed
        self._without_knowledge: dict[str, PatchClustering] = {}

    def ask(self, knowledge: FloatArray) -> None:
        """Takes another knowledge source: (C, Dw) of all classes."""
        self.knowledge, self.asked = knowledge[self._kept], knowledge[self._left_out]

    def clusters(self, losses: str) -> PatchClustering:
        """Fitted without the classes left out; once where the knowledge plays no part."""
        if losses in self._without_knowledge:
            return self._without_knowledge[losses]
        params = ClusteringParams(early_stopping=False, epochs=EPOCHS, **LOSSES[losses])
        fitted = PatchClustering(params, seed=self._seed).fit(self.patches, self.knowledge.astype(np.float32))
        if params.semantic_weight == 0:
            self._without_knowledge[losses] = fitted
        return fitted

    def raw(self, ridge: float) -> float:
        """T1 with the centred knowledge vectors themselves."""
        known, asked = unit_rows(self.knowledge), unit_rows(self.asked)
        mean = known.mean(axis=0)
        return self._judge(unit_rows(known - mean), unit_rows(asked - mean), ridge)

    def composed(self, vectors: FloatArray, relation: Relation, params: RelationParams) -> float:
        """T1 with seen vectors (S, E) and what the relation makes of them, mean over the ridges."""
        embedder = ClassEmbedder(self.images.class_names, vectors, self.knowledge, relation, params)
        asked = embedder.embed(self.asked)[0]
        return float(np.mean([self._judge(embedder.seen_vectors(), asked, ridge) for ridge in RIDGES]))

    def own_vectors(self, clusters: PatchClustering) -> FloatArray:
        """What the classes left out would have for vectors from their own photos, as seen classes have (Eq. 7-8)."""
        table = self._asked_patches
        images, first, count = np.unique(table.image_index, return_index=True, return_counts=True)
        of_images = np.add.reduceat(clusters.assign(table.features), first, axis=0) / count[:, None]
        labels = table.labels[images]
        return np.stack([of_images[labels == c].mean(axis=0) for c in range(len(table.class_names))])

    def oracle(self, clusters: PatchClustering) -> float:
        """T1 with these vectors."""
        known = clusters.class_embeddings_
        mean = known.mean(axis=0)
        kept, left_out = unit_rows(known - mean), unit_rows(self.own_vectors(clusters) - mean)
        return float(np.mean([self._judge(kept, left_out, ridge) for ridge in RIDGES]))

    def table(self) -> dict[str, float]:
        """Every row of the printed table."""
        n_classes = len(self.knowledge)
        rows = {f"raw vectors, ridge {ridge:g}": self.raw(ridge) for ridge in RIDGES}
        means = np.stack([self.images.features[self.images.labels == c].mean(axis=0) for c in range(n_classes)])
        vectors = {"one-hot": np.eye(n_classes), "mean feature": means}
        for name in LOSSES:
            clusters = self.clusters(name)
            vectors[name] = clusters.class_embeddings_
            rows[f"{name}, oracle"] = self.oracle(clusters)
        for name, own in vectors.items():
            for relation in RELATIONS if name == "VGSE" else (SAME,):
                rows[f"{name}, {relation}"] = self.composed(own, *RELATIONS[relation])
        choice = select_relation(vectors["VGSE"], self.knowledge, self.images)
        print(f"group {self._seed}: auto took {choice.relation} {choice.params}", file=sys.stderr)
        return rows | {"VGSE, auto": self.composed(vectors["VGSE"], choice.relation, choice.params)}


def main() -> None:
    """Prints one Markdown table, a column for each set and knowledge source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights") / WEIGHTS)
    parser.add_argument("--sets", nargs="*", default=["animals", "caltech101", "tiny188"])
    parser.add_argument("--groups", type=int, default=8, help="at most so many groups of classes")
    options = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    for name in options.sets:
        photos = load(options.data / name, options.weights)
        left_out = groups(len(photos.class_names), options.groups)
        parts = [Group(photos, classes, seed) for seed, classes in enumerate(left_out)]
        for path in sorted((options.data / name / "knowledge").glob("*.npz")):
            stored = np.load(path)
            row = {str(known): i for i, known in enumerate(stored["class_names"])}
            knowledge = stored["vectors"][[row[c] for c in photos.class_names]].astype(np.float64)
            tables = []
            for group in parts:
                group.ask(knowledge)
                tables.append(group.table())
            columns[f"{name}, {path.stem}"] = {
                line: float(np.mean([table[line] for table in tables])) for line in tables[0]
            }
    print(json.dumps(columns, indent=1))
    table = ["| class vectors | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in next(iter(columns.values())):
        table.append(f"| {line} | " + " | ".join(f"{column[line]:.1f}" for column in columns.values()) + " |")
    print("\n".join(table), file=sys.stderr)


if __name__ == "__main__":
    main()
