"""Starts, kills and watches real worker processes."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis import Redis

from service.core import events, jobs, tables
from service.core.db import Database
from service.core.process import host_id
from service.core.queue import JobQueue
from service.core.reconciler import Reconciler
from service.core.settings import Settings
from tests.workers.zygote import ROOT, Forked, Zygote

__all__ = ["ROOT", "WorkerProcess", "World", "is_alive", "reconciling", "wait_until"]


def events_of(redis: Redis, job_id: str, last_id: str = "0-0") -> list[events.Event]:
    """All events of a job after `last_id`."""
    return events.parse(redis.xread({events.key(job_id): last_id})).get(events.key(job_id), [])


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first true answer of `condition`; fails the test when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {condition}")


class World:
    """The database's view of things, and hands to change it."""

    def __init__(self, settings: Settings, database: Database, queue: JobQueue) -> None:
        self.settings = settings
        self.database = database
        self.queue = queue

    def add(self, kind: str, payload: dict[str, Any], *, enqueue: bool = True, max_attempts: int = 3) -> str:
        """Creates a job as the API does; it fills a dataset, so that it may be retried."""
        with self.database.write() as session:
            dataset = session.merge(tables.Dataset(id="ds_of_jobs", name="of jobs"))
            job_id = jobs.create_job(session, kind, dataset.id, payload, max_attempts).id
        if enqueue:
            self.queue.enqueue(job_id)
        return job_id

    def job(self, job_id: str) -> tables.Job:
        """The job's row now."""
        with self.database.read() as session:
            return jobs.get_job(session, job_id)

    def cancel(self, job_id: str) -> None:
        """Asks for a cancel as the API does."""
        with self.database.write() as session:
            jobs.request_cancel(session, job_id)

    def ended(self, job_id: str, timeout_s: float = 60.0) -> tables.Job:
        """Waits for a terminal state."""
        wait_until(lambda: self.job(job_id).status in jobs.TERMINAL, timeout_s)
        return self.job(job_id)

    def runs(self, job_id: str) -> list[tuple[int, int]]:
        """(token, pid) of every attempt that began to work."""
        log = self.settings.data_dir / "runs.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [(int(token), int(pid)) for job, token, pid in lines if job == job_id]

    def began(self, job_id: str, attempt: int = 1) -> int:
        """Waits until an attempt works; its pid."""
        wait_until(lambda: len(self.runs(job_id)) >= attempt)
        return self.runs(job_id)[attempt - 1][1]

    def effect(self, job_id: str) -> str | None:
        """Which attempt's results are visible."""
        with self.database.read() as session:
            row = session.get(tables.CachedArtifact, f"effect-{job_id}")
            return row.artifact if row is not None else None

    def workers(self) -> list[tables.Worker]:
        """Rows of workers that live as far as the database knows."""
        with self.database.read() as session:
            return [row for row in session.query(tables.Worker) if row.host == host_id()]


class WorkerProcess:
    """One worker in a process of its own."""

    def __init__(self, world: World, zygote: Zygote) -> None:
        before = {row.id for row in world.workers()}
        self.log = world.settings.data_dir / f"worker-{time.monotonic_ns()}.log"
        self.process = Forked(zygote, world.settings.to_environment(), self.log)
        wait_until(lambda: {row.id for row in world.workers()} - before)

    @property
    def pid(self) -> int:
        """The parent's pid."""
        return self.process.pid

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the parent."""
        self.process.send_signal(sig)

    def close(self) -> None:
        """Leaves nothing running."""
        self.process.send_signal(signal.SIGTERM)
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def reconciling(world: World, n: int = 1) -> Iterator[None]:
    """`n` reconcilers in threads, as in `n` API processes."""
    stop = threading.Event()
    threads = []
    for _ in range(n):
        reconciler = Reconciler(world.database, world.queue.redis, world.queue, world.settings)
        threads.append(threading.Thread(target=reconciler.run, args=(stop,)))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
