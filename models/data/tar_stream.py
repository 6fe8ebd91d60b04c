"""Opening a tar so that no header can make `tarfile` read or unpack without bound."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from models.errors import InvalidInput

_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_SEEK_STEP = 2**20


@contextmanager
def opened_tar(path: Path, max_bytes: int, largest_read: int) -> Iterator[tarfile.TarFile]:
    """The tar (plain, .gz, .bz2, .xz) for one pass from start to end.

    InvalidInput if it is no tar, is damaged or cut off, unpacks to more than `max_bytes`, or one of its headers asks
    for more than `largest_read` bytes at once.
    """
    try:
        with _decompressed(path) as stream:
            guarded = cast("IO[bytes]", _GuardedStream(stream, max_bytes, largest_read))
            with _TarFile(fileobj=guarded, mode="r") as tar:
                yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; bz2 and gzip report bad data by an OSError without a number
        raise InvalidInput(
            f"The file is no zip or tar archive, or it is damaged or cut off ({error}). Upload it again, whole."
        ) from None


def refuse_above(total: int, allowed: int) -> None:
    """InvalidInput if an archive unpacks to more than is allowed for its size."""
    if total > allowed:
        raise InvalidInput(
            f"The archive unpacks to more than {allowed:,} bytes, which is too much in all or for a file of its size. "
            "Split it into smaller archives."
        )


class _TarFile(tarfile.TarFile):
    """Says so where the archive turns to garbage in the middle; `tarfile` would take that for its end."""

    fileobj: _GuardedStream

    def next(self) -> tarfile.TarInfo | None:
        """The next entry, None at the end. ReadError if the header is damaged, or what follows is none."""
        self.fileobj.n_read = 0
        try:
            info = super().next()
        except (tarfile.TarError, InvalidInput, EOFError, OSError, MemoryError):
            raise
        except Exception as error:  # hostile headers make tarfile raise nearly anything
            raise tarfile.ReadError(f"a header is damaged: {error}") from None
        self.fileobj.n_read = 0
        if info is None:
            if self.fileobj.last_block.strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {self.offset:,}")
            self.fileobj.drain()
        return info


class _GuardedStream(io.RawIOBase):
    """A forward stream that counts what it unpacks. Seeks forward by reading in steps, so that they count too."""

    def __init__(self, stream: IO[bytes], max_bytes: int, largest_read: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._largest_read = largest_read
        self.n_read = 0
        self.last_block = b""

    def read(self, size: int = -1) -> bytes:
        """InvalidInput where one header or entry asks for too much, or the archive has unpacked to too much."""
        self.n_read += size
        if size < 0 or self.n_read > self._largest_read:
            raise InvalidInput("A header in the archive asks for too many bytes at once. The archive is damaged.")
        self.last_block = self._pull(size)
        return self.last_block

    def _pull(self, size: int) -> bytes:
        data = self._stream.read(size)
        refuse_above(self._stream.tell(), self._max_bytes)
        return data

    def drain(self) -> None:
        """Read to the end, where compressed formats keep their checksum."""
        while self._pull(_SEEK_STEP):
            pass

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Only to absolute positions, which is all that `tarfile` asks for."""
        assert whence == io.SEEK_SET
        while (gap := position - self._stream.tell()) > 0:
            if not self._pull(min(gap, _SEEK_STEP)):
                return self._stream.tell()
        return self._stream.seek(position) if gap < 0 else position

    def seekable(self) -> bool:
        """True: `tarfile` moves over what it does not read."""
        return True

    def tell(self) -> int:
        """The position in the unpacked stream."""
        return self._stream.tell()


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    for magic, opener in _OPENERS:
        if head.startswith(magic):
            return cast("IO[bytes]", opener(path, "rb"))
    return path.open("rb")
