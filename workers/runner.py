"""Runs one attempt of one job: claim, work, publish. What kinds of jobs exist is the caller's table of tasks.

A task is a function of a `TaskContext` that does the work and returns a *publisher*: a function of a database session
that writes the results and returns the job's `result`. The publisher runs in the transaction that ends the job, so
that either both become visible or neither does, and a stale or cancelled attempt publishes nothing.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis, RedisError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from models.errors import Cancelled, InvalidInput, OutOfDeviceMemory
from service.core import events, jobs
from service.core.artifacts import ArtifactStore
from service.core.db import Database, make_engine
from service.core.errors import ServiceError, Unavailable, problem_of
from service.core.jobs import StaleAttempt
from service.core.logging import get_logger
from service.core.queue import JobQueue, connect
from service.core.settings import Settings
from service.core.tables import Job
from workers.progress import JobProgress

_log = get_logger(__name__)
_TRANSIENT_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN}


@dataclass(frozen=True)
class Services:
    """What workers share with the API: the outside world, opened once a process."""

    settings: Settings
    database: Database
    store: ArtifactStore
    redis: Redis
    queue: JobQueue


@dataclass(frozen=True)
class JobSnapshot:
    """The job as it was claimed."""

    id: str
    kind: str
    resource_id: str
    payload: dict[str, Any]
    token: int
    attempts: int
    max_attempts: int


@dataclass(frozen=True)
class TaskContext:
    """All that a task gets. `scratch_dir` is its own and is removed afterwards; `progress` is its `OnProgress`."""

    settings: Settings
    database: Database
    store: ArtifactStore
    redis: Redis
    job: JobSnapshot
    progress: JobProgress
    scratch_dir: Path


Publisher = Callable[[Session], dict[str, Any]]
TaskFunction = Callable[[TaskContext], Publisher]


def open_services(settings: Settings, *, pooled: bool = True) -> Services:
    """Opens database, store and queue as the settings say; `pooled=False` for processes that fork."""
    settings.make_dirs()
    redis = connect(settings.resolved_redis_url)
    return Services(
        settings,
        Database(make_engine(settings.resolved_database_url, pooled=pooled)),
        ArtifactStore(settings.resolved_store_url, settings.cache_dir),
        redis,
        JobQueue(redis, settings.queue),
    )


def run_job(job_id: str, *, worker_id: str, tasks: Mapping[str, TaskFunction], services: Services) -> str | None:
    """Runs one attempt to its end and answers the job's new status; None if the job is not there to be claimed."""
    with services.database.write() as session:
        job = jobs.claim(session, job_id, worker_id)
        snapshot = _snapshot(job) if job is not None else None
    if snapshot is None:
        _log.info("job_not_claimed", job_id=job_id)
        return None
    events.publish_status(services.redis, services.database, job_id)
    _log.info("job_started", job_id=job_id, kind=snapshot.kind, attempt=snapshot.attempts)
    status = _attempt(snapshot, tasks, services)
    _log.info("job_attempt_ended", job_id=job_id, status=status)
    if status == "queued":
        services.queue.enqueue(job_id, snapshot.token)
    events.publish_status(services.redis, services.database, job_id)
    return status


def scratch_path(settings: Settings, job_id: str, token: int) -> Path:
    """The scratch folder of one attempt."""
    return settings.scratch_dir / f"{job_id}-{token}"


def _snapshot(job: Job) -> JobSnapshot:
    return JobSnapshot(job.id, job.kind, job.resource_id, job.payload, job.token, job.attempts, job.max_attempts)


def _attempt(job: JobSnapshot, tasks: Mapping[str, TaskFunction], services: Services) -> str:
    progress = JobProgress(services.database, services.redis, job.id, job.token)
    scratch = scratch_path(services.settings, job.id, job.token)
    with _heartbeat(job, progress, services):
        try:
            task = tasks.get(job.kind)
            if task is None:
                raise ServiceError(f"This worker knows no jobs of kind {job.kind!r}; is it an older version?")
            scratch.mkdir(parents=True, exist_ok=True)
            context = TaskContext(
                services.settings, services.database, services.store, services.redis, job, progress, scratch
            )
            publisher = task(context)
            progress.flush()
            return _publish(job, publisher, services.database)
        except Exception as error:
            return _end(job, error, services)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _publish(job: JobSnapshot, publisher: Publisher, database: Database) -> str:
    """Results and the job's end in one transaction; a lost connection is tried again, as the work is already done."""
    for pause_s in (0.5, 2.0, None):
        try:
            with database.write() as session:
                jobs.hold(session, job.id, job.token)
                jobs.finish(session, job.id, job.token, publisher(session))
        except OperationalError:
            if pause_s is None:
                raise
            time.sleep(pause_s)
        except StaleAttempt:
            # The connection may have been lost after the server had committed.
            with database.read() as session:
                if _status(session, job) != "succeeded":
                    raise
            return "succeeded"
        else:
            return "succeeded"
    raise AssertionError("unreachable")


def _status(session: Session, job: JobSnapshot) -> str:
    """The attempt's status now; raises `StaleAttempt` if there is a newer one."""
    row = session.get(Job, job.id)
    if row is None or row.token != job.token:
        raise StaleAttempt(f"Attempt {job.token} of job {job.id} is over.")
    return row.status


def _end(job: JobSnapshot, error: Exception, services: Services) -> str:
    """Ends an attempt that did not succeed, as its error demands."""
    if isinstance(error, StaleAttempt):
        return "stale"
    passing = _passing_problem(error)
    try:
        if isinstance(error, Cancelled):
            with services.database.write() as session:
                jobs.cancelled(session, job.id, job.token)
            return "cancelled"
        if passing is None:
            _log.info("job_failed", job_id=job.id, error=str(error), exc_info=not _is_expected(error))
            with services.database.write() as session:
                jobs.fail(session, job.id, job.token, problem_of(error))
            return "failed"
        _log.warning("job_interrupted", job_id=job.id, exc_info=True)
        if job.attempts < job.max_attempts:  # what is missing gets some time to come back; the heartbeat goes on
            time.sleep(services.settings.heartbeat_s * 2 ** min(job.attempts - 1, 4))
        with services.database.write() as session:
            return jobs.release(session, job.id, job.token, passing.detail, problem=problem_of(passing))
    except StaleAttempt:
        return "stale"


def _is_expected(error: Exception) -> bool:
    return isinstance(error, InvalidInput | ServiceError)


def _passing_problem(error: Exception) -> Unavailable | None:
    """What to say of an error that may be gone at the next attempt; None for errors that will come again."""
    if isinstance(error, Unavailable):
        return error
    if isinstance(error, OutOfDeviceMemory):  # of a device that others may use, too
        return Unavailable(str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without torch
        return Unavailable("The job ran out of memory. Use smaller parameters or fewer images, or a larger machine.")
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return Unavailable(f"The worker's machine could not go on ({error.strerror}). Free some space and try again.")
    if isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return Unavailable("The database could not be reached while the job ran. Try again.")
    if isinstance(error, RedisError):
        return Unavailable("Redis could not be reached while the job ran. Try again.")
    return None


@contextmanager
def _heartbeat(job: JobSnapshot, progress: JobProgress, services: Services) -> Iterator[None]:
    """Signs of life from a thread while the work goes on; tells `progress` when the work should stop."""
    ended = threading.Event()
    tick_s = min(1.0, services.settings.heartbeat_s)

    def beat() -> None:
        beaten = time.monotonic()
        while not ended.wait(tick_s):
            try:
                is_due = time.monotonic() - beaten >= services.settings.heartbeat_s
                with services.database.write() if is_due else services.database.read() as session:
                    status = jobs.heartbeat(session, job.id, job.token) if is_due else _status(session, job)
                beaten = time.monotonic() if is_due else beaten
            except StaleAttempt as error:
                progress.stop(error)
                return
            except DBAPIError as error:
                _log.warning("heartbeat_failed", job_id=job.id, error=type(error.orig).__name__)
            else:
                if status == "cancelling":
                    progress.stop(Cancelled())

    thread = threading.Thread(target=beat, name="job-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
