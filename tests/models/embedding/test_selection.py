"""Choice of the class relation on held-out seen classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from models.base import LabelledFeatures, Progress
from models.embedding.relations import unit_rows
from models.embedding.selection import (
    EMBEDDING_RIDGES,
    FEATURE_RIDGES,
    Candidate,
    _choose,
    _Evidence,
    default_candidates,
    draw_folds,
    select_relation,
)
from models.errors import Cancelled, InvalidInput, ShapeMismatch, TooFewSamples
from models.params import RelationParams

Matrix = NDArray[np.float64]

SMO = Candidate("smo", RelationParams(alpha=0, ridge=0.1, form="centred"))
ONE_NEIGHBOUR = Candidate("wavg", RelationParams(n_neighbors=1, form="centred"))
SAME_FOR_ALL = Candidate("wavg", RelationParams(n_neighbors=20, eta=0, form="plain"))


def problem(n_classes: int = 12, n_images: int = 15, seed: int = 0) -> tuple[Matrix, Matrix, LabelledFeatures]:
    """Classes are mixtures of 5 properties; embeddings, knowledge and images all show them, images with noise."""
    rng = np.random.default_rng(seed)
    properties = rng.dirichlet(np.full(5, 0.5), size=n_classes)
    knowledge = properties @ rng.normal(size=(5, 20)) + 0.05 * rng.normal(size=(n_classes, 20))
    labels = np.repeat(np.arange(n_classes), n_images)
    features = (properties @ rng.normal(size=(5, 24)))[labels] + 0.3 * rng.normal(size=(len(labels), 24))
    names = tuple(f"c{i}" for i in range(n_classes))
    return properties, knowledge, LabelledFeatures(features.astype(np.float32), labels, names)


def plain_accuracy(
    images: LabelledFeatures, kept: NDArray[np.int64], held_out: NDArray[np.int64], known: Matrix, asked: Matrix
) -> Matrix:
    """ESZSL written down row by row: class-balanced, features centred on the mean of the kept classes."""
    units = unit_rows(images.features)
    centre = np.mean([units[images.labels == c].mean(axis=0) for c in kept], axis=0)
    square, targets = np.zeros((24, 24)), np.zeros((24, len(kept)))
    for column, c in enumerate(kept):
        rows = units[images.labels == c] - centre
        for row in rows:
            square += np.outer(row, row) / len(rows)
            targets[:, column] += row / len(rows)
    hits = np.zeros(len(held_out))
    for gamma in FEATURE_RIDGES:
        for lamda in EMBEDDING_RIDGES:
            left = np.linalg.inv(square + gamma * np.trace(square) / 24 * np.eye(24)) @ targets @ known
            scale = np.trace(known @ known.T) / len(known)
            weight = left @ np.linalg.inv(known.T @ known + lamda * scale * np.eye(known.shape[1]))
            for position, c in enumerate(held_out):
                scores = (units[images.labels == c] - centre) @ weight @ asked.T
                hits[position] += np.mean(scores.argmax(axis=1) == position)
    return hits / 4


@pytest.mark.parametrize("dim", [3, 30])  # either side of the number of kept classes
def test_the_scorer_agrees_with_a_plain_rewrite(dim: int) -> None:
    _, _, images = problem()
    rng = np.random.default_rng(1)
    kept, held_out = np.arange(9), np.array([9, 10, 11])
    known, asked = unit_rows(rng.normal(size=(9, dim))), unit_rows(rng.normal(size=(3, dim)))
    found = _Evidence(images, 12).scorer(kept, held_out)(known, asked)
    np.testing.assert_allclose(found, plain_accuracy(images, kept, held_out, known, asked), atol=1e-12)


def test_images_of_held_out_classes_do_not_train_the_scorer() -> None:
    _, _, images = problem()
    rng = np.random.default_rng(2)
    known, asked = unit_rows(rng.normal(size=(9, 6))), unit_rows(rng.normal(size=(3, 6)))
    kept, held_out = np.arange(9), np.array([9, 10, 11])
    evidence = _Evidence(images, 12)
    square = evidence.square - evidence._moment(np.concatenate(evidence.rows[9:]), np.full(45, 15))
    alone = _Evidence(LabelledFeatures(images.features[:135], images.labels[:135], images.class_names[:9]), 9)
    np.testing.assert_allclose(square, alone.square, atol=1e-5)
    assert evidence.scorer(kept, held_out)(known, asked).shape == (3,)


def test_the_better_relation_is_chosen() -> None:
    choice = select_relation(*problem(), candidates=[SAME_FOR_ALL, SMO])
    assert (choice.relation, choice.params) == (SMO.relation, SMO.params)
    assert choice.table[1].t1 > choice.table[0].t1 + 0.1
    assert "best of 2 candidates" in choice.reason


def test_of_equal_candidates_the_preferred_one_is_chosen() -> None:
    twin = replace(SMO, params=SMO.params.model_copy(update={"n_neighbors": 9}))  # SMO ignores n_neighbors
    assert select_relation(*problem(), candidates=[twin, SMO]).params == twin.params
    assert select_relation(*problem(), candidates=[SMO, twin]).params == SMO.params


def test_what_chance_explains_leaves_the_preferred_one_and_the_reason_says_so() -> None:
    per_class = np.array([[0.5, 0.6, 0.4, 0.5], [0.9, 0.4, 0.5, 0.5]])  # better on average by luck in one class
    choice = _choose([SMO, ONE_NEIGHBOUR], per_class, 8)
    assert choice.params == SMO.params
    assert "no more than chance over classes explains" in choice.reason
    surely = _choose([SMO, ONE_NEIGHBOUR], np.array([[0.5, 0.6, 0.4, 0.5], [0.9, 0.9, 0.8, 0.9]]), 8)
    assert surely.params == ONE_NEIGHBOUR.params
    assert surely.table[0].deficit == pytest.approx(0.375)


def test_the_same_seed_gives_the_same_choice_and_the_json_is_sorted() -> None:
    data = problem(n_classes=6, n_images=6)
    one, two = (select_relation(*data, seed=3, candidates=[SMO, ONE_NEIGHBOUR]).to_json() for _ in range(2))
    assert json.loads(json.dumps(one)) == two
    scores = [row["t1"] for row in one["candidates"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("n_classes", [4, 5, 7, 14, 80, 148])
def test_folds_hold_each_class_out_equally_often_and_leave_enough(n_classes: int) -> None:
    folds = draw_folds(n_classes, seed=1)
    times = np.bincount(np.concatenate(folds), minlength=n_classes)
    assert len(set(times.tolist())) == 1
    assert times[0] >= 2
    assert min(len(fold) for fold in folds) >= 2
    assert max(len(fold) for fold in folds) <= n_classes - 2


def test_many_classes_are_averaged_first_and_few_are_optimised_first() -> None:
    few, many = default_candidates(49), default_candidates(50)
    assert (few[0].label, many[0].label) == ("smo alpha=0 ridge=1 fused", "wavg k=all eta=10 fused")
    assert {option.label for option in few} == {option.label for option in many}


def test_all_default_candidates_run_and_differ() -> None:
    options = default_candidates(14)
    assert len({option.label for option in options}) == len(options)
    choice = select_relation(*problem(n_classes=5, n_images=4))
    assert len(choice.table) == len(options)


def test_what_guessing_reaches_is_told_beside_what_was_reached() -> None:
    choice = select_relation(*problem(n_classes=5), candidates=[SAME_FOR_ALL])
    sizes = [len(fold) for fold in draw_folds(5)]
    assert choice.chance == pytest.approx(len(sizes) / sum(sizes))
    assert choice.t1 == choice.table[0].t1


def test_too_few_classes_keep_the_defaults_and_say_why() -> None:
    defaults = RelationParams(alpha=-1, ridge=0.3)
    choice = select_relation(*problem(n_classes=3), defaults=defaults)
    assert (choice.relation, choice.params, choice.n_folds) == ("smo", defaults, 0)
    assert "3 seen classes are too few" in choice.reason
    assert choice.to_json()["candidates"] == []


def test_progress_is_reported_and_may_cancel() -> None:
    seen: list[Progress] = []
    select_relation(*problem(n_classes=4), candidates=[SMO], on_progress=seen.append)
    assert [report.completed for report in seen] == list(range(seen[0].total or 0))

    def stop(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        select_relation(*problem(n_classes=4), candidates=[SMO], on_progress=stop)


def test_bad_input() -> None:
    embeddings, knowledge, images = problem(n_classes=5)
    with pytest.raises(ShapeMismatch, match="knowledge has 4 rows for 5 seen classes"):
        select_relation(embeddings, knowledge[:4], images)
    with pytest.raises(InvalidInput, match="all zeros"):
        select_relation(embeddings, knowledge * 0, images)
    few = images.labels != 4
    without = replace(images, features=images.features[few], labels=images.labels[few])
    with pytest.raises(TooFewSamples, match="'c4' has no image"):
        select_relation(embeddings, knowledge, without)
    with pytest.raises(InvalidInput, match="NaN"):
        select_relation(embeddings, knowledge, replace(images, features=np.full_like(images.features, np.nan)))
    with pytest.raises(InvalidInput, match="past the 5 class names"):
        select_relation(embeddings, knowledge, replace(images, labels=images.labels + 1))
    with pytest.raises(ShapeMismatch, match="labels"):
        select_relation(embeddings, knowledge, replace(images, labels=images.labels[1:]))
