"""OpenVINO computes the features that torch computes; `auto` takes it only where it measured that and a gain."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import backends
from models.backbones import Backbone, SpatialBackbone, create_backbone
from models.backends import OpenVINOBackbone, awaits_conversion, fast_network
from models.errors import InvalidInput, ShapeMismatch

pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
SIZE = 48


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone("small_cnn", weights=None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture
def fast(backbone: Backbone, kept: Path) -> OpenVINOBackbone:
    found = fast_network(backbone, SIZE, backend="openvino", directory=kept, threads=2, streams=2)
    assert isinstance(found, OpenVINOBackbone)
    return found


def photos(n: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("n", [0, 1, 8, 11])
def test_features_are_those_of_torch(backbone: Backbone, fast: OpenVINOBackbone, n: int) -> None:
    expected, found = backbone.features(photos(n)), fast.features(photos(n))
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) if n else 0)
    assert (fast.digest, fast.feature_dim) == (backbone.digest, backbone.feature_dim)


def test_images_may_come_channels_last_and_must_be_images_of_its_size(fast: OpenVINOBackbone) -> None:
    images = photos(3)
    assert torch.equal(fast.features(images.contiguous(memory_format=torch.channels_last)), fast.features(images))
    with pytest.raises(ShapeMismatch, match="48 pixels"):
        fast.features(photos(2, 64))
    with pytest.raises(ShapeMismatch, match="uint8"):
        fast.features(images.float())


def test_threads_do_not_disturb_each_other(fast: OpenVINOBackbone) -> None:
    batches = [photos(5, seed=i) for i in range(12)]
    alone = [fast.features(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(*pair) for pair in zip(pool.map(fast.features, batches), alone, strict=True))


def test_views_of_one_network_at_one_size_may_share_batches(
    backbone: Backbone, fast: OpenVINOBackbone, kept: Path
) -> None:
    again = fast_network(backbone, SIZE, backend="openvino", directory=kept)
    assert fast == again
    assert fast != fast_network(backbone, 64, backend="openvino", directory=kept)
    assert fast.n_bytes > 4 * sum(p.numel() for p in backbone.module.parameters()) * 0.9


@pytest.mark.parametrize(
    ("measured", "is_taken"),
    [
        ({"gain": 2.0, "cosine": 1.0}, True),
        ({"gain": 1.05, "cosine": 1.0}, False),
        ({"gain": 3.0, "cosine": 0.999}, False),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster_and_the_same(
    backbone: Backbone, fast: OpenVINOBackbone, kept: Path, measured: dict[str, Any], is_taken: bool
) -> None:
    (path,) = kept.glob(f"{backbone.digest[:32]}-{SIZE}-*/measured.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **measured}))
    found = fast_network(backbone, SIZE, directory=kept, threads=2, streams=2)
    assert (found == fast) is is_taken
    assert (found is backbone) is not is_taken


def test_another_machine_measures_anew(backbone: Backbone, fast: OpenVINOBackbone, kept: Path) -> None:
    (path,) = kept.glob(f"{backbone.digest[:32]}-{SIZE}-*/measured.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "another", "gain": 0.0}))
    found = fast_network(backbone, SIZE, backend="openvino", directory=kept, threads=2, streams=2)
    assert isinstance(found, OpenVINOBackbone)
    assert found.measured["cpu"] != "another"
    assert found.measured["gain"] > 0
    assert found.measured["cosine"] > 1 - 1e-5
    assert json.loads(path.read_text()) == found.measured


def test_without_openvino_auto_is_torch_and_the_wish_for_it_is_refused(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'openvino'")

    monkeypatch.setattr(backends, "_import_openvino", missing)
    assert fast_network(backbone, SIZE, directory=tmp_path) is backbone
    with pytest.raises(InvalidInput, match="pip install"):
        fast_network(backbone, SIZE, backend="openvino", directory=tmp_path)
    assert fast_network(backbone, SIZE, backend="torch", directory=tmp_path) is backbone


def test_a_damaged_file_and_a_small_job_leave_torch(backbone: Backbone, fast: OpenVINOBackbone, tmp_path: Path) -> None:
    assert fast_network(backbone, SIZE, directory=tmp_path, may_convert=False) is backbone
    assert not list(tmp_path.iterdir())
    fast_network(backbone, SIZE, directory=tmp_path)
    (model,) = tmp_path.glob("*/model.xml")
    model.write_text("<net")
    with pytest.warns(UserWarning, match="torch does"):
        assert fast_network(backbone, SIZE, directory=tmp_path) is backbone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_32", "googlenet"])
def test_networks_of_all_kinds_convert(name: str, tmp_path: Path) -> None:
    network = create_backbone(name, weights=None)
    images = photos(3, network.input_size)
    fast = fast_network(network, network.input_size, backend="openvino", directory=tmp_path)
    assert isinstance(fast, OpenVINOBackbone)
    expected, found = (n.features(images).numpy() for n in (network, fast))
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_map_of_a_network_is_no_backbone_to_convert(backbone: Backbone) -> None:
    assert not isinstance(SpatialBackbone(backbone, SIZE), Backbone)


def test_nothing_is_reported_to_its_makers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from models.backbones import create_backbone; "
        "from models.backends import fast_network; "
        "network = create_backbone('small_cnn', weights=None); "
        f"fast_network(network, 32, backend='openvino', directory=Path({str(tmp_path)!r})); "
        "assert 'openvino' in sys.modules; print(sys.modules['openvino_telemetry'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == "None"


def test_a_network_awaits_conversion_until_it_was_made(backbone: Backbone, tmp_path: Path) -> None:
    assert awaits_conversion(backbone, SIZE, directory=tmp_path)
    assert not awaits_conversion(backbone, SIZE, backend="torch", directory=tmp_path)
    assert fast_network(backbone, SIZE, directory=tmp_path, may_convert=False) is backbone
    fast_network(backbone, SIZE, directory=tmp_path)
    assert not awaits_conversion(backbone, SIZE, directory=tmp_path)
    assert awaits_conversion(backbone, SIZE * 2, directory=tmp_path)
