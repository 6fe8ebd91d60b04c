"""Class relations of VGSE: how each unseen class is composed of seen classes (section 3.2).

Xu et al., VGSE: Visually-Grounded Semantic Embeddings for Zero-Shot Learning, CVPR 2022, Eq. 9-11.
Everything is float64 and deterministic; all unseen classes are solved together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.base import FloatArray
from models.embedding.quadratic import BoxQP
from models.errors import InvalidInput, ShapeMismatch

Matrix = NDArray[np.float64]

RIDGE_FLOOR = 1e-9
"""Least ridge, in units of the mean squared norm: makes the answer unique, and then it is the one of least norm."""

BLOCK_CELLS = 4_000_000
"""Relations solved at a time (32 MB): memory stays flat for any number of unseen classes."""


def weighted_average(
    knowledge_unseen: FloatArray, knowledge_seen: FloatArray, *, n_neighbors: int = 5, eta: float = 5.0
) -> Matrix:
    """WAvg (Eq. 9-10): exp(-eta * distance) / k at the k nearest seen classes, 0 elsewhere; (n_unseen, n_seen).

    Distances are Euclidean between L2-normalised vectors, without which eta = 5 has no meaning. As printed in the
    paper, rows do not sum to one: normalise what they compose. Fewer seen classes than `n_neighbors`: all are used.
    """
    unseen, seen = check_knowledge(knowledge_unseen, knowledge_seen)
    _check_average(n_neighbors, eta)
    return _average(unseen, seen, n_neighbors, eta, is_normalized=False)


def normalized_average(
    knowledge_unseen: FloatArray, knowledge_seen: FloatArray, *, n_neighbors: int = 5, eta: float = 5.0
) -> Matrix:
    """WAvg with rows that sum to one: the same directions as Eq. 10 gives, also where its weights underflow."""
    unseen, seen = check_knowledge(knowledge_unseen, knowledge_seen)
    _check_average(n_neighbors, eta)
    return _average(unseen, seen, n_neighbors, eta, is_normalized=True)


def similarity_matrix_optimization(
    knowledge_unseen: FloatArray, knowledge_seen: FloatArray, *, alpha: float, ridge: float = 1e-6
) -> Matrix:
    """SMO (Eq. 11): min ||w_u - r W||^2 + ridge * m * ||r||^2, alpha <= r_i <= 1, sum r = 1; (n_unseen, n_seen).

    `m` is the mean squared norm of the seen vectors (1 for unit vectors), so that `ridge` has no unit. Between 0 and 1
    it leads from the paper's answer towards the mean of the seen classes. With more seen classes than dimensions many
    r are equally good: a small ridge picks the one of least norm. Vectors are used as given; normalise them first.
    """
    return SimilarityOptimizer(knowledge_seen, ridge=ridge).solve(knowledge_unseen, alpha=alpha)


class SimilarityOptimizer:
    """SMO against fixed seen classes: factorised once, then an unseen class costs less than a millisecond."""

    def __init__(self, knowledge_seen: FloatArray, *, ridge: float = 1e-6) -> None:
        if not (math.isfinite(ridge) and ridge >= 0):
            raise InvalidInput(f"ridge is {ridge}; use a finite number of at least 0.", field="ridge")
        seen = check_rows(knowledge_seen, "knowledge_seen")
        self.n_seen, self.knowledge_dim = seen.shape
        self._mean = seen.mean(axis=0)
        self._scale = float(np.mean(np.sum(seen**2, axis=1)))
        # sum r = 1 lets any point be the origin; the seen mean keeps the Gram matrix well conditioned. In units of
        # the vectors' own length the same tolerances fit every knowledge source.
        self._centred = (seen - self._mean) / math.sqrt(self._scale)
        self._qp = BoxQP(self._centred, max(ridge, RIDGE_FLOOR))

    def solve(self, knowledge_unseen: FloatArray, *, alpha: float) -> Matrix:
        """Relations (n_unseen, n_seen). `alpha` is at most 1 / n_seen, or nothing could sum to one."""
        targets = self._targets(knowledge_unseen)
        if not math.isfinite(alpha) or alpha * self.n_seen > 1:
            raise InvalidInput(
                f"alpha is {alpha}, but {self.n_seen} coefficients that sum to 1 cannot all be that large; "
                f"use at most {1 / self.n_seen:.3g} (the paper uses 0 and -1).",
                field="alpha",
            )
        relations = np.empty((len(targets), self.n_seen))
        for rows in _blocks(len(targets), self.n_seen):
            relations[rows] = self._qp.solve(targets[rows], lower=alpha)
        return relations

    def report(self, knowledge_unseen: FloatArray, relations: Matrix, *, alpha: float) -> RelationReport:
        """How well `relations` solve Eq. 11; works for answers of any solver."""
        targets = self._targets(knowledge_unseen)
        if relations.shape != (len(targets), self.n_seen):
            raise ShapeMismatch(
                f"relations is {relations.shape}, but there are {len(targets)} unseen and {self.n_seen} seen classes."
            )
        box = np.maximum(np.maximum(alpha - relations, relations - 1), 0)
        return RelationReport(
            objective=self._qp.objective(targets, relations) * self._scale,
            kkt_residual=self._qp.kkt_residual(targets, relations, lower=alpha),
            max_violation=np.maximum(box.max(axis=1), np.abs(relations.sum(axis=1) - 1)),
        )

    def _targets(self, knowledge_unseen: FloatArray) -> Matrix:
        unseen = check_rows(knowledge_unseen, "knowledge_unseen")
        _check_width(unseen.shape[1], self.knowledge_dim)
        targets: Matrix = (unseen - self._mean) / math.sqrt(self._scale)
        return targets


@dataclass(frozen=True)
class RelationReport:
    """Quality of SMO answers, one value per unseen class.

    objective: ||w_u - r W||^2 + ridge * m * ||r||^2.
    kkt_residual: the most that moving a unit of weight between two coefficients, where the box allows it, would
        still gain to first order, in units of the mean squared norm; 0 at the optimum.
    max_violation: largest distance from the box or of the sum from 1.
    """

    objective: Matrix
    kkt_residual: Matrix
    max_violation: Matrix


def unit_rows(vectors: FloatArray) -> Matrix:
    """Rows scaled to Euclidean length 1 in float64; rows of (nearly) no length become zeros."""
    rows = np.asarray(vectors, dtype=np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)  # squares of very large or small entries stay finite
    rows = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 1e-12)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))


def check_knowledge(knowledge_unseen: FloatArray, knowledge_seen: FloatArray) -> tuple[Matrix, Matrix]:
    """Both as float64 matrices of equal width, finite, without zero rows; else InvalidInput."""
    unseen, seen = check_rows(knowledge_unseen, "knowledge_unseen"), check_rows(knowledge_seen, "knowledge_seen")
    _check_width(unseen.shape[1], seen.shape[1])
    return unseen, seen


def check_rows(vectors: FloatArray, name: str) -> Matrix:
    """`vectors` as a float64 matrix with at least one row, finite, without zero rows; else InvalidInput."""
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ShapeMismatch(f"{name} has shape {rows.shape}; give one row of numbers per class.", field=name)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InvalidInput(f"Row {row} of {name} holds NaN or infinity; give finite numbers.", field=f"{name}/{row}")
    usable = (np.abs(rows) > 1e-12).any(axis=1)
    if not usable.all():
        row = int(np.argmin(usable))
        raise InvalidInput(
            f"Row {row} of {name} is all zeros, which says nothing about its class; give it a vector or leave it out.",
            field=f"{name}/{row}",
        )
    return rows


def _check_average(n_neighbors: int, eta: float) -> None:
    if n_neighbors < 1:
        raise InvalidInput(f"n_neighbors is {n_neighbors}; use at least 1.", field="n_neighbors")
    if not (math.isfinite(eta) and eta >= 0):
        raise InvalidInput(f"eta is {eta}; use a finite number of at least 0.", field="eta")


def _average(unseen: Matrix, seen: Matrix, n_neighbors: int, eta: float, *, is_normalized: bool) -> Matrix:
    unseen, seen = unit_rows(unseen), unit_rows(seen)
    n_neighbors = min(n_neighbors, len(seen))
    relations = np.zeros((len(unseen), len(seen)))
    for rows in _blocks(len(unseen), len(seen)):
        distances = np.sqrt(np.maximum(2 - 2 * unseen[rows] @ seen.T, 0))
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :n_neighbors]
        near = np.take_along_axis(distances, nearest, axis=1)
        if is_normalized:
            weights = np.exp(-eta * (near - near[:, :1]))
            weights /= weights.sum(axis=1, keepdims=True)
        else:
            weights = np.exp(-eta * near) / n_neighbors
        np.put_along_axis(relations[rows], nearest, weights, axis=1)
    return relations


def _check_width(unseen_dim: int, seen_dim: int) -> None:
    if unseen_dim != seen_dim:
        raise ShapeMismatch(
            f"Unseen classes have {unseen_dim} knowledge dimensions and seen classes {seen_dim}; "
            "take both from the same source.",
            field="knowledge_unseen",
        )


def _blocks(n_rows: int, n_columns: int) -> list[slice]:
    size = max(1, BLOCK_CELLS // max(n_columns, 1))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
