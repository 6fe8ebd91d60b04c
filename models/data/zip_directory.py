"""How many entries a zip has, before `zipfile` builds an object for each of them (about 1 KB an entry)."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from models.errors import InvalidInput

MAX_RECORD_BYTES = 1024
"""Average size of a directory record that is still believable: 46 bytes, the name and small extra fields."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_RECORD = struct.Struct("<4s24x3H12x")  # signature, ..., lengths of name, extra and comment


def check_zip_directory(path: Path, max_entries: int) -> None:
    """Walk the central directory with constant memory (zip specification 4.3.12 to 4.3.16).

    The count in the end record is not trusted: it is what `zipfile` ignores too. InvalidInput if there are more than
    `max_entries`; BadZipFile if there is no directory.
    """
    with path.open("rb", buffering=2**18) as file:
        start, size = _locate(file)
        if size > max_entries * MAX_RECORD_BYTES:
            raise _too_many(max_entries)
        file.seek(start)
        used = n_entries = 0
        while used < size:
            record = file.read(_RECORD.size)
            if len(record) < _RECORD.size or not record.startswith(b"PK\x01\x02"):
                raise zipfile.BadZipFile("its directory is damaged")
            n_entries += 1
            if n_entries > max_entries:
                raise _too_many(max_entries)
            rest = sum(_RECORD.unpack(record)[1:])
            file.read(rest)
            used += _RECORD.size + rest


def _too_many(max_entries: int) -> InvalidInput:
    return InvalidInput(f"The archive has more than {max_entries:,} entries. Split it into smaller ones.")


def _locate(file: BinaryIO) -> tuple[int, int]:
    """Offset and size of the central directory: it ends where the end records start."""
    file_size = file.seek(0, os.SEEK_END)
    tail_start = max(file_size - 2**16 - _END.size, 0)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("its end record is missing")
    size = _END.unpack_from(tail, at)[5]
    end = tail_start + at
    if end >= _END64_LOCATOR.size + _END64.size:
        file.seek(end - _END64_LOCATOR.size - _END64.size)
        block = file.read(_END64.size + _END64_LOCATOR.size)
        if block.startswith(b"PK\x06\x06") and block[_END64.size :].startswith(b"PK\x06\x07"):
            end -= len(block)
            size = _END64.unpack_from(block)[8]
    if size > end:
        raise zipfile.BadZipFile("its directory is larger than the file")
    return end - size, size
