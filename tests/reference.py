"""Plain rewrites of the papers' formulas, loop by loop, to compare the library with. Never imported by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def neighbour_loss(assignments: Rows, neighbours: Rows) -> float:
    """VGSE Eq. 2, one neighbour per anchor."""
    total = 0.0
    for own, other in zip(assignments, neighbours, strict=True):
        total -= math.log(sum(a * b for a, b in zip(own, other, strict=True)) + 1e-8)
    return total / len(assignments)


def entropy_loss(assignments: Rows) -> float:
    """VGSE Eq. 3."""
    means = [sum(column) / len(assignments) for column in zip(*assignments, strict=True)]
    return math.fsum(mean * math.log(mean) for mean in means if mean > 0)


def class_loss(logits: Rows, labels: Sequence[int], *, double_softmax: bool = False) -> float:
    """VGSE Eq. 4."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        probabilities = softmax(row)
        if double_softmax:
            probabilities = softmax(probabilities)
        total -= math.log(probabilities[label])
    return total / len(logits)


def semantic_loss(predicted: Rows, knowledge: Rows, *, squared: bool = False) -> float:
    """VGSE Eq. 5."""
    total = 0.0
    for row, target in zip(predicted, knowledge, strict=True):
        square = sum((a - b) ** 2 for a, b in zip(row, target, strict=True))
        total += square if squared else math.sqrt(square)
    return total / len(predicted)


def class_embeddings(
    assignments: Rows, image_index: Sequence[int], labels: Sequence[int], n_classes: int
) -> list[list[float]]:
    """VGSE Eq. 7-8: an image is the mean of its patches, a class the mean of its images."""
    found = []
    for wanted in range(n_classes):
        images = []
        for image, label in enumerate(labels):
            patches = [row for row, owner in zip(assignments, image_index, strict=True) if owner == image]
            if label == wanted and patches:
                images.append([sum(column) / len(patches) for column in zip(*patches, strict=True)])
        found.append([sum(column) / len(images) for column in zip(*images, strict=True)])
    return found


def nearest_rows(features: Rows, k: int) -> list[list[int]]:
    """The k nearest other rows of each row by Euclidean distance."""
    found = []
    for i, row in enumerate(features):
        distance = [(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)), j) for j, other in enumerate(features)]
        found.append([j for _, j in sorted(distance) if j != i][:k])
    return found
