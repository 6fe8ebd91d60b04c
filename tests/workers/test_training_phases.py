"""What is announced of a training before it begins."""

from __future__ import annotations

import pytest

from service.core.tables import Classifier, Dataset, Knowledge
from workers.training import TRAINING_SHARE, phases
from workers.training_inputs import Inputs

SEEN = tuple(f"kind {i}" for i in range(9))


def inputs(kind: str, validation: tuple[str, ...], folds: int = 1, **request: object) -> Inputs:
    row = Classifier(request=request, params={"folds": folds})
    return Inputs(row, Dataset(kind=kind), None, Knowledge(), SEEN, (), validation, {})


def test_choosing_and_calibrating_are_announced_where_they_happen() -> None:
    with_images = dict(phases(inputs("images", SEEN[:3], best_on_test=True)))
    assert list(with_images) == [
        "backbone", "image_features", "choosing", "calibrating", "training", "evaluation", "watching"
    ]  # fmt: skip
    assert list(dict(phases(inputs("features", ())))) == ["training", "evaluation"]


def test_each_group_of_validation_classes_takes_its_time() -> None:
    shares = dict(phases(inputs("features", SEEN[:3], folds=3, search={})))
    assert shares["choosing"] == pytest.approx(3 * TRAINING_SHARE)
