"""How labelled images may lie in a folder or an archive, and the optional `splits.json` beside them.

    <class>/<file>                      split unknown, or as splits.json says
    images/<class>/<file>               the same, with other things beside images/
    train/<class>/<file>  test/<class>/<file>

Folders that everything lies in are looked through. Hidden files and those that systems leave behind are skipped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from models.data.splits import ClassSplit, list_names
from models.errors import InvalidInput

SplitName = Literal["train", "test"]
Parts = tuple[str, ...]

SPLITS_FILE = "splits.json"
MAX_SPLITS_BYTES = 64 * 2**20
MAX_NAME_LENGTH = 255

_LEFT_BEHIND = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}
_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SPLIT_LISTS: dict[str, SplitName] = {"train": "train", "test_seen": "test", "test_unseen": "test"}


@dataclass(frozen=True)
class ImageSplits:
    """What splits.json says: `split_of` maps a path (relative to the file) to 'train' or 'test'."""

    split_of: Mapping[str, SplitName]
    seen_classes: tuple[str, ...] | None = None
    unseen_classes: tuple[str, ...] | None = None
    validation_classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Placement:
    """Where a file belongs: its class, and 'train', 'test' or None."""

    class_name: str
    split: SplitName | None


@dataclass(frozen=True)
class Layout:
    """`top` is what all files share and `splits.json` lies in; `prefix` is where the class folders start."""

    top: Parts
    prefix: Parts
    has_split_folders: bool
    splits: ImageSplits | None = None

    def place(self, parts: Parts) -> Placement | str | None:
        """Class and split of a file; a string says why it has none; None: not a file of this set, pass over it."""
        if is_left_behind(parts) or parts == (*self.top, SPLITS_FILE) or parts[: len(self.prefix)] != self.prefix:
            return None
        inner = parts[len(self.prefix) :]
        split: SplitName | None = None
        if self.has_split_folders:
            if inner[0] not in ("train", "test"):
                return "It lies beside train/ and test/. Move it into one of them."
            split = "train" if inner[0] == "train" else "test"
            inner = inner[1:]
        if len(inner) < 2:
            return "It lies in no class folder. Expected <class>/<file>."
        if len(inner) > 2:
            return "It lies too deep. Expected <class>/<file>, without folders inside a class."
        if not inner[0].strip():
            return "The name of its class folder is blank."
        if self.splits is not None:
            split = self.splits.split_of.get("/".join(parts[len(self.top) :]), split)
        return Placement(inner[0], split)


def split_name(name: str) -> Parts | str:
    """The parts of a file name from an archive; a string says why the name is refused."""
    name = name.replace("\\", "/")
    if _CONTROL.search(name):
        return "Its name holds control characters or is not valid Unicode."
    if name.startswith("/") or _DRIVE.match(name):
        return "Its path is absolute. Paths must be relative."
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        return "Its path holds '..' and could lead out of the archive."
    if not parts:
        return "It has no name."
    if max(map(len, parts)) > MAX_NAME_LENGTH:
        return f"Part of its path is longer than {MAX_NAME_LENGTH} characters."
    return parts


def is_left_behind(parts: Parts) -> bool:
    """Whether a path is hidden, or something that an operating system left behind."""
    return any(part.startswith(".") or part in _LEFT_BEHIND for part in parts)


def printable(name: str) -> str:
    """A file name that can be shown and stored as JSON, whatever bytes it had on disk."""
    return name.encode("utf-8", "replace").decode("utf-8")


def missing_images(layout: Layout, names: Iterable[str]) -> list[tuple[str, str]]:
    """(path, reason) of the images that splits.json lists and that are not among `names`."""
    if layout.splits is None:
        return []
    top = "".join(f"{part}/" for part in layout.top)
    absent = set(layout.splits.split_of) - {name.removeprefix(top) for name in names}
    return [(name, f"It is listed in {SPLITS_FILE} but is not there.") for name in sorted(absent)]


def detect_layout(paths: Iterable[Parts], splits_data: Mapping[Parts, bytes]) -> Layout:
    """The layout that most of the files follow. `splits_data`: the contents of each splits.json, by its path.

    InvalidInput if the splits.json that applies is damaged or contradicts itself.
    """
    visible = [parts for parts in paths if not is_left_behind(parts) and parts[-1] != SPLITS_FILE]
    top = _common_top(visible)
    prefix = top
    if _holds_class_folders(visible, (*top, "images")):
        prefix = (*top, "images")
    has_split_folders = _holds_class_folders(visible, (*prefix, "train"))
    data = splits_data.get((*top, SPLITS_FILE))
    return Layout(top, prefix, has_split_folders, None if data is None else parse_splits(data))


def parse_splits(data: bytes) -> ImageSplits:
    """The content of a splits.json, checked. InvalidInput says which key or path is wrong."""
    loaded = load_splits_object(data)
    split_of: dict[str, SplitName] = {}
    for key, split in _SPLIT_LISTS.items():
        for path in _strings(loaded, key) or ():
            if path in split_of:
                raise InvalidInput(f"{SPLITS_FILE}: {path!r} is listed twice. List each image once.", field=key)
            split_of[path] = split
    seen, unseen, validation = (_strings(loaded, f"{kind}_classes") for kind in ("seen", "unseen", "validation"))
    if seen is not None:
        ClassSplit(seen, unseen or (), validation or ())
    leaks = {PurePosixPath(path).parent.name for path in _strings(loaded, "train") or ()} & set(unseen or ())
    if leaks:
        raise InvalidInput(
            f"{SPLITS_FILE}: images of {list_names(sorted(leaks))} are listed under 'train', but the class is unseen.",
            field="train",
        )
    return ImageSplits(split_of, seen, unseen, validation)


def load_splits_object(data: bytes) -> dict[str, object]:
    """The JSON object in a splits.json. InvalidInput if it is too large or no object."""
    if len(data) > MAX_SPLITS_BYTES:
        raise InvalidInput(f"{SPLITS_FILE} is larger than {MAX_SPLITS_BYTES:,} bytes.")
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{SPLITS_FILE} is not valid JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise InvalidInput(f"{SPLITS_FILE} must hold a JSON object with lists such as 'train' and 'test_unseen'.")
    return loaded


def _strings(loaded: Mapping[str, object], key: str) -> tuple[str, ...] | None:
    value = loaded.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidInput(f"{SPLITS_FILE}: {key!r} must be a list of strings.", field=key)
    return tuple(value)


def _common_top(paths: list[Parts]) -> Parts:
    """The folders that all files lie in, leaving `train`/`test` and the class folders themselves."""
    top: Parts = ()
    while paths:
        first = {parts[len(top)] for parts in paths if len(parts) > len(top)}
        depths = Counter(len(parts) - len(top) for parts in paths)
        n_deep = sum(count for depth, count in depths.items() if depth >= 3)
        if len(first) != 1 or n_deep <= depths[2] or first <= {"train", "test", "images"}:
            break
        top += (first.pop(),)
    return top


def _holds_class_folders(paths: list[Parts], folder: Parts) -> bool:
    depth = len(folder)
    return any(parts[:depth] == folder and len(parts) >= depth + 2 for parts in paths)
