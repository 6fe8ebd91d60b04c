"""The client against the real API on a socket, and against hostile answers."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

import unseen
from service.app import create_app
from service.client import ApiError, Client, JobFailed, ServiceUnreachable, UnseenError, WaitTimeout
from service.client_jobs import parse_events
from service.client_uploads import LabelledImage, batches, guess_kind
from service.core import jobs
from service.core.db import Database, make_engine
from service.core.settings import Settings
from service.core.tables import EmbeddingClass, EmbeddingSet, Knowledge

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """The API on a free port, without workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(create_app(settings), port=port, log_level="error", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, retries=2) as client:
        yield client


@pytest.fixture
def database(settings: Settings, address: str) -> Iterator[Database]:
    """The running API's own database."""
    database = Database(make_engine(settings.resolved_database_url))
    yield database
    database.close()


def picture(seed: int, format: str = "PNG") -> bytes:
    """A small picture whose content depends on `seed` only."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seen classes and an unseen one, with a splits.json, one damaged file and one duplicate."""
    root = tmp_path / "photos"
    for number, name in enumerate(("cat", "grizzly_bear", "zebra")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(3):
            (root / "images" / name / f"{i}.png").write_bytes(picture(10 * number + i))
    (root / "images" / "cat" / "broken.png").write_bytes(b"no picture")
    (root / "images" / "cat" / "again.png").write_bytes(picture(0))
    splits = {
        "seen_classes": ["cat", "grizzly_bear"],
        "unseen_classes": ["zebra"],
        "train": [f"images/{name}/{i}.png" for name in ("cat", "grizzly_bear") for i in (0, 1)],
        "test_seen": ["images/cat/2.png", "images/grizzly_bear/2.png"],
        "test_unseen": [f"images/zebra/{i}.png" for i in range(3)],
    }
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def answering(handler: Handler, **options: Any) -> Client:
    """A client whose requests `handler` answers; it never sleeps long."""
    client = Client("http://service.test", transport=httpx.MockTransport(handler), **options)
    client._http._sleep = lambda _: None
    return client


# ---- against the real API ---------------------------------------------------------------------------


def test_a_folder_arrives_with_its_splits(client: Client, folder: Path) -> None:
    dataset = client.create_dataset("photos", description="three classes")
    seen_progress: list[tuple[int, int]] = []
    report = client.upload_folder(dataset["id"], folder, on_progress=lambda n, total: seen_progress.append((n, total)))
    assert (report.n_accepted, report.n_duplicates) == (9, 1)
    assert [entry["filename"] for entry in report.rejected] == ["images/cat/broken.png"]
    assert report.unseen_classes == ("zebra",)
    assert seen_progress[-1] == (11, 11)
    stored = client.get(dataset["id"])
    assert (stored["n_images"], stored["n_classes"]) == (9, 3)
    classes = client._http.json("GET", f"/v1/datasets/{dataset['id']}/classes")["data"]
    assert {c["class_name"]: (c["n_train"], c["n_test"]) for c in classes} == {
        "cat": (2, 1),
        "grizzly_bear": (2, 1),
        "zebra": (0, 3),
    }


def test_a_second_upload_of_a_folder_adds_nothing(client: Client, folder: Path) -> None:
    dataset_id = client.create_dataset("photos")["id"]
    client.upload_folder(dataset_id, folder)
    assert client.upload_folder(dataset_id, folder).n_accepted == 0
    assert client.get(dataset_id)["n_images"] == 9


def test_images_as_paths_bytes_and_named_bytes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / 'a "quoted" näme.png'
    path.write_bytes(picture(1))
    dataset_id = client.create_dataset("mixed")["id"]
    sources = [path, picture(2), ("third.png", picture(3))]
    answer = client.upload_images(dataset_id, sources, labels=["a", "b", "a"], split="train")
    assert [entry["class_name"] for entry in answer["accepted"]] == ["a", "b", "a"]
    with pytest.raises(UnseenError, match="2 labels were given for 1"):
        client.upload_images(dataset_id, [picture(4)], labels=["a", "b"])
    with pytest.raises(UnseenError, match=r"missing\.png cannot be read"):
        client.upload_images(dataset_id, [tmp_path / "missing.png"], "a")


def test_refusals_tell_every_problem(client: Client) -> None:
    with pytest.raises(ApiError, match="There is no") as caught:
        client.get("ds_unknown")
    assert caught.value.status == 404
    with pytest.raises(ApiError) as caught:
        client.create_dataset("", test_fraction=5)
    assert caught.value.status == 422
    assert {entry["pointer"] for entry in caught.value.errors} == {"/name", "/test_fraction"}
    assert "/test_fraction: " in str(caught.value)
    with pytest.raises(UnseenError, match="is no id of a resource"):
        client.get("../secrets")


def test_knowledge_from_vectors_and_file_makes_jobs(client: Client, tmp_path: Path) -> None:
    job = client.add_knowledge("inline", vectors={"cat": np.array([1.0, 0.5]), "zebra": [0.0, 1.0]})
    assert job["kind"] == "index_knowledge"
    assert client.get(job["resource"]["id"])["kind"] == "class_vectors"
    np.savez(tmp_path / "table.npz", class_names=["cat"], vectors=[[1.0]], attribute_names=["furry"])
    job = client.add_knowledge("file", file=tmp_path / "table.npz")
    assert client.get(job["resource"]["id"])["kind"] == "attributes"
    with pytest.raises(UnseenError, match="Give one of"):
        client.add_knowledge("nothing")
    assert [k["name"] for k in client.list_all("knowledge")] == ["file", "inline"]


def test_class_embeddings_travel_as_float32(client: Client, database: Database) -> None:
    dataset_id = client.create_dataset("d")["id"]
    vectors = np.random.default_rng(0).standard_normal((120, 7)).astype("<f4")
    with database.write() as session:
        session.add(Knowledge(id="kn_1", name="k", kind="class_vectors", status="ready"))
        session.flush()
        session.add(
            EmbeddingSet(
                id="es_1",
                name="mine",
                dataset_id=dataset_id,
                knowledge_id="kn_1",
                method="vgse",
                relation="smo",
                status="ready",
                dim=7,
            )
        )
        session.flush()
        for i, vector in enumerate(vectors):
            session.add(
                EmbeddingClass(
                    embedding_set_id="es_1",
                    name=f"class {i}",
                    position=i,
                    is_seen=i < 100,
                    vector=vector.tobytes(),
                    provenance={},
                )
            )
    names, seen, found = client.class_embeddings("es_1")
    assert names == [f"class {i}" for i in range(120)]
    assert seen.sum() == 100
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors)
    some = client.class_embeddings("es_1", ["class 119", "class 3"])
    np.testing.assert_array_equal(some.vectors, vectors[[119, 3]])
    answer = client.embeddings("mine", "class 5", encoding_format="base64")
    assert base64.b64decode(answer["data"][0]["embedding"]) == vectors[5].tobytes()


def test_export_writes_the_whole_file_or_nothing(client: Client, database: Database, tmp_path: Path) -> None:
    test_class_embeddings_travel_as_float32(client, database)
    path = client.export("es_1", tmp_path / "out.npz")
    with np.load(path, allow_pickle=False) as stored:
        assert stored["class_names"].shape == (120,)
    with pytest.raises(UnseenError, match="no format to export"):
        client.export("es_1", tmp_path / "out.xlsx")
    with pytest.raises(UnseenError, match="cannot be written"):
        client.export("es_1", tmp_path / "no folder" / "out.npz")
    with pytest.raises(ApiError, match="There is no"):
        client.export("es_2", tmp_path / "other.npz")
    assert [p.name for p in tmp_path.glob("*") if "out" in p.name or "other" in p.name] == ["out.npz"]


def test_methods_and_version(client: Client) -> None:
    assert {"vgse", "sje"} <= {method["name"] for method in client.methods()}
    assert client.version()["api"] == "v1"


def test_readiness_names_what_is_missing(client: Client) -> None:
    assert client.ready()["checks"]["database"] == "ok"
    with pytest.raises(WaitTimeout, match="worker: no worker was heard of"):
        client.wait_until_ready(timeout=0)


# ---- jobs -------------------------------------------------------------------------------------------


@pytest.fixture
def job_id(client: Client) -> str:
    return str(client.add_knowledge("inline", vectors={"cat": [1.0]})["id"])


def finish_soon(database: Database, job_id: str, fail: bool = False) -> threading.Thread:
    """Plays the worker from another thread: claims, reports twice, ends."""

    def work() -> None:
        time.sleep(0.3)
        with database.write() as session:
            job = jobs.claim(session, job_id, "worker")
            assert job is not None
            token = job.token
        with database.write() as session:
            jobs.report_progress(session, job_id, token, {"phase": "index", "completed": 1, "total": 2})
        time.sleep(1.2)
        with database.write() as session:
            if fail:
                jobs.fail(session, job_id, token, {"title": "Invalid", "status": 422, "detail": "No vector at all."})
            else:
                jobs.finish(session, job_id, token, {"kind": "knowledge", "id": "kn_x"})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("poll", [False, True])
def test_wait_follows_a_job_to_its_end(client: Client, database: Database, job_id: str, poll: bool) -> None:
    reports: list[dict[str, Any]] = []
    worker = finish_soon(database, job_id)
    ended = client.wait(job_id, on_progress=reports.append, timeout=20, poll=poll)
    worker.join()
    assert ended["result"]["id"] == "kn_x"
    assert reports[-1]["status"] == "succeeded"
    if not poll:
        assert reports[0]["status"] == "queued"
        assert any(r["progress"]["phase"] == "index" and r["status"] == "running" for r in reports)


def test_a_failed_job_raises_with_its_reason(client: Client, database: Database, job_id: str) -> None:
    worker = finish_soon(database, job_id, fail=True)
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


# ---- retries and errors -----------------------------------------------------------------------------


def test_a_repeated_upload_has_the_same_key_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(5))
    tries: list[tuple[str, bytes]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append((request.headers["idempotency-key"], request.read()))
        if len(tries) == 1:
            raise httpx.ReadError("cut")
        if len(tries) == 2:
            return httpx.Response(409, json={"detail": "in flight"}, headers={"retry-after": "1"})
        if len(tries) == 3:
            return httpx.Response(503, json={"detail": "busy"}, headers={"retry-after": "0"})
        return httpx.Response(200, json={"accepted": [], "rejected": []})

    with answering(handler) as client:
        client.upload_images("ds_1", [path], "cat")
    assert len(set(tries)) == 1
    assert len(tries) == 4


def test_conflicts_are_not_repeated() -> None:
    calls: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(request.method)
        return httpx.Response(409, json={"title": "Conflict", "status": 409, "detail": "still being built"})

    with answering(handler) as client, pytest.raises(ApiError, match="still being built"):
        client.add_classes("es_1", ["zebra"])
    assert calls == ["POST"]


def test_nobody_there_tells_how_to_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}", retries=0) as client,
        pytest.raises(ServiceUnreachable, match="Start the service with 'unseen serve'"),
    ):
        client.methods()


def test_what_is_no_service_is_told_apart() -> None:
    with (
        answering(lambda request: httpx.Response(200, json=["hello"])) as client,
        pytest.raises(UnseenError, match="is this the address of an Unseen service"),
    ):
        client.version()
    with (
        answering(lambda request: httpx.Response(502, text="<html>bad gateway</html>")) as client,
        pytest.raises(ApiError, match=r"bad gateway.*HTTP 502"),
    ):
        client.version()
    for address in ("localhost:8000", "http://", "http://127.0.0.1:80x", "http://127.0.0.1:99999"):
        with pytest.raises(UnseenError, match="is no address"):
            Client(address)


def test_the_key_is_sent_as_bearer() -> None:
    heard: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers["authorization"])
        return httpx.Response(200, json=[])

    with answering(handler, api_key="secret") as client:
        client.methods()
    assert heard == ["Bearer secret"]


# ---- uploads ----------------------------------------------------------------------------------------


def test_batches_keep_splits_apart_and_sizes_small() -> None:
    images = [LabelledImage(f"{i % 4}.png", bytes(40), "c", "test" if i % 3 == 0 else None) for i in range(12)]
    forms = [form for form, _ in batches(images, max_bytes=100, max_files=10)]
    assert all(len(form.files) <= 2 for form in forms)
    assert all(len({name for _, name, _ in form.files}) == len(form.files) for form in forms)
    assert sum(len(form.files) for form in forms if form.fields.get("split") == "test") == 4
    assert sum(len(form.files) for form in forms) == 12
    assert [n for _, n in batches(images[:1], max_bytes=1)] == [1]


def test_kinds_are_told_by_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "vectors.npz", class_names=["a"], vectors=[[1.0]])
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    assert guess_kind(tmp_path / "vectors.npz") == "class_vectors"
    assert guess_kind(tmp_path / "broken.npz") == "class_vectors"
    assert guess_kind(Path("glove.6B.300d.txt.gz")) == "word_vectors"
    assert guess_kind(Path("wiki.VEC")) == "word_vectors"
    assert guess_kind(Path("att.csv")) == "class_vectors"


def test_classify_numbers_images_over_batches() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        n = request.read().count(b'name="images"')
        rows = [{"index": i, "predictions": []} for i in range(n)]
        return httpx.Response(200, json={"classifier_id": "cl_1", "scope": "all", "gamma": 0.0, "data": rows})

    with answering(handler) as client:
        answer = client.classify([picture(i) for i in range(40)], top_k=2)
    assert [row["index"] for row in answer["data"]] == list(range(40))
    assert answer["classifier_id"] == "cl_1"


def test_the_package_offers_the_client() -> None:
    assert unseen.Client is Client
    assert unseen.__version__
