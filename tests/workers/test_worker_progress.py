"""Fraction and ETA of phases on a hand-moved clock, and what reaches the database."""

from __future__ import annotations

import math

import pytest
from redis import Redis

from models.base import Progress
from models.errors import Cancelled
from service.core import jobs
from service.core.db import Database
from service.core.jobs import StaleAttempt
from tests.workers.harness import events_of
from workers.progress import JobProgress, Timeline


class Clock:
    """Seconds by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_eta_is_unknown_until_measured_then_right() -> None:
    clock = Clock()
    line = Timeline([("features", 3.0), ("clustering", 1.0)], clock)
    line.update("features", 0, 100)
    assert (line.fraction, line.eta_s) == (0.0, None)
    clock.now = 0.5
    line.update("features", 5, 100)
    assert line.eta_s is None  # half a second says little
    clock.now = 3.0
    line.update("features", 30, 100)
    assert line.fraction == pytest.approx(0.75 * 0.3)
    # 7 s remain here; a weight of 3 takes 10 s, so the later weight of 1 takes 10/3.
    assert line.eta_s == pytest.approx(7 + 10 / 3)
    clock.now = 10.0
    line.update("features", 100, 100)
    line.update("clustering", 0, None)
    clock.now = 11.0
    line.update("clustering", 1, None)  # unknown total: the weight must do
    assert line.eta_s == pytest.approx(10 / 3 - 1)
    line.update("clustering", 1, 2)
    assert line.fraction == pytest.approx(0.75 + 0.125)


def test_eta_ignores_what_came_out_of_a_cache() -> None:
    clock = Clock()
    line = Timeline([("features", 9.0), ("clustering", 1.0)], clock)
    line.update("features", 0, 10)
    line.update("features", 10, 10)  # all cached: no time passed
    line.update("clustering", 0, 10)
    assert line.eta_s is None
    clock.now = 2.0
    line.update("clustering", 4, 10)
    assert line.eta_s == pytest.approx(3.0)


def test_a_resumed_phase_is_measured_from_where_it_resumed() -> None:
    clock = Clock()
    line = Timeline([("features", 1.0)], clock)
    line.update("features", 80, 100)
    clock.now = 10.0
    line.update("features", 90, 100)
    assert line.eta_s == pytest.approx(10.0)


def test_the_fraction_never_falls() -> None:
    line = Timeline([("a", 1.0), ("b", 1.0)], Clock())
    seen = []
    for phase, done in (("a", 5), ("b", 9), ("a", 1), ("unannounced", 3), ("b", 20)):
        line.update(phase, done, 10)
        seen.append(line.fraction)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.fixture
def running(database: Database) -> str:
    """A job in its first attempt."""
    with database.write() as session:
        job_id = jobs.create_job(session, "embed", "es_none", {}).id
    with database.write() as session:
        jobs.claim(session, job_id, "w")
    return job_id


def test_reports_reach_database_and_stream_at_a_bounded_rate(database: Database, redis: Redis, running: str) -> None:
    clock = Clock()
    progress = JobProgress(database, redis, running, 1, [("a", 1.0)], clock=clock)
    for i in range(100):
        clock.now = i * 0.01
        progress(Progress("a", i, 100, {"loss": math.nan if i == 0 else 0.5}))
    with database.read() as session:
        view = jobs.get_job(session, running).progress
    assert view["phases"] == ["a"]
    assert view["completed"] in range(85, 100)
    sent = [event.data for event in events_of(redis, running)]
    assert 3 <= len(sent) <= 4
    assert sent[0]["metrics"] == {}  # JSON has no NaN
    assert sent[-1]["metrics"] == {"loss": 0.5}
    assert sent[-1] == view


def test_the_last_report_is_written_at_the_end(database: Database, redis: Redis, running: str) -> None:
    progress = JobProgress(database, redis, running, 1, [("a", 1.0)], clock=Clock())
    for i in range(3):  # all at one moment
        progress(Progress("a", i + 1, 3))
    progress.flush()
    progress.flush()
    assert [event.data["completed"] for event in events_of(redis, running)] == [1, 3]
    with database.read() as session:
        assert jobs.get_job(session, running).progress["completed"] == 3


def test_notes_are_never_left_out_and_stay(database: Database, redis: Redis, running: str) -> None:
    clock = Clock()
    progress = JobProgress(database, redis, running, 1, [("a", 1.0)], clock=clock)
    for note in ("", "smaller batches", "smaller batches", "smaller still"):  # all at one moment
        progress(Progress("a", 0, note=note))
    sent = [event.data["notes"] for event in events_of(redis, running)]
    assert sent == [[], ["smaller batches"], ["smaller batches", "smaller still"]]
    clock.now = 1.0
    progress(Progress("a", 1))
    with database.read() as session:
        assert jobs.get_job(session, running).progress["notes"] == ["smaller batches", "smaller still"]


def test_a_cancel_and_a_newer_attempt_stop_the_work(database: Database, redis: Redis, running: str) -> None:
    progress = JobProgress(database, redis, running, 1, interval_s=0)
    progress(Progress("a", 1))
    with database.write() as session:
        jobs.request_cancel(session, running)
    with pytest.raises(Cancelled):
        progress(Progress("a", 2))
    with pytest.raises(Cancelled):
        progress.check()
    stale = JobProgress(database, redis, running, 0, interval_s=0)
    with pytest.raises(StaleAttempt):
        stale(Progress("a", 1))
