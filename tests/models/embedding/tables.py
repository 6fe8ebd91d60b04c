"""Small patch tables with a known structure."""

from __future__ import annotations

import numpy as np

from models.base import FloatArray, LabelledFeatures, PatchTable

PARTS = 12
"""Properties a patch can show; each class shows four of them."""


def part_classes(n_classes: int, *, seed: int = 0) -> FloatArray:
    """(n_classes, PARTS) 0/1: the parts of each class, all different."""
    random = np.random.default_rng(seed)
    found: list[tuple[int, ...]] = []
    while len(found) < n_classes:
        parts = tuple(sorted(random.permutation(PARTS)[:4].tolist()))
        if parts not in found:
            found.append(parts)
    table = np.zeros((n_classes, PARTS), dtype=np.float32)
    for row, parts in zip(table, found, strict=True):
        row[list(parts)] = 1
    return table


def part_table(
    n_classes: int = 8, images: int = 10, patches: int = 6, dim: int = 24, *, noise: float = 0.15, seed: int = 0
) -> tuple[PatchTable, FloatArray, LabelledFeatures]:
    """Patches that each show one part of their class, the classes' knowledge (their parts), and image features."""
    random = np.random.default_rng(seed)
    knowledge = part_classes(n_classes, seed=seed)
    directions = random.standard_normal((PARTS, dim)).astype(np.float32)
    labels = np.repeat(np.arange(n_classes), images)
    shown = np.stack([random.permutation(np.repeat(np.flatnonzero(knowledge[label]), 2))[:patches] for label in labels])
    features = directions[shown.reshape(-1)] + noise * random.standard_normal((shown.size, dim)).astype(np.float32)
    names = tuple(f"class {number}" for number in range(n_classes))
    table = PatchTable(features.astype(np.float32), np.repeat(np.arange(len(labels)), patches), labels, names)
    means = features.reshape(len(labels), patches, dim).mean(axis=1)
    return table, knowledge, LabelledFeatures(means, labels, names)
