"""Ready-made image features with their zero-shot splits: xlsa17 `.mat` pairs and `.npz` files.

Source of the format: Xian et al., "Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the
Ugly" (TPAMI 2018), https://arxiv.org/abs/1707.00600. Its indices count from 1 and its arrays lie sideways; nothing
of that leaves this file. Its own train_loc/val_loc are not used as rows, because they overlap test_seen_loc.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.base import FloatArray, IntArray
from models.data.feature_files import read_mat, read_npz
from models.data.layout import MAX_SPLITS_BYTES, SPLITS_FILE, load_splits_object
from models.data.splits import ClassSplit, choose_validation_classes, list_names
from models.errors import InvalidInput, ShapeMismatch
from models.knowledge.names import MAX_NAMES, validate_class_names

DEFAULT_MAX_BYTES = 16 * 2**30
LARGEST_FEATURE = 1e15
"""Sums of squares of a hundred million numbers like it still fit float32."""

Rows = NDArray[np.int64]

_SPLIT_KEYS = ("trainval", "test_seen", "test_unseen")
_ROW_SETS = ("train_rows", "test_seen_rows", "test_unseen_rows")
_KNOWN_RELEASES: dict[tuple[str, ...], str] = {
    ("0f9371065449", "b41db328e9cd", "e77c88b48e6e"): "AWA2",
    ("a8d904fb46d1", "8db2270d1d35", "bc6c623579c4"): "SUN",
    ("8f246f278775", "ec80fe48780f", "7c43129c4b47"): "CUB",
    ("36babf86733c", "b4729fb6321d", "6136f4281fbe"): "AWA1",
}


@dataclass(frozen=True, eq=False)
class FeatureDataset:
    """Features of labelled images and the split they come with, checked.

    features: (n_images, feature_dim) float32, finite. labels: (n_images,) index into `class_names`.
    train_rows, test_seen_rows, test_unseen_rows: disjoint row numbers. Classes are in the order of `class_names`.
    class_embeddings: (n_classes, embedding_dim) float32 or None; class_embedding_names: one a column, or None.
    fingerprint: hashes and sizes of the split, to tell releases apart.
    """

    features: NDArray[np.float32]
    labels: Rows
    class_names: tuple[str, ...]
    seen_classes: tuple[str, ...]
    unseen_classes: tuple[str, ...]
    validation_classes: tuple[str, ...]
    train_rows: Rows
    test_seen_rows: Rows
    test_unseen_rows: Rows
    class_embeddings: NDArray[np.float32] | None = None
    class_embedding_names: tuple[str, ...] | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_features(self.features, self.labels, self.class_names)
        ClassSplit(self.seen_classes, self.unseen_classes, self.validation_classes)
        if unknown := sorted({*self.seen_classes, *self.unseen_classes} - set(self.class_names)):
            raise InvalidInput(f"The split names classes that the features do not have: {list_names(unknown)}.")
        _check_rows(self)
        _check_class_embeddings(self)


def load_xlsa17(res101: Path, att_splits: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> FeatureDataset:
    """Read `res101.mat` (features, labels, image_files) and `att_splits.mat` (att and the index vectors).

    Class names come from the folders in image_files, because allclasses_names need not be in label order. Validation
    classes are those of val_loc, used within trainval only. InvalidInput says which variable is wrong and how.
    """
    images = read_mat(res101, required=("features", "labels"), optional=("image_files",), max_bytes=max_bytes)
    splits = read_mat(
        att_splits,
        required=("trainval_loc", "test_seen_loc", "test_unseen_loc"),
        optional=("att", "allclasses_names", "val_loc", "train_loc"),
        max_bytes=max_bytes,
    )
    labels = _zero_based(images["labels"], "labels")
    features = _matrix(images["features"], "features", transposed=True)
    n_images = len(features)
    if len(labels) != n_images:
        raise ShapeMismatch(
            f"features has {n_images} columns but labels has {len(labels)} entries; one an image needed."
        )
    rows = {key: _zero_based(splits[f"{key}_loc"], f"{key}_loc", n_images) for key in _SPLIT_KEYS}
    att = _matrix(splits["att"], "att", transposed=True) if "att" in splits else None
    n_classes = len(att) if att is not None else _count_classes(labels)
    names, source = _class_names(labels, n_classes, images.get("image_files"), splits.get("allclasses_names"))
    names = validate_class_names(names)
    seen, unseen = (_classes_at(labels, rows[key], names) for key in ("trainval", "test_unseen"))
    return FeatureDataset(
        features=features,
        labels=labels,
        class_names=names,
        seen_classes=seen,
        unseen_classes=unseen,
        validation_classes=_xlsa17_validation(splits, labels, names, seen, n_images),
        train_rows=rows["trainval"],
        test_seen_rows=rows["test_seen"],
        test_unseen_rows=rows["test_unseen"],
        class_embeddings=att,
        fingerprint={**fingerprint_splits(**rows), "class_names_from": source},
    )


def load_feature_npz(
    path: Path, splits_json: Path | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES
) -> FeatureDataset:
    """Read an `.npz` with `features` (n, d), `labels` (n,) counted from 0 or class names, and optional `class_names`.

    The split is either in the file (`train_rows`, `test_seen_rows`, `test_unseen_rows`, and optional `seen_classes`,
    `unseen_classes`, `validation_classes`) or in a JSON object with `train`, `test_seen`, `test_unseen` row numbers
    and the same class lists: `splits_json`, else a splits.json beside the file. Optional `class_embeddings` (C, a)
    and `class_embedding_names` are taken along. InvalidInput says what is wrong.
    """
    arrays = read_npz(path, required=("features", "labels"), max_bytes=max_bytes)
    n_images, n_labels = len(np.atleast_1d(arrays["features"])), arrays["labels"].size
    if n_labels != n_images:
        raise ShapeMismatch(f"features has {n_images} rows but labels has {n_labels} entries; one an image needed.")
    labels, listed = _npz_labels(arrays)
    names = validate_class_names(listed)
    split = _npz_split(arrays) if "train_rows" in arrays else _json_split(path, splits_json)
    train, test_seen, test_unseen = (_rows(split.get(key), key, n_images) for key in _ROW_SETS)
    seen, unseen, validation = (_name_list(split, f"{kind}_classes") for kind in ("seen", "unseen", "validation"))
    if seen is None:
        seen = _classes_at(labels, train, names)
    embedding_names = arrays.get("class_embedding_names")
    return FeatureDataset(
        features=_matrix(arrays["features"], "features"),
        labels=labels,
        class_names=names,
        seen_classes=seen,
        unseen_classes=_classes_at(labels, test_unseen, names) if unseen is None else unseen,
        validation_classes=_default_validation(seen) if validation is None else validation,
        train_rows=train,
        test_seen_rows=test_seen,
        test_unseen_rows=test_unseen,
        class_embeddings=_matrix(arrays["class_embeddings"], "class_embeddings")
        if "class_embeddings" in arrays
        else None,
        class_embedding_names=None if embedding_names is None else tuple(map(str, embedding_names.tolist())),
        fingerprint=fingerprint_splits(train, test_seen, test_unseen),
    )


def fingerprint_splits(trainval: IntArray, test_seen: IntArray, test_unseen: IntArray) -> dict[str, Any]:
    """Hash and size of each row set (counted from 0), and the xlsa17 release that has these, or None.

    The hash is the first 12 hex digits of the SHA-1 of the sorted 1-based numbers as little-endian int32.
    """
    row_sets = dict(zip(_SPLIT_KEYS, (trainval, test_seen, test_unseen), strict=True))
    hashes = {
        key: hashlib.sha1(np.sort(rows + 1).astype("<i4").tobytes(), usedforsecurity=False).hexdigest()[:12]
        for key, rows in row_sets.items()
    }
    sizes = {f"n_{key}": len(rows) for key, rows in row_sets.items()}
    return {**hashes, **sizes, "release": _KNOWN_RELEASES.get(tuple(hashes.values()))}


def _xlsa17_validation(
    splits: Mapping[str, NDArray[Any]], labels: Rows, names: tuple[str, ...], seen: tuple[str, ...], n_images: int
) -> tuple[str, ...]:
    """The seen classes of val_loc, if it really divides by class; else a fixed choice of ours."""
    if "val_loc" in splits and "train_loc" in splits:
        train, val = (
            set(_classes_at(labels, _zero_based(splits[key], key, n_images), names)) for key in ("train_loc", "val_loc")
        )
        if val and not val & train and val < set(seen):
            return tuple(name for name in seen if name in val)
    return _default_validation(seen)


def _default_validation(seen: tuple[str, ...]) -> tuple[str, ...]:
    return choose_validation_classes(seen) if len(seen) >= 2 else ()


def _class_names(
    labels: Rows, n_classes: int, image_files: NDArray[Any] | None, listed: NDArray[Any] | None
) -> tuple[tuple[str, ...], str]:
    """Names in label order, and which variable gave them.

    Folders decide: for each label the longest end of its folder path (joined by _) that allclasses_names lists, else
    the last folder. Sets without a folder for each class fall back on allclasses_names, then on numbers.
    """
    listed_names = () if listed is None else tuple(str(name) for name in listed.ravel())
    if image_files is not None:
        if image_files.size != len(labels):
            raise ShapeMismatch(f"image_files has {image_files.size} entries but labels has {len(labels)}.")
        folders: dict[int, set[str]] = {}
        for label, file in zip(labels.tolist(), image_files.ravel().tolist(), strict=True):
            folders.setdefault(label, set()).add(str(file).strip().replace("\\", "/").rpartition("/")[0])
        if set(folders) == set(range(n_classes)) and all(len(found) == 1 for found in folders.values()):
            names = tuple(_folder_name(next(iter(folders[label])), set(listed_names)) for label in range(n_classes))
            if len(set(names)) == n_classes and all(names):
                return names, "image_files"
    if len(listed_names) == n_classes == len(set(listed_names)):
        return listed_names, "allclasses_names"
    return tuple(f"class_{label + 1:03d}" for label in range(n_classes)), "labels"


def _folder_name(folder: str, listed: set[str]) -> str:
    parts = folder.split("/")
    endings = ("_".join(parts[start:]) for start in range(max(len(parts) - 4, 0), len(parts)))
    return next((ending for ending in endings if ending in listed), parts[-1])


def _classes_at(labels: Rows, rows: Rows, names: tuple[str, ...]) -> tuple[str, ...]:
    present = np.unique(labels[rows])
    return tuple(names[label] for label in present if 0 <= label < len(names))


def _npz_labels(arrays: Mapping[str, NDArray[Any]]) -> tuple[Rows, tuple[str, ...]]:
    labels = arrays["labels"].ravel()
    listed = arrays.get("class_names")
    if labels.dtype.kind == "U":
        names = tuple(map(str, np.unique(labels).tolist() if listed is None else listed.tolist()))
        index = {name: position for position, name in enumerate(names)}
        if unknown := sorted(set(labels.tolist()) - set(index)):
            raise InvalidInput(f"labels holds names that class_names lacks: {list_names(unknown)}.", field="labels")
        return np.array([index[name] for name in labels.tolist()], dtype=np.int64), names
    whole = _whole_numbers(labels, "labels")
    if listed is None:
        return whole, tuple(f"class_{label:03d}" for label in range(_count_classes(whole)))
    return whole, tuple(map(str, listed.tolist()))


def _count_classes(labels: Rows) -> int:
    """As many as numbers up to the largest label, each of which gets a name."""
    n_classes = int(labels.max(initial=-1)) + 1
    if n_classes > MAX_NAMES:
        raise InvalidInput(
            f"labels goes up to class number {n_classes:,}; at most {MAX_NAMES:,} classes are allowed. Number them "
            "without gaps, or give their names.",
            field="labels",
        )
    return n_classes


def _npz_split(arrays: Mapping[str, NDArray[Any]]) -> dict[str, object]:
    return {
        key: arrays[key].tolist()
        for key in (*_ROW_SETS, "seen_classes", "unseen_classes", "validation_classes")
        if key in arrays
    }


def _json_split(path: Path, splits_json: Path | None) -> dict[str, object]:
    source = splits_json or path.with_name(SPLITS_FILE)
    if not source.is_file():
        raise InvalidInput(
            f"{path.name} has no train_rows, and there is no {source.name}. Add train_rows, test_seen_rows and "
            "test_unseen_rows to the file, or give a JSON object with 'train', 'test_seen' and 'test_unseen'."
        )
    with source.open("rb") as file:
        loaded = load_splits_object(file.read(MAX_SPLITS_BYTES + 1))
    return {**loaded, **{key: loaded.get(key, loaded.get(key.removesuffix("_rows"))) for key in _ROW_SETS}}


def _name_list(split: Mapping[str, object], key: str) -> tuple[str, ...] | None:
    value = split.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidInput(f"{key} must be a list of class names.", field=key)
    return tuple(name.strip() for name in value)  # as `validate_class_names` gives them


def _rows(value: object, key: str, n_images: int) -> Rows:
    if value is None:
        value = []
    if not isinstance(value, list) or not all(isinstance(row, int | float) for row in value):
        raise InvalidInput(f"{key} must be a list of row numbers counted from 0.", field=key)
    return _in_range(_whole_numbers(np.array(value, dtype=np.float64), key), key, n_images, first=0)


def _zero_based(values: NDArray[Any], key: str, n_images: int | None = None) -> Rows:
    """A MATLAB index vector, any orientation and number type, as int64 counted from 0."""
    whole = _whole_numbers(values.ravel(), key)
    if whole.size and whole.min() < 1:
        raise InvalidInput(f"{key} holds {whole.min()}; MATLAB indices count from 1.", field=key)
    return whole - 1 if n_images is None else _in_range(whole, key, n_images, first=1)


def _in_range(rows: Rows, key: str, n_images: int, *, first: int) -> Rows:
    wrong = rows[(rows < first) | (rows >= n_images + first)]
    if wrong.size:
        raise InvalidInput(
            f"{key} holds {wrong.size} row number(s) outside {first} to {n_images + first - 1}, such as {wrong[0]}.",
            field=key,
        )
    return rows - first


def _whole_numbers(values: NDArray[Any], key: str) -> Rows:
    if values.dtype.kind not in "uif" or (values.dtype.kind == "f" and not np.array_equal(values, np.rint(values))):
        raise InvalidInput(f"{key} must hold whole numbers.", field=key)
    return values.astype(np.int64)


def _matrix(values: NDArray[Any], key: str, *, transposed: bool = False) -> NDArray[np.float32]:
    if values.ndim != 2 or values.dtype.kind not in "uif":
        raise InvalidInput(
            f"{key} must be a matrix of numbers, not {values.ndim}-dimensional {values.dtype}.", field=key
        )
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused as such
        return np.ascontiguousarray(values.T if transposed else values, dtype=np.float32)


def _check_features(features: NDArray[np.float32], labels: Rows, class_names: tuple[str, ...]) -> None:
    if features.shape[0] != len(labels):
        raise ShapeMismatch(f"features has {features.shape[0]} rows but labels has {len(labels)} entries.")
    if 0 in features.shape:
        raise InvalidInput(f"features has the shape {features.shape}; there is nothing in it.", field="features")
    _refuse_twice(class_names)
    outside = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if outside.size:
        raise InvalidInput(
            f"labels of {outside.size} row(s), such as row {outside[0]} ({labels[outside[0]]}), "
            f"are outside the {len(class_names)} classes.",
            field="labels",
        )
    _refuse_unusable(features, "features")


def refuse_overflow(matrix: FloatArray, key: str) -> None:
    """InvalidInput where squares of the numbers, which must be finite, would overflow."""
    reach = max(matrix.max(), -matrix.min())
    if reach > LARGEST_FEATURE:
        raise InvalidInput(
            f"{key} holds numbers as large as {reach:.0e}, and their squares would overflow. "
            f"Scale them to below {LARGEST_FEATURE:.0e}.",
            field=key,
        )


def _refuse_twice(class_names: tuple[str, ...]) -> None:
    if len(set(class_names)) < len(class_names):
        raise InvalidInput("class_names holds a name twice. Name each class once.", field="class_names")


def _refuse_unusable(matrix: NDArray[np.float32], key: str) -> None:
    step = 8192  # a mask of the whole matrix would need a quarter of its memory again
    bad = np.concatenate(
        [
            start + np.flatnonzero(~np.isfinite(matrix[start : start + step]).all(axis=1))
            for start in range(0, len(matrix), step)
        ]
    )
    if bad.size:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if bad.size > 10 else "")
        raise InvalidInput(
            f"{key} holds NaN or infinite numbers in {bad.size} row(s), counted from 0: {shown}. Repair them.",
            field=key,
        )
    refuse_overflow(matrix, key)


def _check_rows(dataset: FeatureDataset) -> None:
    """Each row at most once over all sets, and each set within its side of the classes."""
    row_sets = {key: getattr(dataset, key) for key in _ROW_SETS}
    if not len(dataset.train_rows):
        raise InvalidInput("train_rows is empty. Give rows of seen classes to train on.", field="train_rows")
    times = np.bincount(np.concatenate(list(row_sets.values())), minlength=len(dataset.labels))
    if (times > 1).any():
        row = int(times.argmax())
        where = [key for key, rows in row_sets.items() if (rows == row).any()]
        raise InvalidInput(
            f"{int((times > 1).sum())} row(s) are listed more than once, such as row {row} (counted from 0) in "
            f"{' and '.join(where)}. Test rows must not be among the training rows.",
            field=where[-1],
        )
    for key, rows in row_sets.items():
        allowed = dataset.unseen_classes if key == "test_unseen_rows" else dataset.seen_classes
        if strange := sorted(set(_classes_at(dataset.labels, rows, dataset.class_names)) - set(allowed)):
            side = "unseen" if key == "test_unseen_rows" else "seen"
            raise InvalidInput(f"{key} holds images of {list_names(strange)}, which are not {side} classes.", field=key)


def _check_class_embeddings(dataset: FeatureDataset) -> None:
    matrix, names = dataset.class_embeddings, dataset.class_embedding_names
    if matrix is None:
        return
    if len(matrix) != len(dataset.class_names):
        raise ShapeMismatch(
            f"There are {len(matrix)} class embeddings for {len(dataset.class_names)} classes; one a class needed."
        )
    if names is not None and len(names) != matrix.shape[1]:
        raise ShapeMismatch(f"There are {len(names)} names for {matrix.shape[1]} columns of class_embeddings.")
    _refuse_unusable(matrix, "class_embeddings")
