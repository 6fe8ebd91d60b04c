"""What patch tables and knowledge must be before anything learns from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.base import FloatArray, IntArray, PatchTable
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples, UnknownName
from models.params import ClusteringParams


def check_table(patches: PatchTable, knowledge: FloatArray, params: ClusteringParams) -> list[str]:
    """Raises what `PatchClustering.fit` documents; returns notes on what was adjusted. Features: feature_statistics."""
    notes = []
    check_classes(patches, knowledge)
    n_patches = len(patches.features)
    if len(patches.class_names) < 2:
        raise TooFewSamples("Patch clustering needs at least two seen classes; the table has one.", field="classes")
    if n_patches < params.n_clusters:
        raise TooFewSamples(
            f"{n_patches} patches cannot fill {params.n_clusters} clusters. Add images or lower n_clusters.",
            field="n_clusters",
        )
    if params.n_neighbors >= n_patches:
        notes.append(
            f"n_neighbors was lowered from {params.n_neighbors} to {n_patches - 1}: there are no more patches."
        )
    if params.batch_size < params.n_clusters:
        notes.append(
            f"batch_size {params.batch_size} is below n_clusters {params.n_clusters}: the entropy of so few patches "
            "cannot tell that all clusters are used."
        )
    return notes


def check_classes(patches: PatchTable, knowledge: FloatArray | None = None) -> None:
    """The table agrees with itself and with the knowledge rows, and each class has a patch."""
    n_classes = len(patches.class_names)
    if len(set(patches.class_names)) < n_classes:
        raise InvalidInput("Class names of the patch table repeat; merge the classes or rename one.", field="classes")
    if len(patches.image_index) != len(patches.features):
        raise ShapeMismatch(
            f"The patch table has {len(patches.features)} feature rows but {len(patches.image_index)} image numbers."
        )
    if len(patches.features) == 0:
        raise TooFewSamples("The patch table has no patches. Add images of the seen classes.", field="patches")
    if patches.image_index.min() < 0 or patches.image_index.max() >= len(patches.labels):
        raise ShapeMismatch(
            f"image_index runs to {patches.image_index.max()}, but there are {len(patches.labels)} labelled images."
        )
    if patches.labels.min() < 0 or patches.labels.max() >= n_classes:
        raise ShapeMismatch(f"Labels run to {patches.labels.max()}, but there are {n_classes} class names.")
    empty = np.flatnonzero(np.bincount(patch_classes(patches), minlength=n_classes) == 0)
    if len(empty):
        raise TooFewSamples(
            f"Class {patches.class_names[empty[0]]!r} has no patch. Add images of it or leave it out.", field="classes"
        )
    if knowledge is not None:
        _check_knowledge(knowledge, patches.class_names)


def _check_knowledge(knowledge: FloatArray, class_names: Sequence[str]) -> None:
    if knowledge.ndim != 2 or len(knowledge) != len(class_names) or knowledge.shape[1] == 0:
        raise ShapeMismatch(
            f"Knowledge has shape {knowledge.shape}, but {len(class_names)} classes need one row each.",
            field="class_knowledge",
        )
    bad = np.flatnonzero(~np.isfinite(knowledge).all(axis=1))
    if len(bad):
        raise InvalidInput(
            f"The knowledge vector of {class_names[bad[0]]!r} holds NaN or infinity. Give finite numbers.",
            field="class_knowledge",
        )


def patch_classes(patches: PatchTable) -> IntArray:
    """(P,) class number of each patch."""
    classes: IntArray = np.asarray(patches.labels, dtype=np.int64)[patches.image_index]
    return classes


def class_numbers(class_names: Sequence[str], wanted: Sequence[str]) -> IntArray:
    """Positions of `wanted` in `class_names`, ascending order not implied; UnknownName for one that is not there."""
    position = {name: number for number, name in enumerate(class_names)}
    for name in wanted:
        if name not in position:
            raise UnknownName("class", name, class_names, field="classes")
    return np.asarray([position[name] for name in wanted], dtype=np.int64)
