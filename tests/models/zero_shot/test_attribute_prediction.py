"""DAP and IAP against plain rewrites."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.classic_params import DAPParams, IAPParams
from models.zero_shot.base import ZeroShotModel
from models.zero_shot.dap import DAP
from models.zero_shot.iap import IAP
from tests.models.zero_shot.made_up import made_up
from tests.reference import softmax

VALIDATION = ("class 2", "class 3", "class 4")


def plain_scores(model: ZeroShotModel, *, indirect: bool, images: int) -> list[list[float]]:
    """log prod_m p(a_m = a_m^c | x) / p(a_m = a_m^c), attribute by attribute."""
    data, state = made_up(), model._state()
    unit = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (data.seen_embeddings, data.unseen_embeddings)
    ]
    mean = unit[0].mean(axis=0)
    seen_has, new_has = unit[0] > mean, unit[1] > mean
    found = []
    for x in data.unseen.features[:images]:
        logits = (x @ state["weight"] + state["bias"]).tolist()
        of_class = softmax(logits) if indirect else []
        row = []
        for c in range(4):
            total = 0.0
            for m in range(8):
                if indirect:
                    yes = sum(p for p, has in zip(of_class, seen_has[:, m], strict=True) if has)
                    no = sum(p for p, has in zip(of_class, seen_has[:, m], strict=True) if not has)
                else:
                    yes, no = 1 / (1 + math.exp(-logits[m])), 1 / (1 + math.exp(logits[m]))
                prior = float(seen_has[:, m].mean())
                total += math.log(yes / prior) if new_has[c, m] else math.log(no / (1 - prior))
            row.append(total)
        found.append(row)
    return found


def test_direct_prediction_equals_the_printed_formula() -> None:
    data = made_up()
    model = DAP(DAPParams(lamda=0.05, normalize="none")).fit(data.train, data.seen_embeddings)
    scores = model.scores(data.unseen.features[:8], data.unseen_embeddings)
    np.testing.assert_allclose(scores, plain_scores(model, indirect=False, images=8), rtol=1e-4, atol=1e-4)


def test_indirect_prediction_equals_the_printed_formula() -> None:
    data = made_up()
    model = IAP(IAPParams(lamda=0.5, normalize="none")).fit(data.train, data.seen_embeddings)
    scores = model.scores(data.unseen.features[:8], data.unseen_embeddings)
    np.testing.assert_allclose(scores, plain_scores(model, indirect=True, images=8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [DAP, IAP])
def test_constant_attributes_are_left_out_and_counted(method: type[ZeroShotModel]) -> None:
    data = made_up()
    constant = np.full((12, 1), 0.5, np.float32)
    seen = np.hstack([np.sign(data.seen_embeddings), constant > 0, constant > 1]).astype(np.float32).clip(0, 1)
    new = np.hstack([np.sign(data.unseen_embeddings), np.zeros((4, 2))]).astype(np.float32).clip(0, 1)
    model = method().fit(data.train, seen, validation_classes=VALIDATION)
    assert (model.validation_["setting"]["attributes"], model.validation_["setting"]["constant_attributes"]) == (8, 2)
    other = new.copy()
    other[:, 8:] = 1  # what no seen class differs in says nothing of a new one
    np.testing.assert_allclose(
        model.scores(data.unseen.features, new), model.scores(data.unseen.features, other), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", [DAP, IAP])
def test_a_certain_classifier_still_ranks(method: type[ZeroShotModel]) -> None:
    data = made_up(noise=0.01)
    model = method(method.params_class.model_validate({"lamda": 1e-9, "normalize": "none"}))
    scores = model.fit(data.train, data.seen_embeddings).scores(100 * data.unseen.features, data.unseen_embeddings)
    assert np.isfinite(scores).all()
