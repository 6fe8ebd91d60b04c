"""Idempotency-Key: replays, other bodies, requests in flight, crashes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from service.core.db import utc_now
from service.core.tables import Dataset, IdempotencyKey
from tests.service.harness import LiveApi, png, problem
from tests.service.test_uploads import gone_mid_upload


def create(api: LiveApi, key: str, name: str = "d") -> httpx.Response:
    return api.client.post("/v1/datasets", json={"name": name}, headers={"Idempotency-Key": key})


def keys(api: LiveApi) -> list[IdempotencyKey]:
    with api.parts.database.read() as session:
        return list(session.scalars(select(IdempotencyKey)))


@pytest.fixture
def key() -> str:
    """A fresh key."""
    return uuid.uuid4().hex


def test_the_same_request_has_the_same_answer(live_api: LiveApi, key: str) -> None:
    first, n = create(live_api, key), live_api.snapshot()["rows"]["datasets"]
    second = create(live_api, key)
    assert (first.status_code, first.content) == (second.status_code, second.content)
    assert second.headers["location"] == first.headers["location"]
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert live_api.snapshot()["rows"]["datasets"] == n


def test_refusals_are_replayed_too(live_api: LiveApi, key: str) -> None:
    body = problem(create(live_api, key, ""), 422)
    again = create(live_api, key, "")
    assert (problem(again, 422), again.headers["idempotent-replayed"]) == (body, "true")


def test_another_body_is_refused(live_api: LiveApi, key: str) -> None:
    create(live_api, key, "a")
    problem(create(live_api, key, "b"), 422, "another body", "fresh key")


def test_keys_belong_to_a_route(live_api: LiveApi, key: str) -> None:
    create(live_api, key)
    body = {"name": "k", "vectors": {"cat": [1.0]}}
    response = live_api.client.post("/v1/knowledge", json=body, headers={"Idempotency-Key": key})
    assert response.status_code == 202


def test_uploads_are_replayed(live_api: LiveApi, key: str) -> None:
    url = f"/v1/datasets/{live_api.dataset()}/images"
    request = live_api.client.build_request("POST", url, files={"files": ("a", png(1))}, data={"class_name": "c"})
    content, headers = request.read(), {"content-type": request.headers["content-type"], "Idempotency-Key": key}
    answers = [live_api.client.post(url, content=content, headers=headers) for _ in range(2)]
    assert [answer.json()["accepted"][0]["duplicate"] for answer in answers] == [False, False]


@pytest.mark.parametrize("bad", ["", "x" * 201])
def test_keys_have_a_length(live_api: LiveApi, bad: str) -> None:
    problem(create(live_api, bad), 422, "1 to 200 characters")


def slow_body(go_on: threading.Event) -> Iterator[bytes]:
    yield b'{"name": '
    go_on.wait(20)
    yield b'"slow"}'


def test_a_request_in_flight_is_a_conflict(live_api: LiveApi, key: str) -> None:
    go_on, answers = threading.Event(), []

    def send() -> None:
        headers = {"Idempotency-Key": key, "content-type": "application/json"}
        answers.append(live_api.client.post("/v1/datasets", content=slow_body(go_on), headers=headers))

    thread = threading.Thread(target=send)
    n = len(keys(live_api))
    thread.start()
    deadline = time.monotonic() + 10
    while len(keys(live_api)) == n and time.monotonic() < deadline:
        time.sleep(0.01)
    response = create(live_api, key, "slow")
    go_on.set()
    thread.join()
    problem(response, 409, "still in flight")
    assert response.headers["retry-after"] == "1"
    assert answers[0].status_code == 201


def test_a_key_held_by_a_dead_process_is_free_after_its_lease(live_api: LiveApi, key: str) -> None:
    before = {row.key for row in keys(live_api)}
    create(live_api, key)
    (row,) = [row for row in keys(live_api) if row.key not in before]

    def hold(until_s: float) -> None:  # as a process leaves it that is killed before it could answer
        with live_api.parts.database.write() as session:
            held = session.get_one(IdempotencyKey, row.key)
            held.status = held.body = held.body_sha256 = None
            held.locked_until = utc_now() + timedelta(seconds=until_s)

    hold(20)
    problem(create(live_api, key), 409, "in flight")
    hold(-1)
    response = create(live_api, key)
    assert response.status_code == 201
    assert "idempotent-replayed" not in response.headers
    assert create(live_api, key).json() == response.json()


def test_failures_of_ours_are_not_stored(live_api: LiveApi, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> Any:
        raise RuntimeError("boom")

    n = len(keys(live_api))
    monkeypatch.setattr("service.routes.datasets.new_id", broken)
    body = problem(create(live_api, key), 500, "not in your request")
    assert "boom" not in str(body)
    monkeypatch.undo()
    assert len(keys(live_api)) == n
    assert create(live_api, key).status_code == 201


def test_conflicts_and_oversized_bodies_may_be_tried_again(start_api: Callable[..., LiveApi], key: str) -> None:
    api = start_api(max_json_bytes=1000)
    problem(create(api, key, "x" * 2000), 413)
    assert create(api, key, "x").status_code == 201
    job_id = api.add_job("succeeded")
    headers = {"Idempotency-Key": key}
    problem(api.client.post(f"/v1/jobs/{job_id}/cancel", headers=headers), 409)
    api.set_job(job_id, status="queued")
    assert api.client.post(f"/v1/jobs/{job_id}/cancel", headers=headers).status_code == 202


def test_a_client_that_is_gone_leaves_its_key_free(live_api: LiveApi, key: str) -> None:
    n = len(keys(live_api))
    gone_mid_upload(live_api, "/v1/datasets", "application/json", b'{"name":', f"Idempotency-Key: {key}\r\n")
    deadline = time.monotonic() + 10
    while len(keys(live_api)) != n and time.monotonic() < deadline:
        time.sleep(0.02)
    assert create(live_api, key, "whole").status_code == 201


def test_an_answer_before_the_body_is_read_still_knows_the_body(live_api: LiveApi, key: str) -> None:
    url, headers = "/v1/datasets/ds_x/archive", {"Idempotency-Key": key, "content-type": "application/zip"}
    problem(live_api.client.post(url, content=b"a" * 300_000, headers=headers), 404)
    assert live_api.client.post(url, content=b"a" * 300_000, headers=headers).headers["idempotent-replayed"] == "true"
    problem(live_api.client.post(url, content=b"b" * 300_000, headers=headers), 422, "another body")


def test_two_at_once_make_one_dataset(live_api: LiveApi, key: str) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(create(live_api, key, "twin"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {201, 409}
    with live_api.parts.database.read() as session:
        assert len(list(session.scalars(select(Dataset.id).where(Dataset.name == "twin")))) == 1
