"""A batch on several threads: which way it goes, and that its features are those of one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.backbones import create_backbone
from models.backends.base import Place, PreparedNetwork, Run
from models.backends.choice import fast_network
from models.backends.spread import Spread

SIZE = 48


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def images_of(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def first_pixels(images: Tensor) -> Tensor:
    return images[:, :, 0, 0].float()


def test_small_batches_stay_together_and_others_are_cut_so_that_threads_even_out() -> None:
    together: list[int] = []
    apart: list[int] = []

    def counting(sizes: list[int]) -> Run:
        def run(images: Tensor) -> Tensor:
            sizes.append(len(images))
            return first_pixels(images)

        return run

    spread = Spread(counting(together), counting(apart), threads=2)
    for n in (1, 2, 8, 32, 33):
        images = images_of(n)
        assert torch.equal(spread(images), first_pixels(images))
    assert together == [1]
    assert sorted(apart) == sorted([1] * 2 + [1] * 8 + [4] * 8 + [4] * 8 + [1])


def test_a_small_batch_beside_another_takes_one_thread() -> None:
    ways: list[str] = []
    started, go = threading.Event(), threading.Event()

    def together(images: Tensor) -> Tensor:
        ways.append("together")
        started.set()
        assert go.wait(20)
        return first_pixels(images)

    def apart(images: Tensor) -> Tensor:
        ways.append("apart")
        return first_pixels(images)

    spread = Spread(together, apart, threads=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(spread, images_of(1))
        assert started.wait(20)
        spread(images_of(1))
        go.set()
        first.result(20)
    spread(images_of(1))
    assert ways == ["together", "apart", "together"]


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_onnx_runtime_gives_the_same_features_on_several_threads_as_on_one(kept: Path, n: int) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="the extra 'onnx' is not installed")
    backbone = create_backbone("small_cnn", weights=None)
    spread = fast_network(backbone, Place(SIZE, kept, threads=3), backend="onnxruntime")
    single = fast_network(backbone, Place(SIZE, kept, threads=1), backend="onnxruntime")
    assert isinstance(spread, PreparedNetwork)
    assert isinstance(single, PreparedNetwork)
    torch.testing.assert_close(spread.features(images_of(n)), single.features(images_of(n)), rtol=1e-5, atol=1e-5)
    assert spread.n_bytes == 2 * single.n_bytes  # what the cache of models must know of
