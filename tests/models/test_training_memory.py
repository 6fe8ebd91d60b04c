"""Memory of training: the networks' sizes are what torch says, and the estimate counts what is held."""

from __future__ import annotations

from typing import Any

import pytest

from models.backbone_names import BACKBONE_NAMES
from models.backbones import SpatialBackbone, create_backbone
from models.training_memory import NETWORKS, PROCESS_BYTES, numbers_per_image, refusal, training_bytes


def test_every_network_is_listed() -> None:
    assert set(NETWORKS) == BACKBONE_NAMES


@pytest.mark.parametrize(
    ("name", "size"), [("small_cnn", 32), ("small_cnn", 96), ("mobilenet_v3_small", 64), ("squeezenet1_1", 224)]
)
def test_numbers_of_an_image_are_the_network_s(name: str, size: int) -> None:
    backbone = create_backbone(name, weights=None)
    assert numbers_per_image(name, size, is_spatial=False) == backbone.feature_dim
    assert numbers_per_image(name, size, is_spatial=True) == SpatialBackbone(backbone, size).feature_dim


def test_maps_folds_and_copies_are_counted() -> None:
    assert numbers_per_image("resnet50", 224, is_spatial=True) == 49 * 2048
    assert numbers_per_image("resnet50", 225, is_spatial=True) == 64 * 2048  # a place more a side

    def numbers(params: dict[str, Any], n_test: int = 0, n_validation: int = 2) -> float:
        needed = training_bytes(params, 100, n_test, 10, n_seen=20, n_validation=n_validation)
        return (needed - PROCESS_BYTES) / (4 * 10)

    assert numbers({"normalize": "none"}) == 200
    assert numbers({"folds": 5}) == 700
    assert numbers({"folds": 0}) == 700  # of two classes each, five let ten take a turn
    assert numbers({"folds": 0}, n_validation=1) == 1200
    assert numbers({"folds": 100}) == 1200  # twenty classes make no more than ten groups of two
    assert numbers({"folds": 5}, n_validation=0) == 300
    assert numbers({}, n_test=500) == 100 + 1500  # scoring holds more than training
    assert "40.0 GB in memory (7 images of 9 numbers), and a worker has 8.0 GB" in refusal(7, 9, 40 * 10**9, 8 * 10**9)
