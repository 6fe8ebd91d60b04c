"""Loaded models, kept while they fit: least recently used out first, by the bytes they really take."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import numpy as np
import torch

from workers.predictions import Resident

V = TypeVar("V")
Parts = Mapping[int, int]
"""Identity of each part of a value -> its bytes; a part that several values share counts once."""


class ModelCache(Generic[V]):
    """Values by key, made on demand, each once however many threads ask; together at most `max_bytes`.

    parts: tells what a value is made of and how large that is. The value asked for last always stays, even alone
    beyond the limit. A value that is thrown out lives on for whoever still holds it.
    """

    def __init__(self, max_bytes: int, parts: Callable[[V], Parts]) -> None:
        self._max_bytes = max_bytes
        self._parts_of = parts
        self._values: OrderedDict[str, tuple[V, Parts]] = OrderedDict()
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], V]) -> V:
        """The value of `key`, from `make` where it is not held; what that raises passes through."""
        value = self.held(key)
        if value is not None:
            return value
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            value = self.held(key)
            if value is not None:
                return value
            value = make()
            with self._lock:
                self._values[key] = (value, dict(self._parts_of(value)))
                self._making.pop(key, None)
                while len(self._values) > 1 and self._n_bytes() > self._max_bytes:
                    self._values.popitem(last=False)
            return value

    def held(self, key: str) -> V | None:
        """The value of `key`, if it is there already."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def drop(self, key: str) -> None:
        """Forget `key`, if held."""
        with self._lock:
            self._values.pop(key, None)

    def names(self) -> list[str]:
        """What is held, the one used last at the end."""
        with self._lock:
            return list(self._values)

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is held, shared parts once."""
        with self._lock:
            return self._n_bytes()

    def _n_bytes(self) -> int:
        together: dict[int, int] = {}
        for _, parts in self._values.values():
            together.update(parts)
        return sum(together.values())


def resident_parts(resident: Resident) -> Parts:
    """Backbone, classifier and class table of a resident, each with its bytes of parameters and arrays."""
    own = {id(part): array_bytes(part) for part in (resident.classifier, resident.embeddings)}
    return {**parts_of(resident.backbone), **own}


def parts_of(value: object) -> Parts:
    """A value; a view of a backbone weighs nothing beside it unless it tells bytes of its own."""
    backbone = getattr(value, "backbone", value)
    return {id(value): getattr(value, "n_bytes", 0), id(backbone): array_bytes(backbone)}


def array_bytes(value: object) -> int:
    """Bytes of the tensors and arrays in `value` or in its attributes (a module's parameters and buffers, too)."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, torch.nn.Module):
        return sum(array_bytes(tensor) for tensor in (*value.parameters(), *value.buffers()))
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    return sum(array_bytes(part) for part in held if isinstance(part, torch.Tensor | np.ndarray | torch.nn.Module))
