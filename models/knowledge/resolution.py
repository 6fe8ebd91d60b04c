"""From a class name to entries of a word-vector vocabulary: whole name first, then the average of its words.

Order for each piece: as written; same letters in another case or with other separators (`polar_bear`, `Polar-Bear`;
the most frequent spelling wins); the other grammatical number. Multi-word names that the vocabulary does not have
as one token become the plain mean of their words' vectors (VGSE does not say more; algorithms.md section 1.1).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.knowledge.base import Resolution
from models.knowledge.names import normalize_class_name, number_variants, split_words, strip_index, tokens_of

N_SUGGESTIONS = 3


class Vocabulary(Protocol):
    """The tokens of a word-vector file; rows ascend with falling frequency, as such files are sorted."""

    def exact(self, token: str) -> int | None:
        """Row of `token`, spelled exactly so."""
        ...

    def spelled(self, key: str) -> tuple[str, int] | None:
        """Most frequent token whose `normalize_class_name` is `key`, with its row."""
        ...

    def starting_with(self, prefix: str, min_length: int, max_length: int) -> Sequence[str]:
        """Normalised frequent tokens with that prefix and a length between the two, most frequent first."""
        ...


@dataclass(frozen=True)
class _Hit:
    token: str
    row: int
    how: str


def resolve(name: str, vocabulary: Vocabulary, *, suggest: bool = True) -> tuple[Resolution, tuple[int, ...]]:
    """(how `name` resolves, rows whose mean is its vector); no rows if it does not."""
    if (hit := _find(name.strip(), vocabulary)) is not None:
        return Resolution(name, True, hit.how, (hit.token,)), (hit.row,)
    hits, missing = _find_words(name, vocabulary)
    suggestions = _suggest(missing, vocabulary) if suggest else ()
    if not hits:
        return Resolution(name, False, "not found", (), missing, suggestions), ()
    tokens = tuple(hit.token for hit in hits)
    how = f"averaged tokens: {', '.join(tokens)}"
    if missing:
        how = f"partial: {', '.join(tokens)} (without {', '.join(missing)})"
    return Resolution(name, True, how, tokens, missing, suggestions), tuple(hit.row for hit in hits)


def _find(text: str, vocabulary: Vocabulary) -> _Hit | None:
    """One entry for the whole of `text`."""
    if (row := vocabulary.exact(text)) is not None:
        return _Hit(text, row, "exact")
    key = normalize_class_name(strip_index(text))
    if not key:
        return None
    if (found := vocabulary.spelled(key)) is not None:
        same_letters = found[0].casefold() == text.casefold()
        return _Hit(*found, "case-folded" if same_letters else f"spelled {found[0]}")
    *head, last = key.split(" ")
    for number, form in number_variants(last):
        if (found := vocabulary.spelled(" ".join([*head, form]))) is not None:
            return _Hit(*found, f"{number} of {key}: {found[0]}")
    return None


def _find_words(name: str, vocabulary: Vocabulary) -> tuple[list[_Hit], tuple[str, ...]]:
    """The entries of the words of `name`, and the words that have none."""
    hits: list[_Hit] = []
    missing: list[str] = []
    for token in tokens_of(name):
        whole = _find(token, vocabulary)
        pieces = () if whole else split_words(token)
        found = [whole] if whole else [_find(piece, vocabulary) for piece in pieces] if len(pieces) > 1 else [None]
        if any(found):
            hits.extend(hit for hit in found if hit is not None)
            missing.extend(piece for piece, hit in zip(pieces, found, strict=False) if hit is None)
        else:
            missing.append(token)
    return hits, tuple(missing)


def _suggest(missing: Sequence[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Near entries for each of the first few missing words."""
    near: dict[str, None] = {}
    for word in missing[:5]:
        key = normalize_class_name(word)
        if (pair := _two_words(key, vocabulary)) is not None:
            near[pair] = None
        near.update(dict.fromkeys(_near_words(key, vocabulary)))
    return tuple(near)[: max(N_SUGGESTIONS, len(missing))]


def _near_words(key: str, vocabulary: Vocabulary) -> list[str]:
    """Entries spelled most like `key` among the frequent ones that begin alike."""
    prefix = key[: 1 if len(key) < 4 else 2]
    candidates = vocabulary.starting_with(prefix, len(key) - 3, len(key) + 3) if prefix else ()
    return difflib.get_close_matches(key, candidates, n=N_SUGGESTIONS, cutoff=0.65)


def _two_words(key: str, vocabulary: Vocabulary) -> str | None:
    """`key` cut into two known words ('polarbear': 'polar bear'), the pair whose rarer word is most frequent."""
    best: tuple[int, str] | None = None
    for cut in range(3, min(len(key), 40) - 2):
        left, right = vocabulary.exact(key[:cut]), vocabulary.exact(key[cut:])
        if left is not None and right is not None and (best is None or max(left, right) < best[0]):
            best = max(left, right), f"{key[:cut]} {key[cut:]}"
    return best[1] if best else None
