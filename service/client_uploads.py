"""What the client uploads: image files in batches, folders with their splits, knowledge files by their kind."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.data.folders import scan_folder
from models.errors import InvalidInput
from service.client_http import Form, Json, UnseenError

BATCH_BYTES = 16 * 2**20
BATCH_FILES = 200

ImageSource = str | Path | bytes | tuple[str, bytes]
"""A file's path, the bytes of a file, or (file name, bytes)."""


@dataclass(frozen=True)
class LabelledImage:
    """One file to upload; `split`: train, test, or None for the dataset's own rule."""

    name: str
    content: bytes | Path
    class_name: str
    split: str | None = None


@dataclass
class FolderUpload:
    """What became of a folder. `rejected`: {filename, reason}. Classes as its splits.json gives them, else None."""

    n_images: int = 0
    n_accepted: int = 0
    n_duplicates: int = 0
    rejected: list[Json] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    seen_classes: tuple[str, ...] | None = None
    unseen_classes: tuple[str, ...] | None = None
    validation_classes: tuple[str, ...] | None = None

    def add(self, answer: Json) -> None:
        """Counts one batch's answer."""
        self.n_accepted += sum(not entry["duplicate"] for entry in answer["accepted"])
        self.n_duplicates += sum(entry["duplicate"] for entry in answer["accepted"])
        self.rejected += answer["rejected"]


def read_folder(
    folder: Path, *, classes: Iterable[str] | None = None, test_classes: Iterable[str] = ()
) -> tuple[list[LabelledImage], FolderUpload]:
    """The labelled images of a folder (one folder a class; splits.json heeded), and the report to fill.

    `classes`: only these (None: all). Images of `test_classes` without a split of their own become test rows.
    UnseenError for a folder without images.
    """
    try:
        scan = scan_folder(folder)
    except InvalidInput as error:
        raise UnseenError(str(error)) from error
    held_out = set(test_classes)
    wanted = set(classes) if classes is not None else set(scan.class_names)
    images = [
        LabelledImage(
            image.name, image.path, image.class_name, image.split or ("test" if image.class_name in held_out else None)
        )
        for image in scan.images
        if image.class_name in wanted
    ]
    report = FolderUpload(
        n_images=len(images),
        rejected=[{"filename": name, "reason": reason} for name, reason in scan.rejected],
        class_names=tuple(name for name in scan.class_names if name in wanted),
        seen_classes=scan.seen_classes,
        unseen_classes=scan.unseen_classes,
        validation_classes=scan.validation_classes,
    )
    return images, report


def labelled(
    images: Sequence[ImageSource], class_name: str | None, labels: Sequence[str] | None, split: str | None
) -> list[LabelledImage]:
    """Images with a class each; UnseenError unless exactly one of `class_name` and `labels` fits."""
    if (class_name is None) == (labels is None):
        raise UnseenError("Say which class the images show: class_name for all of them, or labels, one for each.")
    classes = list(labels) if labels is not None else [class_name or ""] * len(images)
    if len(classes) != len(images):
        raise UnseenError(f"{len(classes)} labels were given for {len(images)} images; give one for each.")
    named = [named_content(source, index) for index, source in enumerate(images)]
    return [LabelledImage(name, content, cls, split) for (name, content), cls in zip(named, classes, strict=True)]


def named_content(source: ImageSource, index: int) -> tuple[str, bytes | Path]:
    """A file name and the content of any way to give an image."""
    if isinstance(source, tuple):
        return source
    if isinstance(source, bytes):
        return f"image-{index:05d}", source
    return Path(source).name, Path(source)


def batches(
    images: Iterable[LabelledImage], *, max_bytes: int = BATCH_BYTES, max_files: int = BATCH_FILES
) -> Iterator[tuple[Form, int]]:
    """Forms for POST …/images with the number of files in each: of one split, at most `max_bytes` unless one file is.

    Two files of one name never share a form, as the service tells them apart by name.
    """
    pending: dict[str | None, list[LabelledImage]] = {}
    sizes: dict[str | None, int] = {}
    for image in images:
        batch = pending.setdefault(image.split, [])
        size = _size(image.content)
        is_full = len(batch) >= max_files or sizes.get(image.split, 0) + size > max_bytes
        if batch and (is_full or any(other.name == image.name for other in batch)):
            yield _form(batch), len(batch)
            batch.clear()
            sizes[image.split] = 0
        batch.append(image)
        sizes[image.split] = sizes.get(image.split, 0) + size
    for batch in pending.values():
        if batch:
            yield _form(batch), len(batch)


def guess_kind(path: Path) -> str:
    """word_vectors for GloVe, fastText and word2vec files, attributes or class_vectors for tables."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".txt", ".vec", ".bin")):
        return "word_vectors"
    if name.endswith(".npz"):
        try:
            with zipfile.ZipFile(path) as archive:
                return "attributes" if "attribute_names.npy" in archive.namelist() else "class_vectors"
        except (OSError, zipfile.BadZipFile):
            return "class_vectors"  # the service says what is wrong with it
    return "class_vectors"


def plain_vectors(vectors: Mapping[str, Any]) -> dict[str, list[float]]:
    """Vectors of any kind (lists, arrays, tensors on the CPU) as lists of floats."""
    return {name: [float(number) for number in vector] for name, vector in vectors.items()}


def _form(batch: Sequence[LabelledImage]) -> Form:
    fields = {"labels": json.dumps([image.class_name for image in batch], ensure_ascii=False)}
    if batch[0].split is not None:
        fields["split"] = batch[0].split
    return Form(tuple(("files", image.name, image.content) for image in batch), fields)


def _size(content: bytes | Path) -> int:
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except OSError as error:
        raise UnseenError(f"{content} cannot be read: {error.strerror}.") from error
