from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.embedding.epoch_choice import ValidationScorer, best_epoch, unit_knowledge
from models.embedding.rows import CachedRows, feature_statistics
from models.errors import InvalidInput
from tests.models.embedding.tables import part_table


def test_the_best_epoch_is_a_smooth_best_not_a_lucky_one() -> None:
    scores = [0.1, 0.2, 0.3, 0.9, 0.3, 0.2, 0.5, 0.6, 0.7, 0.6, 0.6, 0.6]
    assert best_epoch(range(1, 13), scores) >= 8


def test_of_epochs_that_score_alike_the_last_is_taken_and_a_clear_fall_ends_it() -> None:
    assert best_epoch([5, 10, 15], [0.5, 0.5, 0.5]) == 15
    assert best_epoch(range(1, 12), [0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3, 0.2, 0.1, 0.0]) in (5, 6)


def test_knowledge_becomes_centred_unit_rows() -> None:
    knowledge = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 8.0]])
    found = unit_knowledge(1000 * knowledge)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, unit_knowledge(knowledge), atol=1e-6)


def test_true_parts_score_above_shuffled_ones() -> None:
    _, knowledge, images = part_table(n_classes=20, images=10)
    train, held_out = np.arange(15), np.arange(15, 20)
    scorer = ValidationScorer(images.features, images.labels, knowledge, train, held_out)
    right = scorer(knowledge[:15])
    wrong = scorer(knowledge[:15][np.random.default_rng(0).permutation(15)])
    assert right[0] > 0.4
    assert right[0] > wrong[0]
    assert right[1] > wrong[1]


def test_the_order_of_images_does_not_matter() -> None:
    _, knowledge, images = part_table(n_classes=10, images=6)
    order = np.random.default_rng(1).permutation(len(images.labels))
    train, held_out = np.arange(7), np.arange(7, 10)
    plain = ValidationScorer(images.features, images.labels, knowledge, train, held_out)(knowledge[:7])
    other = ValidationScorer(images.features[order], images.labels[order], knowledge, train, held_out)(knowledge[:7])
    assert plain == pytest.approx(other)


def test_a_class_without_images_is_refused() -> None:
    _, knowledge, images = part_table(n_classes=6, images=3)
    with pytest.raises(InvalidInput, match="Class number 5"):
        ValidationScorer(images.features[:15], images.labels[:15], knowledge, np.arange(4), np.array([4, 5]))


def test_feature_statistics_are_those_of_numpy_far_from_zero() -> None:
    features = (1000 + np.random.default_rng(0).standard_normal((20_000, 3))).astype(np.float32)
    mean, spread = feature_statistics(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(spread, features.astype(np.float64).std(axis=0), rtol=1e-4)


@pytest.mark.parametrize("keep", [None, np.arange(5, 50, 3)])
def test_rows_are_read_from_the_table_itself(tmp_path: Path, keep: Any) -> None:
    import torch

    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float16)
    np.save(tmp_path / "features.npy", features)
    index, chosen = torch.tensor([7, 0, 7, 14, 3]), features if keep is None else features[keep]
    for table in (features, np.load(tmp_path / "features.npy", mmap_mode="r")):
        rows = CachedRows(table, keep)
        assert len(rows) == len(chosen)
        np.testing.assert_array_equal(rows.rows(index).numpy(), chosen[index.numpy()].astype(np.float32))
        np.testing.assert_array_equal(rows.rows(slice(3, 9)).numpy(), chosen[3:9].astype(np.float32))
        rows.rows(slice(0, 9)).fill_(-1)  # a copy, so that nobody writes into the table
    features[5:20] = 2  # what changes in the table is seen: nothing was copied
    assert bool((CachedRows(features).rows(torch.arange(5, 20)) == 2).all())
