from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from models.data.splits import ClassSplit, assign_holdout, choose_validation_classes, validation_classes
from models.errors import InvalidInput, TooFewSamples

CLASSES = [f"class {i}" for i in range(20)]


def hashes(n: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]


def test_training_classes_are_the_seen_ones_that_are_not_held_out() -> None:
    assert ClassSplit(("a", "b", "c"), ("d",), ("b",)).training_classes == ("a", "c")


@pytest.mark.parametrize(
    ("seen", "unseen", "validation", "message"),
    [
        (("a", "b"), ("b", "c"), (), "'b': listed both as seen and as unseen"),
        (("a", "b"), ("c",), ("c",), "'c': held out for validation"),
        (("a", "a"), ("c",), (), "'a': listed more than once in seen_classes"),
        (("a",), ("c", "c"), (), "'c': listed more than once in unseen_classes"),
        (("a",), ("c",), ("a",), "No seen class is left"),
        ((), ("c",), (), "No seen class is left"),
    ],
)
def test_contradictions_name_the_classes(
    seen: tuple[str, ...], unseen: tuple[str, ...], validation: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        ClassSplit(seen, unseen, validation)


def test_validation_choice_ignores_order_and_depends_on_the_seed() -> None:
    shuffled = random.Random(1).sample(CLASSES, len(CLASSES))
    assert choose_validation_classes(CLASSES, seed=3) == choose_validation_classes(shuffled, seed=3)
    assert len({choose_validation_classes(CLASSES, seed=seed) for seed in range(5)}) > 1
    assert len(choose_validation_classes(CLASSES)) == 4


@pytest.mark.parametrize(("n_classes", "fraction", "n_chosen"), [(2, 0.2, 1), (3, 0.9, 1), (4, 0.01, 1), (10, 0.95, 8)])
def test_validation_choice_takes_one_and_leaves_two(n_classes: int, fraction: float, n_chosen: int) -> None:
    assert len(choose_validation_classes(CLASSES[:n_classes], fraction=fraction)) == n_chosen


def test_validation_classes_are_asked_for_or_chosen_earlier_or_by_the_seed() -> None:
    seen, by_seed = CLASSES[:4], choose_validation_classes(CLASSES[:4], seed=2)
    assert validation_classes(seen, ["class 9"], [["class 1"]], seed=2) == ("class 9",)
    assert validation_classes(seen, [], [["class 1"]], seed=2) == ()
    assert validation_classes(seen, None, [["class 9"], ["class 3", "class 9", "class 1"]], seed=2) == (
        "class 3", "class 1",
    )  # fmt: skip
    assert validation_classes(seen, None, [CLASSES[:3], ()], seed=2) == by_seed  # one class would be left
    assert validation_classes(seen[:3], None, seed=2) == ()


def test_validation_choice_refuses_bad_input() -> None:
    with pytest.raises(TooFewSamples, match="1 seen class cannot be divided"):
        choose_validation_classes(["a"])
    with pytest.raises(InvalidInput, match="fraction"):
        choose_validation_classes(CLASSES, fraction=1.0)
    with pytest.raises(InvalidInput, match="more than once"):
        choose_validation_classes(["a", "b", "a"])


def test_an_image_keeps_its_place_when_others_come_and_go() -> None:
    all_of_them = assign_holdout(hashes(200), 0.2)
    some = assign_holdout(hashes(200)[50:90], 0.2)
    assert np.array_equal(all_of_them[50:90], some)
    assert 25 <= all_of_them.sum() <= 55


def test_holdout_grows_with_the_fraction() -> None:
    few, many = assign_holdout(hashes(200), 0.1), assign_holdout(hashes(200), 0.5)
    assert (many | few == many).all()
    assert many.sum() > few.sum()
    assert not assign_holdout(hashes(200), 0.0).any()


def test_small_classes_keep_all_images_and_no_class_loses_all() -> None:
    taken = [sha for sha in hashes(400) if sha < "4"]
    assert not assign_holdout(taken[:4], 0.25).any()
    assert assign_holdout(taken[:5], 0.25).sum() == 4
    assert assign_holdout([], 0.25).shape == (0,)


def test_holdout_refuses_bad_input() -> None:
    with pytest.raises(InvalidInput, match="hexadecimal"):
        assign_holdout(["not a hash"], 0.2)
    with pytest.raises(InvalidInput, match="fraction"):
        assign_holdout(hashes(3), 1.0)
