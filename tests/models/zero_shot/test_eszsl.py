"""ESZSL against the printed formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.params import ESZSLParams
from models.zero_shot.eszsl import ESZSL
from tests.models.zero_shot.made_up import made_up


@pytest.mark.parametrize(("n_seen", "images"), [(12, 15), (5, 2)])
def test_equals_the_printed_formula(n_seen: int, images: int) -> None:
    data = made_up(n_seen=n_seen, images=images)  # 5 classes x 2 images: fewer rows and classes than dimensions
    model = ESZSL(ESZSLParams(gamma=0.7, lamda=0.3, normalize="none")).fit(data.train, data.seen_embeddings)
    features = data.train.features.astype(np.float64)
    embeddings = data.seen_embeddings / np.linalg.norm(data.seen_embeddings, axis=1, keepdims=True)
    signed = np.where(np.eye(n_seen)[data.train.labels] > 0, 1.0, -1.0)
    left = np.linalg.inv(features.T @ features + 0.7 * np.eye(24))
    right = np.linalg.inv(embeddings.T @ embeddings + 0.3 * np.eye(8))
    weight = left @ features.T @ signed @ embeddings @ right
    found = model._state()["weight"]
    factor = np.linalg.norm(found) / np.linalg.norm(weight)  # the size is the model's own: see _learn
    np.testing.assert_allclose(found, factor * weight, rtol=1e-3, atol=1e-4 * np.abs(found).max())


def test_scores_of_training_rows_have_spread_one() -> None:
    data = made_up()
    model = ESZSL(ESZSLParams(gamma=1e5)).fit(data.train, data.seen_embeddings)
    scores = model.scores(data.train.features, data.seen_embeddings)
    assert np.sqrt(np.mean((scores - scores.mean(axis=1, keepdims=True)) ** 2)) == pytest.approx(1, rel=1e-3)


def test_given_ridges_are_kept_and_missing_ones_chosen() -> None:
    data = made_up()
    validation = ("class 2", "class 3", "class 4")
    both = ESZSL(ESZSLParams(gamma=2.0, lamda=3.0)).fit(data.train, data.seen_embeddings, validation_classes=validation)
    assert (both.validation_["setting"]["gamma"], both.validation_["setting"]["lamda"]) == (2.0, 3.0)
    one = ESZSL(ESZSLParams(gamma=2.0)).fit(data.train, data.seen_embeddings, validation_classes=validation)
    assert one.validation_["setting"]["gamma"] == 2.0
    assert len({entry["relative_lambda"] for entry in one.history_}) == 9


def test_features_that_say_nothing_give_scores_that_say_nothing() -> None:
    data = made_up()
    alike = replace(data.train, features=np.ones_like(data.train.features))
    model = ESZSL().fit(alike, data.seen_embeddings, validation_classes=("class 2", "class 3"))
    assert not model.scores(alike.features[:3], data.unseen_embeddings).any()
