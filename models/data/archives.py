"""Labelled images in a zip or tar archive (layouts: see models.data.layout), read one entry at a time.

Nothing is ever extracted to disk. The whole archive is checked first: what is hostile or hopeless as a whole is
refused before the first entry comes out; a single bad entry is reported and skipped.
"""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.data.images import ImageLimits
from models.data.layout import (
    MAX_SPLITS_BYTES,
    SPLITS_FILE,
    ImageSplits,
    Layout,
    Parts,
    Placement,
    SplitName,
    detect_layout,
    is_left_behind,
    missing_images,
    printable,
    split_name,
)
from models.data.tar_stream import opened_tar, refuse_above
from models.data.zip_directory import check_zip_directory
from models.errors import InvalidInput

MAX_SPLITS_FILES = 4
_NESTED = "It is an archive in the archive. Unpack it first."
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_ARCHIVE_MAGIC = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may cost. `max_ratio`: bytes inside per byte of the file, from `ratio_from_bytes` on."""

    max_entries: int = 200_000
    max_total_bytes: int = 20 * 2**30
    max_ratio: float = 200.0
    ratio_from_bytes: int = 64 * 2**20
    max_entry_bytes: int = ImageLimits().max_bytes

    def total_allowed(self, file_bytes: int) -> int:
        """How many bytes may come out of an archive file of this size."""
        return min(self.max_total_bytes, max(self.ratio_from_bytes, int(self.max_ratio * file_bytes)))


@dataclass(frozen=True)
class ArchiveEntry:
    """One file of a class. Its bytes have not been looked into; `filename` is its path in the archive."""

    class_name: str
    filename: str
    data: bytes
    split: SplitName | None


@dataclass(frozen=True)
class ArchiveRejection:
    """One entry that was skipped, and why."""

    filename: str
    reason: str


@dataclass(frozen=True)
class ArchivePlan:
    """What a first look found: how many entries are files, and the splits.json if there is one."""

    n_files: int
    layout: Layout

    @property
    def splits(self) -> ImageSplits | None:
        """The content of splits.json, or None."""
        return self.layout.splits


@dataclass(frozen=True)
class _Member:
    """An entry of either kind of archive. `problem`: why it is no plain file; `key`: what its reader needs."""

    name: str
    n_bytes: int
    is_folder: bool
    problem: str | None
    key: object


class _Reader(Protocol):
    def members(self) -> Iterator[_Member]:
        """All entries in order; a tar's must be read while it stands at them."""

    def read(self, member: _Member, limit: int) -> bytes:
        """At most `limit` bytes of the entry."""


DEFAULT_LIMITS = ArchiveLimits()


def inspect_archive(path: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> ArchivePlan:
    """Check the archive as a whole and find its layout; reads no images.

    InvalidInput if it is no zip or tar (.gz, .bz2, .xz), is encrypted or damaged, exceeds a limit or has no files.
    """
    n_files = 0
    names: list[Parts] = []
    splits_data: dict[Parts, bytes] = {}
    with _opened(path, limits) as reader:
        for n_entries, member in enumerate(reader.members(), start=1):
            if n_entries > limits.max_entries:
                raise InvalidInput(
                    f"The archive has more than {limits.max_entries:,} entries. Split it into smaller ones."
                )
            parts = split_name(member.name)
            if member.is_folder or member.problem or isinstance(parts, str):
                continue
            n_files += 1
            names.append(parts)
            if parts[-1] == SPLITS_FILE and len(splits_data) < MAX_SPLITS_FILES:
                splits_data[parts] = _read_splits(reader, member)
    if not n_files:
        raise InvalidInput("The archive holds no files. Expected <class>/<file>, one folder a class.")
    return ArchivePlan(n_files, detect_layout(names, splits_data))


def iterate_archive(
    path: Path, limits: ArchiveLimits = DEFAULT_LIMITS, plan: ArchivePlan | None = None
) -> Iterator[ArchiveEntry | ArchiveRejection]:
    """Every entry in archive order: its bytes, or why it was skipped. Holds one entry in memory at a time.

    `plan` is what `inspect_archive` returned for the same file, if the caller has it already.
    InvalidInput as there, before the first entry.
    """
    plan = plan or inspect_archive(path, limits)
    found: set[str] = set()
    with _opened(path, limits) as reader:
        for member in reader.members():
            if member.is_folder:
                continue
            outcome = _outcome(reader, member, plan.layout, limits)
            if outcome is not None:
                if plan.splits is not None and isinstance(parts := split_name(outcome.filename), tuple):
                    found.add("/".join(parts))
                yield outcome
    for name, reason in missing_images(plan.layout, found):
        yield ArchiveRejection(name, reason)


def _read_splits(reader: _Reader, member: _Member) -> bytes:
    try:
        return reader.read(member, MAX_SPLITS_BYTES + 1)
    except (InvalidInput, MemoryError):
        raise
    except Exception as error:  # a damaged entry makes the decompressors raise nearly anything
        raise InvalidInput(f"{printable(member.name)} in the archive cannot be unpacked ({error}).") from None


def _outcome(
    reader: _Reader, member: _Member, layout: Layout, limits: ArchiveLimits
) -> ArchiveEntry | ArchiveRejection | None:
    filename = printable(member.name)
    parts = split_name(member.name)
    if isinstance(parts, str):
        return ArchiveRejection(filename, parts)
    if is_left_behind(parts):
        return None
    if member.problem:
        return ArchiveRejection(filename, member.problem)
    placed = layout.place(parts)
    if placed is None:
        return None
    if filename.lower().endswith(_ARCHIVE_SUFFIXES):
        return ArchiveRejection(filename, _NESTED)
    if isinstance(placed, str):
        return ArchiveRejection(filename, placed)
    return _entry(reader, member, filename, placed, limits)


def _entry(
    reader: _Reader, member: _Member, filename: str, placed: Placement, limits: ArchiveLimits
) -> ArchiveEntry | ArchiveRejection:
    too_large = f"It is larger than {limits.max_entry_bytes:,} bytes."
    if member.n_bytes > limits.max_entry_bytes:
        return ArchiveRejection(filename, too_large)
    try:
        data = reader.read(member, limits.max_entry_bytes + 1)
    except (InvalidInput, MemoryError):
        raise
    except Exception as error:  # a damaged entry makes the decompressors raise nearly anything
        return ArchiveRejection(filename, f"It cannot be unpacked ({str(error)[:120] or type(error).__name__}).")
    if len(data) > limits.max_entry_bytes:
        return ArchiveRejection(filename, too_large)
    if data.startswith(_ARCHIVE_MAGIC) or data[257:262] == b"ustar":
        return ArchiveRejection(filename, _NESTED)
    return ArchiveEntry(placed.class_name, filename, data, placed.split)


@contextmanager
def _opened(path: Path, limits: ArchiveLimits) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            check_zip_directory(path, limits.max_entries)
            with _open_zip(path) as archive:
                yield _ZipReader(archive, path.stat().st_size, limits)
        else:
            allowed = limits.total_allowed(path.stat().st_size)
            with opened_tar(path, allowed, largest_read=max(limits.max_entry_bytes, MAX_SPLITS_BYTES) + 2**20) as tar:
                yield _TarReader(tar)
    except zipfile.BadZipFile as error:
        raise InvalidInput(f"The zip archive is damaged or cut off ({error}). Upload the whole file.") from None


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged directory makes zipfile raise nearly anything
        raise zipfile.BadZipFile(str(error)) from None


class _ZipReader:
    """Entries by the zip's central directory, whose promises (sizes) are checked here as a whole."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int, limits: ArchiveLimits) -> None:
        self.archive = archive
        infos = archive.infolist()
        if any(info.flag_bits & 0x41 for info in infos):
            raise InvalidInput("The archive is encrypted. Upload one without a password.")
        total = sum(info.file_size for info in infos)
        refuse_above(total, limits.total_allowed(file_bytes))

    def members(self) -> Iterator[_Member]:
        """All entries, in the order of the directory."""
        for info in self.archive.infolist():
            yield _Member(info.filename, info.file_size, info.is_dir(), _zip_problem(info), info)

    def read(self, member: _Member, limit: int) -> bytes:
        """At most `limit` bytes; raises whatever zipfile raises for damaged data."""
        assert isinstance(member.key, zipfile.ZipInfo)
        with self.archive.open(member.key) as stream:
            return stream.read(limit)


class _TarReader:
    """Entries of a tar in file order; earlier ones are forgotten so that memory stays flat."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar

    def members(self) -> Iterator[_Member]:
        """All entries; each must be read before the next is asked for."""
        while (info := self.tar.next()) is not None:
            self.tar.members.clear()  # type: ignore[attr-defined]  # documented nowhere, there since 2.3
            yield _Member(info.name, info.size, info.isdir(), _tar_problem(info), info)

    def read(self, member: _Member, limit: int) -> bytes:
        """At most `limit` bytes; ReadError if the archive ends before the entry does."""
        assert isinstance(member.key, tarfile.TarInfo)
        stream = self.tar.extractfile(member.key)
        assert stream is not None  # plain files only come here
        with stream:
            return stream.read(min(limit, member.n_bytes))  # it allocates what it is asked for


def _zip_problem(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if stat.S_ISLNK(kind):
        return "It is a link. Archives must hold the files themselves."
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "It is a device or a pipe, not a file."
    return None


def _tar_problem(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "It is a link. Archives must hold the files themselves."
    if info.issparse():
        return "It is a sparse file. Pack it without --sparse."
    if not (info.isreg() or info.isdir()):
        return "It is a device or a pipe, not a file."
    return None
