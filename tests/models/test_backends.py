"""Backends compute the features that torch computes; `auto` takes the fastest that it measured to do so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbones import Backbone, SpatialBackbone, create_backbone
from models.backends import choice, compiled
from models.backends.base import Place, PreparedNetwork
from models.backends.choice import BackendName, awaits_preparation, fast_network
from models.backends.onnx_file import onnx_file
from models.errors import InvalidInput, ShapeMismatch

for library in ("onnxscript", "openvino", "onnxruntime"):
    if library == "openvino":  # as the product imports it
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not to be found
    pytest.importorskip(library, reason="the extras 'openvino' and 'onnx' are not installed")
SIZE = 48
RUNTIMES: tuple[BackendName, ...] = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone("small_cnn", weights=None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(params=RUNTIMES)
def fast(request: pytest.FixtureRequest, backbone: Backbone, kept: Path) -> PreparedNetwork:
    return prepared(backbone, request.param, kept)


@pytest.fixture
def measured_file(backbone: Backbone, kept: Path) -> Iterator[Path]:
    """What `auto` measured of the network at two threads and streams; tests write other findings into it."""
    for path in kept.glob("*/measured-*.json"):
        path.unlink()
    fast_network(backbone, Place(SIZE, kept, 2, 2))
    (path,) = kept.glob(f"{backbone.digest[:32]}-{SIZE}-*/measured-*.json")
    yield path
    path.unlink()


def prepared(network: Backbone, backend: BackendName, directory: Path, size: int = SIZE) -> PreparedNetwork:
    found = fast_network(network, Place(size, directory, 2, 2), backend=backend)
    assert isinstance(found, PreparedNetwork)
    assert found.backend == backend
    return found


def photos(n: int, size: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def find(path: Path, **gains: float) -> None:
    """Writes that so much was measured, each with the same features."""
    findings = {name: {"gain": gain, "cosine": 1.0} for name, gain in gains.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), "measured": findings}))


@pytest.mark.parametrize("n", [0, 1, 8, 11])
def test_features_are_those_of_torch(backbone: Backbone, fast: PreparedNetwork, n: int) -> None:
    expected, found = backbone.features(photos(n)), fast.features(photos(n))
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) if n else 0)
    assert (fast.digest, fast.feature_dim) == (backbone.digest, backbone.feature_dim)


def test_images_may_come_channels_last_and_must_be_images_of_its_size(fast: PreparedNetwork) -> None:
    images = photos(3)
    assert torch.equal(fast.features(images.contiguous(memory_format=torch.channels_last)), fast.features(images))
    with pytest.raises(ShapeMismatch, match="48 pixels"):
        fast.features(photos(2, 64))
    with pytest.raises(ShapeMismatch, match="uint8"):
        fast.features(images.float())


def test_threads_do_not_disturb_each_other(fast: PreparedNetwork) -> None:
    batches = [photos(5, seed=i) for i in range(12)]
    alone = [fast.features(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(*pair) for pair in zip(pool.map(fast.features, batches), alone, strict=True))


def test_views_of_one_network_at_one_size_may_share_batches(backbone: Backbone, kept: Path) -> None:
    one, other = (prepared(backbone, name, kept) for name in RUNTIMES)
    assert one == prepared(backbone, "openvino", kept)
    assert one != other
    assert one != prepared(backbone, "openvino", kept, 64)
    assert one.n_bytes > 4 * sum(p.numel() for p in backbone.module.parameters()) * 0.9


def test_one_export_serves_both_runtimes(backbone: Backbone, tmp_path: Path) -> None:
    for name in RUNTIMES:
        prepared(backbone, name, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("onnx/*")) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ({"openvino": 2.0, "onnxruntime": 3.0}, "onnxruntime"),
        ({"openvino": 2.0, "onnxruntime": 1.5}, "openvino"),
        ({"openvino": 1.05, "onnxruntime": 1.2}, "onnxruntime"),
        ({"openvino": 1.05, "onnxruntime": 0.5}, "torch"),
    ],
)
def test_auto_takes_the_fastest_where_the_gain_is_clear(
    backbone: Backbone, kept: Path, measured_file: Path, gains: dict[str, float], taken: str
) -> None:
    find(measured_file, **gains)
    found = fast_network(backbone, Place(SIZE, kept, 2, 2))
    assert (found.backend if isinstance(found, PreparedNetwork) else "torch") == taken


def test_auto_takes_nothing_whose_features_are_others(backbone: Backbone, kept: Path, measured_file: Path) -> None:
    find(measured_file, openvino=9.0, onnxruntime=2.0)
    text = json.loads(measured_file.read_text())
    text["measured"]["openvino"]["cosine"] = 0.999
    measured_file.write_text(json.dumps(text))
    found = fast_network(backbone, Place(SIZE, kept, 2, 2))
    assert isinstance(found, PreparedNetwork)
    assert found.backend == "onnxruntime"


def test_what_was_measured_is_near_to_fp32_and_belongs_to_the_machine(
    backbone: Backbone, kept: Path, measured_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(measured_file.read_text())["measured"]
    assert set(found) == set(RUNTIMES)
    assert all(each["gain"] > 0 and each["cosine"] > 1 - 1e-5 for each in found.values())
    find(measured_file, openvino=0.0, onnxruntime=0.0)
    again = Place(SIZE, kept, 2, 2)
    assert not awaits_preparation(backbone, again)
    monkeypatch.setattr(choice.BACKENDS["openvino"], "version", lambda: "another")
    assert awaits_preparation(backbone, again)
    fast_network(backbone, again)
    (new,) = set(measured_file.parent.glob("measured-*.json")) - {measured_file}
    assert json.loads(new.read_text())["machine"]["installed"]["openvino"] == "another"
    assert json.loads(new.read_text())["measured"]["openvino"]["gain"] > 0
    new.unlink()


def test_drift_is_measured_against_fp32_whatever_the_precision(tmp_path: Path) -> None:
    network = create_backbone("small_cnn", weights=None, precision="bf16")
    fast_network(network, Place(SIZE, tmp_path, threads=1))
    (path,) = tmp_path.glob("*/measured-*.json")
    found = json.loads(path.read_text())["measured"]
    assert found["onnxruntime"]["cosine"] > 1 - 1e-5  # it does not round
    assert 0.99 < found["openvino"]["cosine"] <= 1 + 1e-6


def test_without_a_runtime_auto_is_torch_and_the_wish_for_one_is_refused(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("it is not installed")

    for name in RUNTIMES:
        monkeypatch.setattr(choice.BACKENDS[name], "version", missing)
        with pytest.raises(InvalidInput, match="pip install"):
            fast_network(backbone, Place(SIZE, tmp_path), backend=name)
    assert fast_network(backbone, Place(SIZE, tmp_path)) is backbone
    assert not awaits_preparation(backbone, Place(SIZE, tmp_path))
    assert fast_network(backbone, Place(SIZE, tmp_path), backend="torch") is backbone


def test_a_runtime_that_fails_leaves_the_other_and_a_damaged_file_leaves_torch(
    backbone: Backbone, kept: Path, measured_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no such instruction")

    find(measured_file, openvino=9.0, onnxruntime=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(choice.BACKENDS["openvino"], "open", fails)
        with pytest.warns(UserWarning, match="no such instruction"):
            found = fast_network(backbone, Place(SIZE, kept, 2, 2))
    assert isinstance(found, PreparedNetwork)
    assert found.backend == "onnxruntime"
    own = tmp_path / measured_file.parent.name
    shutil.copytree(measured_file.parent, own)
    (own / "onnx" / "model.onnx").write_text("<net")
    with pytest.warns(UserWarning, match="cannot run"):
        assert fast_network(backbone, Place(SIZE, tmp_path, 2, 2)) is backbone


def test_a_network_awaits_preparation_until_it_is_exported_and_measured(backbone: Backbone, tmp_path: Path) -> None:
    assert awaits_preparation(backbone, Place(SIZE, tmp_path))
    assert awaits_preparation(backbone, Place(SIZE, tmp_path), backend="openvino")
    assert not awaits_preparation(backbone, Place(SIZE, tmp_path), backend="torch")
    assert fast_network(backbone, Place(SIZE, tmp_path), may_prepare=False) is backbone
    assert not list(tmp_path.iterdir())
    fast_network(backbone, Place(SIZE, tmp_path), backend="openvino")
    assert not awaits_preparation(backbone, Place(SIZE, tmp_path), backend="onnxruntime")  # the same file
    assert awaits_preparation(backbone, Place(SIZE, tmp_path))  # which is faster is not known
    fast_network(backbone, Place(SIZE, tmp_path))
    assert not awaits_preparation(backbone, Place(SIZE, tmp_path))
    assert awaits_preparation(backbone, Place(SIZE, tmp_path, threads=7))
    assert awaits_preparation(backbone, Place(SIZE * 2, tmp_path))


def test_another_torch_exports_anew(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(SIZE, tmp_path, 1)
    before = onnx_file(backbone, place)
    monkeypatch.setattr(torch, "__version__", "99.0.0+cpu")
    assert onnx_file(backbone, place) != before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_32", "googlenet"])
def test_networks_of_all_kinds_are_exported(name: str, tmp_path: Path) -> None:
    network = create_backbone(name, weights=None)
    images = photos(3, network.input_size)
    expected = network.features(images).numpy()
    for runtime in RUNTIMES:
        found = prepared(network, runtime, tmp_path, network.input_size).features(images).numpy()
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_map_of_a_network_is_no_backbone_to_prepare(backbone: Backbone) -> None:
    assert not isinstance(SpatialBackbone(backbone, SIZE), Backbone)


def test_nothing_is_reported_to_its_makers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from models.backbones import create_backbone; "
        "from models.backends.base import Place; from models.backends.choice import fast_network; "
        "network = create_backbone('small_cnn', weights=None); "
        f"fast_network(network, Place(32, Path({str(tmp_path)!r})), backend='openvino'); "
        "assert 'openvino' in sys.modules; print(sys.modules['openvino_telemetry'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip().splitlines()[-1] == "None"


# ---- torch.compile: on the CPU here, through the code that a GPU runs ------------------------------------------------


class Compiler:
    """Stands in for torch.compile: eager, and remembers what was run in which thread."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []  # batch size, thread
        self.fails = False

    def compile(self, network: torch.nn.Module, **options: Any) -> Any:
        assert options["mode"] == "reduce-overhead"

        def run(images: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("out of graphs")
            self.runs.append((len(images), threading.get_ident()))
            output: Tensor = network(images)
            return output

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(torch, "compile", found.compile)
    return found


def test_batches_are_filled_up_to_few_sizes_and_all_run_in_one_thread(
    backbone: Backbone, compiler: Compiler, tmp_path: Path
) -> None:
    wide = replace(backbone, max_batch=256)
    found = prepared(wide, "compile", tmp_path)
    assert [n for n, _ in compiler.runs] == list(compiled.BUCKETS)  # before anybody asks
    compiler.runs.clear()
    with ThreadPoolExecutor(3) as pool:
        for n, rows in zip((1, 3, 5, 70), pool.map(found.features, map(photos, (1, 3, 5, 70))), strict=True):
            torch.testing.assert_close(rows, wide.features(photos(n)), rtol=1e-4, atol=1e-5)
    assert {n for n, _ in compiler.runs} <= set(compiled.BUCKETS)
    assert len({thread for _, thread in compiler.runs} - {threading.get_ident()}) == 1


def test_what_fails_while_it_runs_leaves_eager_torch(backbone: Backbone, compiler: Compiler, tmp_path: Path) -> None:
    found = prepared(backbone, "compile", tmp_path)
    compiler.fails = True
    with pytest.warns(UserWarning, match="out of graphs"):
        assert torch.equal(found.features(photos(5)), backbone.features(photos(5)))
    assert torch.equal(found.features(photos(2)), backbone.features(photos(2)))  # and nobody is warned again


def test_auto_measures_the_compiler_where_it_is_considered(
    backbone: Backbone, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(choice.MEASURED_ON, "cpu", ("compile",))
    assert fast_network(backbone, Place(SIZE, tmp_path), may_prepare=False) is backbone
    assert not compiler.runs
    fast_network(backbone, Place(SIZE, tmp_path))
    (path,) = tmp_path.glob("*/measured-*.json")
    assert json.loads(path.read_text())["measured"]["compile"]["cosine"] > 1 - 1e-5
    find(path, compile=2.0)
    assert awaits_preparation(backbone, Place(SIZE, tmp_path))  # in each process anew
    assert fast_network(backbone, Place(SIZE, tmp_path), may_prepare=False) is backbone
    assert isinstance(fast_network(backbone, Place(SIZE, tmp_path)), PreparedNetwork)
    find(path, compile=1.0)
    assert not awaits_preparation(backbone, Place(SIZE, tmp_path))
    compiler.fails = True
    find(path, compile=2.0)
    with pytest.warns(UserWarning, match="out of graphs"):
        assert fast_network(backbone, Place(SIZE, tmp_path)) is backbone
    with pytest.raises(InvalidInput, match="out of graphs"):
        fast_network(backbone, Place(SIZE, tmp_path), backend="compile")


@pytest.mark.slow
def test_the_compiler_itself_gives_the_same_features_and_sees_no_other_thread(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
    monkeypatch.setattr(compiled, "BUCKETS", (4,))  # each takes the compiler half a minute
    expected, stop, others = backbone.features(photos(3)), threading.Event(), []

    def compute() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            others.append(torch.allclose(backbone.features(photos(3)), expected, rtol=1e-4, atol=1e-5))

    beside = threading.Thread(target=compute)
    beside.start()
    try:
        found = prepared(backbone, "compile", tmp_path)
        for n in (1, 3, 6):
            torch.testing.assert_close(found.features(photos(n)), backbone.features(photos(n)), rtol=1e-4, atol=1e-5)
    finally:
        stop.set()
        beside.join()
    assert others
    assert all(others)
