"""Memory of training: the networks' sizes are what torch says, and the estimate counts what is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torchvision.models.regnet import BlockParams

from models import backbones
from models.backbone_names import NETWORKS
from models.backbones import SpatialBackbone, create_backbone, list_backbones
from models.training_memory import PROCESS_BYTES, numbers_per_image, refusal, training_bytes


def test_every_network_is_listed() -> None:
    assert set(NETWORKS) == set(list_backbones())


@pytest.mark.parametrize(
    ("name", "size"), [("small_cnn", 32), ("small_cnn", 96), ("mobilenet_v3_small", 64), ("squeezenet1_1", 224)]
)
def test_numbers_of_an_image_are_the_network_s(name: str, size: int) -> None:
    backbone = create_backbone(name, weights=None)
    assert numbers_per_image(name, size, is_spatial=False) == backbone.feature_dim
    assert numbers_per_image(name, size, is_spatial=True) == SpatialBackbone(backbone, size).feature_dim


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks are made on torch's meta device, which knows shapes and no numbers; what needs numbers is left out."""
    plain = BlockParams.from_init_params

    def computed(**shape: Any) -> BlockParams:
        with torch.device("cpu"):
            return plain(**shape)

    monkeypatch.setattr(BlockParams, "from_init_params", computed)
    monkeypatch.setattr(backbones, "_settle_batch_norm", lambda *_: None)
    monkeypatch.setattr(backbones, "weights_digest", lambda *_: "")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_numbers_are_those_of_torchvision(name: str) -> None:
    backbone = create_backbone(name, weights=None, device="meta")
    size = backbone.input_size
    assert (backbone.feature_dim, backbone.spatial_dim) == NETWORKS[name][:2]
    assert SpatialBackbone(backbone, size).feature_dim == numbers_per_image(name, size, is_spatial=True)
    if not backbone.fixed_size:
        assert SpatialBackbone(backbone, 120).feature_dim <= numbers_per_image(name, 120, is_spatial=True)


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
