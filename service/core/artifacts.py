"""The artifact store: immutable files under the sha256 of their content, on a local disk or any fsspec address.

A key is `sha256/ab/<64 hex digits>`. A key that exists holds exactly that content: files are written aside, flushed to
the disk and only then given their name, so that a crash at any moment leaves either the whole artifact or none.

Nothing that another process may just have begun to use is deleted outright: `condemn` moves an artifact out of sight,
to a name of its own in `condemned/`, from where `pardon` brings it back and `purge` removes it (see `garbage`).
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service.core.artifact_files import Backend, LocalFiles, RemoteFiles
from service.core.errors import NotFound, Unavailable

_KEY = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{64})")
_CONDEMNED = re.compile(r"condemned/(\d{1,12})-([0-9a-f]{64})-[0-9a-f]{16}")
_BATCH_FILES, _BATCH_BYTES = 512, 64 * 2**20  # what a batch holds in memory before it writes


def image_key(sha256: str) -> str:
    """The key of content whose sha256 (64 lower-case hex digits) is known."""
    return _checked(f"sha256/{sha256[:2]}/{sha256}")


def _checked(key: str) -> str:
    match = _KEY.fullmatch(key)
    if match is None or not match[2].startswith(match[1]):
        raise ValueError(f"{key!r} is no artifact key; keys look like 'sha256/ab/<64 hex digits>'.")
    return key


@dataclass(frozen=True)
class Condemned:
    """An artifact that was moved out of sight: where it lies, the key it had, since when (Unix time)."""

    path: str
    key: str
    since: float


class ArtifactStore:
    """Content-addressed files at `url`; `cache_dir` holds local copies of what a remote store keeps.

    Errors: `NotFound` for a key that is not there, `Unavailable` when the store is full or does not answer, and
    `ValueError` for a malformed key.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        fs, root = fsspec.core.url_to_fs(url)
        with _as_unavailable("write to"):
            self._backend: Backend = (
                LocalFiles(Path(root)) if isinstance(fs, LocalFileSystem) else RemoteFiles(fs, root, Path(cache_dir))
            )

    def put_bytes(self, data: bytes) -> str:
        """Stores `data` and returns its key; does nothing where the same content is already there."""
        with self.batch() as put:
            return put(data)

    @contextmanager
    def batch(self) -> Iterator[Callable[[bytes], str]]:
        """A `put_bytes` for many, which share their syncs: all are durable when the block ends, and not before."""
        waiting: dict[str, bytes] = {}

        def flush() -> None:
            with _as_unavailable("write to"):
                self._backend.write_many(waiting)
            waiting.clear()

        def put(data: bytes) -> str:
            key = image_key(hashlib.sha256(data).hexdigest())
            waiting[key] = data
            if len(waiting) >= _BATCH_FILES or sum(map(len, waiting.values())) >= _BATCH_BYTES:
                flush()
            return key

        yield put
        flush()

    def put_file(self, path: Path, *, move: bool = False) -> str:
        """Stores the file at `path`, streaming; with `move` the file is given away (renamed where possible)."""
        with path.open("rb") as file:
            key = image_key(hashlib.file_digest(file, "sha256").hexdigest())
        with _as_unavailable("write to"):
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
            for path in self._backend.paths("sha256"):
                if _KEY.fullmatch(path):
                    yield path

    def is_written_before(self, key: str, time: float) -> bool:
        """Whether the content was surely written before `time` (Unix); False where the store does not tell."""
        with _as_unavailable("read from", key):
            written = self._backend.modified(_checked(key))
            return written is not None and written < time

    def condemn(self, key: str, time: float) -> None:
        """Moves the content out of sight at `time` (Unix); a key that is not there is fine."""
        with _as_unavailable("write to"), suppress(FileNotFoundError):
            # A name that nobody else uses: two that condemn at once must not take each other's file for their own.
            name = f"{int(time)}-{_checked(key).rsplit('/', 1)[1]}-{secrets.token_hex(8)}"
            self._backend.move(key, f"condemned/{name}")

    def iter_condemned(self) -> Iterator[Condemned]:
        """All that was condemned and neither pardoned nor purged."""
        with _as_unavailable("read from"):
            for path in self._backend.paths("condemned"):
                if (match := _CONDEMNED.fullmatch(path)) is not None:
                    yield Condemned(path, image_key(match[2]), float(match[1]))

    def pardon(self, condemned: Condemned) -> None:
        """Puts the content back under its key, which must not exist."""
        with _as_unavailable("write to"), suppress(FileNotFoundError):
            self._backend.move(condemned.path, condemned.key)

    def purge(self, condemned: Condemned) -> None:
        """Removes the content for good."""
        with _as_unavailable("write to"), suppress(FileNotFoundError):
            self._backend.delete(condemned.path)

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
