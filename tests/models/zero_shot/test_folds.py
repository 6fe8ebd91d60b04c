"""Folds of classes and the slice of held-out images."""

from __future__ import annotations

import numpy as np

from models.data.splits import fold_count
from models.zero_shot.folds import HELD_OUT_SHARE, Rows, class_folds, held_out_slice


def test_folds_start_with_the_named_classes_and_share_none() -> None:
    folds = class_folds(14, np.array([3, 8, 11]), 5, seed=1)
    assert folds[0].tolist() == [3, 8, 11]
    together = np.concatenate(folds)
    assert sorted(together.tolist()) == list(range(14))
    assert max(len(fold) for fold in folds) - min(len(fold) for fold in folds) <= 1
    assert all(
        np.array_equal(a, b) for a, b in zip(folds, class_folds(14, np.array([3, 8, 11]), 5, seed=1), strict=True)
    )


def test_one_fold_and_no_validation_classes() -> None:
    assert [fold.tolist() for fold in class_folds(14, np.array([2, 5]), 1, seed=0)] == [[2, 5]]
    assert [fold.tolist() for fold in class_folds(14, np.zeros(0, np.int64), 5, seed=0)] == [[]]
    assert len(class_folds(100, np.array([2, 5]), 5, seed=0)) == 5


def test_slice_takes_a_share_of_each_class_and_never_all_of_it() -> None:
    labels = np.repeat([0, 1, 2], [20, 2, 1])
    held, rest = held_out_slice(labels, seed=0)
    assert np.bincount(labels[held], minlength=3).tolist() == [round(20 * HELD_OUT_SHARE), 1, 0]
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(23))


def test_rows_of_some_classes_are_relabelled_in_their_order() -> None:
    rows = Rows(np.arange(8.0)[:, None], np.array([0, 1, 2, 3, 0, 1, 2, 3]), np.arange(4.0)[:, None])
    part = rows.of(np.array([3, 1]))
    assert part.features[:, 0].tolist() == [1, 3, 5, 7]
    assert part.labels.tolist() == [1, 0, 1, 0]
    assert part.embeddings[:, 0].tolist() == [3, 1]
    assert rows.of(np.array([3, 1]), np.array([0, 3, 5])).features[:, 0].tolist() == [3, 5]


def test_ten_classes_take_a_turn() -> None:
    for n_first, wanted in ((1, 10), (3, 4), (10, 1), (30, 1), (0, 1)):
        assert fold_count(0, 100, n_first) == wanted
    folds = class_folds(14, np.array([2, 5, 9]), 0, 0)
    assert sum(len(fold) for fold in folds) >= 10


def test_folds_are_as_many_as_counted_beforehand() -> None:
    for n_classes in (1, 2, 3, 5, 12, 40):
        for n_first in range(n_classes + 1):
            for asked in (0, 1, 2, 5, 100):
                folds = class_folds(n_classes, np.arange(n_first), asked, seed=0)
                assert len(folds) == fold_count(asked, n_classes, n_first)
