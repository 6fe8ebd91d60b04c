"""GEM-ZSL and APN on global features, against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from models.base import FloatArray
from models.classifier_params import APNParams, GEMZSLParams
from models.zero_shot.apn import APN
from models.zero_shot.gem_zsl import GEMZSL
from models.zero_shot.scaling import unit_rows
from tests.models.zero_shot.made_up import made_up
from tests.reference import softmax

STILL: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-12, "batch_size": 1000, "normalize": "none"}
DATA = made_up()
UNIT = unit_rows(DATA.seen_embeddings).astype(np.float64)


def cross_entropy(scores: FloatArray, *, double: bool = False) -> float:
    total = 0.0
    for row, label in zip(scores.tolist(), DATA.train.labels, strict=True):
        total -= math.log(softmax(softmax(row) if double else row)[label])
    return total / len(scores)


def test_gem_is_the_softmax_of_scaled_cosines() -> None:
    model = GEMZSL(GEMZSLParams.model_validate({**STILL, "scale": 7})).fit(DATA.train, DATA.seen_embeddings)
    projected = DATA.train.features.astype(np.float64) @ model._state()["weight"]
    cosine = [
        [sum(a * b for a, b in zip(v, phi, strict=True)) / math.sqrt(sum(a * a for a in v)) for phi in UNIT]
        for v in projected
    ]
    expected = 7 * np.array(cosine)
    np.testing.assert_allclose(model.scores(DATA.train.features, UNIT), expected, rtol=1e-4, atol=1e-4)
    assert model.history_[0]["loss"] == pytest.approx(cross_entropy(expected), rel=1e-5)


def test_gem_scores_do_not_depend_on_the_length_of_the_image_vector() -> None:
    model = GEMZSL(GEMZSLParams(epochs=5, normalize="none")).fit(DATA.train, DATA.seen_embeddings)
    features = DATA.unseen.features
    np.testing.assert_allclose(model.scores(features, UNIT), model.scores(9 * features, UNIT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_apn_loss_is_the_sum_of_its_three_terms(double: bool) -> None:
    params = {**STILL, "double_softmax": double, "regression_weight": 0.7, "decorrelation_weight": 0.3}
    model = APN(APNParams.model_validate(params)).fit(DATA.train, DATA.seen_embeddings)
    weight = model._state()["weight"].astype(np.float64)
    attributes = DATA.train.features.astype(np.float64) @ weight
    scores = attributes @ UNIT.T
    squares = [
        (v - t) ** 2
        for row, label in zip(attributes, DATA.train.labels, strict=True)
        for v, t in zip(row, UNIT[label], strict=True)
    ]
    expected = cross_entropy(scores, double=double) + 0.7 * sum(squares) / len(squares)
    expected += 0.3 * math.sqrt(sum(w * w for w in weight.ravel()))
    assert model.history_[0]["loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(model.scores(DATA.train.features, UNIT), scores, rtol=1e-4, atol=1e-4)


def test_apn_regression_brings_the_attributes_nearer_to_the_classes_own() -> None:
    def error(weight: float) -> float:
        params = APNParams(epochs=40, learning_rate=0.01, regression_weight=weight, normalize="none")
        model = APN(params).fit(DATA.train, DATA.seen_embeddings)
        return float(np.mean((DATA.train.features @ model._state()["weight"] - UNIT[DATA.train.labels]) ** 2))

    assert error(100.0) < 0.5 * error(0.0)
