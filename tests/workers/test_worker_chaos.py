"""Kills at bad moments. Whatever dies: one terminal state a job, and its effect exactly once."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from service.core.db import Database
from service.core.embedded import EmbeddedValkey
from service.core.queue import JobQueue, connect
from service.core.settings import Settings
from service.core.tables import Job
from tests.workers.harness import WorkerProcess, World, is_alive, reconciling, wait_until
from tests.workers.zygote import Zygote

StartWorker = Callable[[], WorkerProcess]
MODERATE = {"n": 60, "pause_s": 0.02}


def test_a_killed_work_horse_is_replaced(world: World, start_worker: StartWorker) -> None:
    start_worker()
    job_id = world.add("count", MODERATE)
    os.kill(world.began(job_id), signal.SIGKILL)
    job = world.ended(job_id)
    assert (job.status, job.attempts, world.effect(job_id)) == ("succeeded", 2, "2")


def test_a_killed_worker_takes_its_work_horse_along_and_another_goes_on(
    world: World, start_worker: StartWorker
) -> None:
    workers = {worker.pid: worker for worker in (start_worker(), start_worker())}
    job_id = world.add("count", {"n": 100, "pause_s": 0.03})
    horse = world.began(job_id)
    pids = {row.id: row.pid for row in world.workers()}
    first = workers.pop(pids[world.job(job_id).worker_id or ""])
    (second,) = workers.values()
    with reconciling(world, n=2):
        first.kill(signal.SIGKILL)
        first.process.wait()
        wait_until(lambda: not is_alive(horse))
        world.began(job_id, attempt=2)
        job = world.ended(job_id)
    assert (job.status, job.attempts, world.effect(job_id)) == ("succeeded", 2, "2")
    assert len(world.runs(job_id)) == 2
    assert second.process.poll() is None


def test_a_frozen_worker_loses_its_job_and_cannot_write_when_it_thaws(world: World, start_worker: StartWorker) -> None:
    """Nobody can tell a frozen machine from a dead one; the fence must hold when it comes back."""
    first = start_worker()
    job_id = world.add("count", MODERATE)
    horse = world.began(job_id)
    freeze(world, job_id, (first.pid, horse))
    start_worker()
    try:
        with reconciling(world):
            world.began(job_id, attempt=2)
            os.kill(horse, signal.SIGCONT)  # now both attempts run
            os.kill(first.pid, signal.SIGCONT)
            job = world.ended(job_id)
    finally:
        for pid in (horse, first.pid):
            if is_alive(pid):
                os.kill(pid, signal.SIGCONT)
    assert (job.status, job.token, world.effect(job_id)) == ("succeeded", 2, "2")
    wait_until(lambda: not is_alive(horse))
    again = world.add("count", {"n": 1})
    assert world.ended(again).status == "succeeded"


def freeze(world: World, job_id: str, pids: tuple[int, ...]) -> None:
    """Stops the processes at a moment when none of them is in a transaction, which would lock the row for all."""
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if not is_locked(world, job_id):
            return
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)


def is_locked(world: World, job_id: str) -> bool:
    address = world.database.engine.url
    try:
        if address.drivername.startswith("sqlite"):
            with closing(sqlite3.connect(str(address.database), timeout=0.2)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        else:
            with world.database.write() as session:
                session.execute(select(Job).where(Job.id == job_id).with_for_update(nowait=True))
    except (sqlite3.OperationalError, DBAPIError):
        return True
    return False


@pytest.fixture
def own_world(own_valkey: EmbeddedValkey, settings: Settings, database: Database) -> Iterator[World]:
    """The world on that server."""
    settings = settings.model_copy(update={"redis_url": own_valkey.url})
    client = connect(own_valkey.url)
    yield World(settings, database, JobQueue(client, settings.queue))
    client.close()


@pytest.mark.parametrize("wipe", [False, True], ids=["data kept", "data lost"])
def test_valkey_dies_during_a_job(own_world: World, own_valkey: EmbeddedValkey, zygote: Zygote, wipe: bool) -> None:
    worker = WorkerProcess(own_world, zygote)
    try:
        with reconciling(own_world):
            running = own_world.add("count", {"n": 100, "pause_s": 0.02})
            waiting = [own_world.add("count", {"n": 2}) for _ in range(3)]
            own_world.began(running)
            n_threads = count_threads(worker.pid)
            assert own_valkey.pid is not None
            os.kill(own_valkey.pid, signal.SIGKILL)
            wait_until(lambda: not own_valkey.is_running())
            meanwhile = own_world.add("count", {"n": 2})  # accepted while Redis is away
            assert own_world.ended(running).status == "succeeded"
            if wipe:
                for path in (own_valkey.folder / "appendonlydir").iterdir():
                    path.unlink()
            own_valkey.restart()
            for job_id in (*waiting, meanwhile):
                job = own_world.ended(job_id)
                assert (job.status, job.attempts, own_world.effect(job_id)) == ("succeeded", 1, "1")
        assert own_world.effect(running) == "1"
        assert worker.process.poll() is None
        wait_until(lambda: count_threads(worker.pid) <= n_threads)  # no listener is left from before
    finally:
        worker.close()


def count_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_a_wiped_queue_is_filled_again(world: World, start_worker: StartWorker) -> None:
    jobs_ = [world.add("count", {"n": 1}) for _ in range(5)]
    world.queue.redis.flushall()
    start_worker()
    with reconciling(world, n=3):
        for job_id in jobs_:
            assert world.ended(job_id).status == "succeeded"
    assert [len(world.runs(job_id)) for job_id in jobs_] == [1] * 5


def test_a_message_lost_between_queue_and_worker_comes_back(world: World, start_worker: StartWorker) -> None:
    """As after a kill between taking the message and claiming the job."""
    job_id = world.add("count", {"n": 1})
    world.queue.redis.lmove(world.queue.rq.key, world.queue.rq.intermediate_queue_key, "LEFT", "RIGHT")
    assert world.queue.waiting() == []
    start_worker()
    with reconciling(world):
        assert world.ended(job_id).status == "succeeded"
    assert len(world.runs(job_id)) == 1
    wait_until(lambda: world.queue.in_hand() == [])


def test_delivered_many_times_a_job_runs_once(world: World, start_worker: StartWorker) -> None:
    start_worker()
    start_worker()
    job_id = world.add("count", {"n": 20}, enqueue=False)
    for token in range(6):
        world.queue.enqueue(job_id, token)
    assert world.ended(job_id).status == "succeeded"
    wait_until(lambda: world.queue.waiting() == [] and world.queue.in_hand() == [])
    assert len(world.runs(job_id)) == 1
