"""SAE against a general Sylvester solver and plain cosines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_sylvester

from models.base import FloatArray
from models.classic_params import SAEParams
from models.zero_shot.sae import _GRID, SAE
from tests.models.zero_shot.made_up import MadeUp, made_up

VALIDATION = ("class 2", "class 3", "class 4")


def unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def matrices(data: MadeUp) -> tuple[FloatArray, FloatArray]:
    """X (feature_dim, n_images), M (embedding_dim, n_images)."""
    return data.train.features.T.astype(np.float64), unit(data.seen_embeddings.astype(np.float64))[data.train.labels].T


@pytest.mark.parametrize(("n_seen", "images"), [(12, 15), (12, 3)])
def test_weight_solves_the_sylvester_equation(n_seen: int, images: int) -> None:
    data = made_up(n_seen=n_seen, images=images)
    x, m = matrices(data)
    model = SAE(SAEParams(lamda=0.7, normalize="none")).fit(data.train, data.seen_embeddings)
    expected = solve_sylvester(m @ m.T, 0.7 * x @ x.T, 1.7 * m @ x.T)
    np.testing.assert_allclose(model._state()["weight"], expected, rtol=1e-3, atol=1e-5)


def test_weight_is_the_minimum_of_the_objective_also_where_classes_span_less() -> None:
    data = made_up(n_seen=5, images=3)  # 5 classes in 8 dimensions: M M^T is singular
    x, m = matrices(data)
    weight = SAE(SAEParams(lamda=0.7, normalize="none")).fit(data.train, data.seen_embeddings)._state()["weight"]

    def objective(w: FloatArray) -> float:
        return float(np.sum((x - w.T @ m) ** 2) + 0.7 * np.sum((w @ x - m) ** 2))

    rng = np.random.default_rng(0)
    lowest = objective(weight)
    assert all(objective(weight + 1e-3 * rng.normal(size=weight.shape)) > lowest for _ in range(20))


@pytest.mark.parametrize("direction", ["feature_to_semantic", "semantic_to_feature"])
def test_scores_are_cosines_in_either_space(direction: str) -> None:
    data = made_up(n_seen=6)
    params = SAEParams(lamda=0.7, direction=direction, normalize="none")
    model = SAE(params).fit(data.train, data.seen_embeddings)
    weight, scores = model._state()["weight"], model.scores(data.unseen.features, data.unseen_embeddings)
    for i, x in enumerate(data.unseen.features[:5]):
        for c, phi in enumerate(data.unseen_embeddings):
            a, b = (x, weight.T @ phi) if direction == "semantic_to_feature" else (weight @ x, phi)
            assert scores[i, c] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_every_setting_tried_scores_as_a_model_with_that_setting() -> None:
    data = made_up(noise=2.0)
    model = SAE(SAEParams(folds=1)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert len(model.history_) == 2 * len(_GRID)
    for entry in (model.history_[3], model.history_[12]):
        params = SAEParams(
            lamda=entry["relative_lambda"],  # unit rows on both sides: relative is absolute
            direction="semantic_to_feature" if entry["semantic_to_feature"] else "feature_to_semantic",
            folds=1,
        )
        given = SAE(params).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
        assert given.validation_["t1"] == pytest.approx(entry["validation_t1"], abs=0.03)


def test_what_is_given_is_kept_and_what_is_missing_chosen() -> None:
    data = made_up()
    given = SAE(SAEParams(lamda=2.0, direction="feature_to_semantic"))
    given.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert (given.validation_["setting"]["lamda"], given.validation_["setting"]["semantic_to_feature"]) == (2.0, 0)
    direction = SAE(SAEParams(lamda=2.0)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert direction.validation_["setting"]["lamda"] == 2.0
    assert {entry["semantic_to_feature"] for entry in direction.history_} == {0, 1}
    default = SAE().fit(data.train, data.seen_embeddings)
    assert default.validation_["setting"]["semantic_to_feature"] == 1
