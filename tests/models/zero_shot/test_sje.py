"""SJE's losses against plain rewrites, and its training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.params import SJEParams
from models.zero_shot.sje import SJE, best_epoch, choose_epoch, compatibility_loss
from tests.models.zero_shot.made_up import made_up

SCORES = [[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]]
LABELS = [0, 2]


def plain_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def plain_loss(kind: str) -> float:
    losses = []
    for row, label in zip(SCORES, LABELS, strict=True):
        if kind == "hinge":
            losses.append(max(0.0, *(1 + s - row[label] for c, s in enumerate(row) if c != label)))
        else:
            values = plain_softmax(row) if kind == "double_softmax" else row
            losses.append(-math.log(plain_softmax(values)[label]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["ce", "double_softmax", "hinge"])
def test_loss_equals_plain_rewrite(kind: str) -> None:
    loss = compatibility_loss(torch.tensor(SCORES), torch.tensor(LABELS), kind)
    assert loss.item() == pytest.approx(plain_loss(kind), rel=1e-6)


def test_double_softmax_is_bounded_as_the_paper_code_makes_it() -> None:
    right, wrong = (
        compatibility_loss(torch.tensor([[s, 0.0, 0.0]]), torch.tensor([0]), "double_softmax") for s in (99, -99)
    )
    assert right.item() == pytest.approx(math.log(math.e + 2) - 1)
    assert wrong.item() < math.log(math.e + 2)


@pytest.mark.parametrize("loss", ["ce", "double_softmax", "hinge"])
def test_every_loss_learns_and_scores_are_scale_times_compatibility(loss: str) -> None:
    data = made_up()
    params = SJEParams(
        loss=loss, epochs=15, learning_rate=0.01, scale=2.0, folds=1, weight_penalty=1e-4, normalize="minmax"
    )
    model = SJE(params).fit(data.train, data.seen_embeddings)
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]
    scores = model.scores(data.unseen.features, data.unseen_embeddings)
    state = model._state()
    scaled = (data.unseen.features - data.train.features.min(0)) / np.ptp(data.train.features, axis=0)
    unit = data.unseen_embeddings / np.linalg.norm(data.unseen_embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(scores, 2 * (scaled @ state["weight"] + state["bias"]) @ unit.T, rtol=2e-4, atol=1e-4)


def test_weight_penalty_shrinks_the_weights() -> None:
    data = made_up()
    plain, shrunk = (
        SJE(SJEParams(epochs=15, learning_rate=0.01, weight_penalty=penalty)).fit(data.train, data.seen_embeddings)
        for penalty in (0.0, 1.0)
    )
    assert np.linalg.norm(shrunk._state()["weight"]) < 0.5 * np.linalg.norm(plain._state()["weight"])


def test_best_epoch_is_smoothed_and_takes_the_earliest_of_equals() -> None:
    assert best_epoch([0.1, 0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6]) == 7
    assert best_epoch([0.5] * 6) == 1


def test_epoch_over_folds_is_the_best_of_their_mean() -> None:
    rising = [0.1 * i for i in range(1, 9)]
    assert choose_epoch([rising]) == choose_epoch([rising, rising]) == best_epoch(rising) == 8
    falling = [0.9 - 0.02 * i for i in range(8)]
    assert choose_epoch([rising, falling]) == 8  # the rise is the steeper one
    assert choose_epoch([[0.5, 0.6, 0.7], [0.5] * 9]) <= 3  # the short one stays where it stopped


def test_chosen_epoch_is_the_one_trained_and_without_early_stopping_all_are() -> None:
    data = made_up()
    for early, expected in ((True, None), (False, 9)):
        params = SJEParams(epochs=9, learning_rate=0.01, early_stopping=early, folds=1)
        model = SJE(params).fit(data.train, data.seen_embeddings, validation_classes=("class 0", "class 1", "class 2"))
        t1 = [entry.get("validation_t1", 0.0) for entry in model.history_]
        assert model.best_epoch_ == (expected or best_epoch(t1))


def test_patience_ends_the_search_early() -> None:
    data = made_up()
    long, short = (
        SJE(SJEParams(epochs=60, learning_rate=0.05, patience=patience, folds=1)).fit(
            data.train, data.seen_embeddings, validation_classes=("class 0", "class 1", "class 2")
        )
        for patience in (60, 5)
    )
    assert len(long.history_) == 60
    assert len(short.history_) < 60
    assert short.best_epoch_ is not None
    assert short.best_epoch_ <= len(short.history_) - 5
