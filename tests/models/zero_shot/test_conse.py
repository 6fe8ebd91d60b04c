"""CONSE against a plain rewrite."""

from __future__ import annotations

import numpy as np
import pytest

from models.classic_params import ConSEParams
from models.zero_shot.conse import _TOPS, ConSE, combine
from tests.models.zero_shot.made_up import made_up
from tests.reference import softmax

VALIDATION = ("class 2", "class 3", "class 4")


@pytest.mark.parametrize("top", [1, 3, 12, 99])
def test_scores_equal_the_printed_formula(top: int) -> None:
    data = made_up()
    model = ConSE(ConSEParams(top=top, lamda=0.01, normalize="none")).fit(data.train, data.seen_embeddings)
    state = model._state()
    scores = model.scores(data.unseen.features, data.unseen_embeddings)
    seen = data.seen_embeddings / np.linalg.norm(data.seen_embeddings, axis=1, keepdims=True)
    for i, x in enumerate(data.unseen.features[:6]):
        probabilities = softmax((x @ state["weight"] + state["bias"]).tolist())
        likeliest = sorted(range(12), key=lambda c: -probabilities[c])[:top]
        total = sum(probabilities[c] for c in likeliest)
        combined = sum(probabilities[c] * seen[c] for c in likeliest) / total
        for c, phi in enumerate(data.unseen_embeddings):
            cosine = combined @ phi / np.linalg.norm(combined) / np.linalg.norm(phi)
            assert scores[i, c] == pytest.approx(cosine, abs=1e-5)


def test_top_one_is_the_likeliest_class_and_equals_go_to_the_first() -> None:
    seen = np.eye(3)
    assert combine(np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]), seen, 1).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_what_is_given_is_kept_and_what_is_missing_chosen() -> None:
    data = made_up()
    top = ConSE(ConSEParams(lamda=0.02)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert top.validation_["setting"]["lamda"] == 0.02
    assert [entry["top"] for entry in top.history_] == list(_TOPS)
    both = ConSE(ConSEParams(lamda=0.02, top=4))
    both.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert (both.validation_["setting"]["lamda"], both.validation_["setting"]["top"]) == (0.02, 4)
