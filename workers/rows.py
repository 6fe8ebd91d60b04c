"""Which images of a dataset are training rows, and which are test rows that training never sees."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from models.data.splits import assign_holdout
from service.core import repositories
from service.core.tables import Dataset, Image

SPLITS_FILE = "splits.npz"  # among the artifacts of an embedding set


@dataclass(frozen=True)
class ImageRow:
    """One image by its content, with the class it shows."""

    sha256: str
    class_name: str
    filename: str


@dataclass(frozen=True)
class SplitRows:
    """Rows of a dataset for one choice of seen and unseen classes, each in a stable order (class, content)."""

    train: tuple[ImageRow, ...]
    test_seen: tuple[ImageRow, ...]
    test_unseen: tuple[ImageRow, ...]

    def not_tested_on(self, contents: Collection[str]) -> SplitRows:
        """The same without test rows of these contents."""
        seen, unseen = (
            tuple(row for row in rows if row.sha256 not in contents) for rows in (self.test_seen, self.test_unseen)
        )
        return SplitRows(self.train, seen, unseen)


def split_rows(session: Session, dataset: Dataset, seen: Sequence[str], unseen: Sequence[str]) -> SplitRows:
    """Seen classes split as uploaded, else by the dataset's hash rule; every image of an unseen class is a test row."""
    by_class: dict[str, list[Image]] = {}
    for image in repositories.images_of(session, dataset.id, [*seen, *unseen]):
        by_class.setdefault(image.class_name, []).append(image)
    train: list[ImageRow] = []
    test_seen: list[ImageRow] = []
    for name in seen:
        images = by_class.get(name, [])
        held_out = _held_out(images, dataset.test_fraction)
        for image, is_test in zip(images, held_out, strict=True):
            (test_seen if is_test else train).append(_row(image))
    test_unseen = [_row(image) for name in unseen for image in by_class.get(name, [])]
    return SplitRows(tuple(train), tuple(test_seen), tuple(test_unseen))


def _held_out(images: Sequence[Image], fraction: float) -> list[bool]:
    """Per image: an explicit split counts; the others follow the hash rule among themselves."""
    automatic = [image.sha256 for image in images if image.split is None]
    by_hash = dict(zip(automatic, assign_holdout(automatic, fraction).tolist(), strict=True))
    return [by_hash[image.sha256] if image.split is None else image.split == "test" for image in images]


def _row(image: Image) -> ImageRow:
    return ImageRow(image.sha256, image.class_name, image.filename)


def learned_contents(splits: bytes) -> set[str]:
    """What `splits_npz` lists as train rows: sha256 of each."""
    with np.load(io.BytesIO(splits), allow_pickle=False) as arrays:
        return set(arrays["image_sha256"][arrays["trainval_loc"] - 1].tolist())


def splits_npz(rows: SplitRows, class_names: Sequence[str]) -> bytes:
    """xlsa17's split variables (1-based) over the list of all images: train rows, then both kinds of test rows."""
    everything = [*rows.train, *rows.test_seen, *rows.test_unseen]
    number = {name: i + 1 for i, name in enumerate(class_names)}
    bounds = np.cumsum([0, len(rows.train), len(rows.test_seen), len(rows.test_unseen)]) + 1
    out = io.BytesIO()
    np.savez(
        out,
        image_files=np.array([f"{row.class_name}/{row.filename or row.sha256}" for row in everything], dtype=np.str_),
        image_sha256=np.array([row.sha256 for row in everything], dtype=np.str_),
        labels=np.array([number[row.class_name] for row in everything], dtype=np.int64),
        trainval_loc=np.arange(bounds[0], bounds[1]),
        test_seen_loc=np.arange(bounds[1], bounds[2]),
        test_unseen_loc=np.arange(bounds[2], bounds[3]),
    )
    return out.getvalue()
