"""Scaling of image features, against plain rewrites."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.errors import UnknownName
from models.zero_shot.scaling import FeatureScaling

TRAIN = np.array([[0.0, 2, 5], [4, 2, 1]], np.float32)
LATER = np.array([[8.0, 3, 1], [0, 0, 0]], np.float32)


def test_minmax_uses_training_rows_only_and_does_not_clip() -> None:
    scaling = FeatureScaling("minmax").fit(TRAIN)
    assert scaling(TRAIN).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert scaling(LATER).tolist() == [[2, 1, 0], [0, -2, -0.25]]


def test_l2_gives_unit_rows_and_leaves_zero_rows() -> None:
    scaled = FeatureScaling("l2").fit(TRAIN)(LATER)
    assert np.linalg.norm(scaled, axis=1).tolist() == pytest.approx([1, 0])


def test_centered_is_unit_length_about_the_training_mean() -> None:
    scaled = FeatureScaling("centered").fit(TRAIN)(TRAIN)
    expected = np.array([[-2.0, 0, 2], [2, 0, -2]]) / np.sqrt(8)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_zscore_has_mean_zero_and_deviation_one_and_leaves_constants() -> None:
    train = np.array([[1.0, 0.1], [3, 0.1], [8, 0.1]], np.float32)
    scaling = FeatureScaling("zscore").fit(train)
    scaled = scaling(train)
    deviation = np.sqrt((9 + 1 + 16) / 3)
    np.testing.assert_allclose(scaled, [[-3 / deviation, 0], [-1 / deviation, 0], [4 / deviation, 0]], atol=1e-6)
    assert np.abs(scaling(train + np.float32(0.5))[:, 1]).max() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["centered", "zscore", "minmax", "l2", "none"])
def test_stored_scaling_is_the_same_and_results_are_float32(kind: Any) -> None:
    scaling = FeatureScaling(kind).fit(TRAIN.astype(np.float16))
    again = FeatureScaling.restore(kind, scaling.state())
    assert np.array_equal(scaling(LATER), again(LATER))
    assert scaling(LATER.astype(np.float16)).dtype == np.float32


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UnknownName, match="'minmax'"):
        FeatureScaling("minmix")  # type: ignore[arg-type]  # which is the point
