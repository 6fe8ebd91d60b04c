"""Which seen classes stand for unseen ones while settings are chosen, and which of their images are held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.base import FloatArray, IntArray
from models.data.splits import fold_count, group_count

HELD_OUT_SHARE = 0.2
"""Share of each class's training images that stands in for seen test images while gamma is chosen."""


@dataclass(frozen=True)
class Rows:
    """Scaled features (n_images, feature_dim) float32, labels into unit `embeddings` (n_classes, embedding_dim)."""

    features: FloatArray
    labels: IntArray
    embeddings: FloatArray

    def of(self, classes: IntArray, keep: IntArray | None = None) -> Rows:
        """The images of `classes` (those also in `keep`, row numbers, if given), relabelled 0, 1, ... in that order."""
        position = np.full(len(self.embeddings), -1)
        position[classes] = np.arange(len(classes))
        rows = np.flatnonzero(position[self.labels] >= 0) if keep is None else keep[position[self.labels[keep]] >= 0]
        return Rows(self.features[rows], position[self.labels[rows]], self.embeddings[classes])


def class_folds(n_classes: int, first: IntArray, n_folds: int, seed: int) -> list[IntArray]:
    """Up to `n_folds` groups of class numbers without overlap: `first`, then seeded groups of about its size.

    n_folds 0: as many as let 10 classes take a turn. No `first`: one empty fold, which means that nothing is chosen.
    """
    folds = [first]
    if len(first):
        others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(n_classes), first))
        groups = np.array_split(others, group_count(n_classes, len(first)) - 1)
        folds += [np.sort(group) for group in groups[: fold_count(n_folds, n_classes, len(first)) - 1]]
    return folds


def held_out_slice(labels: IntArray, seed: int) -> tuple[IntArray, IntArray]:
    """(slice, rest) of row numbers: a seeded fifth of each class with 2 images or more, never all of it."""
    order = np.random.default_rng(seed).permutation(len(labels))
    taken = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        taken.append(rows[: min(len(rows) - 1, max(1, round(HELD_OUT_SHARE * len(rows))))])
    held = np.sort(np.concatenate(taken))
    return held, np.setdiff1d(np.arange(len(labels)), held)
