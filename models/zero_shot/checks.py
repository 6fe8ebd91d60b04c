"""What training and scoring are given, checked: an error says what does not fit and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.base import FloatArray, IntArray, LabelledFeatures
from models.data.features import LARGEST_FEATURE, refuse_overflow
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples
from models.zero_shot.scaling import unit_rows

EmbeddingsOf = Callable[[Sequence[str]], FloatArray]
"""Class names -> embeddings (n_classes, embedding_dim)."""


def checked(features: LabelledFeatures, class_embeddings: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Float32 features and unit embeddings, or an error that says what does not fit."""
    raw, labels = real_numbers(features.features, "features"), np.asarray(features.labels)
    if raw.ndim != 2 or labels.shape != (len(raw),):
        raise ShapeMismatch(f"features {raw.shape} and labels {labels.shape} must be one row and one label an image.")
    if len(raw) == 0:
        raise TooFewSamples("There are no training images. Give images of at least 2 seen classes.")
    if raw.shape[1] == 0:
        raise ShapeMismatch(f"features {raw.shape} hold no numbers of an image. Give at least one column.")
    if not np.isfinite(raw).all():
        raise InvalidInput("The training features hold NaN or infinite values. Remove or repair those rows.")
    refuse_overflow(raw, "features")
    if labels.dtype.kind not in "ui":
        raise InvalidInput(f"Labels must be whole numbers, not {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= len(features.class_names):
        raise InvalidInput(
            f"Labels must lie in 0..{len(features.class_names) - 1}, not {labels.min()}..{labels.max()}."
        )
    embeddings = unit_embeddings(class_embeddings)
    if len(embeddings) != len(features.class_names):
        raise ShapeMismatch(f"{len(embeddings)} class embeddings for {len(features.class_names)} seen classes.")
    empty = np.setdiff1d(np.arange(len(embeddings)), labels)
    if len(empty):
        shown = ", ".join(repr(features.class_names[i]) for i in empty[:5])
        raise TooFewSamples(
            f"{len(empty)} seen class(es) have no training image: {shown}. Add images or leave them out."
        )
    if len(embeddings) > 1 and np.allclose(embeddings, embeddings[0], rtol=0, atol=1e-6):
        raise InvalidInput(
            f"All {len(embeddings)} seen classes have the same class embedding, so nothing tells them apart. "
            "Give other class embeddings.",
            field="class_embeddings",
        )
    return raw, embeddings


def unit_embeddings(class_embeddings: FloatArray) -> FloatArray:
    """Float32 rows of unit length: the papers' convention, and it makes seen and unseen scores comparable."""
    embeddings = real_numbers(class_embeddings, "class_embeddings")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ShapeMismatch(f"class_embeddings must be (n_classes, embedding_dim), not {embeddings.shape}.")
    length = np.linalg.norm(embeddings.astype(np.float64), axis=1)  # a float32 sum of squares may overflow
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        raise InvalidInput(f"Class embedding {bad[0]} is zero or not finite; so are {len(bad) - 1} more. Repair them.")
    if length.max() > LARGEST_FEATURE or length.min() < 1 / LARGEST_FEATURE:  # their squares leave float32
        embeddings = (embeddings / length[:, None]).astype(np.float32)
    return unit_rows(embeddings)


def real_numbers(values: FloatArray, name: str) -> FloatArray:
    """As float32, in C order, as torch wants it; what is too large for it becomes infinite, and is refused as such."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} must hold real numbers, not {array.dtype}.", field=name)
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32, order="C")


def positions(names: Sequence[str], chosen: Sequence[str]) -> IntArray:
    """Index of each of `chosen` in `names`; each must be there, once."""
    index = {name: i for i, name in enumerate(names)}
    unknown = [name for name in chosen if name not in index]
    if unknown:
        raise InvalidInput(
            f"Validation class {unknown[0]!r} is none of the seen classes. Choose validation classes among those.",
            field="validation_classes",
        )
    if len(set(chosen)) != len(chosen):
        raise InvalidInput("A validation class is named twice.", field="validation_classes")
    return np.array([index[name] for name in chosen], np.int64)


def as_unseen(
    embeddings: FloatArray, fold: IntArray, names: Sequence[str], given: FloatArray | EmbeddingsOf | None
) -> FloatArray:
    """All classes' embeddings, those of the `fold` replaced by what they would be without images, where `given`."""
    if given is None or len(fold) == 0:
        return embeddings
    rows = unit_embeddings(given([names[c] for c in fold]) if callable(given) else given)
    if rows.shape != (len(fold), embeddings.shape[1]):
        raise ShapeMismatch(
            f"validation_embeddings {rows.shape} must be {(len(fold), embeddings.shape[1])}.",
            field="validation_embeddings",
        )
    replaced = embeddings.copy()
    replaced[fold] = rows
    return replaced


def match_seen(embeddings: FloatArray, seen: FloatArray) -> IntArray:
    """For each unit row of `embeddings` (C, E) the row of `seen` (S, E) that it is, or -1.

    A row may have been scaled and brought back to unit length, so a rounding apart is the same. Seen classes with one
    vector are told apart by their order.
    """
    if embeddings.shape[1] != seen.shape[1]:
        raise InvalidInput(f"embeddings {embeddings.shape} and seen {seen.shape} differ in width.")
    rows, others = embeddings.astype(np.float64), seen.astype(np.float64)
    squared = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T  # (C, S), distances
    is_same = squared < 1e-10
    found = np.where(is_same.any(axis=1), is_same.argmax(axis=1), -1)
    for c in np.flatnonzero(is_same.sum(axis=1) > 1):
        choices = np.flatnonzero(is_same[c])
        found[c] = choices[min(int((is_same[:c] == is_same[c]).all(axis=1).sum()), len(choices) - 1)]
    return np.asarray(found, np.int64)
