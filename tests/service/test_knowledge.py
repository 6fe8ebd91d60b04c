"""Knowledge: inline vectors, files, text encoders; lookups; what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from service.core.tables import Classifier
from service.schemas import JobOut, KnowledgeOut, LookupOut, Page
from tests.service.harness import LiveApi, checked, problem
from tests.service.tasks import finish

VECTORS = {"cat": [1.0, 0.0, 0.5], "polar bear": [0.0, 1.0, 0.5]}


def create(api: LiveApi, **body: Any) -> httpx.Response:
    return api.client.post("/v1/knowledge", json={"name": "k", **body})


def test_inline_vectors_become_a_ready_source(live_api: LiveApi) -> None:
    response = create(live_api, vectors=VECTORS)
    job = checked(response, JobOut, 202)
    waiting = checked(live_api.client.get(job["resource"]["href"]), KnowledgeOut)
    assert (waiting["status"], waiting["job_id"]) == ("importing", job["id"])
    done = finish(live_api, job["id"])
    assert done["status"] == "succeeded", done["error"]
    ready = checked(live_api.client.get(done["result"]["href"]), KnowledgeOut)
    assert (ready["status"], ready["dim"], ready["n_entries"]) == ("ready", 3, 2)


def test_a_source_of_dimensions_stays_while_a_classifier_waits_for_it(live_api: LiveApi) -> None:
    knowledge_id, classifier_id = live_api.knowledge(), live_api.classifier("queued", "sc_egg")

    def change(**fields: Any) -> None:
        with live_api.parts.database.write() as session:
            for name, value in fields.items():
                setattr(session.get_one(Classifier, classifier_id), name, value)

    change(request={"dimension_knowledge_id": knowledge_id})
    problem(live_api.client.delete(f"/v1/knowledge/{knowledge_id}"), 409, classifier_id)
    change(status="ready")
    assert live_api.client.delete(f"/v1/knowledge/{knowledge_id}").status_code == 204


def test_attributes_with_names(live_api: LiveApi) -> None:
    job = create(live_api, kind="attributes", vectors=VECTORS, attribute_names=["furry", "white", "big"]).json()
    done = finish(live_api, job["id"])
    assert done["status"] == "succeeded", done["error"]
    summary = live_api.client.get(done["result"]["href"]).json()["summary"]
    assert summary["attribute_names"] == ["furry", "white", "big"]


def test_a_file_of_word_vectors(live_api: LiveApi) -> None:
    text = b"cat 1 0 0\ndog 0 1 0\nbear 0 0 1\n"
    form = {"name": "glove", "kind": "word_vectors"}
    job = live_api.client.post("/v1/knowledge", data=form, files={"file": ("dir/glove.txt", text)}).json()
    done = finish(live_api, job["id"])
    assert done["status"] == "succeeded", done["error"]
    row = live_api.client.get(done["result"]["href"]).json()
    assert (row["n_entries"], row["dim"], row["summary"]["file"]) == (3, 3, "glove.txt")
    assert live_api.snapshot()["scratch"] == []


def test_a_damaged_file_fails_the_job_and_marks_the_source(live_api: LiveApi) -> None:
    form = {"name": "k", "kind": "class_vectors"}
    job = live_api.client.post("/v1/knowledge", data=form, files={"file": ("k.npz", b"junk")}).json()
    done = finish(live_api, job["id"])
    assert (done["status"], done["error"]["status"]) == ("failed", 422)
    row = live_api.client.get(job["resource"]["href"]).json()
    assert row["status"] == "failed"
    lookup = live_api.client.get(f"/v1/knowledge/{row['id']}/lookup?names=cat")
    problem(lookup, 409, "could not be read", done["error"]["detail"][:30])


@pytest.mark.parametrize(
    ("body", "words", "pointer"),
    [
        ({}, "upload a file", "/vectors"),
        ({"vectors": {}}, "upload a file", "/vectors"),
        ({"vectors": {"cat": []}}, "all zeros", "/vectors/cat"),
        ({"vectors": {"cat": [0.0, 0.0]}}, "all zeros", "/vectors/cat"),
        ({"vectors": {"cat": [1e-60, 0.0]}}, "all zeros", "/vectors/cat"),
        ({"vectors": {"cat": [1e39]}}, "too large for 32 bits", "/vectors/cat"),
        ({"vectors": {"cat": [1.0], "a/b~c": [1.0, 2.0]}}, "one length", "/vectors/a~1b~0c"),
        ({"vectors": {"cat": ["x"]}}, "valid number", "/vectors/cat/0"),
        ({"vectors": {"Polar_Bear": [1.0], "polar bear": [1.0]}}, "same name", "/vectors/1"),
        ({"vectors": {" ": [1.0]}}, "is empty", "/vectors/0"),
        ({"vectors": {"a\u202eb": [1.0]}}, "control character", "/vectors/0"),
        ({"vectors": {"x" * 300: [1.0]}}, "at most 256", "/vectors/0"),
        ({"vectors": VECTORS, "attribute_names": ["a"]}, "every dimension", "/attribute_names"),
        ({"vectors": VECTORS, "kind": "atributes"}, "'attributes'", "/kind"),
        ({"vectors": VECTORS, "vector": 1}, "Did you mean 'vectors'?", "/vector"),
        ({"kind": "text_encoder"}, "'model'", "/model"),
        ({"kind": "text_encoder", "model": "m", "vectors": VECTORS}, "no 'vectors'", "/model"),
        ({"name": "\n", "vectors": VECTORS}, "pattern", "/name"),
    ],
)
def test_bad_inline_knowledge(live_api: LiveApi, body: dict[str, Any], words: str, pointer: str) -> None:
    before = live_api.snapshot()
    answer = problem(create(live_api, **body), 422, words)
    assert [entry["pointer"] for entry in answer["errors"]] == [pointer]
    assert live_api.snapshot() == before


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know(live_api: LiveApi, number: float) -> None:
    raw = json.dumps({"name": "k", "vectors": {"cat": [1.0, number]}})
    response = live_api.client.post("/v1/knowledge", content=raw, headers={"content-type": "application/json"})
    problem(response, 422, "'cat'", "NaN")


@pytest.mark.parametrize(
    ("form", "filename", "status", "words"),
    [
        ({}, "g.txt", 422, "'name'"),
        ({"name": " "}, "g.txt", 422, "'name'"),
        ({"name": "g", "kind": "words"}, "g.txt", 422, "word_vectors, class_vectors or attributes"),
        ({"name": "g", "kind": "text_encoder"}, "g.txt", 422, "not 'text_encoder'"),
        ({"name": "g"}, "g.pkl", 415, "suffixes"),
    ],
)
def test_bad_files(live_api: LiveApi, form: dict[str, str], filename: str, status: int, words: str) -> None:
    before = live_api.snapshot()
    response = live_api.client.post("/v1/knowledge", data=form, files={"file": (filename, b"cat 1 2\n")})
    problem(response, status, words)
    assert live_api.snapshot() == before


def test_files_missing_empty_or_too_many(live_api: LiveApi) -> None:
    url, form = "/v1/knowledge", {"name": "g"}
    problem(live_api.client.post(url, data=form, files={"fil": ("g.txt", b"x")}), 422, "exactly one file", "0 found")
    problem(live_api.client.post(url, data=form, files={"file": ("g.txt", b"")}), 422, "empty (0 bytes)")
    two = [("file", ("g.txt", b"x")), ("file", ("h.txt", b"y"))]
    problem(live_api.client.post(url, data=form, files=two), 422, "2 found")
    problem(live_api.client.post(url, content=b"x", headers={"content-type": "text/csv"}), 415, "multipart/form-data")


def test_malformed_json(live_api: LiveApi) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    for raw in (b"{", b"", b"[]", b'"text"', b"\xff\xfe"):
        problem(live_api.client.post("/v1/knowledge", content=raw, headers=headers), 422)


def test_lookup_tells_what_resolves(live_api: LiveApi) -> None:
    knowledge_id = live_api.knowledge()
    url = f"/v1/knowledge/{knowledge_id}/lookup"
    body = checked(live_api.client.get(f"{url}?names=cat, unknownish, half fox"), LookupOut)
    assert (body["n_found"], body["n_missing"], body["n_partial"]) == (2, 1, 1)
    assert [entry["name"] for entry in body["data"]] == ["cat", "unknownish", "half fox"]
    assert body["data"][1]["suggestions"] == ["known"]
    with_comma = live_api.client.get(url, params={"names": ["keyboard, keypad", "cat"]}).json()
    assert [entry["name"] for entry in with_comma["data"]] == ["keyboard, keypad", "cat"]
    problem(live_api.client.get(url), 422, "required")
    problem(live_api.client.get(f"{url}?names=cat,Cat"), 422, "same name")
    problem(live_api.client.get("/v1/knowledge/kn_x/lookup?names=cat"), 404, "kn_x")


def test_lookup_waits_for_the_import(live_api: LiveApi) -> None:
    response = live_api.client.get(f"/v1/knowledge/{live_api.knowledge('importing')}/lookup?names=cat")
    problem(response, 409, "wait for job")
    assert response.headers["retry-after"] == "2"


def test_delete_only_what_nothing_uses(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set({"cat": [1.0]})
    knowledge_id = live_api.client.get(f"/v1/embedding-sets/{set_id}").json()["knowledge_id"]
    problem(live_api.client.delete(f"/v1/knowledge/{knowledge_id}"), 409, set_id)
    waiting = live_api.knowledge("importing")
    problem(live_api.client.delete(f"/v1/knowledge/{waiting}"), 409, "job_")
    free = live_api.knowledge()
    assert live_api.client.delete(f"/v1/knowledge/{free}").status_code == 204
    assert free not in [row["id"] for row in checked(live_api.client.get("/v1/knowledge"), Page[KnowledgeOut])["data"]]


def test_a_hundred_thousand_names_are_the_most(live_api: LiveApi) -> None:
    job = create(live_api, vectors={f"class {i}": [1.0] for i in range(100_000)}).json()
    assert job["status"] == "queued"
    answer = create(live_api, vectors={f"class {i}": [1.0] for i in range(100_001)})
    problem(answer, 422, "100001 names; at most 100000")
    problem(create(live_api, vectors={"cat": [1.0] * 65_537}), 413, "at most 65,536")
