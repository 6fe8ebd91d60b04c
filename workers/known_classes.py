"""The classes that a loaded classifier knows, and those of them that compete in one request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np

from models.base import FloatArray
from models.knowledge.names import normalize_class_name
from workers.model_cache import Parts, parts_of
from workers.predictions import Resident


@dataclass(frozen=True)
class Competing:
    """A classifier with the classes that compete in one request, and what is known of their origin.

    names: those that compete, where the resident knows more: its scores then depend on all it knows.
    """

    resident: Resident
    provenance: dict[str, dict[str, Any]]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class KnownClasses:
    """All classes of a classifier at one version of its embedding set, or a later one."""

    version: int
    names: tuple[str, ...]
    embeddings: FloatArray
    is_seen: np.ndarray[Any, np.dtype[np.bool_]]
    provenance: dict[str, dict[str, Any]]
    position: dict[str, int]

    @cached_property
    def parts(self) -> Parts:
        """What the cache counts; measured once, since nothing changes and there may be millions of texts."""
        everything = (self.names, self.embeddings, self.is_seen, self.provenance, self.position)
        return {id(self): sum(parts_of(everything).values())}

    def names_of(self, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[str, ...]:
        """Those where `chosen` is set."""
        return self.names if chosen.all() else tuple(compress(self.names, chosen))


def among_all(
    resident: Resident,
    table: KnownClasses,
    names: Sequence[str],
    embeddings: FloatArray,
    is_seen: np.ndarray[Any, Any],
    origin: dict[str, dict[str, Any]],
) -> Competing:
    """The named classes among all that the classifier knows: it is then trained once, not for every choice of them."""
    positions = [table.position.get(normalize_class_name(name)) for name in names]
    new = [i for i, position in enumerate(positions) if position is None]
    asked = dataclasses.replace(
        resident,
        class_names=(*table.names, *(names[i] for i in new)),
        embeddings=np.concatenate([table.embeddings, embeddings[new]]) if new else table.embeddings,
        is_seen=np.concatenate([table.is_seen, is_seen[new]]) if new else table.is_seen,
    )
    spelled = (name if p is None else table.names[p] for name, p in zip(names, positions, strict=True))
    return Competing(asked, origin, tuple(spelled))
