"""Queue and event stream on a real server, and without one."""

from __future__ import annotations

import pytest
from redis import Redis

from service.core import events, jobs
from service.core.db import Database
from service.core.queue import JobQueue, connect
from tests.workers.harness import events_of

JOB = "job_" + "0" * 26
OTHER = "job_" + "1" * 26


def test_jobs_wait_in_order_and_positions_say_so(queue: JobQueue) -> None:
    assert queue.enqueue(JOB)
    assert queue.enqueue(OTHER, token=4)
    assert queue.waiting() == [f"{JOB}-1", f"{OTHER}-5"]
    assert (queue.position(JOB), queue.position(OTHER)) == (0, 1)
    assert queue.position("job_unknown") is None
    assert queue.contains(OTHER)
    message = queue.rq.fetch_job(f"{JOB}-1")
    assert message is not None
    assert (message.func_name, list(message.args), message.kwargs) == ("workers.tasks.run_job", [JOB], {})


def test_without_redis_nothing_is_raised_where_the_reconciler_repairs() -> None:
    client = connect("unix:///nonexistent/socket")
    queue = JobQueue(client, "q")
    assert queue.enqueue(JOB) is False
    assert queue.stop(JOB, "w") is False
    assert queue.position(JOB) is None
    assert events.publish(client, JOB, "status", {}) is None


def test_events_come_back_in_order_and_resume(redis: Redis) -> None:
    ids = [events.publish(redis, JOB, "progress", {"completed": i}) for i in range(5)]
    got = events_of(redis, JOB)
    assert [event.id for event in got] == ids
    assert [event.data["completed"] for event in got] == [0, 1, 2, 3, 4]
    assert [event.data["completed"] for event in events_of(redis, JOB, got[2].id)] == [3, 4]
    assert events_of(redis, JOB, got[-1].id) == []
    assert events.newest_id(redis.xrevrange(events.key(JOB), count=1)) == ids[-1]
    assert events.newest_id(redis.xrevrange(events.key(OTHER), count=1)) == "0-0"
    assert 0 < redis.ttl(events.key(JOB)) <= events.EXPIRY_S


def test_a_stream_stays_small(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENTS", 150)
    for i in range(450):
        events.publish(redis, JOB, "progress", {"completed": i})
    assert 150 <= redis.xlen(events.key(JOB)) < 300


def test_a_status_event_shows_the_job(redis: Redis, database: Database) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "embed", "es_none", {}).id
    events.publish_status(redis, database, job_id)
    events.publish_status(redis, database, "job_unknown")
    (event,) = events_of(redis, job_id)
    assert (event.event, event.data["id"], event.data["queue_position"]) == ("status", job_id, 0)


def test_entries_of_others_do_not_stop_the_reading(redis: Redis) -> None:
    first = events.publish(redis, JOB, "progress", {"completed": 0})
    redis.xadd(events.key(JOB), {"kind": "progress"})
    redis.xadd(events.key(JOB), {"event": "progress", "data": "{"})
    last = events.publish(redis, JOB, "progress", {"completed": 1})
    found = events_of(redis, JOB)
    assert [event.event for event in found] == ["progress", "unknown", "unknown", "progress"]
    assert (found[0].id, found[-1].id) == (first, last)


def test_positions_sort_where_ids_do_not() -> None:
    ids = ["9-0", "10-0", "10-2", "10-10"]
    assert sorted(ids) != ids
    assert sorted(ids, key=events.position) == ids
    assert [events.event_id(events.position(event_id)) for event_id in ids] == ids
