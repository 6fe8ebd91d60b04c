"""SJE's losses against plain rewrites, and its training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.classifier_params import SJEParams
from models.zero_shot.scaling import unit_rows
from models.zero_shot.sje import SJE, compatibility_loss
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


@pytest.mark.parametrize("loss", ["ce", "hinge"])
def test_training_is_the_plain_loop_bit_for_bit(loss: str) -> None:
    data = made_up()
    params = SJEParams(epochs=4, batch_size=32, loss=loss, scale=3.0, weight_penalty=1e-3, normalize="none")
    model = SJE(params, seed=5).fit(data.train, data.seen_embeddings)
    features, labels = torch.from_numpy(data.train.features), torch.from_numpy(data.train.labels)
    embeddings = torch.from_numpy(unit_rows(data.seen_embeddings))
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(24, 8, generator=generator) * 0.02).requires_grad_()
    bias = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=3e-3, betas=(0.5, 0.999), fused=True)
    for _ in range(4):
        for rows in torch.split(torch.randperm(len(features), generator=generator), 32):
            scores = 3.0 * ((features[rows] @ weight + bias) @ embeddings.T)
            step_loss = compatibility_loss(scores, labels[rows], loss) + 1e-3 * weight.norm()
            optimizer.zero_grad()
            step_loss.backward()
            optimizer.step()
    assert np.array_equal(model._state()["weight"], weight.detach().numpy())
    assert np.array_equal(model._state()["bias"], bias.detach().numpy())
