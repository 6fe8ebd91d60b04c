"""Makes the world agree with the database: lost jobs, forgotten messages, unheeded cancels, leftovers.

Any number of these may run at once: every change is a compare-and-set, and a message too many does no harm.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from redis import Redis, RedisError
from sqlalchemy import delete, select
from sqlalchemy.exc import DBAPIError

from service.core import events, jobs
from service.core.db import Database, utc_now
from service.core.jobs import StaleAttempt
from service.core.logging import get_logger
from service.core.process import is_dead
from service.core.queue import JobQueue
from service.core.settings import Settings
from service.core.tables import IdempotencyKey, Job, Worker

_TIDY_S = 60.0
_OLD_S = 86_400.0
_UPLOAD_S = 60.0  # more than enough between making an upload's file and locking it
_LOST = "its worker gave no sign of life any more."
_log = get_logger(__name__)


class Reconciler:
    """Call `step` every `reconcile_s`, or `run` in a thread.

    Silence is measured on this process's own monotonic clock, from the moment a heartbeat was last seen to change, so
    that neither a wrong clock nor a machine that slept makes a living worker look dead.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        queue: JobQueue,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._redis = redis
        self._queue = queue
        self._settings = settings
        self._clock = clock
        self._beats: dict[tuple[str, int], tuple[datetime | None, float]] = {}
        self._in_hand: dict[str, float] = {}
        self._tidied = -float("inf")

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set, through every failure of database and Redis."""
        while not stop.wait(self._settings.reconcile_s):
            try:
                self.step()
            except DBAPIError as error:
                _log.warning("reconciler_step_failed", error=type(error.orig).__name__)
            except Exception:  # a thread that ends here would leave lost jobs lost
                _log.exception("reconciler_step_failed")

    def step(self) -> None:
        """Looks once at everything. Raises what the database raises; an absent Redis only postpones."""
        self._release_lost()
        self._end_overdue_cancels()
        with suppress(RedisError):
            self._requeue_forgotten()
        if self._clock() - self._tidied >= _TIDY_S:
            self._tidied = self._clock()
            self._tidy()

    def _release_lost(self) -> None:
        now = self._clock()
        with self._database.read() as session:
            active = jobs.unended_jobs(session, jobs.ACTIVE)
            dead = {row.id for row in session.scalars(select(Worker)) if is_dead(row.host, row.pid)}
        beats = {}
        for job in active:
            seen = self._beats.get((job.id, job.token))
            is_new = seen is None or seen[0] != job.heartbeat_at
            beats[job.id, job.token] = (job.heartbeat_at, now) if is_new or seen is None else seen
            is_silent = now - beats[job.id, job.token][1] > self._settings.lost_after_s
            if is_silent or job.worker_id in dead:
                self._release(job)
        self._beats = beats

    def _release(self, seen: Job) -> None:
        try:
            with self._database.write() as session:
                # Under the row's lock: a sign of life may have come since it was read.
                query = select(Job.heartbeat_at).where(Job.id == seen.id).with_for_update()
                if session.scalar(query) != seen.heartbeat_at:
                    return
                status = jobs.release(session, seen.id, seen.token, _LOST)
        except StaleAttempt:
            return
        _log.warning("job_released", job_id=seen.id, worker_id=seen.worker_id, status=status)
        if status == "queued":
            self._queue.enqueue(seen.id, seen.token)
        events.publish_status(self._redis, self._database, seen.id)

    def _end_overdue_cancels(self) -> None:
        # The worker kills its own work-horse first; this is for workers that do not.
        patience = timedelta(seconds=self._settings.cancel_kill_s + min(1.0, self._settings.reconcile_s))
        with self._database.read() as session:
            cancelling = jobs.unended_jobs(session, ("cancelling",))
        for job in cancelling:
            if job.cancel_requested_at is None or utc_now() - job.cancel_requested_at < patience:
                continue
            with suppress(StaleAttempt):
                with self._database.write() as session:
                    jobs.cancelled(session, job.id, job.token)
                _log.warning("cancel_enforced", job_id=job.id, worker_id=job.worker_id)
                self._queue.stop(job.id, job.worker_id or "")
                events.publish_status(self._redis, self._database, job.id)

    def _requeue_forgotten(self) -> None:
        # Redis first: a job that is claimed in between then only looks known, never forgotten.
        in_hand, waiting = self._queue.in_hand(), set(self._queue.waiting())
        stuck = self._stuck(in_hand)
        with self._database.read() as session:
            queued = jobs.unended_jobs(session, ("queued",))
            running = {self._queue.message_id(j.id, j.token - 1) for j in jobs.unended_jobs(session, jobs.ACTIVE)}
        for message_id in stuck - running:
            self._queue.drop_in_hand(message_id)
        known = waiting | (set(in_hand) - stuck)
        settled = utc_now() - timedelta(seconds=self._settings.reconcile_s)
        for job in queued:
            # A job queued just now is still on its way to Redis.
            if job.queued_at <= settled and self._queue.message_id(job.id, job.token) not in known:
                _log.info("job_queued_again", job_id=job.id)
                self._queue.enqueue(job.id, job.token)

    def _stuck(self, in_hand: list[str]) -> set[str]:
        """Messages that a worker has held for long; if no attempt runs for one, that worker died before it began."""
        now = self._clock()
        self._in_hand = {message_id: self._in_hand.get(message_id, now) for message_id in in_hand}
        return {m for m, since in self._in_hand.items() if now - since > self._settings.lost_after_s}

    def _tidy(self) -> None:
        now = utc_now()
        with self._database.write() as session:
            silent = Worker.heartbeat_at < now - timedelta(seconds=4 * self._settings.lost_after_s)
            session.execute(delete(Worker).where(silent))
            for row in session.scalars(select(Worker)):
                if is_dead(row.host, row.pid):
                    session.delete(row)
            forgotten = now - timedelta(seconds=self._settings.idempotency_ttl_s)
            old = (IdempotencyKey.created_at < forgotten) & (IdempotencyKey.locked_until < now)
            session.execute(delete(IdempotencyKey).where(old))
            current = {f"{job.id}-{job.token}" for job in jobs.unended_jobs(session, jobs.ACTIVE)}
        for path in _entries(self._settings.scratch_dir):
            age_s = _age_s(path)
            if path.name not in current and (age_s > _OLD_S or (age_s > _UPLOAD_S and _is_abandoned(path))):
                _remove(path)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _is_abandoned(path: Path) -> bool:
    """Whether this is an upload's file that no process writes or reads any more: those hold a lock on it."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
