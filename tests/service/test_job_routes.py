"""Jobs over HTTP: list, long-poll, event stream, cancel, retry; Redis away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from service.core import events
from service.core.embedded import EmbeddedValkey
from service.core.errors import Unavailable, problem_of
from service.schemas import JobOut, Page
from tests.service.harness import LiveApi, checked, problem
from tests.service.tasks import finish

Event = tuple[str, Any, str | None]


def sse(lines: Iterator[str]) -> Iterator[Event]:
    """(event, data, id) of a stream."""
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "event" in fields:
            yield fields["event"], orjson.loads(fields["data"]), fields.get("id")
            fields = {}


def follow(
    api: LiveApi, job_id: str, last_id: str | None = None, on_event: Callable[[], None] = lambda: None
) -> list[Event]:
    """All events until the stream ends; `on_event` is called after the first."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    found: list[Event] = []
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for event in sse(response.iter_lines()):
            found.append(event)
            if len(found) == 1:
                on_event()
    return found


def test_list_by_status_and_resource(live_api: LiveApi) -> None:
    first, second = live_api.add_job(), live_api.add_job("failed", error=problem_of(Unavailable("No luck.")))
    page = checked(live_api.client.get("/v1/jobs?limit=1"), Page[JobOut])
    assert ([row["id"] for row in page["data"]], page["has_more"]) == ([second], True)
    failed = live_api.client.get("/v1/jobs?status=failed").json()["data"]
    assert [(row["id"], row["error"]["detail"]) for row in failed] == [(second, "No luck.")]
    resource = live_api.job(first)["resource"]["id"]
    mine = live_api.client.get("/v1/jobs", params={"resource_id": resource}).json()["data"]
    assert [row["id"] for row in mine] == [first]
    problem(live_api.client.get("/v1/jobs?status=done"), 422, "'succeeded'")
    problem(live_api.client.get("/v1/jobs/job_x"), 404, "job_x")


def test_queue_positions_count_from_the_oldest(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    ids = [api.add_job() for _ in range(3)]
    assert [api.job(job_id)["queue_position"] for job_id in ids] == [0, 1, 2]
    assert api.client.post(f"/v1/jobs/{ids[0]}/cancel").json()["queue_position"] is None
    assert api.job(ids[2])["queue_position"] == 1


def test_a_long_poll_answers_when_the_job_ends(live_api: LiveApi) -> None:
    job_id = live_api.add_job()
    timer = threading.Timer(0.4, lambda: live_api.set_job(job_id, status="succeeded", result={"kind": "dataset"}))
    timer.start()
    began = time.monotonic()
    response = live_api.client.get(f"/v1/jobs/{job_id}?wait=30")
    timer.join()
    assert checked(response, JobOut)["status"] == "succeeded"
    assert 0.3 < time.monotonic() - began < 15
    assert "retry-after" not in response.headers


def test_a_long_poll_gives_up_in_time(live_api: LiveApi) -> None:
    response = live_api.client.get(f"/v1/jobs/{live_api.add_job()}?wait=0.3")
    assert (response.json()["status"], response.headers["retry-after"]) == ("queued", "1")
    for wait in ("61", "-1", "nan", "long"):
        problem(live_api.client.get(f"/v1/jobs/{live_api.add_job()}?wait={wait}"), 422)


def test_cancel_and_retry_with_their_conflicts(live_api: LiveApi) -> None:
    job_id = live_api.add_job()
    problem(live_api.client.post(f"/v1/jobs/{job_id}/retry"), 409, "only failed and cancelled")
    assert checked(live_api.client.post(f"/v1/jobs/{job_id}/cancel"), JobOut, 202)["status"] == "cancelled"
    problem(live_api.client.post(f"/v1/jobs/{job_id}/cancel"), 409, "already ended")
    again = live_api.client.post(f"/v1/jobs/{job_id}/retry")
    assert checked(again, JobOut, 202)["status"] == "queued"
    assert again.headers["location"] == f"/v1/jobs/{job_id}"
    live_api.set_job(job_id, status="running")
    assert live_api.client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    live_api.set_job(job_id, status="succeeded")
    problem(live_api.client.post(f"/v1/jobs/{job_id}/retry"), 409, "succeeded")
    for action in ("cancel", "retry"):
        problem(live_api.client.post(f"/v1/jobs/job_x/{action}"), 404, "job_x")


def test_a_stream_ends_with_the_job(live_api: LiveApi) -> None:
    job_id = live_api.add_job("running")
    redis = live_api.parts.redis

    def work() -> None:
        time.sleep(0.2)
        for i in range(3):
            events.publish(redis, job_id, "progress", {"completed": i})
        live_api.set_job(job_id, status="succeeded")
        events.publish_status(redis, live_api.parts.database, job_id)

    thread = threading.Thread(target=work)
    found = follow(live_api, job_id, on_event=thread.start)
    thread.join()
    kinds = [kind for kind, _, _ in found]
    assert (kinds[0], kinds[-1]) == ("status", "end")
    assert [data["completed"] for kind, data, _ in found if kind == "progress"] == [0, 1, 2]
    assert (found[0][1]["status"], found[-1][1]["status"]) == ("running", "succeeded")
    assert set(found[-1][1]) == set(JobOut.model_fields)


def test_what_is_told_just_before_the_end_arrives(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = live_api.add_job("running")
    fanout = live_api.parts.fanout
    state_of, calls = fanout._state_of, iter(range(1, 99))

    def end_between_reading_events_and_state(wanted: str) -> dict[str, Any]:
        if next(calls) == 2:
            for i in range(3):
                events.publish(live_api.parts.redis, job_id, "progress", {"completed": i})
            live_api.set_job(job_id, status="succeeded")
        return state_of(wanted)

    monkeypatch.setattr(fanout, "_state_of", end_between_reading_events_and_state)
    found = follow(live_api, job_id)
    assert [data["completed"] for kind, data, _ in found if kind == "progress"] == [0, 1, 2]
    assert (found[-1][0], found[-1][1]["status"]) == ("end", "succeeded")


def test_a_stream_resumes_after_the_last_event(live_api: LiveApi) -> None:
    job_id = live_api.add_job("running")
    ids = [events.publish(live_api.parts.redis, job_id, "progress", {"completed": i}) for i in range(4)]
    found = follow(live_api, job_id, ids[1], on_event=lambda: live_api.set_job(job_id, status="failed"))
    assert [(data["completed"], event_id) for kind, data, event_id in found if kind == "progress"] == [
        (2, ids[2]), (3, ids[3])
    ]  # fmt: skip
    assert found[-1][0] == "end"
    bad = live_api.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "yesterday"})
    problem(bad, 422, "Last-Event-ID")


def test_a_stream_of_an_ended_job_ends_at_once(live_api: LiveApi) -> None:
    job_id = live_api.add_job("cancelled")
    assert [kind for kind, _, _ in follow(live_api, job_id)] == ["status", "end"]
    problem(live_api.client.get("/v1/jobs/job_x/events"), 404, "job_x")


def test_many_streams_do_not_hold_up_other_requests(live_api: LiveApi) -> None:
    job_id = live_api.add_job("running")
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=live_api.client.base_url, timeout=30, limits=limits) as client:
        streams = [client.stream("GET", f"/v1/jobs/{job_id}/events") for _ in range(60)]
        opened = [stream.__enter__() for stream in streams]
        assert all(response.status_code == 200 for response in opened)
        began = time.monotonic()
        for _ in range(5):
            assert client.get("/v1/datasets").status_code == 200
        took_s = time.monotonic() - began
        live_api.set_job(job_id, status="succeeded")
        for stream in streams:
            stream.__exit__(None, None, None)
    assert took_s < 4


def test_redis_away_at_submit_loses_nothing(start_api: Callable[..., LiveApi], own_valkey: EmbeddedValkey) -> None:
    api = start_api(redis_url=own_valkey.url, lost_after_s=2, heartbeat_s=0.2)
    own_valkey.stop()
    response = api.client.post("/v1/knowledge", json={"name": "k", "vectors": {"cat": [1.0, 2.0]}})
    job = checked(response, JobOut, 202)
    assert api.job(job["id"])["status"] == "queued"
    ready = api.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["redis"] != "ok"
    other = api.add_job("running")
    stream = follow(api, other, on_event=lambda: api.set_job(other, status="succeeded"))
    assert [kind for kind, _, _ in stream][-1] == "end"
    own_valkey.start()
    deadline = time.monotonic() + 20
    while not api.parts.queue.contains(job["id"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert api.parts.queue.contains(job["id"])
    assert finish(api, job["id"])["status"] == "succeeded"
