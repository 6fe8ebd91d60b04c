from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.data.archives import (
    ArchiveEntry,
    ArchiveLimits,
    ArchiveRejection,
    inspect_archive,
    iterate_archive,
)
from models.errors import InvalidInput
from tests.models.data.pictures import encode, picture

KINDS = (".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
JPEG = encode(picture(), "JPEG")


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    openers: dict[str, Callable[..., Any]] = {".tar": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers[path.suffix](path, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, limits: ArchiveLimits | None = None) -> tuple[dict[str, ArchiveEntry], dict[str, str]]:
    outcomes = list(iterate_archive(path, limits or ArchiveLimits()))
    entries = {outcome.filename: outcome for outcome in outcomes if isinstance(outcome, ArchiveEntry)}
    return entries, {o.filename: o.reason for o in outcomes if isinstance(o, ArchiveRejection)}


@pytest.mark.parametrize("kind", KINDS)
def test_entries_come_whole_and_in_order(tmp_path: Path, kind: str) -> None:
    files = {f"data/{name}/{i}.jpg": JPEG + bytes([i]) for i in range(40) for name in ("cat", "dog")}
    path = pack(tmp_path / f"a{kind}", {"data/": b"", **files} if kind == ".zip" else files)
    outcomes = list(iterate_archive(path))
    assert [(o.filename, o.data) for o in outcomes if isinstance(o, ArchiveEntry)] == list(files.items())
    assert {o.class_name for o in outcomes if isinstance(o, ArchiveEntry)} == {"cat", "dog"}
    assert inspect_archive(path).n_files == 80


@pytest.mark.parametrize("kind", KINDS)
def test_splits_file_inside_is_found_wherever_it_stands(tmp_path: Path, kind: str) -> None:
    splits = {
        "train": ["images/cat/1.jpg", "images/cat/gone.jpg"],
        "test_unseen": ["images/dog/1.jpg"],
        "seen_classes": ["cat"],
        "unseen_classes": ["dog"],
    }
    path = tmp_path / f"a{kind}"
    pack(
        path,
        {"set/images/cat/1.jpg": JPEG, "set/images/dog/1.jpg": JPEG, "set/splits.json": json.dumps(splits).encode()},
    )
    entries, rejected = read(path)
    assert {name: entry.split for name, entry in entries.items()} == {
        "set/images/cat/1.jpg": "train",
        "set/images/dog/1.jpg": "test",
    }
    assert list(rejected) == ["images/cat/gone.jpg"]
    plan = inspect_archive(path)
    assert plan.splits is not None
    assert (plan.splits.seen_classes, plan.splits.unseen_classes) == (("cat",), ("dog",))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_entries_are_reported_and_the_rest_survives(tmp_path: Path, kind: str) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x", "y")
    bad = {
        "../cat/2.jpg": "'..'",
        "/cat/3.jpg": "absolute",
        "C:/cat/4.jpg": "absolute",
        "cat/deep/5.jpg": "too deep",
        "loose.jpg": "no class folder",
        "cat/inner.zip": "archive in the archive",
        "cat/renamed.jpg": "archive in the archive",
        "cat/gz.jpg": "archive in the archive",
        "cat/huge.jpg": "larger than 40,000 bytes",
    }
    contents = dict.fromkeys(bad, JPEG)
    contents |= {"cat/inner.zip": inner.getvalue(), "cat/renamed.jpg": inner.getvalue()}
    contents |= {"cat/gz.jpg": gzip.compress(b"x"), "cat/huge.jpg": bytes(40_001), "cat/most.jpg": bytes(40_000)}
    hidden = {"__MACOSX/cat/._1.jpg": b"x", "cat/.DS_Store": b"x"}
    path = pack(tmp_path / f"a{kind}", {"cat/1.jpg": JPEG, **contents, **hidden, "dog/note.txt": b"no image"})
    entries, rejected = read(path, ArchiveLimits(max_entry_bytes=40_000))
    assert list(entries) == ["cat/1.jpg", "cat/most.jpg", "dog/note.txt"]
    assert set(rejected) == set(bad)
    for name, reason in bad.items():
        assert reason in rejected[name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S"])
def test_links_and_devices_in_a_tar_are_rejected(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("cat/bad.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        info = tarfile.TarInfo("cat/good.jpg")
        info.size = len(JPEG)
        tar.addfile(info, io.BytesIO(JPEG))
    entries, rejected = read(path)
    assert list(entries) == ["cat/good.jpg"]
    assert list(rejected) == ["cat/bad.jpg"]


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644])
def test_links_and_devices_in_a_zip_are_rejected(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("cat/bad.jpg")
        info.create_system, info.external_attr = 3, mode << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("cat/good.jpg", JPEG)
    entries, rejected = read(path)
    assert list(entries) == ["cat/good.jpg"]
    assert list(rejected) == ["cat/bad.jpg"]


@pytest.mark.parametrize("kind", KINDS)
def test_entry_count_holds_at_and_past_the_limit(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.jpg": b"x" for i in range(10)})
    assert len(read(path, ArchiveLimits(max_entries=10))[0]) == 10
    with pytest.raises(InvalidInput, match="more than 9 entries"):
        next(iterate_archive(path, ArchiveLimits(max_entries=9)))


@pytest.mark.parametrize("kind", KINDS)
def test_total_size_is_refused_before_the_first_entry(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.jpg": rng.bytes(50_000) for i in range(4)})
    slack = 20_000  # a tar's headers count too
    assert len(read(path, ArchiveLimits(max_total_bytes=200_000 + slack))[0]) == 4
    with pytest.raises(InvalidInput, match="unpacks to more than 190,000 bytes"):
        next(iterate_archive(path, ArchiveLimits(max_total_bytes=190_000)))


@pytest.mark.parametrize("kind", [".zip", ".tar.gz", ".tar.xz"])
def test_high_compression_ratio_is_refused(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.bmp": bytes(3_000_000) for i in range(3)})
    assert len(read(path, ArchiveLimits(ratio_from_bytes=10_000_000))[0]) == 3
    with pytest.raises(InvalidInput, match="unpacks to more than"):
        next(iterate_archive(path, ArchiveLimits(ratio_from_bytes=1_000_000)))


def million_entry_zip(path: Path, n_entries: int) -> None:
    """A central directory whose records all point to one stored file; the end record lies about their number."""
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 1, 1, 5, 0) + b"c/1.j" + b"x"
    record = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 1, 1, 5, 0, 0, 0, 0, 0, 0) + b"c/1.j"
    with path.open("wb") as file:
        file.write(local)
        for _ in range(10):
            file.write(record * (n_entries // 10))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(record) * n_entries, len(local), 0))


def test_a_million_entries_are_refused_fast_and_in_small_memory(tmp_path: Path) -> None:
    million_entry_zip(tmp_path / "a.zip", 1_000_000)
    start = time.perf_counter()
    with pytest.raises(InvalidInput, match="more than 200,000 entries"):
        next(iterate_archive(tmp_path / "a.zip"))
    assert time.perf_counter() - start < 10
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="more than 60,000 entries"):
        next(iterate_archive(tmp_path / "a.zip", ArchiveLimits(max_entries=60_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_overlapping_entries_count_as_a_bomb(tmp_path: Path) -> None:
    million_entry_zip(tmp_path / "a.zip", 1000)
    with pytest.raises(InvalidInput, match="unpacks to more than"):
        next(iterate_archive(tmp_path / "a.zip", ArchiveLimits(max_ratio=0.01, ratio_from_bytes=0)))


def test_zip64_directories_are_counted_and_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {f"cat/{i}.jpg": b"x" for i in range(10)})
    data = path.read_bytes()
    at = data.rindex(b"PK\x05\x06")
    size, offset = struct.unpack_from("<2L", data, at + 12)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10, 10, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:at] + end64 + locator + end)
    assert inspect_archive(path, ArchiveLimits(max_entries=10)).n_files == 10
    with pytest.raises(InvalidInput, match="more than 9 entries"):
        inspect_archive(path, ArchiveLimits(max_entries=9))


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"cat/1.jpg": JPEG})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="encrypted"):
        next(iterate_archive(path))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello" * 200, JPEG, b"PK\x03\x04" + bytes(100), gzip.compress(b"not a tar" * 99), b"\x1f\x8b", b"BZh9"],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="archive"):
        next(iterate_archive(path))


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_without_files_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InvalidInput, match="holds no files"):
        inspect_archive(pack(tmp_path / f"a{kind}", {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_truncated_archives_are_refused_before_the_first_entry(tmp_path: Path, kind: str, keep: float) -> None:
    rng = np.random.default_rng(0)
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.jpg": rng.bytes(9_000) for i in range(20)})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InvalidInput, match="cut off"):
        next(iterate_archive(path))


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz", ".tar.bz2"])
def test_damaged_bytes_raise_only_invalid_input(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.jpg": rng.bytes(300) for i in range(5)})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    n_refused = 0
    for _ in range(80):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), size=6)] = rng.integers(0, 256, size=6)
        path.write_bytes(damaged.tobytes())
        try:
            list(iterate_archive(path))
        except InvalidInput:
            n_refused += 1
    assert n_refused > 0


def test_damaged_header_in_the_middle_of_a_tar_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"cat/{i}.jpg": b"x" for i in range(4)})
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"damaged at byte 1,024"):
        inspect_archive(path)


def test_a_header_of_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8 * 2**30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="too many bytes at once"):
        inspect_archive(path)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_corrupt_entry_of_a_zip_is_rejected_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("cat/1.jpg", b"first content")
        archive.writestr("cat/2.jpg", b"second content")
    path.write_bytes(path.read_bytes().replace(b"first content", b"wurst content"))
    entries, rejected = read(path)
    assert list(entries) == ["cat/2.jpg"]
    assert "CRC" in rejected["cat/1.jpg"]


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz"])
def test_memory_stays_flat(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = pack(tmp_path / f"a{kind}", {f"cat/{i}.jpg": rng.bytes(200_000) for i in range(100)})
    tracemalloc.start()
    n_bytes = sum(len(o.data) for o in iterate_archive(path) if isinstance(o, ArchiveEntry))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == 20_000_000
    assert peak < 4_000_000
