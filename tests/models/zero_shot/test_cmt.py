"""CMT and CMT* against loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from models.base import FloatArray, LabelledFeatures
from models.classifier_params import CMTParams
from models.evaluation import ClassTable, evaluate
from models.zero_shot.cmt import CMT
from models.zero_shot.scaling import unit_rows
from tests.models.zero_shot.made_up import made_up


def mapped(model: CMT, features: FloatArray) -> FloatArray:
    """z(x) by hand, of features that the model takes as they are."""
    state = {name: array.astype(np.float64) for name, array in model._state().items()}
    hidden = np.tanh(features.astype(np.float64) @ state["0.weight"].T + state["0.bias"])
    return np.asarray(hidden @ state["2.weight"].T + state["2.bias"])


def test_scores_and_loss_equal_plain_rewrites() -> None:
    data = made_up()
    params = CMTParams(hidden_dim=6, epochs=1, learning_rate=1e-12, batch_size=1000, normalize="none")
    model = CMT(params).fit(data.train, data.seen_embeddings)
    z, unit = mapped(model, data.train.features), unit_rows(data.seen_embeddings).astype(np.float64)
    expected = [[-sum((a - b) ** 2 for a, b in zip(row, phi, strict=True)) for phi in unit] for row in z]
    np.testing.assert_allclose(model.scores(data.train.features, unit), expected, rtol=1e-4, atol=1e-5)
    own = [expected[i][label] for i, label in enumerate(data.train.labels)]
    assert model.history_[0]["loss"] == pytest.approx(-sum(own) / len(own), rel=1e-5)


def test_novelty_is_the_printed_rule() -> None:
    data = made_up()
    params = CMTParams(hidden_dim=20, epochs=40, learning_rate=0.01, normalize="none", novelty=True, novelty_share=0.3)
    model = CMT(params).fit(data.train, data.seen_embeddings)
    seen = unit_rows(data.seen_embeddings).astype(np.float64)
    z, labels = mapped(model, data.train.features), data.train.labels

    def density(row: FloatArray, s: int, variance: float) -> float:
        square = sum((a - b) ** 2 for a, b in zip(row, seen[s], strict=True))
        return -square / (2 * variance) - len(row) / 2 * math.log(2 * math.pi * variance)

    variances, thresholds = [], []
    for s in range(len(seen)):
        rows = z[labels == s]
        variances.append(sum(sum((row - seen[s]) ** 2) for row in rows) / (len(rows) * seen.shape[1]))
        thresholds.append(float(np.quantile([density(row, s, variances[s]) for row in rows], 0.3)))
    everything = np.concatenate([data.seen_embeddings, data.unseen_embeddings])
    images = np.concatenate([data.train.features, data.unseen.features])
    goes_to_seen = model.scores(images, everything).argmax(axis=1) < len(seen)
    is_seen = [
        any(density(row, s, variances[s]) >= thresholds[s] for s in range(len(seen))) for row in mapped(model, images)
    ]
    assert np.mean(goes_to_seen == np.array(is_seen)) > 0.99  # rounding may turn one on the threshold itself
    assert 0.1 < np.mean(is_seen) < 0.9


def test_novelty_leaves_the_order_among_unseen_classes_and_helps_in_the_generalised_setting(tmp_path: Path) -> None:
    data = made_up(noise=0.3, images=30)
    half = np.arange(len(data.train.labels)) % 2 == 0
    train, test_seen = (
        LabelledFeatures(data.train.features[rows], data.train.labels[rows], data.train.class_names)
        for rows in (half, ~half)
    )
    plain, star = (
        CMT(CMTParams(epochs=60, learning_rate=0.01, batch_size=32, novelty=novelty)).fit(train, data.seen_embeddings)
        for novelty in (False, True)
    )
    features = data.unseen.features
    assert np.array_equal(
        plain.scores(features, data.unseen_embeddings).argmax(axis=1),
        star.scores(features, data.unseen_embeddings).argmax(axis=1),
    )
    everything = np.concatenate([data.seen_embeddings, data.unseen_embeddings])
    classes = ClassTable((*train.class_names, *data.unseen.class_names), everything, np.arange(16) < 12)

    def h(model: CMT) -> float:
        found = evaluate(model, classes, test_unseen=data.unseen, test_seen=test_seen).gzsl
        assert found is not None
        return found.h

    assert h(star) > h(plain)
    star.save(tmp_path)
    assert np.array_equal(CMT.load(tmp_path).scores(features, everything), star.scores(features, everything))
