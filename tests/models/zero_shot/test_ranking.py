"""The ranking losses of ALE, DeViSE and LATEM against loops over images and classes, and LATEM's choice of a map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from models.classifier_params import ALEParams, DeViSEParams, LATEMParams
from models.zero_shot.ale import ALE, ranking_loss
from models.zero_shot.bilinear import violations
from models.zero_shot.devise import DeViSE
from models.zero_shot.latem import LATEM
from models.zero_shot.scaling import unit_rows
from tests.models.zero_shot.made_up import made_up

SCORES = [[1.0, 2.0, 0.4, -1.0], [0.0, 0.5, 3.0, 2.9], [5.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.0]]
LABELS = [0, 2, 0, 3]


def plain_hinges(row: Sequence[float], label: int, margin: float) -> list[float]:
    return [max(0.0, margin + score - row[label]) for c, score in enumerate(row) if c != label]


def plain_warp(margin: float) -> float:
    total = 0.0
    for row, label in zip(SCORES, LABELS, strict=True):
        hinges = plain_hinges(row, label, margin)
        rank = sum(hinge > 0 for hinge in hinges)
        if rank:
            total += sum(1 / i for i in range(1, rank + 1)) / rank * sum(hinges)
    return total / len(SCORES)


def plain_sum(scores: Sequence[Sequence[float]], labels: Sequence[int], margin: float) -> float:
    return sum(sum(plain_hinges(row, label, margin)) for row, label in zip(scores, labels, strict=True)) / len(labels)


@pytest.mark.parametrize("margin", [0.1, 1.0, 4.0])
def test_warp_equals_plain_rewrite(margin: float) -> None:
    loss = ranking_loss(torch.tensor(SCORES), torch.tensor(LABELS), margin)
    assert loss.item() == pytest.approx(plain_warp(margin), rel=1e-6)


def test_warp_is_zero_where_every_image_leads_and_weighs_a_wrong_first_place_most() -> None:
    leads = torch.tensor([[9.0, 0.0, 0.0]])
    assert ranking_loss(leads, torch.tensor([0]), 1.0).item() == 0
    one, two = torch.tensor([[0.0, 1.0, -9.0]]), torch.tensor([[0.0, 0.5, 0.5]])
    assert ranking_loss(one, torch.tensor([0]), 0.5).item() == pytest.approx(1.5)
    assert ranking_loss(two, torch.tensor([0]), 0.5).item() == pytest.approx(
        1.5 / 2 * 2
    )  # l_2 / 2 times two hinges of 1


@pytest.mark.parametrize("margin", [0.1, 1.0, 4.0])
def test_sum_of_hinges_equals_plain_rewrite(margin: float) -> None:
    loss = violations(torch.tensor(SCORES), torch.tensor(LABELS), margin).sum(dim=1).mean()
    assert loss.item() == pytest.approx(plain_sum(SCORES, LABELS, margin), rel=1e-6)


def test_first_epoch_reports_the_printed_loss_of_the_start() -> None:
    """The whole path, from rows to loss: a step so small that the weights do not move, one batch an epoch."""
    data = made_up()
    unit = unit_rows(data.seen_embeddings)
    still = {"learning_rate": 1e-12, "epochs": 1, "batch_size": 1000, "normalize": "none"}
    for model, margin in (
        (ALE(ALEParams.model_validate(still)), 1.0),
        (DeViSE(DeViSEParams.model_validate(still)), 0.1),
    ):
        model.fit(data.train, data.seen_embeddings)
        scores = (data.train.features @ model._state()["weight"] @ unit.T).tolist()
        if isinstance(model, DeViSE):
            expected = plain_sum(scores, data.train.labels.tolist(), margin)
        else:
            expected = ranking_loss(torch.tensor(scores), torch.from_numpy(data.train.labels), margin).item()
        assert model.history_[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_latem_takes_the_best_map_for_each_image_and_class() -> None:
    data = made_up()
    params = LATEMParams(n_maps=3, epochs=1, learning_rate=1e-12, batch_size=1000, normalize="none", margin=0.5)
    model = LATEM(params).fit(data.train, data.seen_embeddings)
    maps = model._state()["weight"]
    assert maps.shape == (3, 24, 8)
    unit = unit_rows(data.seen_embeddings)
    scores = [
        [max(float(x @ maps[k] @ phi) for k in range(3)) for phi in unit.astype(np.float64)]
        for x in data.train.features.astype(np.float64)
    ]
    np.testing.assert_allclose(model.scores(data.train.features, unit), scores, rtol=1e-4, atol=1e-5)
    expected = plain_sum(scores, data.train.labels.tolist(), 0.5)
    assert model.history_[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_latem_gradient_reaches_the_chosen_map_alone() -> None:
    model = LATEM(LATEMParams(n_maps=2))
    model.network = model._make_network(2, 2, torch.Generator().manual_seed(0))  # type: ignore[assignment]  # its own kind
    with torch.no_grad():
        model.network.weight.copy_(torch.stack([torch.eye(2), -torch.eye(2)]))
    # Class 0 is best under map 0, class 1 under map 1; the image of class 0 violates by margin + 1 - 1.
    features, embeddings = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    model._loss(features, torch.tensor([0]), embeddings).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    gradient = model.network.weight.grad
    assert gradient is not None
    assert gradient[0].tolist() == [[-1, 0], [0, 0]]  # W_0 gains x phi(y_n)^T
    assert gradient[1].tolist() == [[-1, 0], [0, 0]]  # W_1 loses x phi(y)^T, with phi(y) = (-1, 0)


def test_one_latent_map_is_the_bilinear_model() -> None:
    data = made_up()
    shared = {"epochs": 5, "learning_rate": 0.01, "margin": 0.7}
    one = LATEM(LATEMParams.model_validate({**shared, "n_maps": 1})).fit(data.train, data.seen_embeddings)
    bilinear = DeViSE(DeViSEParams.model_validate(shared)).fit(data.train, data.seen_embeddings)
    np.testing.assert_allclose(one._state()["weight"][0], bilinear._state()["weight"], rtol=1e-3, atol=1e-4)
