"""What all classic methods must stand, beyond the contract of every classifier: learning, and degenerate input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.base import FloatArray, LabelledFeatures
from models.evaluation import mean_per_class_accuracy
from models.zero_shot.base import ZeroShotModel
from models.zero_shot.conse import ConSE
from models.zero_shot.dap import DAP
from models.zero_shot.iap import IAP
from models.zero_shot.sae import SAE
from models.zero_shot.sse import SSE
from models.zero_shot.sync import SynC
from tests.models.zero_shot.made_up import MadeUp, made_up

pytestmark = pytest.mark.parametrize("method", [SAE, ConSE, SynC, DAP, IAP, SSE])
VALIDATION = ("class 2", "class 3", "class 4")


def fit(method: type[ZeroShotModel], data: MadeUp, **more: Any) -> ZeroShotModel:
    return method().fit(data.train, data.seen_embeddings, **more)


def t1(model: ZeroShotModel, data: MadeUp, embeddings: FloatArray | None = None) -> float:
    rows = data.unseen_embeddings if embeddings is None else embeddings
    predicted = model.scores(data.unseen.features, rows).argmax(axis=1)
    return mean_per_class_accuracy(predicted, data.unseen.labels, range(len(rows)))


def test_learns_far_above_chance_and_only_by_the_embeddings(method: type[ZeroShotModel]) -> None:
    right, wrong = [], []
    for seed in range(3):
        data = made_up(n_seen=30, images=8, seed=seed)
        model = fit(method, data, validation_classes=VALIDATION)
        right.append(t1(model, data))
        wrong.append(t1(model, data, -data.unseen_embeddings))
    assert np.mean(right) > 0.75  # chance: 0.25
    assert np.mean(wrong) < 0.1


def test_two_seen_classes_and_one_image_of_each(method: type[ZeroShotModel], tmp_path: Path) -> None:
    data = made_up(n_seen=2, images=1)
    model = fit(method, data)
    model.save(tmp_path)
    for found in (model, method.load(tmp_path)):
        scores = found.scores(data.unseen.features, np.concatenate([data.seen_embeddings, data.unseen_embeddings]))
        assert scores.shape == (4, 6)
        assert np.isfinite(scores).all()
    own = model.scores(data.train.features, data.seen_embeddings)
    assert own.argmax(axis=1).tolist() == [0, 1]


def test_more_attributes_than_images_and_some_of_them_constant(method: type[ZeroShotModel]) -> None:
    data = made_up(n_seen=12, images=2)
    rng = np.random.default_rng(0)
    wider = rng.normal(size=(8, 60))
    everything = np.concatenate([data.seen_embeddings, data.unseen_embeddings]) @ wider
    everything[:, :5] = 0.0
    everything[:, 5:8] = 1.0
    embeddings = everything.astype(np.float32)
    model = method().fit(data.train, embeddings[:12], validation_classes=VALIDATION)
    assert t1(model, data, embeddings[12:]) > 0.4


def test_features_that_say_nothing(method: type[ZeroShotModel]) -> None:
    data = made_up()
    train = LabelledFeatures(np.ones_like(data.train.features), data.train.labels, data.train.class_names)
    model = method().fit(train, data.seen_embeddings, validation_classes=VALIDATION)
    assert np.isfinite(model.scores(data.unseen.features, data.unseen_embeddings)).all()
    assert np.isfinite([model.gamma_, model.temperature_]).all()


def test_classes_with_the_same_embedding_get_the_same_score(method: type[ZeroShotModel]) -> None:
    data = made_up()
    twins = data.seen_embeddings.copy()
    twins[3] = twins[4]
    model = method().fit(data.train, twins, validation_classes=VALIDATION)
    scores = model.scores(data.train.features, twins)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores[:, 3], scores[:, 4], rtol=1e-3, atol=1e-4)
