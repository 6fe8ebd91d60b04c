from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.embedding.heads import ClusterHeads, seeded_heads
from models.embedding.losses import class_loss, entropy_loss, neighbour_loss, semantic_loss
from tests import reference


def _assignments(seed: int, rows: int = 7, clusters: int = 5) -> Tensor:
    return torch.randn(rows, clusters, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=1)


def test_neighbour_loss_is_equation_2() -> None:
    own, other = _assignments(0), _assignments(1)
    assert neighbour_loss(own, other).item() == pytest.approx(
        reference.neighbour_loss(own.tolist(), other.tolist()), rel=1e-5
    )


def test_neighbour_loss_is_zero_for_equal_sure_assignments_and_finite_for_opposite_ones() -> None:
    sure = torch.eye(4)
    assert neighbour_loss(sure, sure).item() == pytest.approx(0, abs=1e-6)
    assert neighbour_loss(sure, sure.roll(1, 0)).item() == pytest.approx(-math.log(1e-8), rel=1e-4)


def test_entropy_loss_is_equation_3() -> None:
    assignments = _assignments(2)
    assert entropy_loss(assignments).item() == pytest.approx(reference.entropy_loss(assignments.tolist()), rel=1e-5)


def test_entropy_loss_is_least_when_clusters_are_used_evenly() -> None:
    assert entropy_loss(torch.eye(6)).item() == pytest.approx(-math.log(6), rel=1e-6)
    one_cluster = torch.eye(6)[[0] * 6].requires_grad_()
    loss = entropy_loss(one_cluster)
    loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert loss.item() == 0
    assert one_cluster.grad is not None
    assert one_cluster.grad.isfinite().all()


@pytest.mark.parametrize("double_softmax", [False, True])
def test_class_loss_is_equation_4(double_softmax: bool) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)) * 3
    labels = [0, 1, 2, 3, 0, 1]
    found = class_loss(logits, torch.tensor(labels), double_softmax=double_softmax).item()
    assert found == pytest.approx(
        reference.class_loss(logits.tolist(), labels, double_softmax=double_softmax), rel=1e-5
    )


@pytest.mark.parametrize("squared", [False, True])
def test_semantic_loss_is_equation_5(squared: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    predicted, knowledge = torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)
    found = semantic_loss(predicted, knowledge, squared=squared).item()
    assert found == pytest.approx(
        reference.semantic_loss(predicted.tolist(), knowledge.tolist(), squared=squared), rel=1e-5
    )


def test_semantic_loss_has_a_gradient_at_a_perfect_prediction() -> None:
    predicted = torch.ones(2, 3, requires_grad=True)
    semantic_loss(predicted, torch.ones(2, 3)).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


def _heads(seed: int = 0, **changes: Any) -> ClusterHeads:
    settings: dict[str, Any] = {
        "n_clusters": 5,
        "n_classes": 3,
        "knowledge_dim": 2,
        "head_input": "assignment",
        **changes,
    }
    return seeded_heads(torch.full((4,), 2.0), torch.full((4,), 3.0), seed=seed, **settings)


def test_heads_standardise_and_follow_equation_1() -> None:
    heads = _heads()
    features = torch.randn(6, 4)
    scores, assignments = heads(features)
    plain = (features - 2) / 3 @ heads.clusters.weight.T + heads.clusters.bias
    torch.testing.assert_close(scores, plain)
    expected = [reference.softmax(row) for row in plain.tolist()]
    torch.testing.assert_close(assignments, torch.tensor(expected))


def test_heads_read_assignments_or_scores() -> None:
    scores, assignments = _heads()(torch.randn(6, 4))
    by_assignment = _heads().read(scores, assignments)[0]
    torch.testing.assert_close(by_assignment, _heads().classes(5 * assignments))
    by_score = _heads(head_input="logits").read(scores, assignments)[0]
    torch.testing.assert_close(by_score, _heads().classes(scores))


def test_seed_decides_the_first_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = _heads(1), _heads(1), _heads(2)
    assert torch.equal(first.clusters.weight, again.clusters.weight)
    assert not torch.equal(first.clusters.weight, other.clusters.weight)
    assert torch.equal(before, torch.get_rng_state())
