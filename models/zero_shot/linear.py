"""Ridge-regularised linear heads, several outputs at once, by L-BFGS.

    minimise over W (feature_dim, n_outputs), b (n_outputs,):   mean loss(X W + b) + ridge / 2 ||W||_F^2

One matrix product an evaluation serves every output, which for dozens of attributes or classes is many times faster
than a solver run for each. In the basis of the eigenvectors of X^T X / n_images, each direction divided by the root of
its curvature, every direction is about equally steep: a few dozen steps do, whatever the ridge.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from models.base import FloatArray, IntArray
from models.classic_params import RidgeParams
from models.zero_shot.base import ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.scaling import Scaling


@dataclass(frozen=True)
class Loss:
    """`of` goes from scores (n_images, n_outputs) to the mean loss over images and its gradient, of the scores' shape.

    curvature: about its second derivative by one image's score; it only speeds up the solver.
    """

    of: Callable[[FloatArray], tuple[float, FloatArray]]
    curvature: float


RIDGES = tuple(float(10.0**power) for power in range(-6, 1))
"""Grid of ridges, relative to the mean squared length of a feature row, so that one grid serves every scaling."""
MAX_ITERATIONS = 200
TOLERANCE = 1e-5
"""Relative decrease of the objective in one step at which the solver stops; finer than any choice made on folds."""


@dataclass(frozen=True)
class Heads:
    """weight (feature_dim, n_outputs), bias (n_outputs,)."""

    weight: FloatArray
    bias: FloatArray

    def __call__(self, features: FloatArray) -> FloatArray:
        """Scores (n_images, n_outputs)."""
        return np.asarray(features @ self.weight + self.bias)


class RidgePath:
    """Heads for one training set at any ridge; each is solved once, from the nearest larger ridge already solved.

    scale: mean squared length of a feature row, what relative ridges multiply.
    """

    def __init__(
        self, features: FloatArray, loss: Loss, n_outputs: int, *, intercept: bool = True, tolerance: float = TOLERANCE
    ) -> None:
        self.loss, self.n_outputs, self.intercept, self.tolerance = loss, n_outputs, intercept, tolerance
        exact = features.astype(np.float64)
        values, vectors = np.linalg.eigh(exact.T @ exact / len(exact))
        self.scale = float(values.sum()) or 1.0
        spans = values > 1e-10 * self.scale  # no image reaches the other directions, so W has nothing there
        self._values, self._vectors = values[spans], vectors[:, spans]  # (K,), (feature_dim, K)
        self._features = features @ self._vectors.astype(features.dtype)  # (N, K)
        self._solved: dict[float, tuple[FloatArray, FloatArray]] = {}

    def at(self, ridge: float) -> Heads:
        """The heads at `ridge`, of the precision of the features."""
        if ridge not in self._solved:
            larger = [solved for solved in self._solved if solved > ridge]
            origin = (np.zeros((len(self._values), self.n_outputs)), np.zeros(self.n_outputs))
            self._solved[ridge] = self._solve(ridge, *(self._solved[min(larger)] if larger else origin))
        weight, bias = self._solved[ridge]
        dtype = self._features.dtype
        return Heads((self._vectors @ weight).astype(dtype), bias.astype(dtype))

    def _solve(self, ridge: float, weight: FloatArray, bias: FloatArray) -> tuple[FloatArray, FloatArray]:
        """W in the basis of eigenvectors, (K, n_outputs), and the bias, from where the arguments are."""
        steep = np.sqrt(self.loss.curvature * self._values + ridge)[:, None]
        features, size, shape = self._features, weight.size, weight.shape

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            weight, bias = flat[:size].reshape(shape) / steep, flat[size:]
            scores = features @ weight.astype(features.dtype) + bias.astype(features.dtype)
            value, slope = self.loss.of(scores)
            by_weight = (features.T @ slope.astype(features.dtype)).astype(np.float64) + ridge * weight
            by_bias = slope.sum(axis=0, dtype=np.float64) * self.intercept
            gradient = np.concatenate([(by_weight / steep).ravel(), by_bias])
            return value + ridge / 2 * float(np.vdot(weight, weight)), gradient

        start = np.concatenate([(weight * steep).ravel(), bias])
        options = {"maxiter": MAX_ITERATIONS, "ftol": self.tolerance, "gtol": 1e-12}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
        return found[:size].reshape(shape) / steep, found[size:]


def softmax_loss(labels: IntArray) -> Loss:
    """Cross-entropy of softmax(scores) with class numbers `labels` (n_images,)."""
    rows = np.arange(len(labels))

    def loss(scores: FloatArray) -> tuple[float, FloatArray]:
        log_total = logsumexp(scores, axis=1, keepdims=True)
        slope = np.exp(scores - log_total)
        slope[rows, labels] -= 1
        value = float(np.mean(log_total[:, 0] - scores[rows, labels], dtype=np.float64))
        return value, slope / len(labels)

    n_classes = int(labels.max()) + 1
    return Loss(loss, 1 / n_classes)


def logistic_loss(targets: FloatArray) -> Loss:
    """Sum over outputs of log(1 + exp(-t s)), `targets` t (n_images, n_outputs) of +-1."""

    def loss(scores: FloatArray) -> tuple[float, FloatArray]:
        margins = targets * scores
        slope = -targets * expit(-margins) / len(targets)
        return float(np.logaddexp(0, -margins).sum(dtype=np.float64) / len(targets)), slope

    return Loss(loss, 0.25)


def squared_hinge_loss(targets: FloatArray) -> Loss:
    """Sum over outputs of max(0, 1 - t s)^2, `targets` t (n_images, n_outputs) of +-1."""

    def loss(scores: FloatArray) -> tuple[float, FloatArray]:
        short = np.maximum(1 - targets * scores, 0)
        value = float(np.square(short).sum(dtype=np.float64) / len(targets))
        return value, -2 * targets * short / len(targets)

    return Loss(loss, 2.0)


def multiclass_hinge_loss(labels: IntArray, margins: FloatArray) -> Loss:
    """max_c [margins[y, c] + s_c] - s_y with `margins` (n_classes, n_classes) zero where c = y (Crammer and Singer)."""
    rows = np.arange(len(labels))
    asked = margins[labels]  # (N, C)

    def loss(scores: FloatArray) -> tuple[float, FloatArray]:
        raised = scores + asked
        worst = raised.argmax(axis=1)
        value = float(np.mean(raised[rows, worst] - scores[rows, labels], dtype=np.float64))
        slope = np.zeros_like(scores)
        slope[rows, worst] += 1
        slope[rows, labels] -= 1
        return value, slope / len(labels)

    return Loss(loss, 1 / len(margins))


class RidgeModel(ZeroShotModel):
    """Base of methods that rest on linear heads, and choose the heads' ridge on validation folds unless it is given.

    DEFAULT_RIDGE: relative, where there is nothing to choose by.
    """

    params: RidgeParams
    DEFAULT_RIDGE: ClassVar[float]
    _solved: tuple[Rows, RidgePath] | None = None

    @abstractmethod
    def _new_path(self, train: Rows) -> RidgePath:
        """The learning problem on `train`."""

    def _path_of(self, train: Rows) -> RidgePath:
        """Made once for `_try_settings` and the `_learn` with the same rows that follows it."""
        if self._solved is None or self._solved[0] is not train:
            self._solved = (train, self._new_path(train))
        return self._solved[1]

    def _ridges(self) -> tuple[float, ...]:
        """Relative ridges to try, largest first so that each starts from the one before; one alone if it is given."""
        return RIDGES[::-1] if self.params.lamda is None else (self.DEFAULT_RIDGE,)

    def _heads(self, path: RidgePath, relative_ridge: float) -> tuple[Heads, float]:
        """The heads, and the absolute ridge: the one of the parameters if given."""
        ridge = self.params.lamda if self.params.lamda is not None else relative_ridge * path.scale
        return path.at(ridge), ridge

    def _scaling_kind(self) -> Scaling:
        return self.params.normalize
