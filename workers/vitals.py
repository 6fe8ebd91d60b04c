"""The worker parent's thread for signs of life: the worker's row, its job's row, and the horse that must not go on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.core import jobs
from service.core.db import utc_now
from service.core.logging import get_logger
from service.core.process import host_id
from service.core.tables import Job, Worker
from workers.runner import Services

_OVER_GRACE_S = 2.0  # an attempt that is over may still be tidying up
_log = get_logger(__name__)


class Vitals:
    """Beats every `heartbeat_s`, looks at the running job every second, and never at the moment of a fork."""

    def __init__(self, services: Services, worker_id: str, device: str) -> None:
        self.worker_id = worker_id
        self._device = device
        self._settings = services.settings
        self._database = services.database
        self._lock = threading.Lock()  # held while this thread uses the database, and by whoever forks
        self._wake = threading.Event()
        self._ended = False
        self._job_id: str | None = None
        self._kill: Callable[[], None] = lambda: None
        self._token: int | None = None
        self._over_since: float | None = None
        self._beaten = -float("inf")
        self._thread = threading.Thread(target=self._loop, name="vitals", daemon=True)

    def __enter__(self) -> Vitals:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._wake.set()
        self._thread.join()
        try:
            with self._database.write() as session:
                session.execute(delete(Worker).where(Worker.id == self.worker_id))
        except DBAPIError as failure:
            _log.warning("worker_not_unregistered", error=type(failure.orig).__name__)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, this thread has no database connection: the time to fork."""
        with self._lock:
            yield

    @contextmanager
    def watching(self, job_id: str, kill: Callable[[], None]) -> Iterator[None]:
        """Within, the job is kept alive and looked at; `kill` is called when its attempt must not go on."""
        with self._lock:
            self._job_id, self._kill, self._token, self._over_since = job_id, kill, None, None
        try:
            yield
        finally:
            with self._lock:
                self._job_id = None

    def look_now(self) -> None:
        """Looks at the job at once instead of within a second."""
        self._wake.set()

    def _loop(self) -> None:
        while not self._ended:
            with self._lock:
                try:
                    self._beat()
                except DBAPIError as error:
                    _log.warning("heartbeat_failed", error=type(error.orig).__name__)
            self._wake.wait(min(1.0, self._settings.heartbeat_s))
            self._wake.clear()

    def _beat(self) -> None:
        is_due = time.monotonic() - self._beaten >= self._settings.heartbeat_s
        if is_due:
            with self._database.write() as session:
                self._write(session)
            self._beaten = time.monotonic()
        if self._job_id is not None:
            with self._database.read() as session:
                row = session.get(Job, self._job_id)
            if not self._may_go_on(row):
                _log.warning("work_horse_killed", job_id=self._job_id, status=row.status if row is not None else None)
                self._kill()

    def _write(self, session: Session) -> None:
        now = utc_now()
        row = session.get(Worker, self.worker_id)
        if row is None:
            row = Worker(id=self.worker_id, host=host_id(), pid=os.getpid(), device=self._device, started_at=now)
            session.add(row)
        row.heartbeat_at = now
        if self._job_id is not None:
            mine = (Job.id == self._job_id) & (Job.worker_id == self.worker_id) & Job.status.in_(jobs.ACTIVE)
            session.execute(update(Job).where(mine).values(heartbeat_at=now))

    def _may_go_on(self, job: Job | None) -> bool:
        """False once a cancel has gone unheeded too long, or the attempt has been over for a while."""
        if job is not None and job.worker_id == self.worker_id and job.status in jobs.ACTIVE:
            self._token, self._over_since = job.token, None
            if job.status == "running" or job.cancel_requested_at is None:
                return True
            return utc_now() - job.cancel_requested_at < timedelta(seconds=self._settings.cancel_kill_s)
        if self._token is None and job is not None:  # not claimed yet
            return True
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since < _OVER_GRACE_S
