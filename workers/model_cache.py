"""Loaded models, kept while they fit: least recently used out first, by the bytes they really take."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch

V = TypeVar("V")
Parts = Mapping[int, int]
"""Identity of each part of a value -> its bytes; a part that several values share counts once."""
MEASURE_EVERY = 100
"""Uses after which all is measured again: classifiers keep what they generate or train for new classes."""


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
        self._of_thread = threading.local()
        self._n_uses = 0

    def get(self, key: str, make: Callable[[], V], *, fits: Callable[[V], bool] = lambda _: True) -> V:
        """The value of `key`, from `make` where none is held that `fits`; what that raises passes through."""
        if (asked := self._asked_together()) is not None:
            asked.add(key)
        value = self.held(key)
        if value is not None and fits(value):
            self._n_uses += 1  # a few that threads lose do no harm
            if self._n_uses % MEASURE_EVERY == 0:
                self._fit({key})
            return value
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            value = self.held(key)
            if value is not None and fits(value):
                return value
            value = make()
            with self._lock:
                self._values[key] = (value, {})
                self._values.move_to_end(key)
                self._making.pop(key, None)
            self._fit({key})
            return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever this thread asks for within stays while it asks for more, even beyond the limit: it needs all."""
        self._of_thread.asked = set()
        try:
            yield
        finally:
            self._of_thread.asked = None

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

    def _asked_together(self) -> set[str] | None:
        return getattr(self._of_thread, "asked", None)

    def _fit(self, used: Set[str]) -> None:
        """Measure all values anew, and throw out the oldest but `used` until the rest fit."""
        with self._lock:
            held = [(key, value) for key, (value, _) in self._values.items()]
        measured = [(key, value, dict(self._parts_of(value))) for key, value in held]
        kept = used | (self._asked_together() or set())
        with self._lock:
            for key, value, parts in measured:
                if key in self._values and self._values[key][0] is value:
                    self._values[key] = (value, parts)
            for key in [key for key in self._values if key not in kept]:
                if self._n_bytes() <= self._max_bytes:
                    break
                del self._values[key]

    def _n_bytes(self) -> int:
        together: dict[int, int] = {}
        for _, parts in self._values.values():
            together.update(parts)
        return sum(together.values())


def parts_of(value: object) -> Parts:
    """The arrays and tensors in `value`, however deep; texts, numbers and containers together count as the value's own.

    A network that tells bytes of its own is taken at its word, beside the backbone that it stands for. Memory-mapped
    files are the system's to keep.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()
    own, stack = 0, [value]
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        size, inner = _measured(part)
        stack.extend(inner)
        if isinstance(part, torch.Tensor | np.ndarray) or hasattr(part, "n_bytes"):
            found[id(part)] = size
        else:
            own += size
    return {id(value): own, **found}


def _measured(part: Any) -> tuple[int, Iterable[object]]:
    """Bytes of a part alone, and what else is in it."""
    if isinstance(part, torch.Tensor):
        return part.numel() * part.element_size(), ()
    if isinstance(part, np.ndarray):
        return (0 if isinstance(part, np.memmap) else part.nbytes), ()
    if isinstance(part, torch.nn.Module):
        return 0, (*part.parameters(), *part.buffers())
    if isinstance(part, str | bytes | int | float):
        return sys.getsizeof(part), ()
    if isinstance(part, dict):  # the copies are made at once: other threads may add to what a classifier keeps
        return sys.getsizeof(part), (*tuple(part), *tuple(part.values()))
    if isinstance(part, list | tuple | set | frozenset):
        return sys.getsizeof(part), tuple(part)
    if isinstance(part, type | ModuleType | FunctionType | MethodType):
        return 0, ()
    if isinstance(n_bytes := getattr(part, "n_bytes", None), int):
        return n_bytes, (getattr(part, "backbone", None),)
    return 0, tuple(getattr(part, "__dict__", {}).values())
