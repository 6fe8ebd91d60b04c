"""Features of stored images: in shards, from the cache, and as well from processes as from threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from redis import Redis
from sqlalchemy import func, select

from models.backbones import Backbone, create_backbone
from models.params import PatchParams
from service.core import jobs
from service.core.artifacts import ArtifactStore
from service.core.db import Database
from service.core.queue import JobQueue
from service.core.settings import Settings
from service.core.tables import FeatureRows
from tests.service.harness import png
from workers import features
from workers.features import image_features, processes_to_cut
from workers.runner import Services, TaskContext, run_job

PATCHES = PatchParams(size=32)


class Found(NamedTuple):
    """What a job found, and how it ended."""

    rows: dict[str, Any]
    n_computed: int
    status: str


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone("small_cnn", weights=None)


@pytest.fixture
def images(store: ArtifactStore) -> list[str]:
    """Ten stored images."""
    return [store.put_bytes(png(seed)).rpartition("/")[2] for seed in range(10)]


@pytest.fixture
def extract(
    settings: Settings, database: Database, store: ArtifactStore, redis: Redis, queue: JobQueue, backbone: Backbone
) -> Callable[[list[str]], Found]:
    """Runs a job that wants the features of images."""

    def run(sha256s: list[str]) -> Found:
        found: list[tuple[dict[str, Any], int]] = []

        def task(context: TaskContext) -> Callable[..., dict[str, Any]]:
            table = image_features(context, sha256s, backbone, PATCHES, phase="features")
            rows = {"features": np.array(table.features), "boxes": table.boxes, "image_index": table.image_index}
            found.append((rows, table.n_computed))
            return lambda _session: {}

        with database.write() as session:
            job_id = jobs.create_job(session, "extract", "es_none", {}, 1).id
        services = Services(settings, database, store, redis, queue)
        status = run_job(job_id, worker_id="test", tasks={"extract": task}, services=services)
        return Found(*(found[0] if found else ({}, 0)), str(status))

    return run


def n_shards(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count(FeatureRows.shard.distinct()))) or 0


def test_shards_are_written_while_others_are_computed_and_hold_everything(
    extract: Callable[[list[str]], Found], images: list[str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_IMAGES", 4)
    first = extract([*images, images[3]])
    assert first.status == "succeeded"
    assert n_shards(database) == 3
    assert len(first.rows["features"]) == first.n_computed + np.sum(first.rows["image_index"] == 3)
    again = extract([*images, images[3]])
    assert again.n_computed == 0
    for name, rows in first.rows.items():
        assert (rows == again.rows[name]).all()


def test_shards_that_the_store_has_lost_are_computed_anew(
    extract: Callable[[list[str]], Found], images: list[str], database: Database, store: ArtifactStore
) -> None:
    first = extract(images)
    with database.read() as session:
        for shard in session.scalars(select(FeatureRows.shard).distinct()):
            store.delete(shard)
    again = extract(images[:5])
    assert again.status == "succeeded"
    assert again.n_computed == np.sum(first.rows["image_index"] < 5)
    assert extract(images).n_computed == first.n_computed - again.n_computed


def test_what_was_written_before_a_failure_is_found_again(
    extract: Callable[[list[str]], Found], images: list[str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_IMAGES", 4)
    put_file, n_put = ArtifactStore.put_file, 0

    def put_one(self: ArtifactStore, path: Path, *, move: bool = False) -> str:
        nonlocal n_put
        n_put += 1
        if n_put == 2:
            raise OSError("The disk is full.")
        return put_file(self, path, move=move)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "put_file", put_one)
        assert extract(images).status == "failed"
    assert n_shards(database) == 1
    rest = extract(images)
    assert rest.status == "succeeded"
    assert len(rest.rows["features"]) > rest.n_computed > 0


def test_processes_find_what_threads_find(
    extract: Callable[[list[str]], Found], images: list[str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads = extract(images)
    with database.write() as session:
        session.query(FeatureRows).delete()
    monkeypatch.setattr(features, "processes_to_cut", lambda *_: 2)
    in_processes = extract(images)
    assert in_processes.n_computed == in_threads.n_computed > 0
    for name, rows in in_threads.rows.items():
        assert (rows == in_processes.rows[name]).all()


def test_processes_cut_for_a_gpu_where_they_are_worth_their_start_and_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "has_room_for_processes", lambda _patches, n: n < 32)
    assert processes_to_cut("cuda", PATCHES, 10_000, 16) == 16
    assert processes_to_cut("cuda", PATCHES, 10_000, 32) == 0
    assert processes_to_cut("cuda", PATCHES, 100, 16) == 0
    assert processes_to_cut("cpu", PATCHES, 10_000, 16) == 0
