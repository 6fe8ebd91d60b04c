"""Models kept by their real size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from workers.model_cache import ModelCache, array_bytes, resident_parts
from workers.predictions import Resident


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


def test_bytes_are_measured() -> None:
    assert array_bytes(torch.nn.Linear(10, 5)) == (50 + 5) * 4
    assert array_bytes(np.zeros((3, 4), np.float16)) == 24

    class Holder:
        def __init__(self) -> None:
            self.weight = torch.zeros(7, dtype=torch.float64)
            self.table = np.zeros(2)
            self.name = "x"

    backbone: Any = Holder()
    classifier: Any = Holder()
    table = np.zeros((2, 3), np.float32)
    resident = Resident(classifier, backbone, 8, ("a", "b"), table, np.zeros(2, np.bool_), 0.0, 1.0)
    assert sorted(resident_parts(resident).values()) == [24, 72, 72]
