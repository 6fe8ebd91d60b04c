from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.backbones import Backbone, create_backbone
from models.data.images import DEFAULT_LIMITS, decode_image
from models.embedding import cutting
from models.embedding.cutting import ImageFailure, decoded_side, has_room_for_processes
from models.embedding.extraction import ImageFeatures, extract_features
from models.embedding.patches import cut_patches, patch_boxes
from models.errors import UnreadableImage
from models.params import PatchParams

PARAMS = PatchParams(size=32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone("small_cnn", weights=None)


def picture(seed: int, width: int = 60, height: int = 45) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def stored(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def files(n: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for seed in range(n):
        yield f"image {seed}", stored(picture(seed, 40 + 3 * seed % 50, 70 - seed % 30))


def usable(results: list[ImageFeatures | ImageFailure]) -> list[ImageFeatures]:
    return [result for result in results if isinstance(result, ImageFeatures)]


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("patches")]


@pytest.mark.parametrize("method", ["watershed", "grid", "whole"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_it_equals_one_image_after_the_other(backbone: Backbone, method: Any, n_threads: int) -> None:
    params = PatchParams(method=method, size=32)
    results = usable(list(extract_features(files(12), backbone, params, n_threads=n_threads)))
    assert [result.key for result in results] == [f"image {seed}" for seed in range(12)]
    for result, (_, read) in zip(results, files(12), strict=True):
        image = decode_image(read(), DEFAULT_LIMITS, target_side=decoded_side(params))
        boxes = patch_boxes(image, params)
        expected = backbone.features(cut_patches(image, boxes, 32)).numpy()
        assert result.boxes.tolist() == boxes.tolist()
        assert result.frame == image.shape[:2]
        assert result.features.dtype == np.float16
        np.testing.assert_allclose(result.features, expected, rtol=2e-3, atol=2e-3)


def test_a_second_run_is_the_same_bit_for_bit(backbone: Backbone) -> None:
    one, two = (usable(list(extract_features(files(7), backbone, PARAMS, n_threads=2))) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert (a.features == b.features).all()


@pytest.mark.parametrize("room", [12, 8])  # patches of an image; without room they travel by themselves
def test_processes_cut_as_threads_do(backbone: Backbone, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "_shape_of_pixels", lambda _params, n: (cutting.AHEAD * n + 1, room, 32, 32, 3))

    def unreadable() -> bytes:
        raise UnreadableImage("It was lost.")

    images = [*files(9), ("empty", stored(b"")), ("lost", unreadable), *files(9)]
    in_threads = list(extract_features(images, backbone, PARAMS))
    in_processes = list(extract_features(images, backbone, PARAMS, n_processes=2))
    assert {len(result.boxes) > 8 for result in usable(in_threads)} == {True, False}
    assert [result.key for result in in_processes] == [key for key, _ in images]
    for one, other in zip(in_threads, in_processes, strict=True):
        if isinstance(one, ImageFeatures):
            assert isinstance(other, ImageFeatures)
            assert (one.features == other.features).all()
            assert (one.boxes == other.boxes).all()
            assert one.frame == other.frame
        else:
            assert one == other
    assert not multiprocessing.active_children()


def test_a_network_that_is_not_on_the_cpu_has_a_thread_of_its_own(backbone: Backbone) -> None:
    class Elsewhere:
        digest, feature_dim, max_batch = backbone.digest, backbone.feature_dim, backbone.max_batch
        device = torch.device("cuda")
        threads, sizes = set[int](), list[int]()

        def features(self, images: torch.Tensor) -> torch.Tensor:
            self.threads.add(threading.get_ident())
            self.sizes.append(len(images))
            return backbone.features(images)

    elsewhere = Elsewhere()
    found = usable(list(extract_features(files(9), elsewhere, PARAMS, batch_size=7)))
    assert len(elsewhere.threads) == 1
    assert set(elsewhere.sizes[:-1]) == {7}  # across images
    for one, other in zip(usable(list(extract_features(files(9), backbone, PARAMS))), found, strict=True):
        np.testing.assert_allclose(one.features, other.features, rtol=2e-3, atol=2e-3)
    assert not threads_left()


def test_processes_end_when_nobody_listens_any_more_or_one_is_killed(backbone: Backbone) -> None:
    data = picture(0)
    for end in ("closed", "killed"):
        results = extract_features(((str(i), stored(data)) for i in count()), backbone, PARAMS, n_processes=2)
        next(results)
        children = multiprocessing.active_children()
        assert len(children) == 2
        if end == "closed":
            results.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
        else:
            children[0].kill()
            with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
                list(results)
        assert not multiprocessing.active_children()
        assert not threads_left()


def test_processes_end_with_the_one_they_cut_for() -> None:
    """Whatever ends it: they would wait for work for ever."""
    code = (
        "import multiprocessing; from itertools import repeat; from models.data.images import DEFAULT_LIMITS; "
        "from models.embedding.cutting import cut_in_processes; from models.params import PatchParams; "
        "cut = cut_in_processes(repeat(('image', bytes)), PatchParams(size=32), DEFAULT_LIMITS, 2); next(cut); "
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True); list(cut)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        children = [Path("/proc", pid) for pid in process.stdout.readline().decode().split()]
        assert len(children) == 2
        assert all(child.exists() for child in children)
        process.kill()
    deadline = time.monotonic() + 20
    while any(child.exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_need_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_of(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=free))

    disk_of(64 * 2**20)
    assert has_room_for_processes(PatchParams(), 2)
    assert not has_room_for_processes(PatchParams(), 4)
    disk_of(2**30)
    assert has_room_for_processes(PatchParams(), 8)


def test_unreadable_images_are_reported_in_their_place(backbone: Backbone) -> None:
    data: dict[str, bytes] = {
        "empty": b"",
        "a": picture(1),
        "text": b"hello" * 50,
        "cut": picture(2)[:200],
        "b": picture(3),
    }
    results = list(extract_features([(key, stored(d)) for key, d in data.items()], backbone, PARAMS))
    assert [result.key for result in results] == list(data)
    assert [isinstance(result, ImageFailure) for result in results] == [True, False, True, True, False]
    assert all(result.reason for result in results if isinstance(result, ImageFailure))


def test_no_images_and_only_bad_images(backbone: Backbone) -> None:
    assert list(extract_features([], backbone, PARAMS)) == []
    results = list(extract_features([(str(i), lambda: b"") for i in range(30)], backbone, PARAMS))
    assert len(results) == 30
    assert not usable(results)


def test_any_other_error_passes_and_leaves_no_thread(backbone: Backbone) -> None:
    def lost() -> bytes:
        raise OSError("the disk is gone")

    images = [*files(3), ("lost", lost), *files(30)]
    with pytest.raises(OSError, match="the disk is gone"):
        list(extract_features(images, backbone, PARAMS))
    assert not threads_left()


def test_stopping_early_starts_no_further_image_and_leaves_no_thread(backbone: Backbone) -> None:
    read: list[str] = []

    def noted(key: str, data: bytes) -> Callable[[], bytes]:
        def read_it() -> bytes:
            read.append(key)
            return data

        return read_it

    data = picture(0)
    results = extract_features(((str(i), noted(str(i), data)) for i in range(1000)), backbone, PARAMS)
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    assert len(read) < 50
    assert not threads_left()


def test_images_are_read_when_their_turn_comes(backbone: Backbone) -> None:
    """Memory stays flat: a slow consumer finds a bounded number of images ahead of it."""
    n_asked = 0

    def endless() -> Iterator[tuple[str, Callable[[], bytes]]]:
        nonlocal n_asked
        data = picture(0)
        while True:
            n_asked += 1
            yield str(n_asked), lambda: data

    results = extract_features(endless(), backbone, PARAMS, n_threads=2)
    ahead = [n_asked - given_out for given_out, _ in zip(range(1, 60), results, strict=False)]
    results.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    assert max(ahead) <= 16


def test_torch_threads_of_the_caller_are_left_alone(backbone: Backbone) -> None:
    before = torch.get_num_threads()
    list(extract_features(files(4), backbone, PARAMS))
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_features_beyond_half_precision_are_clipped(backbone: Backbone) -> None:
    class Loud(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).mean(dim=(2, 3)) * 0 + 1e6

    module = Loud()
    loud = Backbone("loud", module, module.layer, 32)
    result = usable(list(extract_features(files(1), loud, PARAMS)))[0]
    assert (result.features == 65504).all()


def test_pictures_are_decoded_no_larger_than_patches_need() -> None:
    assert decoded_side(PatchParams(method="whole", size=96)) == 96
    assert decoded_side(PatchParams(size=96)) == 288
    assert decoded_side(PatchParams(size=16)) == 256
    assert decoded_side(PatchParams(size=1024)) == 1024
