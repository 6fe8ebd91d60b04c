"""The client against hostile answers: retries, errors, and how uploads are cut into requests."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.client import ApiError, Client, ServiceUnreachable, UnseenError
from service.client_uploads import LabelledImage, batches, guess_kind
from tests.fakes import answering
from tests.service.harness import png

# ---- retries and errors -----------------------------------------------------------------------------


def test_a_repeated_upload_has_the_same_key_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(5))
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


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSEEN_URL", "http://10.0.0.7:9000/")
    monkeypatch.setenv("UNSEEN_API_KEY", "from-the-environment")

    def sent(client: Client) -> tuple[str, str | None]:
        with client:
            return client.base_url, client._http._client.headers.get("authorization")

    assert sent(Client()) == ("http://10.0.0.7:9000", "Bearer from-the-environment")
    assert sent(Client("http://127.0.0.1:8000", "mine")) == ("http://127.0.0.1:8000", "Bearer mine")
    assert sent(Client(api_key=""))[1] is None
    monkeypatch.delenv("UNSEEN_URL")
    assert sent(Client())[0] == "http://127.0.0.1:8000"


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


def test_classify_numbers_images_over_batches_of_one_classifier() -> None:
    asked: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("classifier_id"))
        n = request.read().count(b'name="images"')
        rows = [{"index": i, "predictions": []} for i in range(n)]
        return httpx.Response(200, json={"classifier_id": "cl_1", "scope": "all", "gamma": 0.0, "data": rows})

    with answering(handler) as client:
        answer = client.classify([png(i) for i in range(40)], top_k=2)
    assert [row["index"] for row in answer["data"]] == list(range(40))
    assert answer["classifier_id"] == "cl_1"
    assert asked == [None, "cl_1"]


def test_options_of_classify_and_infer_are_sent() -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        request.read()
        asked.append((request.url.path, dict(request.url.params)))
        return httpx.Response(200, json={"classifier_id": "cl_1", "data": [{"index": 0}]})

    with answering(handler) as client:
        client.classify(png(0), min_score=0.5, timeout_s=2)
        client.infer(png(0), class_names=["cat"], tau=0.2, timeout_s=2)
    (classify, sent), (infer, sent_to_infer) = asked
    assert (classify, sent["min_score"], sent["timeout_s"]) == ("/v1/classify", "0.5", "2")
    assert infer == "/v1/infer"
    assert sent_to_infer == {"class_names": "cat", "tau": "0.2", "top_k": "10", "timeout_s": "2"}
