"""The artifact store, on a local disk and on an fsspec store: content in, the same content out, or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from service.core.artifacts import ArtifactStore, image_key
from service.core.errors import NotFound, Unavailable
from tests.workers.harness import ROOT


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """Each kind of store, empty."""
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    return ArtifactStore(url, tmp_path / "cache")


def test_what_goes_in_comes_out(any_store: ArtifactStore, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    key = any_store.put_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    assert key == f"sha256/{digest[:2]}/{digest}" == image_key(digest)
    assert any_store.read_bytes(key) == data
    assert any_store.size(key) == len(data)
    assert any_store.local_path(key).read_bytes() == data
    with any_store.open(key) as file:
        file.seek(-3, 2)
        assert file.read() == data[-3:]
    path = tmp_path / "file"
    path.write_bytes(data + b"x")
    other = any_store.put_file(path)
    assert path.exists()
    assert any_store.read_bytes(other) == data + b"x"
    assert sorted(any_store.iter_keys()) == sorted([key, other])
    any_store.delete(key)
    any_store.delete(key)
    assert not any_store.exists(key)
    with pytest.raises(NotFound, match=key):
        any_store.read_bytes(key)
    with pytest.raises(NotFound, match=key):
        any_store.local_path(key)
    any_store.check()
    assert list(any_store.iter_keys()) == [other]


def test_the_same_content_again_changes_nothing(any_store: ArtifactStore, tmp_path: Path) -> None:
    key = any_store.put_bytes(b"same")
    path = tmp_path / "same"
    path.write_bytes(b"same")
    before = any_store.local_path(key).stat()
    assert any_store.put_file(path, move=True) == key == any_store.put_bytes(b"same")
    assert not path.exists()
    after = any_store.local_path(key).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_moved_file_is_renamed_and_can_be_memory_mapped(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"), tmp_path)
    path = tmp_path / "array.npy"
    np.save(path, np.arange(10))
    inode = path.stat().st_ino
    local = store.local_path(store.put_file(path, move=True))
    assert local.stat().st_ino == inode
    assert not path.exists()
    assert np.load(local, mmap_mode="r", allow_pickle=False).sum() == 45


def test_a_file_with_a_second_name_is_copied(tmp_path: Path) -> None:
    """Whoever holds the other name could change the content under its key."""
    store = ArtifactStore(str(tmp_path / "store"), tmp_path)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"content")
    other.hardlink_to(path)
    key = store.put_file(path, move=True)
    other.write_bytes(b"changed")
    assert store.read_bytes(key) == b"content"


@pytest.mark.parametrize(
    "key", ["", "../../etc/passwd", "sha256/ab/cd", f"sha256/00/{'1' * 64}", f"sha256/11/{'1' * 63}G"]
)
def test_a_malformed_key_is_refused(key: str, any_store: ArtifactStore) -> None:
    for call in (any_store.read_bytes, any_store.exists, any_store.delete, any_store.local_path):
        with pytest.raises(ValueError, match="artifact key"):
            call(key)


def test_a_download_is_verified(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://{tmp_path.name}", tmp_path / "cache")
    key = store.put_bytes(b"right")
    store._backend.fs.pipe_file(f"/{tmp_path.name}/{key}", b"wrong")  # type: ignore[attr-defined]  # fsspec's
    with pytest.raises(Unavailable):
        store.local_path(key)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(str(tmp_path / "store"), tmp_path)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="full"):
        store.put_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(Unavailable, match="full"):
        store.put_file(source)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_a_batch_flushes_every_file_before_its_name_and_every_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(str(tmp_path / "store"), tmp_path)
    there_before = store.put_bytes(b"0")
    flushed: list[int] = []  # inodes
    named: list[int] = []  # how many names there were at each flush

    def fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        named.append(len(list(store.iter_keys())))

    monkeypatch.setattr(os, "fsync", fsync)
    with store.batch() as put:
        keys = [put(str(i).encode()) for i in [*range(30), *range(30)]]
        assert list(store.iter_keys()) == [there_before]
    assert keys[0] == there_before
    new = {store.local_path(key) for key in keys} - {store.local_path(there_before)}
    folders = {folder for key in keys for folder in store.local_path(key).parents[:2]} | {tmp_path / "store"}
    assert len(flushed) == len(new) + len(folders)
    assert set(flushed[: len(new)]) == {path.stat().st_ino for path in new}
    assert set(flushed[len(new) :]) == {path.stat().st_ino for path in folders}
    assert set(named[: len(new)]) == {1}
    assert set(named[len(new) :]) == {30}


def test_a_batch_that_is_given_up_stores_nothing_and_a_long_one_writes_on_the_way(any_store: ArtifactStore) -> None:
    with pytest.raises(TypeError), any_store.batch() as put:
        put(put(b"never"))  # type: ignore[arg-type]  # a key is no content
    assert list(any_store.iter_keys()) == []
    with any_store.batch() as put:
        for i in range(600):
            put(i.to_bytes(2, "big"))
        n_written = len(list(any_store.iter_keys()))
    assert 0 < n_written < 600 == len(list(any_store.iter_keys()))


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(Unavailable):
        ArtifactStore(str(blocked / "store"), tmp_path)


def test_abandoned_writes_are_removed_at_the_next_start(tmp_path: Path) -> None:
    aside = tmp_path / "store" / "aside"
    aside.mkdir(parents=True)
    old, young = aside / "old", aside / "young"
    old.write_bytes(b"1")
    young.write_bytes(b"2")
    os.utime(old, (time.time() - 1e6, time.time() - 1e6))
    ArtifactStore(str(tmp_path / "store"), tmp_path)
    assert list(aside.iterdir()) == [young]


KILLED_WHILE_WRITING = """
import sys
from pathlib import Path
from service.core.artifacts import ArtifactStore
store = ArtifactStore(sys.argv[1], Path(sys.argv[1]))
i = 0
while True:
    with store.batch() as put:
        for _ in range(int(sys.argv[2])):
            put(i.to_bytes(4, "big") * 500_000)
            i += 1
"""


@pytest.mark.parametrize("batch", ["1", "4"])
def test_a_kill_while_writing_leaves_only_whole_artifacts(tmp_path: Path, batch: str) -> None:
    root = tmp_path / "store"
    for n_before in (0, 2, 5):
        process = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_WRITING, str(root), batch], cwd=ROOT)
        while len(list(root.glob("sha256/*/*"))) <= n_before:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
    store = ArtifactStore(str(root), tmp_path)
    for key in store.iter_keys():
        assert image_key(hashlib.sha256(store.read_bytes(key)).hexdigest()) == key
    assert store.exists(store.put_bytes(b"goes on"))
