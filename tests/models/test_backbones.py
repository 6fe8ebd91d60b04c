from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from models import backbones
from models.backbones import (
    Backbone,
    SpatialBackbone,
    create_backbone,
    list_backbones,
    small_backbone,
    torchvision_weights,
)
from models.errors import InvalidInput, ShapeMismatch, UnknownName
from models.small_cnn import SmallCNN
from models.weights import save_state
from tests.shared_data import shared_path

# name, feature_dim, spatial_dim, input size, does the mean of the map equal the features?
NETWORKS = [
    ("small_cnn", 256, 256, 96, True),
    ("resnet18", 512, 512, 224, True),
    ("mobilenet_v2", 1280, 1280, 224, True),
    ("mobilenet_v3_small", 1024, 576, 224, False),
    ("efficientnet_b0", 1280, 1280, 224, True),
    ("shufflenet_v2_x0_5", 1024, 1024, 224, True),
    ("squeezenet1_1", 512, 512, 224, True),
    ("regnet_y_400mf", 440, 440, 224, True),
    ("densenet121", 1024, 1024, 224, True),
    ("swin_t", 768, 768, 224, True),
    ("vit_b_32", 768, 768, 224, False),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return create_backbone("small_cnn", weights=None)


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return create_backbone("resnet18", weights=None)


def noise(n: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "feature_dim", "spatial_dim", "size", "mean_is_feature"), NETWORKS)
def test_networks_are_cut_at_their_features(
    name: str, feature_dim: int, spatial_dim: int, size: int, mean_is_feature: bool
) -> None:
    backbone = create_backbone(name, weights=None)
    images = noise(2, size if backbone.fixed_size else 64)
    features, maps = backbone.features(images), backbone.spatial(images)
    assert (backbone.feature_dim, backbone.spatial_dim, backbone.input_size) == (feature_dim, spatial_dim, size)
    assert features.shape == (2, feature_dim)
    assert maps.shape[:2] == (2, spatial_dim)
    assert maps.shape[2] == maps.shape[3] > 1
    assert features.dtype == maps.dtype == torch.float32
    assert features.std() > 1e-3  # an untrained network must say something, too
    if mean_is_feature:
        torch.testing.assert_close(maps.mean(dim=(2, 3)), features, rtol=1e-3, atol=1e-3)


def test_features_equal_a_plain_forward_pass_up_to_the_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = noise(2, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = network((images / 255 - mean) / std)
    features = create_backbone("resnet18", weights=tmp_path / "weights.pth").features(images)
    torch.testing.assert_close(network.fc(features), expected, rtol=1e-3, atol=1e-3)


def test_an_image_has_the_same_features_in_any_batch(resnet: Backbone) -> None:
    images = noise(11, 48)  # more than one forward pass
    together = resnet.features(images)
    alone = torch.cat([resnet.features(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(together, resnet.features(images))
    assert resnet.spatial(images).shape[0] == 11


def test_no_images_give_no_rows(small: Backbone) -> None:
    assert small.features(noise(0, 32)).shape == (0, 256)
    assert small.spatial(noise(0, 32)).shape[:2] == (0, 256)


def test_untrained_weights_do_not_depend_on_the_number_of_threads() -> None:
    """Processes with different numbers of threads must agree on which network it is."""
    before, digests = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            digests.append(create_backbone("mobilenet_v2", weights=None).digest)
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert digests[0] == digests[1]


def test_the_seed_decides_untrained_weights_and_the_digest() -> None:
    one, again, other = (create_backbone("small_cnn", weights=None, seed=seed) for seed in (1, 1, 2))
    bf16 = create_backbone("small_cnn", weights=None, seed=1, precision="bf16")
    assert one.digest == again.digest
    assert len({one.digest, other.digest, bf16.digest}) == 3
    assert torch.equal(one.features(noise(2, 32)), again.features(noise(2, 32)))


def test_bf16_is_near_fp32(small: Backbone) -> None:
    bf16 = create_backbone("small_cnn", weights=None, precision="bf16")
    images = noise(4, 64)
    a, b = small.features(images), bf16.features(images)
    assert b.dtype == torch.float32
    assert torch.cosine_similarity(a, b).min() > 0.999
    assert not torch.equal(a, b)


def test_the_module_can_be_fine_tuned(small: Backbone) -> None:
    loss = small.module(small.normalise(noise(2, 32))).square().mean()
    loss.backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in small.module.parameters())


def test_weights_come_back_from_either_format(tmp_path: Path) -> None:
    module = SmallCNN()
    expected = small_backbone(module)
    save_state(module, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "w.pth")
    for file_name in ("w.safetensors", "w.pth"):
        loaded = create_backbone("small_cnn", weights=tmp_path / file_name)
        assert loaded.digest == expected.digest
        assert torch.equal(loaded.features(noise(2, 32)), expected.features(noise(2, 32)))


def test_half_precision_files_and_other_heads_are_fine(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in resnet18(num_classes=7).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    backbone = create_backbone("resnet18", weights=tmp_path / "w.safetensors")
    assert backbone.feature_dim == 512
    assert next(backbone.module.parameters()).dtype == torch.float32
    del state["fc.weight"], state["fc.bias"], state["bn1.num_batches_tracked"]
    save_file(state, tmp_path / "headless.safetensors")
    assert create_backbone("resnet18", weights=tmp_path / "headless.safetensors").digest == backbone.digest


def test_weights_that_do_not_belong_are_refused(tmp_path: Path, small: Backbone) -> None:
    path = tmp_path / "w.safetensors"
    state = {key: value.contiguous() for key, value in small.module.state_dict().items()}

    def error_of(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(InvalidInput) as caught:
            create_backbone("small_cnn", weights=path)
        assert caught.value.field == "params/backbone/weights"
        return str(caught.value)

    assert "missing: stem.0.weight" in error_of({k: v for k, v in state.items() if k != "stem.0.weight"})
    assert "unexpected: extra" in error_of({**state, "extra": torch.zeros(1)})
    assert "stem.0.weight" in error_of({**state, "stem.0.weight": torch.zeros(16, 3, 3, 3)})
    assert "NaN" in error_of({**state, "stem.0.weight": torch.full((16, 3, 5, 5), torch.nan)})


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    for file_name, content in (("w.pth", b""), ("v.pth", b"hello"), ("w.safetensors", b"hello"), ("w.bin", b"")):
        (tmp_path / file_name).write_bytes(content)
        with pytest.raises(InvalidInput, match=file_name):
            create_backbone("small_cnn", weights=tmp_path / file_name)
    with pytest.raises(InvalidInput, match="no weights file"):
        create_backbone("small_cnn", weights=tmp_path / "absent.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InvalidInput, match="no state dict"):
        create_backbone("small_cnn", weights=tmp_path / "list.pth")


class _RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _RunsCode()}, tmp_path / "w.pth")
    with pytest.raises(InvalidInput, match=r"w\.pth cannot be read"):
        create_backbone("small_cnn", weights=tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownName, match="resnet50") as caught:
        create_backbone("resnet-50", weights=None)
    assert caught.value.field == "params/backbone/name"
    for name in ("fcn_resnet50", "fasterrcnn_resnet50_fpn", ""):  # not for classification
        with pytest.raises(UnknownName):
            create_backbone(name, weights=None)


def test_wrong_images_are_refused(small: Backbone) -> None:
    for images in (torch.zeros(2, 3, 8, 8), torch.zeros((3, 8, 8), dtype=torch.uint8), noise(1, 8).transpose(1, 3)):
        with pytest.raises(ShapeMismatch, match="uint8 images of shape"):
            small.features(images)


def test_a_network_of_one_size_says_so() -> None:
    vit = create_backbone("vit_b_32", weights=None)
    with pytest.raises(ShapeMismatch, match="224x224 pixels only"):
        vit.features(noise(1, 64))


def test_every_torchvision_network_has_weights_with_a_checksum() -> None:
    names = [name for name in list_backbones() if name != backbones.SMALL_CNN]
    assert len(names) >= 80
    for name in names:
        weights = torchvision_weights(name)
        assert weights.url.startswith("https://download.pytorch.org/models/")
        assert weights.url.endswith(weights.file_name)
        assert len(weights.sha256_prefix) >= 8
    assert torchvision_weights("resnet50").sha256_prefix == "11ad3fa6"
    with pytest.raises(InvalidInput, match="no pretrained weights"):
        torchvision_weights("small_cnn")


@pytest.mark.parametrize(("name", "feature_dim"), [("mobilenet_v2", 1280), ("squeezenet1_1", 512)])
def test_real_weights_load(name: str, feature_dim: int) -> None:
    backbone = create_backbone(name, weights=shared_path("weights", f"{name}-imagenet1k.fp16.safetensors"))
    features = backbone.features(noise(2, 96))
    assert features.shape == (2, feature_dim)
    assert (features >= 0).all()
    assert features.max() > 0.1


def test_a_map_is_a_feature_place_after_place(small: Backbone) -> None:
    view = SpatialBackbone(small, 64)
    images = noise(11, 64)
    maps = small.spatial(images)
    side = maps.shape[2]
    assert (view.channels, view.feature_dim) == (256, side * side * 256)
    assert (view.device, view.max_batch) == (small.device, small.max_batch)
    flat = view.features(images)
    place = flat.reshape(11, side, side, 256)[4, 1, 2]  # second row, third column
    assert torch.equal(place, maps[4, :, 1, 2])
    torch.testing.assert_close(flat.reshape(11, -1, 256).mean(dim=1), small.features(images))
    assert view.features(images[:0]).shape == (0, view.feature_dim)


def test_views_of_one_network_are_equal_and_have_a_digest_of_their_own(small: Backbone, resnet: Backbone) -> None:
    view = SpatialBackbone(small, 64)
    assert view == SpatialBackbone(small, 64)
    assert view != SpatialBackbone(small, 96)
    assert view != SpatialBackbone(resnet, 64)
    assert view != small
    assert view.digest == SpatialBackbone(small, 96).digest
    assert len({view.digest, small.digest, SpatialBackbone(resnet, 64).digest}) == 3
