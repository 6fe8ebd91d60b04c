"""SSE against plain rewrites."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from models.base import FloatArray
from models.classic_params import SSEParams
from models.zero_shot.sse import SSE, margin_loss, project_to_simplex, simplex_codes
from tests.models.zero_shot.made_up import made_up

VALIDATION = ("class 2", "class 3", "class 4")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("gamma", [0.01, 0.1, 10.0])
def test_codes_are_the_minimum_on_the_simplex(gamma: float) -> None:
    seen = RNG.normal(size=(6, 4))
    embeddings = RNG.normal(size=(3, 4))
    codes = simplex_codes(embeddings, seen, gamma)
    assert (codes >= 0).all()
    np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-9)
    for phi, code in zip(embeddings, codes, strict=True):

        def objective(a: FloatArray, phi: FloatArray = phi) -> float:
            return float(gamma / 2 * a @ a + np.sum((phi - a @ seen) ** 2) / 2)

        constraint = {"type": "eq", "fun": lambda a: a.sum() - 1}
        options = {"ftol": 1e-12, "maxiter": 500}
        best = minimize(objective, np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=constraint, options=options)
        assert objective(code) <= best.fun + 1e-7
        np.testing.assert_allclose(code, best.x, atol=1e-3)


def test_a_class_has_its_code_whatever_other_classes_are_asked_for() -> None:
    seen, embeddings = RNG.normal(size=(6, 4)), RNG.normal(size=(5, 4))
    np.testing.assert_allclose(
        simplex_codes(embeddings, seen, 0.01)[3:4], simplex_codes(embeddings[3:4], seen, 0.01), atol=1e-6
    )


def test_projection_is_the_nearest_point_of_the_simplex() -> None:
    points = RNG.normal(size=(20, 5))
    nearest = project_to_simplex(points)
    assert (nearest >= 0).all()
    np.testing.assert_allclose(nearest.sum(axis=1), 1)
    others = RNG.dirichlet(np.full(5, 0.3), size=500)
    for point, found in zip(points, nearest, strict=True):
        assert np.sum((point - found) ** 2) <= np.min(np.sum((point - others) ** 2, axis=1)) + 1e-9
    np.testing.assert_allclose(project_to_simplex(others), others, atol=1e-12)


def test_margin_loss_equals_plain_rewrite_and_its_slope_is_its_derivative() -> None:
    pi, labels = RNG.normal(size=(2, 5, 3)), np.array([0, 1, 2, 1, 1])
    codes = RNG.dirichlet(np.ones(3), size=(2, 3))
    values, slopes = margin_loss(pi, codes, labels)
    for k in range(2):
        total = 0.0
        for i in range(5):
            scores = [sum(pi[k, i, s] * codes[k, y, s] for s in range(3)) for y in range(3)]
            total += sum(max(0.0, 1 + scores[y] - scores[labels[i]]) for y in range(3) if y != labels[i])
        assert values[k] == pytest.approx(total / 5 / 2)
        for i, s in [(0, 0), (3, 2), (4, 1)]:
            step = np.zeros_like(pi)
            step[k, i, s] = 1e-6
            numeric = margin_loss(pi + step, codes, labels)[0][k] - margin_loss(pi - step, codes, labels)[0][k]
            assert slopes[k, i, s] == pytest.approx(numeric / 2e-6, abs=1e-6)


def test_scores_equal_the_printed_formula() -> None:
    data = made_up(n_seen=5)
    params = SSEParams(gamma=0.1, lamda=1.0, normalize="none", steps=50)
    model = SSE(params).fit(data.train, data.seen_embeddings)
    scores, weight = model.scores(data.unseen.features, data.unseen_embeddings), model._state()["weight"]
    means = [data.train.features[data.train.labels == s].mean(axis=0) for s in range(5)]
    seen, new = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (data.seen_embeddings, data.unseen_embeddings)
    )
    codes = simplex_codes(new, seen, 0.1)
    for i, x in enumerate(data.unseen.features[:5]):
        of_class = []
        for v in means:
            psi = [min(a, b) for a, b in zip(x, v, strict=True)]
            of_class.append(sum(w * p for w, p in zip(weight, psi, strict=True)))
        for c in range(4):
            expected = sum(p * z for p, z in zip(of_class, codes[c], strict=True))
            assert scores[i, c] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_rectified_similarity_is_the_same_model_with_the_opposite_weights() -> None:
    features, models, weight = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 6)), RNG.normal(size=6)
    codes = RNG.dirichlet(np.ones(3), size=5)
    above = features[:, None, :] - models[None, :, :]
    rectified = np.maximum(above, 0) @ -weight @ codes.T
    intersection = np.minimum(features[:, None, :], models[None, :, :]) @ weight @ codes.T
    np.testing.assert_allclose(intersection - rectified, np.repeat((features @ weight)[:, None], 5, axis=1))


def test_steps_lower_the_objective() -> None:
    data = made_up()
    model = SSE(SSEParams(gamma=0.1, lamda=0.05)).fit(data.train, data.seen_embeddings)
    features = model._scaling(data.train.features)
    codes = simplex_codes(model._seen, model._seen, 0.1)

    def objective(weight: FloatArray) -> float:
        pi = model._similarities(features, weight[:, None])[:, :, 0]
        return float(margin_loss(pi[None], codes[None], data.train.labels)[0][0] + 0.05 / 2 * weight @ weight)

    found = objective(model._weight)
    assert found < 0.9 * objective(np.zeros(24))
    assert all(objective(model._weight + 0.3 * RNG.normal(size=24)) > found for _ in range(20))


def test_what_is_given_is_kept_and_what_is_missing_chosen() -> None:
    data = made_up()
    gamma = SSE(SSEParams(lamda=0.5, steps=30)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert gamma.validation_["setting"]["lamda"] == 0.5
    assert len({entry["gamma"] for entry in gamma.history_}) == len(gamma.history_) == 3
    both = SSE(SSEParams(lamda=0.5, gamma=0.3, steps=30))
    both.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert (both.validation_["setting"]["lamda"], both.validation_["setting"]["gamma"]) == (0.5, 0.3)
