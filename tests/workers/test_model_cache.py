"""Models kept by their real size."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers.model_cache import MEASURE_EVERY, ModelCache, parts_of


def parts(value: tuple[str, int]) -> dict[int, int]:
    return {hash(value[0]): value[1]}


def thirty(key: str) -> Callable[[], tuple[str, int]]:
    return lambda: (key, 30)


def test_least_recently_used_goes_first_and_only_when_needed() -> None:
    cache: ModelCache[tuple[str, int]] = ModelCache(100, parts)
    for key in "abc":
        cache.get(key, thirty(key))
    cache.get("a", lambda: pytest.fail("held already"))
    cache.get("d", lambda: ("d", 30))
    assert cache.names() == ["c", "a", "d"]
    assert cache.n_bytes == 90
    cache.get("big", lambda: ("big", 500))
    assert cache.names() == ["big"]
    cache.drop("big")
    assert cache.n_bytes == 0


def test_shared_part_counts_once() -> None:
    shared, one, two = object(), object(), object()
    cache: ModelCache[tuple[object, ...]] = ModelCache(100, lambda value: {id(part): 40 for part in value})
    cache.get("one", lambda: (shared, one))
    assert cache.n_bytes == 80
    cache.get("two", lambda: (shared, two))  # 120 with the shared part once: one goes
    assert cache.names() == ["two"]


def test_many_threads_make_a_value_once_and_a_failure_is_tried_again() -> None:
    cache: ModelCache[tuple[str, int]] = ModelCache(100, parts)
    made: list[int] = []

    def make() -> tuple[str, int]:
        made.append(1)
        time.sleep(0.05)
        if len(made) == 1:
            raise OSError("disk gone")
        return ("a", 1)

    with pytest.raises(OSError, match="disk gone"):
        cache.get("a", make)
    threads = [threading.Thread(target=cache.get, args=("a", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2


class Holder:
    """Keeps what it is given."""

    def __init__(self, **kept: Any) -> None:
        vars(self).update(kept)


def test_all_that_a_value_holds_is_measured() -> None:
    assert sum(parts_of(torch.nn.Linear(10, 5)).values()) == (50 + 5) * 4
    assert sum(parts_of(np.zeros((3, 4), np.float16)).values()) == 24
    text, rows, generated = "a class name that is long" * 9, torch.zeros(7, dtype=torch.float64), torch.zeros(5)
    inner = Holder(rows=rows, generated={b"key": (generated, generated)}, self_again=None, function=len, kind=Holder)
    inner.self_again = inner  # type: ignore[attr-defined]  # a holder holds anything
    value = Holder(inner=inner, table=np.zeros(2), names=(text,), text=text)
    found = parts_of(value)
    assert (found[id(rows)], found[id(generated)]) == (56, 20)
    assert sum(found.values()) - 56 - 20 - 16 == found[id(value)]
    assert sys.getsizeof(text) < found[id(value)] < sys.getsizeof(text) + 1000
    backbone = Holder(weights=np.zeros(8))
    prepared = Holder(n_bytes=1000, backbone=backbone, run=Holder(copies=np.zeros(99)))
    assert sum(parts_of(prepared).values()) == 1064


def test_memory_mapped_files_do_not_count(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.zeros(1000))
    assert sum(parts_of(Holder(vectors=np.load(tmp_path / "vectors.npy", mmap_mode="r"))).values()) == 0


def test_what_has_grown_is_noticed_when_more_comes_and_now_and_then() -> None:
    cache: ModelCache[list[int]] = ModelCache(100, lambda value: {id(value): sum(value)})
    for key in "abc":
        cache.get(key, lambda: [30])
    cache.get("c", list).append(40)
    cache.get("d", lambda: [20])
    assert cache.names() == ["c", "d"]
    cache.get("d", list).append(20)
    for _ in range(MEASURE_EVERY):
        cache.get("d", list)
    assert cache.names() == ["d"]


def test_what_one_request_needs_stays_together() -> None:
    cache: ModelCache[tuple[str, int]] = ModelCache(50, parts)
    cache.get("a", thirty("a"))
    with cache.together():
        for key in "bcd":
            cache.get(key, thirty(key))
        assert cache.names() == ["b", "c", "d"]
    cache.get("e", thirty("e"))
    assert cache.names() == ["e"]


def test_a_value_that_no_longer_fits_is_made_anew_in_its_place() -> None:
    cache: ModelCache[tuple[str, int]] = ModelCache(100, parts)
    for version in (1, 2, 2, 1):
        cache.get("a", lambda made=version: ("a", made), fits=lambda value, least=version: value[1] >= least)
    assert cache.get("a", lambda: pytest.fail("held already")) == ("a", 2)
    assert cache.n_bytes == 2
