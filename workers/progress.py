"""Progress of a running job: from a model's callback to the database and the event stream, with an honest ETA."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis
from sqlalchemy.exc import DBAPIError

from models.base import Progress
from models.errors import Cancelled
from service.core import events, jobs
from service.core.db import Database
from service.core.jobs import StaleAttempt
from service.core.logging import get_logger

Clock = Callable[[], float]
_ENOUGH_S = 1.0  # shorter measurements say little about what is to come
_MUTE_S = 2.0
_log = get_logger(__name__)


class Timeline:
    """Fraction done and seconds left of work in weighted phases.

    The weights are guesses of each phase's share of the time; what is measured replaces them as it comes in.
    The fraction never falls. The ETA is None until something has been measured for at least a second.
    """

    def __init__(self, phases: Sequence[tuple[str, float]], clock: Clock = time.monotonic) -> None:
        self._weights = dict(phases)
        self._clock = clock
        self._measured: dict[str, float] = {}  # seconds of the phases that ended
        self._phase: str | None = None
        self._began = 0.0
        self._first = 0
        self.fraction = 0.0
        self.eta_s: float | None = None

    @property
    def phases(self) -> list[str]:
        """Names of the phases in order."""
        return list(self._weights)

    def update(self, phase: str, completed: int, total: int | None) -> None:
        """Takes one report; the first one of a phase starts its clock."""
        now = self._clock()
        if phase != self._phase:
            if self._phase is not None:
                self._measured[self._phase] = now - self._began
            self._phase, self._began, self._first = phase, now, completed
        if phase not in self._weights:  # unannounced: it counts for nothing
            return
        share = min(completed / total, 1.0) if total else 0.0
        order = self.phases
        before = sum(self._weights[name] for name in order[: order.index(phase)])
        whole = sum(self._weights.values()) or 1.0
        self.fraction = min(max(self.fraction, (before + self._weights[phase] * share) / whole), 1.0)
        self.eta_s = self._remaining(phase, now - self._began, completed, total)

    def _remaining(self, phase: str, elapsed: float, completed: int, total: int | None) -> float | None:
        weight = self._weights[phase]
        order = self.phases
        later = sum(self._weights[name] for name in order[order.index(phase) + 1 :])
        done = completed - self._first
        is_measured = bool(total) and done > 0 and elapsed >= _ENOUGH_S
        pace = self._pace(weight * done / total if is_measured and total else 0.0, elapsed)
        if is_measured and total:
            here = elapsed * max(total - completed, 0) / done
        elif pace is not None:
            here = max(pace * weight * (1 - (completed / total if total else 0.0)) - (0.0 if total else elapsed), 0.0)
        else:
            return None
        if later and pace is None:
            return None
        return here + later * (pace or 0.0)

    def _pace(self, weight_here: float, elapsed: float) -> float | None:
        """Seconds per unit of weight. Phases that passed in no time (cached) teach nothing about the others."""
        past = {name: s for name, s in self._measured.items() if s >= _ENOUGH_S and self._weights.get(name)}
        weight = sum(self._weights[name] for name in past) + weight_here
        seconds = sum(past.values()) + (elapsed if weight_here else 0.0)
        return seconds / weight if weight else None


class JobProgress:
    """The `OnProgress` of one attempt; may be called from several threads, as often as one likes.

    Raises `Cancelled` soon after a cancel was asked for, and `StaleAttempt` when the attempt is over.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        job_id: str,
        token: int,
        phases: Sequence[tuple[str, float]] = (),
        *,
        interval_s: float = 0.3,
        clock: Clock = time.monotonic,
    ) -> None:
        self._database = database
        self._redis = redis
        self._job_id = job_id
        self._token = token
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._written = -math.inf
        self._unwritten: Progress | None = None
        self._mute_until = -math.inf  # a Redis that is away must not slow the work down
        self._stop: Exception | None = None
        self._timeline = Timeline(phases, clock)
        self._notes: list[str] = []

    def set_phases(self, phases: Sequence[tuple[str, float]]) -> None:
        """Announces the phases to come and their expected shares of the time; call once, before the first report."""
        with self._lock:
            self._timeline = Timeline(phases, self._clock)

    def stop(self, error: Exception) -> None:
        """From now on every report and check raises `error`."""
        self._stop = error

    def check(self) -> None:
        """Raises if the work should stop; costs nothing."""
        if self._stop is not None:
            raise self._stop

    def __call__(self, progress: Progress) -> None:
        self.check()
        with self._lock:
            self._timeline.update(progress.phase, progress.completed, progress.total)
            self._unwritten = progress
            is_due = self._clock() - self._written >= self._interval_s
            if progress.note and progress.note not in self._notes:
                self._notes.append(progress.note)
                is_due = True
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Writes the last report if it came too soon after the one before; raises as `check` does."""
        self.check()
        with self._lock:
            if self._unwritten is None:
                return
            view, now = self._view(self._unwritten), self._clock()
            self._unwritten, self._written = None, now
            self._write(view)
            is_muted = now < self._mute_until
        if not is_muted and events.publish(self._redis, self._job_id, "progress", view) is None:
            self._mute_until = self._clock() + _MUTE_S

    def _view(self, progress: Progress) -> dict[str, Any]:
        eta = self._timeline.eta_s
        return {
            "phase": progress.phase,
            "completed": progress.completed,
            "total": progress.total,
            "fraction": round(self._timeline.fraction, 4),
            "eta_s": round(eta, 1) if eta is not None else None,
            "phases": self._timeline.phases,
            # JSON has no NaN, and a loss may well be one.
            "metrics": {name: float(v) for name, v in progress.metrics.items() if math.isfinite(v)},
            "notes": list(self._notes),
        }

    def _write(self, view: dict[str, Any]) -> None:
        try:
            with self._database.write() as session:
                is_wanted = jobs.report_progress(session, self._job_id, self._token, view)
        except StaleAttempt as error:
            self.stop(error)
            raise
        except DBAPIError as error:  # progress is worth no failed job; the heartbeat keeps trying
            _log.warning("progress_lost", job_id=self._job_id, error=type(error.orig).__name__)
            return
        if not is_wanted:
            self.stop(Cancelled())
            self.check()
