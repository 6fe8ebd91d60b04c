"""The collector: orphans go in two steps, and nothing that a row names, or may soon name, is ever lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from service.core import jobs, repositories, tables
from service.core.artifacts import ArtifactStore
from service.core.db import Database
from service.core.garbage import Collector
from service.core.settings import Settings

DAY_S = 86_400.0


class Clock:
    """Unix time by hand."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """Each kind of store, empty."""
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    return ArtifactStore(url, tmp_path / "cache")


@pytest.fixture
def collector(database: Database, any_store: ArtifactStore, settings: Settings, clock: Clock) -> Collector:
    """One collector on that clock and store."""
    return Collector(database, any_store, settings, clock)


def add_image(database: Database, key: str) -> None:
    """An image with that content, in a dataset of its own."""
    sha256 = key.rsplit("/", 1)[1]
    with database.write() as session:
        session.add(tables.Dataset(id=f"ds_{sha256[:20]}", name="d"))
        session.flush()
        image = {"sha256": sha256, "class_name": "c", "width": 1, "height": 1, "size_bytes": 1}
        session.add(tables.Image(id=f"im_{sha256[:20]}", dataset_id=f"ds_{sha256[:20]}", **image))


def keys(store: ArtifactStore) -> set[str]:
    return set(store.iter_keys())


def test_an_orphan_goes_in_two_steps_of_the_safe_age(
    any_store: ArtifactStore, collector: Collector, clock: Clock
) -> None:
    orphan = any_store.put_bytes(b"orphan")
    clock.now += DAY_S - 60
    assert collector.step() == 0
    clock.now += 120
    assert collector.step() == 1
    assert keys(any_store) == set()
    assert [condemned.key for condemned in any_store.iter_condemned()] == [orphan]
    clock.now += DAY_S - 60
    collector.step()
    assert len(list(any_store.iter_condemned())) == 1
    clock.now += 120
    collector.step()
    assert list(any_store.iter_condemned()) == []


def test_what_any_row_names_stays(
    database: Database, any_store: ArtifactStore, collector: Collector, clock: Clock
) -> None:
    names = ("image", "features", "index", "set", "model", "shard", "backbone", "fitted", "failed", "succeeded")
    key = {name: any_store.put_bytes(name.encode()) for name in names}
    add_image(database, key["image"])
    with database.write() as session:
        session.add(tables.Dataset(id="ds_1", name="d", artifacts={"res101": key["features"]}))
        session.add(tables.Knowledge(id="kn_1", name="k", kind="word_vectors", artifacts={"tokens": key["index"]}))
        session.flush()
        made = {"dataset_id": "ds_1", "knowledge_id": "kn_1", "name": "n"}
        how = {"method": "vgse", "artifacts": {"a": key["set"]}}
        session.add(tables.EmbeddingSet(id="es_1", relation="smo", **how, **made))
        session.add(tables.Classifier(id="cl_1", method="sje", artifacts={"a": key["model"]}, **made))
        session.add(tables.FeatureRows(spec="s", sha256="0", shard=key["shard"], start=0, count=1))
        summary = {"files": {"a": key["fitted"]}}
        session.add(tables.CachedArtifact(key="k", artifact=key["backbone"], summary=summary))
        for status in ("failed", "succeeded"):
            jobs.create_job(session, "import_archive", "ds_1", {"files": [key[status]]}).status = status
    clock.now += 10 * DAY_S
    assert collector.step() == 1
    assert keys(any_store) == set(key.values()) - {key["succeeded"]}


def test_what_a_failed_job_was_given_goes_with_what_it_was_to_fill(
    database: Database, any_store: ArtifactStore, collector: Collector, clock: Clock
) -> None:
    archive = any_store.put_bytes(b"archive")
    with database.write() as session:
        session.add(tables.Dataset(id="ds_1", name="d"))
        jobs.create_job(session, "import_archive", "ds_1", {"archive": archive}).status = "failed"
    clock.now += 10 * DAY_S
    assert collector.step() == 0
    with database.write() as session:
        repositories.delete_dataset(session, "ds_1")
    assert collector.step() == 1
    assert keys(any_store) == set()


def test_a_job_that_has_not_ended_may_still_record_what_it_wrote(
    database: Database, any_store: ArtifactStore, collector: Collector, clock: Clock
) -> None:
    with database.write() as session:
        job = jobs.create_job(session, "import_archive", "ds_1", {})
    orphan = any_store.put_bytes(b"of a long job")
    clock.now += 10 * DAY_S
    assert collector.step() == 0
    any_store.condemn(orphan, clock.now - 9 * DAY_S)
    collector.step()
    assert len(list(any_store.iter_condemned())) == 1
    with database.write() as session:
        session.get_one(tables.Job, job.id).status = "failed"
    collector.step()
    assert list(any_store.iter_condemned()) == []


@pytest.mark.parametrize("is_written_again", [False, True])
def test_what_gets_its_row_after_it_was_moved_aside_comes_back(
    database: Database, any_store: ArtifactStore, collector: Collector, clock: Clock, is_written_again: bool
) -> None:
    key = any_store.put_bytes(b"wanted after all")
    clock.now += 2 * DAY_S
    assert collector.step() == 1
    if is_written_again:
        any_store.put_bytes(b"wanted after all")
    add_image(database, key)
    clock.now += 2 * DAY_S
    collector.step()
    assert any_store.read_bytes(key) == b"wanted after all"
    assert list(any_store.iter_condemned()) == []


def test_a_store_that_tells_no_times_is_left_alone(
    database: Database, settings: Settings, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(f"memory://{tmp_path.name}", tmp_path / "cache")
    key = store.put_bytes(b"orphan")

    def modified(path: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(store._backend.fs, "modified", modified)  # type: ignore[attr-defined]  # fsspec's
    clock.now += 10 * DAY_S
    assert Collector(database, store, settings, clock).step() == 0
    assert keys(store) == {key}


def test_collectors_and_writers_at_once_lose_nothing(
    database: Database, any_store: ArtifactStore, settings: Settings, clock: Clock
) -> None:
    """Old orphans that are just being uploaded again: the writer does not write them, as they are there."""
    contents = [i.to_bytes(2, "big") for i in range(60)]
    for data in contents:
        any_store.put_bytes(data)
    clock.now += 2 * DAY_S
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            Collector(database, any_store, settings, clock).step()

    collectors = [threading.Thread(target=collect) for _ in range(2)]
    for thread in collectors:
        thread.start()
    written = []
    for start in range(0, len(contents), 10):
        with any_store.batch() as put:
            written += [put(data) for data in contents[start : start + 10]]
        for key in written[start:]:
            add_image(database, key)
    stop.set()
    for thread in collectors:
        thread.join()
    for _ in range(2):
        Collector(database, any_store, settings, clock).step()
        assert keys(any_store) == set(written)
        clock.now += 2 * DAY_S
    assert list(any_store.iter_condemned()) == []
    assert [any_store.read_bytes(key) for key in written] == contents


def test_it_stops_when_told_to(any_store: ArtifactStore, collector: Collector, clock: Clock) -> None:
    any_store.put_bytes(b"orphan")
    clock.now += 2 * DAY_S
    stop = threading.Event()
    stop.set()
    assert collector.step(stop) == 0
    collector.run(stop)
    assert len(keys(any_store)) == 1
