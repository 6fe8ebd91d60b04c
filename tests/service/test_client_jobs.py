"""The client as it follows jobs: to their end, over broken streams, until it gives up."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from service.client import Client, JobFailed, WaitTimeout
from service.client_jobs import parse_events
from service.core import jobs
from service.core.db import Database
from tests.fakes import answering


@pytest.fixture
def job_id(client: Client) -> str:
    return str(client.add_knowledge("inline", vectors={"cat": [1.0]})["id"])


def finish_soon(
    database: Database,
    job_id: str,
    fail: bool = False,
    begin: threading.Event | None = None,
    end: threading.Event | None = None,
) -> threading.Thread:
    """Plays the worker from another thread: claims, reports, ends; each when told to, or soon."""

    def work() -> None:
        if begin is None:
            time.sleep(0.3)
        else:
            begin.wait(10)
        with database.write() as session:
            job = jobs.claim(session, job_id, "worker")
            assert job is not None
            token = job.token
        with database.write() as session:
            jobs.report_progress(session, job_id, token, {"phase": "index", "completed": 1, "total": 2})
        if end is None:
            time.sleep(1.2)
        else:
            end.wait(10)
        with database.write() as session:
            if fail:
                jobs.fail(session, job_id, token, {"title": "Invalid", "status": 422, "detail": "No vector at all."})
            else:
                jobs.finish(session, job_id, token, {"kind": "knowledge", "id": "kn_x"})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_wait_polls_a_job_to_its_end(client: Client, api_database: Database, job_id: str) -> None:
    reports: list[dict[str, Any]] = []
    worker = finish_soon(api_database, job_id)
    ended = client.wait(job_id, on_progress=reports.append, timeout=20, poll=True)
    worker.join()
    assert ended["result"]["id"] == "kn_x"
    assert reports[-1]["status"] == "succeeded"


def test_wait_follows_every_state_of_a_job(client: Client, api_database: Database, job_id: str) -> None:
    reports: list[dict[str, Any]] = []
    queued, running = threading.Event(), threading.Event()

    def on_progress(report: dict[str, Any]) -> None:
        reports.append(report)
        if report["status"] == "queued":
            queued.set()
        if report["status"] == "running" and report["progress"]["phase"] == "index":
            running.set()

    worker = finish_soon(api_database, job_id, begin=queued, end=running)
    ended = client.wait(job_id, on_progress=on_progress, timeout=30)
    worker.join()
    assert queued.is_set()
    assert running.is_set()
    assert ended["result"]["id"] == "kn_x"
    assert [reports[0]["status"], reports[-1]["status"]] == ["queued", "succeeded"]


def test_a_failed_job_raises_with_its_reason(client: Client, api_database: Database, job_id: str) -> None:
    worker = finish_soon(api_database, job_id, fail=True)
    with pytest.raises(JobFailed, match=r"failed: No vector at all\.") as caught:
        client.wait(job_id, timeout=20)
    worker.join()
    assert caught.value.job["status"] == "failed"


def test_cancel_retry_and_giving_up_waiting(client: Client, job_id: str) -> None:
    with pytest.raises(WaitTimeout, match="it goes on"):
        client.wait(job_id, timeout=0.2)
    assert client.cancel(job_id)["status"] == "cancelled"
    with pytest.raises(JobFailed, match="was cancelled"):
        client.wait(job_id)
    assert client.retry(job_id)["status"] == "queued"


def test_wait_bridges_broken_streams() -> None:
    job = {"id": "job_1", "kind": "x", "status": "running", "progress": {"completed": 0}}
    last_ids: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            last_ids.append(request.headers.get("last-event-id"))
            if len(last_ids) == 1:
                text = (
                    f'event: status\ndata: {json.dumps(job)}\n\nid: 7-0\nevent: progress\ndata: {{"completed": 4}}\n\n'
                )
                return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
            if len(last_ids) == 2:
                raise httpx.ReadError("cut")
            ended = {**job, "status": "succeeded", "progress": {"completed": 9}}
            text = f": hello\n\nevent: end\ndata: {json.dumps(ended)}\n\n"
            return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
        return httpx.Response(200, json={**job, "progress": {"completed": 4}})

    reports: list[int] = []
    with answering(handler) as client:
        ended = client.wait(job, on_progress=lambda j: reports.append(j["progress"]["completed"]), timeout=20)
    assert ended["status"] == "succeeded"
    assert last_ids == [None, "7-0", "7-0"]
    assert reports == [0, 4, 9]


def test_event_lines_are_parsed() -> None:
    lines = ["retry: 500", "event: a", "data: 1", "data: 2", "", ": comment", "", "id: 5", "data:x", ""]
    assert list(parse_events(lines)) == [{"event": "a", "data": "1\n2"}, {"event": "message", "id": "5", "data": "x"}]
