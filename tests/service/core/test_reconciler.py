"""The reconciler's single steps, on a clock that the test moves."""

from __future__ import annotations

import fcntl
import os
import time
from datetime import timedelta

import pytest
from redis import Redis
from sqlalchemy import update

from service.core import jobs, tables
from service.core.db import Database, utc_now
from service.core.process import host_id
from service.core.queue import JobQueue
from service.core.reconciler import Reconciler
from service.core.settings import Settings


class Clock:
    """Monotonic seconds by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def reconciler(database: Database, redis: Redis, queue: JobQueue, settings: Settings, clock: Clock) -> Reconciler:
    """One reconciler on that clock."""
    return Reconciler(database, redis, queue, settings, clock)


def add(database: Database, *, queued_ago_s: float = 10.0, claimed_by: str | None = None, max_attempts: int = 3) -> str:
    with database.write() as session:
        job = jobs.create_job(session, "embed", "es_none", {}, max_attempts)
        job.queued_at = utc_now() - timedelta(seconds=queued_ago_s)
    if claimed_by is not None:
        with database.write() as session:
            assert jobs.claim(session, job.id, claimed_by) is not None
    return job.id


def status(database: Database, job_id: str) -> str:
    with database.read() as session:
        return jobs.get_job(session, job_id).status


def test_silence_is_measured_from_the_last_change(
    database: Database, reconciler: Reconciler, clock: Clock, settings: Settings
) -> None:
    job_id = add(database, claimed_by="w")
    with database.write() as session:  # by the wall clock this heartbeat is ancient
        session.execute(update(tables.Job).values(heartbeat_at=utc_now() - timedelta(days=1)))
    reconciler.step()
    clock.now += settings.lost_after_s * 0.9
    reconciler.step()
    assert status(database, job_id) == "running"
    with database.write() as session:
        jobs.heartbeat(session, job_id, 1)
    clock.now += settings.lost_after_s * 0.9
    reconciler.step()
    assert status(database, job_id) == "running"
    clock.now += settings.lost_after_s * 1.1
    reconciler.step()
    assert status(database, job_id) == "queued"


def test_a_lost_job_is_queued_again_until_its_attempts_are_spent(
    database: Database, reconciler: Reconciler, clock: Clock, settings: Settings, queue: JobQueue
) -> None:
    job_id = add(database, claimed_by="w", max_attempts=2)
    for expected in ("queued", "failed"):
        reconciler.step()
        clock.now += settings.lost_after_s + 0.1
        reconciler.step()
        assert status(database, job_id) == expected
        if expected == "queued":
            assert queue.contains(job_id)
            with database.write() as session:
                jobs.claim(session, job_id, "w2")


def test_a_worker_whose_process_is_gone_is_not_waited_for(database: Database, reconciler: Reconciler) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    job_id, other = add(database, claimed_by="dead"), add(database, claimed_by="elsewhere")
    with database.write() as session:
        session.add(tables.Worker(id="dead", host=host_id(), pid=child))
        session.add(tables.Worker(id="elsewhere", host="another/boot/pid:[1]", pid=child))
    reconciler.step()
    assert status(database, job_id) == "queued"
    assert status(database, other) == "running"
    with database.read() as session:
        assert [row.id for row in session.query(tables.Worker)] == ["elsewhere"]


def test_a_forgotten_job_is_queued_again_but_one_on_its_way_is_not(
    database: Database, reconciler: Reconciler, queue: JobQueue
) -> None:
    forgotten, fresh, known = add(database), add(database, queued_ago_s=-60), add(database)
    queue.enqueue(known)
    reconciler.step()
    reconciler.step()
    assert queue.waiting() == [queue.message_id(known, 0), queue.message_id(forgotten, 0)]
    assert not queue.contains(fresh)


def test_messages_stuck_with_a_dead_worker_are_freed(
    database: Database, reconciler: Reconciler, queue: JobQueue, clock: Clock, settings: Settings
) -> None:
    taken, running = add(database), add(database)
    for job_id in (taken, running):
        queue.enqueue(job_id)
        queue.redis.lmove(queue.rq.key, queue.rq.intermediate_queue_key, "LEFT", "RIGHT")
    with database.write() as session:
        jobs.claim(session, running, "w")
    reconciler.step()
    assert queue.waiting() == []
    with database.write() as session:
        jobs.heartbeat(session, running, 1)
    clock.now += settings.lost_after_s + 0.1
    reconciler.step()
    assert queue.waiting() == [queue.message_id(taken, 0)]
    assert queue.in_hand() == [queue.message_id(running, 0)]


def test_an_unheeded_cancel_is_enforced(database: Database, reconciler: Reconciler, settings: Settings) -> None:
    job_id = add(database, claimed_by="w")
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    reconciler.step()
    assert status(database, job_id) == "cancelling"
    with database.write() as session:
        late = utc_now() - timedelta(seconds=settings.cancel_kill_s + 2)
        session.execute(update(tables.Job).values(cancel_requested_at=late))
    reconciler.step()
    assert status(database, job_id) == "cancelled"
    with pytest.raises(jobs.StaleAttempt), database.write() as session:
        jobs.finish(session, job_id, 1, {})


def test_leftovers_are_tidied(database: Database, reconciler: Reconciler, settings: Settings) -> None:
    with database.write() as session:
        old = utc_now() - timedelta(seconds=settings.idempotency_ttl_s + 10)
        session.add(tables.IdempotencyKey(key="old", created_at=old, locked_until=old))
        session.add(tables.IdempotencyKey(key="new"))
        session.add(tables.Worker(id="silent", host="h", pid=1, heartbeat_at=utc_now() - timedelta(hours=1)))
    job_id = add(database, claimed_by="w")
    for name in ("upload", f"{job_id}-1", "fresh"):
        (settings.scratch_dir / name).mkdir()
    for name in ("upload", f"{job_id}-1"):
        os.utime(settings.scratch_dir / name, (1.0, 1.0))
    reconciler.step()
    with database.read() as session:
        assert [row.key for row in session.query(tables.IdempotencyKey)] == ["new"]
        assert session.query(tables.Worker).count() == 0
    assert sorted(path.name for path in settings.scratch_dir.iterdir()) == sorted([f"{job_id}-1", "fresh"])


def test_what_a_killed_upload_left_is_removed_at_the_next_start_and_what_is_being_written_is_not(
    reconciler: Reconciler, settings: Settings
) -> None:
    left, written, young = (settings.scratch_dir / name for name in ("upload-left", "upload-written", "upload-young"))
    for path in (left, written, young):
        path.write_bytes(b"part of an archive")
    for path in (left, written):
        os.utime(path, (time.time() - 120, time.time() - 120))
    with written.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reconciler.step()
    assert sorted(settings.scratch_dir.iterdir()) == [written, young]


def test_without_redis_the_rest_goes_on(database: Database, settings: Settings, clock: Clock) -> None:
    from service.core.queue import connect

    nowhere = connect("unix:///nonexistent/socket")
    reconciler = Reconciler(database, nowhere, JobQueue(nowhere, "q"), settings, clock)
    waiting, running = add(database), add(database, claimed_by="w")
    reconciler.step()
    clock.now += settings.lost_after_s + 0.1
    reconciler.step()
    assert status(database, waiting) == "queued"
    assert status(database, running) == "queued"
