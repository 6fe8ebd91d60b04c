"""Limits of every body, at and past them; slow senders; a busy database."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.middleware import Gate
from tests.service.harness import LiveApi, eventually, png, problem

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def body_of() -> Callable[[int], bytes]:
    """A valid dataset of exactly so many bytes."""

    def make(n_bytes: int) -> bytes:
        empty = len(json.dumps({"name": "d", "description": ""}))
        return json.dumps({"name": "d", "description": "x" * (n_bytes - empty)}).encode()

    return make


def chunked(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 100):
        yield data[start : start + 100]


def test_json_bodies(start_api: Callable[..., LiveApi], body_of: Callable[[int], bytes]) -> None:
    api = start_api(max_json_bytes=2000)
    url = "/v1/datasets"
    assert api.client.post(url, content=body_of(2000), headers=JSON).status_code == 201
    assert api.client.post(url, content=chunked(body_of(2000)), headers=JSON).status_code == 201
    before = api.snapshot()
    problem(api.client.post(url, content=body_of(2001), headers=JSON), 413, "2,001 bytes", "at most 2,000")
    problem(api.client.post(url, content=chunked(body_of(2001)), headers=JSON), 413, "at most 2,000")
    problem(api.client.post("/v1/knowledge", content=chunked(b"x" * 2001), headers=JSON), 413)
    problem(api.client.post("/v1/classify", content=chunked(b"x" * 2001), headers=JSON), 413)
    twice = [*JSON.items(), ("content-type", "multipart/form-data; boundary=B")]
    for url in ("/v1/classify", "/v1/knowledge"):
        problem(api.client.post(url, content=b"x" * 2001, headers=twice), 413, "at most 2,000")
    assert api.snapshot() == before


def test_files_and_archives(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(max_body_bytes=50_000, max_archive_bytes=80_000, max_image_bytes=10_000)
    dataset = f"/v1/datasets/{api.dataset()}"
    before = api.snapshot()
    form = {"class_name": "c"}
    # Well-formed as far as it goes: how much of a chunked body is parsed before the limit is met is a matter of timing.
    opening = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    for content in (b"x" * 50_001, chunked(opening + b"x" * 50_001)):
        headers = {"content-type": "multipart/form-data; boundary=B"}
        problem(api.client.post(f"{dataset}/images", content=content, headers=headers), 413, "at most 50,000")
    for content in (b"x" * 80_001, chunked(b"x" * 80_001)):
        headers = {"content-type": "application/zip"}
        problem(api.client.post(f"{dataset}/archive", content=content, headers=headers), 413, "at most 80,000")
    headers = {"content-type": "image/png"}
    problem(api.client.post("/v1/classify", content=chunked(b"x" * 10_001), headers=headers), 413, "at most 10,000")
    assert api.snapshot() == before
    big = api.client.post(f"{dataset}/images", files={"files": ("a.png", png(1, 64))}, data=form).json()
    assert "at most 10,000" in big["rejected"][0]["reason"]


def test_bodies_of_all_requests_together(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(max_held_bytes=3_000_000)
    image, headers = b"x" * 2_000_000, {"content-type": "image/png"}
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000000\r\n\r\n"

    def classified(data: bytes) -> httpx.Response:
        return api.client.post("/v1/classify", content=data, headers=headers)

    with socket.create_connection(("127.0.0.1", api.port)) as other:
        other.sendall(head + image)
        gate: Any = api.app.middleware_stack
        while not isinstance(gate, Gate):
            gate = gate.app
        eventually(lambda: gate.held_bytes == len(image))  # who comes last is refused, and that must not be the other
        response = classified(image)
        problem(response, 503, "hold too much memory")
        assert int(response.headers["retry-after"]) > 0
        problem(classified(b"x"), 404, "classifier")
    deadline = time.monotonic() + 10
    while (response := classified(image)).status_code == 503 and time.monotonic() < deadline:
        pass  # that the other is gone has not been noticed
    problem(response, 404, "classifier")
    problem(classified(image * 2), 404, "classifier")  # alone it may


def test_how_many_files_and_fields(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(max_files_per_request=3, max_json_bytes=500)
    url = f"/v1/datasets/{api.dataset()}/images"
    before = api.snapshot()
    four = [("files", (f"{i}.png", png(i))) for i in range(4)]
    problem(api.client.post(url, files=four, data={"class_name": "c"}), 413, "at most 3 files")
    fields = {f"f{i}": "" for i in range(1001)}
    problem(api.client.post(url, files=four[:1], data=fields), 413, "1000 fields")
    for texts in ({"labels": "x" * 501}, {"labels": "x" * 251, "class_name": "x" * 250}):
        problem(api.client.post(url, files=four[:1], data=texts), 413, "more than 500 bytes")
    assert api.snapshot() == before
    assert api.client.post(url, files=four[:3], data={"class_name": "c"}).status_code == 200


def test_how_many_classes(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(max_classes=3)
    names = [f"c{i}" for i in range(4)]
    problem(
        api.client.post("/v1/knowledge", json={"name": "k", "vectors": {n: [1.0] for n in names}}), 422, "at most 3"
    )
    ids = {"dataset_id": api.dataset(), "knowledge_id": api.knowledge()}
    problem(api.client.post("/v1/embedding-sets", json={**ids, "unseen_classes": names}), 422, "at most 3")


def receive_all(connection: socket.socket) -> bytes:
    data = b""
    connection.settimeout(10)
    while b"}" not in data:
        part = connection.recv(65_536)
        if not part:
            break
        data += part
    return data


def test_a_sender_that_stalls_is_told_to_hurry(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(request_timeout_s=0.5)
    head = b"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(head + b'{"na')
        answer = receive_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"without pauses of 0.5 s" in answer


def test_a_sender_that_trickles_is_told_to_hurry(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(request_timeout_s=0.8)
    head = b"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2000\r\n\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(head)
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            connection.sendall(b" ")
            try:
                answer = connection.recv(65_536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_each_1024_bytes_that_arrive_buy_a_second(
    start_api: Callable[..., LiveApi], body_of: Callable[[int], bytes]
) -> None:
    api = start_api(request_timeout_s=0.5)

    def slowly(data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), 1024):
            yield data[start : start + 1024]
            time.sleep(0.3)

    began = time.monotonic()
    assert api.client.post("/v1/datasets", content=slowly(body_of(4000)), headers=JSON).status_code == 201
    assert time.monotonic() - began > 2 * api.settings.request_timeout_s


def test_a_locked_database_answers_503(start_api: Callable[..., LiveApi], tmp_path: object) -> None:
    api = start_api(reconcile_s=1000)
    engine = api.parts.database.engine
    if engine.dialect.name != "sqlite":
        pytest.skip("only SQLite has one lock for all")
    engine.dispose()

    def impatient(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA busy_timeout=100")

    from sqlalchemy import event

    event.listen(engine, "connect", impatient)
    blocker = engine.raw_connection()
    blocker.cursor().execute("BEGIN IMMEDIATE")
    try:
        for headers in ({}, {"Idempotency-Key": "k"}):
            response = api.client.post("/v1/datasets", json={"name": "d"}, headers=headers)
            problem(response, 503, "database", "try again")
            assert int(response.headers["retry-after"]) > 0
        assert api.client.get("/v1/datasets").json()["data"] == []  # reading goes on
    finally:
        blocker.rollback()
        blocker.close()
    assert api.client.post("/v1/datasets", json={"name": "d"}, headers={"Idempotency-Key": "k"}).status_code == 201


def test_deep_and_strange_json(live_api: LiveApi) -> None:
    deep = b'{"name": "d", "metadata": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    problem(live_api.client.post("/v1/datasets", content=deep, headers=JSON), 422)
    nested = b'{"name": "d", "metadata": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}"
    problem(live_api.client.post("/v1/datasets", content=nested, headers=JSON), 422, "metadata")
    problem(live_api.client.post("/v1/datasets", content=b'{"\xff": 1}', headers=JSON), 422, "UTF-8")
    odd = json.dumps({"name": "d", "\ud800": 1}).encode()
    problem(live_api.client.post("/v1/datasets", content=odd, headers=JSON), 422, "unicode")


def test_a_connection_lives_on_after_a_refusal(live_api: LiveApi) -> None:
    with httpx.Client(base_url=live_api.client.base_url) as client:
        for _ in range(3):
            assert client.post("/v1/datasets", content=b"{", headers=JSON).status_code == 422
            assert client.get("/healthz").status_code == 200
