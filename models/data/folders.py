"""Labelled images in a folder on disk (layouts: see models.data.layout)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.data.layout import (
    MAX_SPLITS_BYTES,
    SPLITS_FILE,
    Parts,
    Placement,
    SplitName,
    detect_layout,
    is_left_behind,
    missing_images,
    printable,
    split_name,
)
from models.errors import InvalidInput


@dataclass(frozen=True)
class FolderImage:
    """One file in a class folder; nothing has looked inside yet. `name` is relative to the scanned root."""

    path: Path
    class_name: str
    split: SplitName | None
    name: str


@dataclass(frozen=True)
class FolderScan:
    """What a folder holds, sorted by name. `rejected`: (relative name, reason). Classes as splits.json gives them."""

    images: tuple[FolderImage, ...]
    rejected: tuple[tuple[str, str], ...]
    seen_classes: tuple[str, ...] | None = None
    unseen_classes: tuple[str, ...] | None = None
    validation_classes: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that have images, sorted."""
        return tuple(sorted({image.class_name for image in self.images}))


def scan_folder(root: Path) -> FolderScan:
    """Every labelled image file under `root`, in a fixed order. Links that lead out of `root` are rejected.

    InvalidInput if `root` is no folder, holds no file in a class folder, or has a damaged splits.json.
    """
    if not root.is_dir():
        raise InvalidInput(f"{root} is not a folder.")
    found = sorted(_walk(root))
    layout = detect_layout((parts for parts, reason in found if reason is None), _read_splits(root, found))
    images: list[FolderImage] = []
    rejected: list[tuple[str, str]] = []
    for parts, reason in found:
        if is_left_behind(parts):
            continue
        name = "/".join(parts)
        placed = reason or layout.place(parts)
        if isinstance(placed, str):
            rejected.append((printable(name), placed))
        elif isinstance(placed, Placement):
            images.append(FolderImage(root.joinpath(*parts), placed.class_name, placed.split, name))
    if not images:
        raise InvalidInput(f"{root} holds no files in class folders. Expected <class>/<file>, one folder a class.")
    rejected.extend(missing_images(layout, (image.name for image in images)))
    splits = layout.splits
    if splits is None:
        return FolderScan(tuple(images), tuple(rejected))
    return FolderScan(
        tuple(images), tuple(rejected), splits.seen_classes, splits.unseen_classes, splits.validation_classes
    )


def _walk(root: Path) -> Iterator[tuple[Parts, str | None]]:
    """(parts, reason for refusal or None) of every file. Folder links are not followed, so there are no rings."""
    real_root = root.resolve()
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root).parts
        folders[:] = [name for name in folders if not is_left_behind((name,))]
        for name in folders:
            if (Path(folder) / name).is_symlink():
                yield (*here, name), "It is a link to a folder. Copy the folder here instead."
        for name in files:
            yield (*here, name), _refusal(Path(folder) / name, (*here, name), real_root)


def _refusal(path: Path, parts: Parts, real_root: Path) -> str | None:
    named = split_name("/".join(parts))
    if isinstance(named, str):
        return named
    if path.is_symlink() and not path.resolve().is_relative_to(real_root):
        return "It is a link that leads out of the folder."
    if not path.is_file():
        return "It is a broken link, a device or a pipe, not a file."
    return None


def _read_splits(root: Path, found: list[tuple[Parts, str | None]]) -> dict[Parts, bytes]:
    return {
        parts: _read_at_most(root.joinpath(*parts), MAX_SPLITS_BYTES + 1)
        for parts, reason in found
        if reason is None and parts[-1] == SPLITS_FILE
    }


def _read_at_most(path: Path, n_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(n_bytes)
