"""The artifact store: immutable files under the sha256 of their content, on a local disk or any fsspec address.

A key is `sha256/ab/<64 hex digits>`. A key that exists holds exactly that content: files are written aside, flushed to
the disk and only then given their name, so that a crash at any moment leaves either the whole artifact or none.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service.core.errors import NotFound, Unavailable

_KEY = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{64})")
_CHUNK = 4 * 2**20
_STALE_S = 86_400.0  # an unfinished write older than this was abandoned
# Stores that publish an object whole or not at all; on others a file is written aside and moved.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}


def image_key(sha256: str) -> str:
    """The key of content whose sha256 (64 lower-case hex digits) is known."""
    return _checked(f"sha256/{sha256[:2]}/{sha256}")


def _checked(key: str) -> str:
    match = _KEY.fullmatch(key)
    if match is None or not match[2].startswith(match[1]):
        raise ValueError(f"{key!r} is no artifact key; keys look like 'sha256/ab/<64 hex digits>'.")
    return key


class ArtifactStore:
    """Content-addressed files at `url`; `cache_dir` holds local copies of what a remote store keeps.

    Errors: `NotFound` for a key that is not there, `Unavailable` when the store is full or does not answer, and
    `ValueError` for a malformed key.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        fs, root = fsspec.core.url_to_fs(url)
        self._backend: _Backend = (
            _LocalFiles(Path(root)) if isinstance(fs, LocalFileSystem) else _RemoteFiles(fs, root, Path(cache_dir))
        )

    def put_bytes(self, data: bytes) -> str:
        """Stores `data` and returns its key; does nothing where the same content is already there."""
        key = image_key(hashlib.sha256(data).hexdigest())
        with _as_unavailable("write to"):
            if not self._backend.exists(key):
                self._backend.write(key, io.BytesIO(data))
        return key

    def put_file(self, path: Path, *, move: bool = False) -> str:
        """Stores the file at `path`, streaming; with `move` the file is given away (renamed where possible)."""
        with path.open("rb") as file:
            key = image_key(hashlib.file_digest(file, "sha256").hexdigest())
        with _as_unavailable("write to"):
            if not self._backend.exists(key):
                self._backend.take(key, path, move)
        if move:
            path.unlink(missing_ok=True)
        return key

    def read_bytes(self, key: str) -> bytes:
        """The whole content."""
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> IO[bytes]:
        """The content as a readable, seekable binary file; the caller closes it."""
        with _as_unavailable("read from", key):
            return self._backend.open(_checked(key))

    def local_path(self, key: str) -> Path:
        """A local file with the content, fit for memory-mapping: never write to it."""
        with _as_unavailable("read from", key):
            return self._backend.local_path(_checked(key))

    def exists(self, key: str) -> bool:
        """Whether the content is there."""
        with _as_unavailable("read from"):
            return self._backend.exists(_checked(key))

    def size(self, key: str) -> int:
        """The content's size in bytes."""
        with _as_unavailable("read from", key):
            return self._backend.size(_checked(key))

    def delete(self, key: str) -> None:
        """Removes the content; a key that is not there is fine."""
        with _as_unavailable("write to"), suppress(FileNotFoundError):
            self._backend.delete(_checked(key))

    def iter_keys(self) -> Iterator[str]:
        """Every key, in no promised order."""
        with _as_unavailable("read from"):
            yield from self._backend.iter_keys()

    def check(self) -> None:
        """Writes, reads and removes a probe; raises `Unavailable` if that fails."""
        with _as_unavailable("write to"):
            self._backend.probe(secrets.token_bytes(16))


@contextmanager
def _as_unavailable(action: str, key: str | None = None) -> Iterator[None]:
    """Turns the store's own errors into ours."""
    try:
        yield
    except FileNotFoundError as error:
        if key is not None:
            raise NotFound(
                f"Artifact {key} is not in the store; it was deleted there or the store is another one."
            ) from error
        raise Unavailable("The artifact store's folder or bucket does not exist; check UNSEEN_STORE_URL.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable("The artifact store is full; free some space and try again.", retry_after_s=60) from error
        reason = error.strerror or type(error).__name__
        raise Unavailable(f"Could not {action} the artifact store ({reason}).", retry_after_s=10) from error


class _Backend(Protocol):
    def exists(self, key: str) -> bool: ...
    def size(self, key: str) -> int: ...
    def open(self, key: str) -> IO[bytes]: ...
    def local_path(self, key: str) -> Path: ...
    def write(self, key: str, source: IO[bytes]) -> None: ...
    def take(self, key: str, path: Path, move: bool) -> None: ...
    def delete(self, key: str) -> None: ...
    def iter_keys(self) -> Iterator[str]: ...
    def probe(self, data: bytes) -> None: ...


class _LocalFiles:
    """A folder: `root/sha256/ab/<hex>`, and `root/aside/` for unfinished writes (same file system, so renames hold)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.aside = root / "aside"
        with _as_unavailable("write to"):
            self.aside.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.aside)

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def size(self, key: str) -> int:
        return (self.root / key).stat().st_size

    def open(self, key: str) -> IO[bytes]:
        return (self.root / key).open("rb")

    def local_path(self, key: str) -> Path:
        path = self.root / key
        if not path.is_file():
            raise FileNotFoundError(key)
        return path

    def write(self, key: str, source: IO[bytes]) -> None:
        aside = self.aside / secrets.token_hex(16)
        try:
            with aside.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
            self._publish(aside, key)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def take(self, key: str, path: Path, move: bool) -> None:
        # A hard link elsewhere could still change the content under its key, so only a sole owner is renamed.
        status = path.lstat()
        if move and not path.is_symlink() and status.st_nlink == 1 and status.st_dev == self.root.stat().st_dev:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            self._publish(path, key)
            return
        with path.open("rb") as source:
            self.write(key, source)

    def _publish(self, aside: Path, key: str) -> None:
        target = self.root / key
        new_folders = [folder for folder in (target.parent, target.parent.parent) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.chmod(0o444)
        aside.rename(target)
        _sync_folder(target.parent)
        for folder in new_folders:
            _sync_folder(folder.parent)

    def delete(self, key: str) -> None:
        (self.root / key).unlink()

    def iter_keys(self) -> Iterator[str]:
        for path in (self.root / "sha256").glob("*/*"):
            key = f"sha256/{path.parent.name}/{path.name}"
            if _KEY.fullmatch(key):
                yield key

    def probe(self, data: bytes) -> None:
        path = self.aside / f"probe-{secrets.token_hex(8)}"
        try:
            path.write_bytes(data)
            if path.read_bytes() != data:
                raise OSError(errno.EIO, "what was written reads back differently")
        finally:
            path.unlink(missing_ok=True)


class _RemoteFiles:
    """Any fsspec file system; content that is needed as a local file is downloaded once and verified."""

    def __init__(self, fs: Any, root: str, cache_dir: Path) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.cache_dir = cache_dir
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self.is_object_store = bool(protocols & _OBJECT_STORES)

    def _address(self, key: str) -> str:
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        return bool(self.fs.isfile(self._address(key)))

    def size(self, key: str) -> int:
        return int(self.fs.size(self._address(key)))

    def open(self, key: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(self._address(key), "rb")
        return file

    def local_path(self, key: str) -> Path:
        path = self.cache_dir / key
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            self.fs.get_file(self._address(key), str(aside))
            with aside.open("rb") as file:
                if image_key(hashlib.file_digest(file, "sha256").hexdigest()) != key:
                    raise OSError(errno.EIO, f"{key} arrived damaged")
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def write(self, key: str, source: IO[bytes]) -> None:
        self._put(key, lambda address: self.fs.pipe_file(address, source.read()))

    def take(self, key: str, path: Path, move: bool) -> None:  # noqa: ARG002 - `put_file` removes what was given away
        self._put(key, lambda address: self.fs.put_file(str(path), address))

    def _put(self, key: str, upload: Any) -> None:
        target = self._address(key)
        if self.is_object_store:
            upload(target)
            return
        aside = self._address(f"aside/{secrets.token_hex(16)}")
        self.fs.makedirs(f"{self.root}/aside", exist_ok=True)
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        upload(aside)
        self.fs.mv(aside, target)

    def delete(self, key: str) -> None:
        self.fs.rm_file(self._address(key))
        (self.cache_dir / key).unlink(missing_ok=True)

    def iter_keys(self) -> Iterator[str]:
        with suppress(FileNotFoundError):
            for address in self.fs.find(f"{self.root}/sha256"):
                key = "/".join(str(address).rsplit("/", 3)[1:])
                if _KEY.fullmatch(key):
                    yield key

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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
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
