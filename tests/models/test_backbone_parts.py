"""A network cut in two gives the same map as the whole, and its last layers alone can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbone_names import BACKBONE_NAMES, FIXED_SIZE_NAMES
from models.backbone_parts import Tail, Trunk
from models.backbones import Backbone, SpatialBackbone, create_backbone
from models.errors import InvalidInput


def pixels(n: int = 3, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return create_backbone("small_cnn", weights=None)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    "name", ["small_cnn", "mobilenet_v2", "resnet18", "densenet121", "squeezenet1_1", "shufflenet_v2_x0_5"]
)
def test_trunk_and_tail_together_are_the_network(name: str, share: float) -> None:
    backbone, images = create_backbone(name, weights=None), pixels()
    trunk = Trunk(backbone, 64, share)
    tail, features = trunk.tail(), trunk.features(images)
    assert features.shape == (3, trunk.feature_dim)
    before = features.clone()
    maps = tail(features)
    assert torch.equal(features, before)
    assert maps.shape[2] == tail.channels == backbone.spatial_dim
    torch.testing.assert_close(maps.flatten(1), SpatialBackbone(backbone, 64).features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "googlenet"])
def test_other_architectures_are_cut_as_well(name: str) -> None:
    backbone, images = create_backbone(name, weights=None), pixels(2, 96)
    trunk = Trunk(backbone, 96, 0.25)
    whole = SpatialBackbone(backbone, 96).features(images)
    torch.testing.assert_close(trunk.tail()(trunk.features(images)).flatten(1), whole, rtol=1e-3, atol=1e-4)


def test_a_larger_share_learns_more_and_all_of_it_is_the_image_itself(small: Backbone) -> None:
    learning = [sum(p.numel() for p in Trunk(small, 64, s).tail().learning()) for s in (0.1, 0.4, 0.7, 1.0)]
    assert learning == sorted(set(learning))
    assert learning[-1] == sum(p.numel() for p in small.module.parameters())
    assert Trunk(small, 64, 1.0).feature_dim == 3 * 64 * 64


def test_layers_before_the_share_stay_as_they_are(small: Backbone) -> None:
    trunk = Trunk(small, 64, 0.2)
    tail, features = trunk.tail(), trunk.features(pixels()).clone()
    tail(features).sum().backward()
    fixed = [p for p in tail.parameters() if not p.requires_grad]
    assert all(p.grad is not None for p in tail.learning())
    assert all(p.grad is None for p in fixed)
    assert not any(p.grad is not None for p in small.module.parameters())


def test_tails_are_copies_and_stay_in_evaluation_mode(small: Backbone) -> None:
    trunk = Trunk(small, 64, 0.4)
    features = trunk.features(pixels()).clone()
    one, other = trunk.tail(), trunk.tail()
    third = one.copied()
    with torch.no_grad():
        for parameter in one.learning():
            parameter.add_(1.0)
    assert torch.equal(other(features), third(features))
    assert not torch.equal(one(features), other(features))
    assert not one.train().training
    assert not any(module.training for module in one.modules())


def test_a_tail_is_rebuilt_from_recipe_and_weights(small: Backbone) -> None:
    trunk = Trunk(small, 64, 0.4)
    tail, features = trunk.tail(), trunk.features(pixels()).clone()
    again = Tail.rebuilt(tail.recipe())
    again.load_state_dict(tail.state_dict())
    assert torch.equal(again(features), tail(features))
    assert [p.shape for p in again.learning()] == [p.shape for p in tail.learning()]
    for damaged in (tail.recipe()[:5], np.frombuffer(b"{}", np.uint8), np.frombuffer(b"[1]", np.uint8)):
        with pytest.raises(InvalidInput, match="last layers cannot be told"):
            Tail.rebuilt(damaged)


def test_equal_cuts_are_equal_and_tell_their_features_apart(small: Backbone) -> None:
    trunk = Trunk(small, 64, 0.4)
    assert trunk == Trunk(small, 64, 0.4)
    assert trunk != Trunk(small, 96, 0.4)
    assert trunk != Trunk(small, 64, 0.9)
    digests = {view.digest for view in (trunk, Trunk(small, 64, 0.9), small, SpatialBackbone(small, 64))}
    assert len(digests) == 4
    assert Trunk(small, 96, 0.4).digest == trunk.digest
    assert trunk.features(pixels(0)).shape == (0, trunk.feature_dim)


def test_bf16_trunks_give_floats_close_to_fp32(small: Backbone) -> None:
    half = create_backbone("small_cnn", weights=None, precision="bf16")
    found, wanted = (Trunk(network, 64, 0.4).features(pixels()) for network in (half, small))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_networks_of_one_size_are_refused_and_known_by_name() -> None:
    backbone = create_backbone("vit_b_32", weights=None)
    with pytest.raises(InvalidInput, match="'vit_b_32' cannot be trained apart"):
        Trunk(backbone, 224, 0.25)
    assert backbone.name in FIXED_SIZE_NAMES
    assert {name for name in BACKBONE_NAMES if "vit" in name} == FIXED_SIZE_NAMES
