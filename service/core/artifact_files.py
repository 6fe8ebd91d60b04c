"""Where the artifact store keeps its files: a folder on a local disk, or any fsspec address.

Both know paths below their root only; what the paths mean is `artifacts`' business.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

_CHUNK = 4 * 2**20
_STALE_S = 86_400.0  # an unfinished write older than this was abandoned
_N_SYNCS = 8  # at a time: the file system's journal then writes them down together
# Stores that publish an object whole or not at all; on others a file is written aside and moved.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}


class Backend(Protocol):
    """What the store asks of either. Paths are relative, with '/'. What is written is durable when the call returns."""

    def exists(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def modified(self, path: str) -> float | None: ...
    def open(self, path: str) -> IO[bytes]: ...
    def local_path(self, path: str) -> Path: ...
    def write_many(self, contents: Mapping[str, bytes]) -> None: ...
    def take(self, path: str, source: Path, move: bool) -> None: ...
    def move(self, path: str, target: str) -> None: ...
    def delete(self, path: str) -> None: ...
    def paths(self, folder: str) -> Iterator[str]: ...
    def probe(self, data: bytes) -> None: ...


class LocalFiles:
    """A folder; unfinished writes lie in `root/aside/`, on the same file system, so that renames hold."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.aside = root / "aside"
        self.aside.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.aside)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def modified(self, path: str) -> float | None:
        return (self.root / path).stat().st_mtime

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")

    def local_path(self, path: str) -> Path:
        found = self.root / path
        if not found.is_file():
            raise FileNotFoundError(path)
        return found

    def write_many(self, contents: Mapping[str, bytes]) -> None:
        asides: dict[str, Path] = {}
        try:
            for path, data in contents.items():
                if not self.exists(path):
                    asides[path] = self._aside()
                    asides[path].write_bytes(data)
            self._publish(asides, contents)
        except BaseException:
            for aside in asides.values():
                aside.unlink(missing_ok=True)
            raise

    def take(self, path: str, source: Path, move: bool) -> None:
        if self.exists(path):
            self._publish({}, [path])
            return
        # A hard link elsewhere could still change the content under its key, so only a sole owner is renamed.
        status = source.lstat()
        if move and not source.is_symlink() and status.st_nlink == 1 and status.st_dev == self.root.stat().st_dev:
            os.utime(source)  # its age as an artifact begins now
            self._publish({path: source}, [path])
            return
        aside = self._aside()
        try:
            with source.open("rb") as file, aside.open("xb") as target:
                shutil.copyfileobj(file, target, _CHUNK)
            self._publish({path: aside}, [path])
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _aside(self) -> Path:
        return self.aside / secrets.token_hex(16)

    def _publish(self, asides: Mapping[str, Path], paths: Collection[str]) -> None:
        """Flushes the files, gives them their names, flushes the folders: a crash leaves whole files or none.

        `paths` are also those that were there already: whoever wrote them may not have come to the folders yet.
        """
        _side_by_side(_sync, asides.values())
        for path, aside in asides.items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.chmod(0o444)
            aside.rename(target)
        folders = {folder for path in paths for folder in (self.root / path).parents if self.root in folder.parents}
        _side_by_side(_sync, [*folders, self.root])

    def move(self, path: str, target: str) -> None:
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).rename(self.root / target)

    def delete(self, path: str) -> None:
        (self.root / path).unlink()

    def paths(self, folder: str) -> Iterator[str]:
        for path in (self.root / folder).rglob("*"):
            yield path.relative_to(self.root).as_posix()

    def probe(self, data: bytes) -> None:
        path = self.aside / f"probe-{secrets.token_hex(8)}"
        try:
            path.write_bytes(data)
            if path.read_bytes() != data:
                raise OSError(errno.EIO, "what was written reads back differently")
        finally:
            path.unlink(missing_ok=True)


class RemoteFiles:
    """Any fsspec file system; content that is needed as a local file is downloaded once and verified."""

    def __init__(self, fs: Any, root: str, cache_dir: Path) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.cache_dir = cache_dir
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.is_object_store = bool(protocols & _OBJECT_STORES)

    def _address(self, path: str) -> str:
        return f"{self.root}/{path}"

    def exists(self, path: str) -> bool:
        return bool(self.fs.isfile(self._address(path)))

    def size(self, path: str) -> int:
        return int(self.fs.size(self._address(path)))

    def modified(self, path: str) -> float | None:
        try:
            time_of: datetime = self.fs.modified(self._address(path))
        except NotImplementedError:
            return None
        return (time_of if time_of.tzinfo is not None else time_of.replace(tzinfo=UTC)).timestamp()

    def open(self, path: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self._address(path), "rb")
        return file

    def local_path(self, path: str) -> Path:
        cached = self.cache_dir / path
        if cached.is_file():
            return cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_name(f"{cached.name}.{secrets.token_hex(8)}")
        try:
            self.fs.get_file(self._address(path), str(aside))
            with aside.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != cached.name:
                    raise OSError(errno.EIO, f"{path} arrived damaged")
            aside.rename(cached)
        finally:
            aside.unlink(missing_ok=True)
        return cached

    def write_many(self, contents: Mapping[str, bytes]) -> None:
        for path, data in contents.items():
            if not self.exists(path):
                self._put(path, partial(self.fs.pipe_file, value=data))

    def take(self, path: str, source: Path, move: bool) -> None:  # noqa: ARG002 - `put_file` removes what was given away
        if not self.exists(path):
            self._put(path, lambda address: self.fs.put_file(str(source), address))

    def _put(self, path: str, upload: Callable[[str], Any]) -> None:
        if self.is_object_store:
            upload(self._address(path))
            return
        aside = f"aside/{secrets.token_hex(16)}"
        self.fs.makedirs(f"{self.root}/aside", exist_ok=True)
        upload(self._address(aside))
        self.move(aside, path)

    def move(self, path: str, target: str) -> None:
        if not self.is_object_store:
            self.fs.makedirs(self._address(target).rsplit("/", 1)[0], exist_ok=True)
        self.fs.mv(self._address(path), self._address(target))

    def delete(self, path: str) -> None:
        self.fs.rm_file(self._address(path))
        (self.cache_dir / path).unlink(missing_ok=True)

    def paths(self, folder: str) -> Iterator[str]:
        with suppress(FileNotFoundError):
            for address in self.fs.find(self._address(folder)):
                yield f"{folder}/" + str(address).rsplit(f"/{folder}/", 1)[-1]

    def probe(self, data: bytes) -> None:
        address = self._address(f"aside/probe-{secrets.token_hex(8)}")
        if not self.is_object_store:
            self.fs.makedirs(f"{self.root}/aside", exist_ok=True)
        self.fs.pipe_file(address, data)
        try:
            if self.fs.cat_file(address) != data:
                raise OSError(errno.EIO, "what was written reads back differently")
        finally:
            self.fs.rm_file(address)


def _side_by_side(function: Callable[[Path], None], paths: Collection[Path]) -> None:
    """`function` of each path, some at a time; the first error is raised."""
    if len(paths) > 1:
        with ThreadPoolExecutor(min(_N_SYNCS, len(paths))) as pool:
            _drain(pool.map(function, paths))
    else:
        _drain(map(function, paths))


def _drain(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _sync(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Removes what a crash left behind long ago; younger files may still be being written."""
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
