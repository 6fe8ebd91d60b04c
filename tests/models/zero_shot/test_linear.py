"""Linear heads: losses against plain rewrites, minima against scikit-learn's solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from models.base import FloatArray
from models.zero_shot.linear import (
    Loss,
    RidgePath,
    logistic_loss,
    multiclass_hinge_loss,
    softmax_loss,
    squared_hinge_loss,
)
from tests.reference import softmax

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 6)) * np.array([3, 1, 1, 1, 0.1, 0.01])
LABELS = np.arange(40) % 3
SIGNS = np.where(RNG.random((40, 4)) < 0.4, 1.0, -1.0)
MARGINS = np.array([[0, 1, 0.5], [1, 0, 2], [0.5, 2, 0]])
RIDGE = 0.05


def plain(kind: str, scores: FloatArray) -> float:
    total = 0.0
    for i, row in enumerate(scores.tolist()):
        if kind == "softmax":
            total -= math.log(softmax(row)[LABELS[i]])
        elif kind == "multiclass hinge":
            total += max(MARGINS[LABELS[i], c] + row[c] for c in range(3)) - row[LABELS[i]]
        else:
            for output, s in enumerate(row):
                t = SIGNS[i, output]
                total += math.log(1 + math.exp(-t * s)) if kind == "logistic" else max(0.0, 1 - t * s) ** 2
    return total / len(scores)


def loss_of(kind: str) -> Loss:
    return {
        "softmax": softmax_loss(LABELS),
        "multiclass hinge": multiclass_hinge_loss(LABELS, MARGINS),
        "logistic": logistic_loss(SIGNS),
        "squared hinge": squared_hinge_loss(SIGNS),
    }[kind]


@pytest.mark.parametrize("kind", ["softmax", "multiclass hinge", "logistic", "squared hinge"])
def test_loss_equals_plain_rewrite_and_its_slope_is_its_derivative(kind: str) -> None:
    loss = loss_of(kind)
    scores = RNG.normal(size=(40, 3 if kind in ("softmax", "multiclass hinge") else 4))
    value, slope = loss.of(scores)
    assert value == pytest.approx(plain(kind, scores), rel=1e-9)
    for i, output in [(0, 0), (7, 2), (39, 1)]:
        step = np.zeros_like(scores)
        step[i, output] = 1e-6
        numeric = (loss.of(scores + step)[0] - loss.of(scores - step)[0]) / 2e-6
        assert slope[i, output] == pytest.approx(numeric, abs=1e-7)


def test_softmax_heads_are_scikit_learns() -> None:
    heads = RidgePath(FEATURES, softmax_loss(LABELS), 3, tolerance=1e-14).at(RIDGE)
    theirs = LogisticRegression(C=1 / (RIDGE * 40), tol=1e-10, max_iter=5000).fit(FEATURES, LABELS)
    np.testing.assert_allclose(heads.weight, theirs.coef_.T, atol=1e-4)
    np.testing.assert_allclose(heads.bias - heads.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_logistic_heads_are_scikit_learns_one_by_one() -> None:
    heads = RidgePath(FEATURES, logistic_loss(SIGNS), 4, tolerance=1e-14).at(RIDGE)
    for output in range(4):
        theirs = LogisticRegression(C=1 / (RIDGE * 40), tol=1e-10, max_iter=5000).fit(FEATURES, SIGNS[:, output])
        np.testing.assert_allclose(heads.weight[:, output], theirs.coef_[0], atol=1e-4)
        assert heads.bias[output] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_squared_hinge_heads_are_scikit_learns_one_by_one() -> None:
    heads = RidgePath(FEATURES, squared_hinge_loss(SIGNS), 4, intercept=False, tolerance=1e-14).at(RIDGE)
    assert not heads.bias.any()
    for output in range(4):
        theirs = LinearSVC(C=1 / (RIDGE * 40), fit_intercept=False, dual=False, tol=1e-10).fit(
            FEATURES, SIGNS[:, output]
        )
        np.testing.assert_allclose(heads.weight[:, output], theirs.coef_[0], atol=1e-4)


def test_multiclass_hinge_reaches_a_minimum() -> None:
    loss = multiclass_hinge_loss(LABELS, MARGINS)
    heads = RidgePath(FEATURES, loss, 3, intercept=False, tolerance=1e-14).at(RIDGE)

    def objective(weight: FloatArray) -> float:
        return loss.of(FEATURES @ weight)[0] + RIDGE / 2 * float(np.sum(weight**2))

    lowest = objective(heads.weight)
    assert lowest < 0.9 * objective(np.zeros((6, 3)))
    for scale in (1e-1, 1e-2):
        for _ in range(50):
            assert objective(heads.weight + scale * RNG.normal(size=(6, 3))) > lowest - 1e-3


def test_way_to_a_ridge_does_not_matter() -> None:
    path = RidgePath(FEATURES, logistic_loss(SIGNS), 4, tolerance=1e-12)
    path.at(1.0)
    path.at(0.2)
    alone = RidgePath(FEATURES, logistic_loss(SIGNS), 4, tolerance=1e-12).at(RIDGE)
    np.testing.assert_allclose(path.at(RIDGE).weight, alone.weight, atol=1e-4)
    assert path.at(RIDGE).weight is not alone.weight
    assert np.array_equal(path.at(RIDGE).weight, path.at(RIDGE).weight)


def test_fewer_images_than_features_constant_and_empty_features() -> None:
    wide = np.zeros((5, 30), np.float32)
    wide[:, :20] = RNG.normal(size=(5, 20))
    wide[:, 0] = 7
    heads = RidgePath(wide, softmax_loss(np.arange(5)), 5).at(1e-3)
    assert heads.weight.dtype == np.float32
    assert not heads.weight[20:].any()
    assert heads(wide).argmax(axis=1).tolist() == list(range(5))
    nothing = RidgePath(np.zeros((6, 3), np.float32), softmax_loss(np.array([0, 0, 0, 0, 1, 1])), 2).at(1e-3)
    assert nothing.bias[0] - nothing.bias[1] == pytest.approx(math.log(2), abs=0.02)
