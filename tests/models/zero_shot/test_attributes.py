"""Embeddings as yes-or-no attributes."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import InvalidInput
from models.zero_shot.attributes import Attributes, is_binary, log_posterior_ratio
from models.zero_shot.scaling import unit_rows

ANIMALS = np.array([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]], np.float32)


def test_two_valued_embeddings_keep_their_values_whatever_the_length_of_a_row() -> None:
    attributes = Attributes.of(unit_rows(ANIMALS))
    assert attributes.kept.tolist() == [0, 1, 1, 1, 0]
    assert attributes.report() == {"attributes": 3, "constant_attributes": 2}
    assert attributes(unit_rows(ANIMALS)).tolist() == ANIMALS[:, 1:4].tolist()
    assert attributes.prior.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    many = unit_rows(np.ones((1, 5), np.float32))  # each value smaller than any seen class's
    assert attributes(many).tolist() == [[1, 1, 1]]
    signs = Attributes.of(unit_rows(2 * ANIMALS - 1))
    assert signs(unit_rows(2 * ANIMALS - 1)).tolist() == ANIMALS[:, 1:4].tolist()


def test_continuous_embeddings_are_cut_at_the_mean_of_the_seen_classes() -> None:
    seen = np.array([[0.1, 0.9, 0.3], [0.5, 0.2, 0.3], [0.3, 0.1, 0.3]], np.float32)
    attributes = Attributes.of(seen)
    assert attributes.threshold.tolist() == pytest.approx([0.3, 0.4, 0.3])
    assert attributes.kept.tolist() == [1, 1, 0]
    assert attributes(seen).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert attributes(np.array([[0.31, 0.41, 9]])).tolist() == [[1, 1]]


def test_what_counts_as_binary() -> None:
    assert is_binary(unit_rows(ANIMALS))
    assert is_binary(unit_rows(2 * ANIMALS - 1))
    assert not is_binary(unit_rows(ANIMALS + 0.1 * np.eye(3, 5, dtype=np.float32)))
    assert not is_binary(np.array([[-1, 0, 1], [1, 1, -1]], np.float32))


def test_classes_that_share_every_attribute_are_refused() -> None:
    with pytest.raises(InvalidInput, match="None of 5 attributes differs over 2 seen classes"):
        Attributes.of(unit_rows(ANIMALS[[0, 0]]))


def test_ratio_equals_the_product_over_attributes() -> None:
    rng = np.random.default_rng(0)
    yes = rng.uniform(0.05, 0.95, size=(6, 4))
    has = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], np.float64)
    prior = np.array([0.2, 0.5, 0.7, 0.4])
    found = log_posterior_ratio(np.log(yes), np.log(1 - yes), has, prior)
    for i in range(6):
        for c in range(3):
            ratio = 1.0
            for m in range(4):
                ratio *= yes[i, m] / prior[m] if has[c, m] else (1 - yes[i, m]) / (1 - prior[m])
            assert np.exp(found[i, c]) == pytest.approx(ratio)
