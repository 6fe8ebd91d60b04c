"""What every knowledge source answers: vectors for class names, and how each name was resolved. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import MissingKnowledge

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Resolution:
    """How one class name was resolved.

    how: 'exact', 'case-folded', 'spelled polar_bear', 'singular of mice: mouse', 'plural of mouse: mice',
        'averaged tokens: polar, bear', 'partial: bear (without grizzly)', 'encoded: a photo of a bear', 'not found'.
    tokens: entries of the source that make up the vector.
    missing_tokens: words of the name that the source does not have (all of them when not found).
    suggestions: near entries of the source, for what is missing.
    """

    name: str
    found: bool
    how: str
    tokens: tuple[str, ...] = ()
    missing_tokens: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """What to know about a vector that leaves out some words of the name; None for all others."""
        if not self.found or not self.missing_tokens:
            return None
        near = f" Near entries: {_quoted(self.suggestions)}." if self.suggestions else ""
        return (
            f"Of {self.name!r} the knowledge source knows {_quoted(self.tokens)} but not {_quoted(self.missing_tokens)}"
            f", so its vector says nothing about the latter.{near}"
        )


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words))


@dataclass(frozen=True)
class Lookup:
    """The answer to `lookup`: row i of `vectors` (n_names, dim) float32 belongs to `names[i]`; zero where missing."""

    names: tuple[str, ...]
    vectors: Vectors
    resolutions: tuple[Resolution, ...]

    @property
    def missing(self) -> tuple[Resolution, ...]:
        """The names without a vector."""
        return tuple(r for r in self.resolutions if not r.found)

    @property
    def partial(self) -> tuple[Resolution, ...]:
        """The names whose vector leaves out some of their words."""
        return tuple(r for r in self.resolutions if r.found and r.missing_tokens)

    @property
    def warnings(self) -> list[str]:
        """A sentence about each of `partial`."""
        return [r.warning for r in self.resolutions if r.warning is not None]


class KnowledgeSource(Protocol):
    """Word vectors, class tables and text encoders alike."""

    @property
    def kind(self) -> str:
        """'word_vectors', 'class_vectors', 'attributes' or 'text_encoder'."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def lookup(self, names: Sequence[str]) -> Lookup:
        """Vectors of `names`, in that order; never raises for a name that is not known."""
        ...


def require(lookup: Lookup, *, allow_partial: bool = True, field: str | None = None) -> Vectors:
    """`lookup.vectors` (n_names, dim), all rows known; MissingKnowledge with suggestions otherwise.

    With `allow_partial=False` a multi-word name of which a word is missing counts as missing too.
    """
    bad = [r for r in lookup.resolutions if not r.found or (r.missing_tokens and not allow_partial)]
    if bad:
        raise MissingKnowledge([r.name for r in bad], {r.name: r.suggestions for r in bad}, field=field)
    return lookup.vectors
