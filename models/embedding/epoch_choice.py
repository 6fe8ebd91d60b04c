"""Which epoch to stop at: the one whose embeddings of held-out classes recognise those classes' images best.

Validation classes play unseen: the heads never train on them, their embeddings are composed from the remaining
classes' by the class relation, and a closed-form compatibility (ESZSL's) on image features scores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from models.base import FloatArray, IntArray
from models.embedding.relations import similarity_matrix_optimization, unit_rows, weighted_average
from models.embedding.rows import blocks
from models.errors import InvalidInput

Matrix = NDArray[np.float64]

FEATURE_RIDGE = 1.0
EMBEDDING_RIDGE = 1.0
RELATION_RIDGE = 0.1
TEMPERATURE_OF_SPREAD = 0.5
UNIT_ROWS = 2048
SMOOTHING = 2
"""Scores are averaged over this many neighbours on each side before the best is taken: one lucky epoch cannot win."""


class ValidationScorer:
    """Scores seen-class embeddings by how well they carry over to the validation classes.

    features: (N, D) whole-image features; classes: (N,) class of each; knowledge: (C, Dw) of all classes;
    train, validation: ascending class numbers without overlap. Everything that does not depend on the class
    embeddings is solved here, so that a score costs milliseconds.
    """

    def __init__(
        self, features: FloatArray, classes: IntArray, knowledge: FloatArray, train: IntArray, validation: IntArray
    ) -> None:
        is_train, is_validation = np.isin(classes, train), np.isin(classes, validation)
        for members, needed in ((is_train, train), (is_validation, validation)):
            missing = np.setdiff1d(needed, classes[members])
            if len(missing):
                raise InvalidInput(f"Class number {missing[0]} has no image features to validate with.")
        self._relations = _relations(unit_knowledge(knowledge), train, validation)
        self._labels = np.searchsorted(validation, classes[is_validation])
        mean, weights = _feature_part(features, np.flatnonzero(is_train), np.searchsorted(train, classes[is_train]))
        self._evidence = np.empty((len(self._labels), len(train)))
        for block, rows in _unit_blocks(features, np.flatnonzero(is_validation)):
            self._evidence[block] = (rows - mean) @ weights

    def __call__(self, class_embeddings: FloatArray) -> tuple[float, float]:
        """Of (n_train_classes, E): mean per-class accuracy, and mean log-probability of the right class."""
        seen = unit_rows(class_embeddings)
        mean = seen.mean(axis=0)
        known = unit_rows(seen - mean)
        gram = known.T @ known
        ridge = _ridge(EMBEDDING_RIDGE, gram)
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), known.T @ self._evidence.T)  # (E, N)
        found = []
        for relation in self._relations:
            unseen = unit_rows(unit_rows(relation @ seen) - mean)
            found.append(_balanced(unseen @ weights, self._labels))
        accuracy, log_probability = np.mean(found, axis=0)
        return float(accuracy), float(log_probability)


def best_epoch(epochs: Sequence[int], scores: Sequence[float]) -> int:
    """The last epoch whose smoothed score cannot be told from the best one.

    Scores are averaged with their SMOOTHING neighbours on each side. How far they scatter around that average is
    their noise; smoothed scores within it of the best are ties, and of tied epochs the last is taken: clusters grow
    sharper, and mean more, the longer they are trained.
    """
    values = np.asarray(scores, dtype=np.float64)
    smoothed = np.array([values[max(0, i - SMOOTHING) : i + SMOOTHING + 1].mean() for i in range(len(values))])
    noise = float(np.sqrt(np.mean((values - smoothed) ** 2)))
    return epochs[int(np.flatnonzero(smoothed >= smoothed.max() - noise - 1e-12)[-1])]


def unit_knowledge(knowledge: FloatArray) -> FloatArray:
    """Rows minus their mean, then of unit length: weights of the losses mean the same for every source."""
    centred = knowledge.astype(np.float64) - knowledge.mean(axis=0, dtype=np.float64)
    units: FloatArray = unit_rows(centred).astype(np.float32)
    return units


def _relations(knowledge: FloatArray, train: IntArray, validation: IntArray) -> list[Matrix]:
    """Both of the paper's class relations (V, S), rows summing to one: no single one is trusted."""
    average = weighted_average(knowledge[validation], knowledge[train])
    return [
        average / average.sum(axis=1, keepdims=True),
        similarity_matrix_optimization(knowledge[validation], knowledge[train], alpha=0, ridge=RELATION_RIDGE),
    ]


def _feature_part(features: FloatArray, chosen: IntArray, labels: IntArray) -> tuple[Matrix, Matrix]:
    """Mean x (D,) of the chosen rows, and ESZSL's (X^T X + g I)^-1 X^T Y (D, S) of them less x.

    Rows have unit length; labels (n_chosen,) are their classes, which weigh the same.
    """
    one_hot = np.eye(labels.max() + 1)[labels]
    one_hot /= one_hot.sum(axis=0)
    total = np.zeros(features.shape[1])
    gram = np.zeros((features.shape[1], features.shape[1]))
    means = np.zeros((features.shape[1], one_hot.shape[1]))
    for block, rows in _unit_blocks(features, chosen):
        total += rows.sum(axis=0)
        gram += rows.T @ rows
        means += rows.T @ one_hot[block]
    mean = total / len(chosen)
    gram -= len(chosen) * np.outer(mean, mean)
    ridge = _ridge(FEATURE_RIDGE, gram)
    weights: Matrix = np.linalg.solve(gram + ridge * np.eye(len(gram)), means - mean[:, None]).astype(np.float64)
    return mean, weights


def _ridge(part: float, gram: Matrix) -> float:
    """A part of the mean eigenvalue. All rows may be the same, where training has gone wrong: then of nothing."""
    return max(part * float(np.trace(gram)) / len(gram), 1e-12)


def _unit_blocks(features: FloatArray, chosen: IntArray) -> Iterator[tuple[slice, Matrix]]:
    """The chosen rows of `features` (which may be a memory map) at unit length, some at a time."""
    for block in blocks(len(chosen), UNIT_ROWS):
        yield block, unit_rows(features[chosen[block]])


def _balanced(scores: Matrix, labels: IntArray) -> tuple[float, float]:
    """Scores (V, N) of labels (N,): accuracy and log-probability, each the mean over classes of the class's mean.

    Scores are divided by their own spread first: only their order and relative gaps count.
    """
    scaled = scores / max(TEMPERATURE_OF_SPREAD * float(scores.std()), 1e-12)
    log_probability = scaled[labels, np.arange(len(labels))] - logsumexp(scaled, axis=0)
    count = np.bincount(labels)
    right = np.bincount(labels, weights=(scores.argmax(axis=0) == labels).astype(np.float64))
    return float((right / count).mean()), float((np.bincount(labels, weights=log_probability) / count).mean())
