"""Tables with one vector a class: attributes, or class vectors made elsewhere. Read by `table_files.py`."""

from __future__ import annotations

import bisect
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.errors import InvalidInput, ShapeMismatch
from models.knowledge.base import Lookup, Resolution, Vectors
from models.knowledge.names import MAX_NAMES, normalize_class_name, quote, strip_index, validate_class_names

TableKind = Literal["class_vectors", "attributes"]
MAX_DIM = 65_536
MAX_CELLS = 500_000_000  # 2 GB of float32

_ARRAYS_FILE = "class_table.safetensors"
_NAMES_FILE = "class_table.json"
_FORMAT = "unseen class table 1"
_MAX_SUGGESTED_NAMES = 50
_MAX_COMPARED = 2000


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Vectors of classes. Make it with `class_table` or the readers of `table_files.py`, which check everything.

    class_names: in the file's order and spelling.
    vectors: (n_classes, dim) float32, finite, no zero row.
    attribute_names: what the dimensions mean (attributes only), or None.
    attribute_vectors: (dim, d) float32, a word vector of each attribute's name, or None.
    """

    kind: TableKind
    class_names: tuple[str, ...]
    vectors: Vectors
    attribute_names: tuple[str, ...] | None = None
    attribute_vectors: Vectors | None = None
    _row_of: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = {normalize_class_name(name): i for i, name in enumerate(self.class_names)}
        # '002.Laysan_Albatross' also answers to 'Laysan Albatross', unless that is another class.
        without_index: dict[str, list[int]] = {}
        for i, name in enumerate(self.class_names):
            without_index.setdefault(normalize_class_name(strip_index(name)), []).append(i)
        for key, found in without_index.items():
            if len(found) == 1:
                rows.setdefault(key, found[0])
        object.__setattr__(self, "_row_of", rows)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    def lookup(self, names: Sequence[str]) -> Lookup:
        """Vectors (n_names, dim) of `names`, compared normalised; zero rows, with suggestions, where missing."""
        vectors = np.zeros((len(names), self.dim), np.float32)
        resolutions: list[Resolution] = []
        n_missing = 0
        for i, name in enumerate(names):
            row = self._row(name)
            if row is None:
                n_missing += 1
                near = self._near(name) if n_missing <= _MAX_SUGGESTED_NAMES else ()
                resolutions.append(Resolution(name, False, "not found", missing_tokens=(name,), suggestions=near))
            else:
                vectors[i] = self.vectors[row]
                entry = self.class_names[row]
                resolutions.append(Resolution(name, True, _how(name, entry), (entry,)))
        return Lookup(tuple(names), vectors, tuple(resolutions))

    def _row(self, name: str) -> int | None:
        for spelling in (name, strip_index(name)):
            if (row := self._row_of.get(normalize_class_name(spelling))) is not None:
                return row
        return None

    def _near(self, name: str) -> tuple[str, ...]:
        """Classes spelled most like `name`, or that share a whole word with it."""
        key = normalize_class_name(strip_index(name))
        keys = difflib.get_close_matches(key, self._candidates(key), n=3, cutoff=0.65)
        for word in key.split():
            keys += self._keys_with_word.get(word, ())[:3]
        return tuple(dict.fromkeys(self.class_names[self._row_of[k]] for k in keys))[:3]

    def _candidates(self, key: str) -> list[str]:
        """All classes to compare a misspelled name with; in a large table, its neighbours in the alphabet."""
        keys = self._sorted_keys
        if len(keys) > _MAX_COMPARED:
            middle = bisect.bisect_left(keys, key)
            keys = keys[max(0, middle - _MAX_COMPARED // 2) : middle + _MAX_COMPARED // 2]
        return [k for k in keys if abs(len(k) - len(key)) <= 4]

    @cached_property
    def _sorted_keys(self) -> list[str]:
        return sorted(self._row_of)

    @cached_property
    def _keys_with_word(self) -> dict[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for key in self._row_of:
            for word in key.split():
                keys.setdefault(word, []).append(key)
        return keys

    def save(self, directory: Path | str) -> None:
        """Write `class_table.safetensors` and `class_table.json` into the existing `directory`."""
        directory = Path(directory)
        arrays: dict[str, np.ndarray[Any, Any]] = {"vectors": self.vectors}
        if self.attribute_vectors is not None:
            arrays["attribute_vectors"] = self.attribute_vectors
        save_file(arrays, directory / _ARRAYS_FILE)
        names = {
            "format": _FORMAT,
            "kind": self.kind,
            "class_names": self.class_names,
            "attribute_names": self.attribute_names,
        }
        (directory / _NAMES_FILE).write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> ClassTable:
        """What `save` wrote, checked again. InvalidInput if it is missing or damaged."""
        directory = Path(directory)
        try:
            names = json.loads((directory / _NAMES_FILE).read_text(encoding="utf-8"))
            if names["format"] != _FORMAT:
                raise ValueError(f"{_NAMES_FILE} is not of format {_FORMAT!r}")
            arrays = load_file(directory / _ARRAYS_FILE)
            given = names["kind"], names["class_names"], arrays["vectors"], names["attribute_names"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidInput(f"No usable class table in {directory.name!r}: {error}. Make it again.") from error
        return class_table(*given, arrays.get("attribute_vectors"))


def attribute_groups(names: Sequence[str]) -> tuple[int, ...] | None:
    """Number of each dimension's group, where all are named 'group::value' as in CUB's lists; else None."""
    parts = [name.partition("::") for name in names]
    if not parts or not all(separator for _, separator, _ in parts):
        return None
    number = {group: i for i, group in enumerate(dict.fromkeys(group for group, _, _ in parts))}
    return tuple(number[group] for group, _, _ in parts)


def class_table(
    kind: TableKind,
    class_names: Iterable[str],
    vectors: object,
    attribute_names: Iterable[str] | None = None,
    attribute_vectors: object | None = None,
) -> ClassTable:
    """A checked ClassTable from loose parts.

    Raises InvalidInput (ShapeMismatch where lengths disagree) for: names that `validate_class_names` refuses; arrays
    that are not numeric or not 2-D; NaN, infinite or all-zero vectors; no classes; more than 65,536 dimensions.
    """
    if kind not in ("class_vectors", "attributes"):
        raise InvalidInput(f"A class table is of kind 'class_vectors' or 'attributes', not {kind!r}.", field="kind")
    names = validate_class_names(class_names)
    if not names:
        raise InvalidInput("The table has no classes.", field="class_names")
    matrix = _matrix(vectors, "vectors")
    if len(matrix) != len(names):
        raise ShapeMismatch(
            f"{len(names)} class names but {len(matrix)} vectors of shape {matrix.shape}. Give one row a class.",
            field="vectors",
        )
    _check_rows(matrix, names, "class")
    labels = _attribute_names(attribute_names, matrix.shape[1])
    meanings = None if attribute_vectors is None else _matrix(attribute_vectors, "attribute_vectors")
    if meanings is not None:
        if len(meanings) != matrix.shape[1]:
            raise ShapeMismatch(
                f"attribute_vectors has {len(meanings)} rows {meanings.shape}, but the classes have {matrix.shape[1]} "
                f"attributes {matrix.shape}. Give one row an attribute.",
                field="attribute_vectors",
            )
        _check_rows(meanings, labels or tuple(map(str, range(len(meanings)))), "attribute", zero_allowed=True)
    return ClassTable(kind, names, matrix, labels, meanings)


def _matrix(values: object, name: str) -> Vectors:
    """`values` as a C-contiguous float32 matrix of allowed size."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged rows
        raise InvalidInput(f"{name} is not a matrix: its rows differ in length.", field=name) from error
    if array.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} must hold numbers, but it is of type {array.dtype}.", field=name)
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidInput(f"{name} must be a non-empty matrix, one row each; it has shape {array.shape}.", field=name)
    if array.shape[1] > MAX_DIM:
        raise InvalidInput(f"{name} has {array.shape[1]} dimensions; at most {MAX_DIM} are allowed.", field=name)
    if array.size > MAX_CELLS:
        raise InvalidInput(f"{name} of shape {array.shape} has more than {MAX_CELLS} numbers.", field=name)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _check_rows(matrix: Vectors, names: Sequence[str], what: str, *, zero_allowed: bool = False) -> None:
    """No NaN, no infinity (in float32), no zero vector: all have no direction."""
    finite = np.isfinite(matrix)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        n_more = int((~finite).any(axis=1).sum()) - 1
        more = f", and in {n_more} more" if n_more else ""
        raise InvalidInput(
            f"The vector of {what} {quote(names[row])} has {matrix[row, column]} at position {column}{more}. "
            f"Numbers must be finite and fit float32.",
            field=f"vectors/{row}/{column}",
        )
    if not zero_allowed and not (nonzero := matrix.any(axis=1)).all():
        zero = [quote(names[int(i)]) for i in np.flatnonzero(~nonzero)]
        shown = ", ".join(zero[:5]) + (f" and {len(zero) - 5} more" if len(zero) > 5 else "")
        raise InvalidInput(f"The vector of {what} {shown} is all zero. Leave classes without knowledge out.")


def _attribute_names(names: Iterable[str] | None, dim: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    labels = tuple(str(name).strip() for name in names)
    if len(labels) != dim:
        raise ShapeMismatch(f"{len(labels)} attribute names but vectors of {dim} numbers.", field="attribute_names")
    return labels


def _how(name: str, entry: str) -> str:
    if name == entry:
        return "exact"
    return "case-folded" if name.casefold() == entry.casefold() else f"spelled {entry}"


__all__ = ["MAX_DIM", "MAX_NAMES", "ClassTable", "TableKind", "class_table"]
