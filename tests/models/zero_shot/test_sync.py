"""SYNC against plain rewrites, and its claim that classifiers of seen classes need no phantoms."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from scipy.optimize import minimize

from models.base import FloatArray
from models.classic_params import SynCParams
from models.zero_shot.folds import Rows
from models.zero_shot.linear import RidgePath
from models.zero_shot.sync import SynC, mean_distance, seen_loss, similarities
from tests.models.zero_shot.made_up import made_up

VALIDATION = ("class 2", "class 3", "class 4")
RNG = np.random.default_rng(0)


def plain_similarities(embeddings: FloatArray, phantoms: FloatArray, sigma: float) -> list[list[float]]:
    found = []
    for own in embeddings:
        powers = [math.exp(-float(np.sum((own - b) ** 2)) / sigma**2) for b in phantoms]
        found.append([power / sum(powers) for power in powers])
    return found


def test_similarities_equal_the_printed_formula() -> None:
    embeddings, phantoms = RNG.normal(size=(4, 5)), RNG.normal(size=(3, 5))
    np.testing.assert_allclose(
        similarities(embeddings, phantoms, 1.7), plain_similarities(embeddings, phantoms, 1.7), rtol=1e-9
    )


def test_mean_distance() -> None:
    assert mean_distance(np.array([[0.0, 0], [3, 4], [3, 4]])) == pytest.approx(math.sqrt(50 / 3))
    assert mean_distance(np.ones((3, 2))) == 1


@pytest.mark.parametrize("kind", ["one_versus_other", "crammer_singer", "structured"])
def test_losses_equal_plain_rewrites(kind: str) -> None:
    embeddings, labels, scores = RNG.normal(size=(3, 4)), np.array([0, 2, 1, 2]), RNG.normal(size=(4, 3))
    value = seen_loss(Rows(np.zeros((4, 2)), labels, embeddings), kind).of(scores)[0]
    total = 0.0
    for row, y in zip(scores, labels, strict=True):
        if kind == "one_versus_other":
            total += sum(max(0.0, 1 - (1 if c == y else -1) * row[c]) ** 2 for c in range(3))
        else:
            asked = [
                math.dist(embeddings[c], embeddings[y]) if kind == "structured" else float(c != y) for c in range(3)
            ]
            total += max(asked[c] + row[c] - row[y] for c in range(3))
    assert value == pytest.approx(total / 4, rel=1e-6)


def test_learning_phantom_classifiers_directly_gives_the_same_seen_ones() -> None:
    """The paper's objective over v, solved as printed, against the short cut v = s^-1 w."""
    labels, sigma, lamda = np.arange(20) % 4, 1.1, 0.1
    embeddings = RNG.normal(size=(4, 3))
    features = RNG.normal(size=(4, 5))[labels] + RNG.normal(size=(20, 5))
    s = np.array(plain_similarities(embeddings, embeddings, sigma))
    signs = np.where(np.eye(4)[labels] > 0, 1.0, -1.0)

    def objective(flat: FloatArray) -> float:
        w = s @ flat.reshape(4, 5)
        short = np.maximum(0, 1 - signs * (features @ w.T))
        return float(np.sum(short**2) / 20 + lamda / 2 * np.sum(w**2))

    v = minimize(objective, np.zeros(20), options={"gtol": 1e-9, "maxiter": 2000}, method="L-BFGS-B").x.reshape(4, 5)
    loss = seen_loss(Rows(features, labels, embeddings), "one_versus_other")
    heads = RidgePath(features, loss, 4, intercept=False, tolerance=1e-14).at(lamda)
    np.testing.assert_allclose(s @ v, heads.weight.T, atol=2e-3)
    new = np.array(plain_similarities(RNG.normal(size=(2, 3)), embeddings, sigma))
    np.testing.assert_allclose(new @ v, new @ np.linalg.solve(s, heads.weight.T), atol=2e-2)


@pytest.mark.parametrize("loss", ["one_versus_other", "crammer_singer", "structured"])
def test_scores_are_synthesised_classifiers_and_seen_classes_keep_their_own(
    loss: Literal["one_versus_other", "crammer_singer", "structured"],
) -> None:
    data = made_up()
    params = SynCParams(sigma=0.9, lamda=0.01, loss=loss, normalize="none")
    model = SynC(params).fit(data.train, data.seen_embeddings)
    state = model._state()
    unit = data.unseen_embeddings / np.linalg.norm(data.unseen_embeddings, axis=1, keepdims=True)
    classifiers = np.array(plain_similarities(unit, state["phantoms"], 0.9)) @ state["bases"]
    scores = model.scores(data.unseen.features, data.unseen_embeddings)
    np.testing.assert_allclose(scores, data.unseen.features @ classifiers.T, rtol=1e-3, atol=1e-3)
    own = SynC(params)._new_path(Rows(data.train.features, data.train.labels, state["phantoms"])).at(0.01)
    again = model.scores(data.train.features, data.seen_embeddings)
    np.testing.assert_allclose(again, own(data.train.features), rtol=1e-2, atol=1e-2)
    assert np.mean(again.argmax(axis=1) == data.train.labels) > 0.95


def test_what_is_given_is_kept_and_what_is_missing_chosen() -> None:
    data = made_up()
    sigma = SynC(SynCParams(lamda=0.02)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert sigma.validation_["setting"]["lamda"] == 0.02
    assert len({entry["relative_sigma"] for entry in sigma.history_}) == len(sigma.history_) == 9
    both = SynC(SynCParams(lamda=0.02, sigma=0.8))
    both.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert (both.validation_["setting"]["lamda"], both.validation_["setting"]["sigma"]) == (0.02, 0.8)
