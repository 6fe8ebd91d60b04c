"""Embedding sets: requests checked before a job is queued, vectors read, classes added live."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from models.params import FINETUNED_COST
from service import planning
from service.core.tables import CachedArtifact, EmbeddingSet
from service.schemas import AddedClass, EmbeddedClass, EmbeddingSetOut, Estimate, JobOut, Page
from tests.service.harness import LiveApi, checked, forged_cursor, problem
from workers.backbones import TRAINING_SIDE

SMALL = {"backbone": {"name": "small_cnn", "weights": "scratch"}, "clustering": {"n_clusters": 4}}


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, str]:
    """A dataset of three classes and a ready knowledge source."""
    dataset_id = live_api.filled_dataset({"cat": 2, "dog": 2, "polar_bear": 1})
    return {"dataset_id": dataset_id, "knowledge_id": live_api.knowledge()}


def create(api: LiveApi, body: dict[str, Any], query: str = "") -> httpx.Response:
    return api.client.post(f"/v1/embedding-sets{query}", json={"params": SMALL, **body})


def test_a_good_request_is_queued_with_its_resource(live_api: LiveApi, inputs: dict[str, str]) -> None:
    response = create(live_api, {**inputs, "unseen_classes": ["zebra", " POLAR BEAR "], "name": "pets"})
    job = checked(response, JobOut, 202)
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(response.headers["retry-after"]) >= 1
    row = checked(live_api.client.get(job["resource"]["href"]), EmbeddingSetOut)
    assert (row["status"], row["name"], row["job_id"]) == ("queued", "pets", job["id"])
    with live_api.parts.database.read() as session:
        request = session.get_one(EmbeddingSet, row["id"]).request
    # An unseen class is never trained on because it is spelled differently.
    assert request == {"seen_classes": ["cat", "dog"], "unseen_classes": ["zebra", "polar_bear"]}


def test_the_estimate_counts_fine_tuning(live_api: LiveApi, inputs: dict[str, str]) -> None:
    def estimate(**clustering: Any) -> dict[str, Any]:
        params = {"backbone": {"name": "mobilenet_v2"}, "clustering": {"n_clusters": 4, "epochs": 10, **clustering}}
        body = {**inputs, "unseen_classes": ["zebra"], "params": params}
        return checked(create(live_api, body, "?validate_only=true"), Estimate)

    frozen, tuned = estimate(), estimate(mode="finetune")
    assert tuned["seconds"] == pytest.approx(
        (1 + 2 * 10 * FINETUNED_COST) * frozen["seconds"], rel=0.1
    )  # of a rounded number
    assert tuned["memory_bytes"] > frozen["memory_bytes"] + 2**30
    assert "to fine-tune the network" in tuned["basis"]
    assert "fine-tune" not in frozen["basis"]


def test_validate_only_estimates_and_queues_nothing(live_api: LiveApi, inputs: dict[str, str]) -> None:
    before = live_api.snapshot()
    good = checked(create(live_api, {**inputs, "unseen_classes": ["zebra"]}, "?validate_only=true"), Estimate)
    assert (good["valid"], good["problems"], good["n_images"], good["n_patches"]) == (True, [], 5, 45)
    bad = checked(
        create(live_api, {**inputs, "unseen_classes": ["unknown thing", "zebra"]}, "?validate_only=true"), Estimate
    )
    assert not bad["valid"]
    assert bad["problems"] == [
        {
            "pointer": "/unseen_classes",
            "message": "The knowledge source has no vector for 'unknown thing'. Near entries: 'known'.",
        }
    ]
    assert live_api.snapshot() == before


def test_a_name_that_is_known_by_some_of_its_words_is_warned_of(live_api: LiveApi, inputs: dict[str, str]) -> None:
    answer = create(live_api, {**inputs, "unseen_classes": ["half known fox", "zebra"]}, "?validate_only=true")
    cost = checked(answer, Estimate)
    assert (cost["valid"], cost["problems"]) == (True, [])
    message = "Of 'half known fox' the knowledge source knows 'known', 'fox' but not 'half', so its vector says nothing"
    assert cost["warnings"] == [
        {"pointer": "/unseen_classes", "message": f"{message} about the latter. Near entries: 'known'."}
    ]


def test_the_estimate_counts_the_training_of_a_network(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    body = {"dataset_id": api.filled_dataset({"cat": 3, "dog": 2}), "knowledge_id": api.knowledge()}

    def estimated(weights: str, epochs: int = 40) -> dict[str, Any]:
        backbone = {"name": "small_cnn", "weights": weights}
        params = {**SMALL, "backbone": backbone, "scratch": {"epochs": epochs}}
        return checked(create(api, {**body, "params": params}, "?validate_only=true"), Estimate)

    untrained, trained = estimated("random"), estimated("scratch")
    assert trained["seconds"] == pytest.approx(untrained["seconds"] + 40 * 5 / planning.DEFAULT_TRAINED_PER_S, abs=0.1)
    assert trained["memory_bytes"] - untrained["memory_bytes"] == 5 * 3 * TRAINING_SIDE**2
    assert "train" not in untrained["basis"]
    with api.parts.database.write() as session:
        summary = {"name": "small_cnn", "images_per_s": 2.0}
        session.add(CachedArtifact(key="backbone-0", artifact="sha256/…", summary=summary))
    again = estimated("scratch", epochs=60)
    assert again["seconds"] == pytest.approx(untrained["seconds"] + 60 * 5 / 2.0, abs=0.1)
    assert "150 s to train the network at 2 images/s, measured" in again["basis"]


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"seen_classes": ["cat", "dog"], "unseen_classes": ["Cat"]}, "/unseen_classes", "Both seen and unseen"),
        ({"unseen_classes": ["unknown word"]}, "/unseen_classes", "no vector for 'unknown word'"),
        ({"unseen_classes": [""]}, "/unseen_classes/0", "is empty"),
        ({"unseen_classes": ["a b", "A_b"]}, "/unseen_classes/1", "same name"),
        ({"unseen_classes": ["x" * 300]}, "/unseen_classes/0", "at most 256"),
        ({"unseen_classes": ["a\x00b"]}, "/unseen_classes/0", "U+0000"),
        ({"unseen_classes": [f"c{i}" for i in range(100_001)]}, "/unseen_classes", "at most 100000"),
        ({"seen_classes": ["cat", "dgo"]}, "/seen_classes", "Did you mean 'dog'?"),
        ({"seen_classes": ["cat"]}, "/seen_classes", "At least 2 seen classes"),
        ({"unseen_classes": ["cat", "dog"]}, "/seen_classes", "At least 2 seen classes"),
        ({"method": "vsge"}, "/method", "Did you mean 'vgse'?"),
        ({"relation": "smoo"}, "/relation", "Did you mean 'smo'?"),
        ({"params": {"backbone": {"name": "resnet5"}}}, "/params/backbone/name", "Did you mean 'resnet50'"),
        ({"params": {"backbone": {"weights": "../x.pth"}}}, "/params/backbone/weights", "no plain file name"),
        ({"params": {"backbone": {"weights": "x.pth"}}}, "/params/backbone/weights", "UNSEEN_WEIGHTS_DIR"),
        ({"params": {"clustering": {"n_cluster": 3}}}, "/params/clustering/n_cluster", "Did you mean 'n_clusters'?"),
        ({"params": {"clusterin": {}}}, "/params/clusterin", "Did you mean 'clustering'?"),
        ({"params": {"patches": {"size": 5}}}, "/params/patches/size", "greater than or equal to 16"),
        ({"params": {**SMALL, "clustering": {"n_clusters": 46}}}, "/params/clustering/n_clusters", "5 images"),
        ({"params": {**SMALL, "validation_classes": ["zebra"]}}, "/params/validation_classes", "must be seen"),
        ({"params": {**SMALL, "validation_classes": ["cat", "dog"]}}, "/params/validation_classes", "at least 2"),
        ({"unseen_clases": []}, "/unseen_clases", "Did you mean 'unseen_classes'?"),
        ({"name": "\t"}, "/name", "pattern"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_queued(
    live_api: LiveApi, inputs: dict[str, str], body: dict[str, Any], pointer: str, words: str
) -> None:
    before = live_api.snapshot()
    answer = problem(create(live_api, {**inputs, **body}), 422, words)
    assert pointer in [entry["pointer"] for entry in answer["errors"]]
    assert len(answer["errors"]) <= 100
    assert live_api.snapshot() == before


def test_many_unknown_names_are_answered_in_little_time(live_api: LiveApi, inputs: dict[str, str]) -> None:
    names = [f"no such class {i}" for i in range(50_000)]
    answer = problem(create(live_api, {**inputs, "seen_classes": names}), 422, "has no class", "49,990 more")
    assert len(answer["errors"]) < 20


@pytest.mark.parametrize("field", ["dataset_id", "knowledge_id"])
def test_unknown_and_wrong_kinds_of_ids(live_api: LiveApi, inputs: dict[str, str], field: str) -> None:
    other = inputs["knowledge_id" if field == "dataset_id" else "dataset_id"]
    for bad in ("nope", other):
        problem(create(live_api, {**inputs, field: bad}), 404, bad)
    problem(create(live_api, {**inputs, field: "a\x00"}), 422, "pattern")
    problem(create(live_api, {**inputs, field: None}), 422, "valid string")


def test_knowledge_that_is_not_ready(live_api: LiveApi, inputs: dict[str, str]) -> None:
    problem(create(live_api, {**inputs, "knowledge_id": live_api.knowledge("importing")}), 409, "wait for job")


def test_without_inference_process_the_job_checks_names(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    api.stop_inference()
    body = {"dataset_id": api.filled_dataset({"cat": 1, "dog": 1}), "knowledge_id": api.knowledge()}
    checked(create(api, {**body, "unseen_classes": ["unknown"]}), JobOut, 202)
    answer = create(api, {**body, "unseen_classes": ["unknown"]}, "?validate_only=true")
    problem(answer, 503, "inference process is not answering")
    assert int(answer.headers["retry-after"]) > 0


# ---- reading ----------------------------------------------------------------------------------

THREE = {"cat": np.array([1.0, 0.0]), "dog": np.array([0.6, 0.8]), "zebra": np.array([-1 / 3, 2 / 7])}


def test_vectors_as_floats_and_as_base64_are_the_same(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set(THREE, unseen=("zebra",))
    url = f"/v1/embedding-sets/{set_id}/classes"
    floats = checked(live_api.client.get(url), Page[EmbeddedClass])["data"]
    assert [(row["name"], row["seen"]) for row in floats] == [("cat", True), ("dog", True), ("zebra", False)]
    packed = checked(live_api.client.get(f"{url}?encoding_format=base64"), Page[EmbeddedClass])["data"]
    for one, other in zip(floats, packed, strict=True):
        raw = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.array_equal(raw, np.array(one["embedding"], np.float32))
    problem(live_api.client.get(f"{url}?encoding_format=hex"), 422, "'float' or 'base64'")


def test_classes_by_page_and_by_name(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set({f"c{i}": np.array([float(i + 1)]) for i in range(5)})
    url = f"/v1/embedding-sets/{set_id}/classes"
    names: list[str] = []
    cursor = None
    while cursor is not None or not names:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = live_api.client.get(url, params=query).json()
        names += [row["name"] for row in page["data"]]
        cursor = page["next_cursor"]
    assert names == [f"c{i}" for i in range(5)]
    picked = live_api.client.get(url, params={"names": ["c3", "c1"]}).json()["data"]
    assert [row["name"] for row in picked] == ["c1", "c3"]
    problem(live_api.client.get(url, params={"names": ["c9"]}), 404, "no class 'c9'", "POST")
    for key in ("x", "-1", "9" * 30):
        forged = live_api.client.get(url, params={"cursor": forged_cursor(url, key)})
        problem(forged, 422, "/query/cursor", "not one that this list gave out")


def test_a_set_that_is_not_ready(live_api: LiveApi) -> None:
    queued = live_api.embedding_set({}, status="queued", job_id="job_1")
    failed = live_api.embedding_set({}, status="failed")
    for path in ("/classes", "/export"):
        problem(live_api.client.get(f"/v1/embedding-sets/{queued}{path}"), 409, "wait for job job_1")
        problem(live_api.client.get(f"/v1/embedding-sets/{failed}{path}"), 409, "was not built")
    problem(live_api.client.get("/v1/embedding-sets/es_x/classes"), 404, "es_x")


def test_delete_only_what_nothing_uses(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set(THREE, unseen=("zebra",))
    body = {"dataset_id": live_api.filled_dataset({"cat": 1, "dog": 1}), "embedding_set_id": set_id}
    job = checked(live_api.client.post("/v1/classifiers", json={**body, "unseen_classes": ["zebra"]}), JobOut, 202)
    problem(live_api.client.delete(f"/v1/embedding-sets/{set_id}"), 409, job["resource"]["id"])
    problem(live_api.client.delete(job["resource"]["href"]), 409, job["id"])
    assert live_api.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
    assert live_api.client.delete(job["resource"]["href"]).status_code == 204
    before = live_api.snapshot()["rows"]["embedding_classes"]
    assert live_api.client.delete(f"/v1/embedding-sets/{set_id}").status_code == 204
    assert live_api.snapshot()["rows"]["embedding_classes"] == before - 3


# ---- live classes -----------------------------------------------------------------------------


def add(api: LiveApi, set_id: str, names: list[str], **more: Any) -> httpx.Response:
    return api.client.post(f"/v1/embedding-sets/{set_id}/classes", json={"class_names": names, **more})


def test_new_classes_are_stored_once(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set(THREE, unseen=("zebra",))
    first = add(live_api, set_id, ["quagga", "CAT"]).json()["data"]
    assert [(row["name"], row["created"], row["seen"]) for row in first] == [
        ("quagga", True, False), ("cat", False, True)
    ]  # fmt: skip
    assert set(first[0]) == set(AddedClass.model_fields)
    assert np.array_equal(np.array(first[0]["embedding"], np.float32), live_api.inference.vector("quagga"))
    again = add(live_api, set_id, ["Quagga", "okapi"], relation="wavg").json()["data"]
    assert [(row["name"], row["created"]) for row in again] == [("quagga", False), ("okapi", True)]
    assert live_api.inference.calls[-1] == (
        "relate",
        {"embedding_set_id": set_id, "names": ["okapi"], "relation": "wavg", "field": "class_names"},
    )  # fmt: skip
    row = live_api.client.get(f"/v1/embedding-sets/{set_id}").json()
    assert (row["version"], row["n_seen"], row["n_unseen"]) == (3, 2, 3)
    classes = live_api.client.get(f"/v1/embedding-sets/{set_id}/classes").json()["data"]
    assert [c["name"] for c in classes] == ["cat", "dog", "zebra", "quagga", "okapi"]


def test_two_requests_at_once_make_a_class_once(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set(THREE)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: add(live_api, set_id, ["lynx" if i % 2 else "Lynx"]), range(8)))
    rows = [answer.json()["data"][0] for answer in answers]
    assert sum(row["created"] for row in rows) == 1
    assert len({(row["name"], tuple(row["embedding"])) for row in rows}) == 1
    assert live_api.client.get(f"/v1/embedding-sets/{set_id}").json()["version"] == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "at least 1 item"),
        (["lynx", "unknown beast"], "no vector for 'unknown beast'"),
        (["lynx", "LYNX"], "same name"),
        (["a\x07"], "control character"),
        ([f"c{i}" for i in range(10_001)], "at most 10000"),
    ],
)
def test_bad_new_classes_store_nothing(live_api: LiveApi, names: list[str], words: str) -> None:
    set_id = live_api.embedding_set(THREE)
    before = live_api.snapshot()
    problem(add(live_api, set_id, names), 422, words)
    assert live_api.snapshot() == before


# ---- /v1/embeddings ---------------------------------------------------------------------------


def embed(api: LiveApi, **body: Any) -> httpx.Response:
    return api.client.post("/v1/embeddings", json=body)


def test_openai_shape(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set(
        {"polar_bear": np.array([0.6, 0.8, 0, 0]), "cat": np.array([0, 1, 0, 0])}, name="n1"
    )
    before = live_api.snapshot()
    names = ["Polar Bear", "quagga", "cat", "polar-bear", "QUAGGA"]
    body = embed(live_api, model="n1", input=names, user="me").json()
    assert set(body) == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", "n1")
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert [(d["object"], d["index"]) for d in body["data"]] == [("embedding", i) for i in range(5)]
    vectors = [np.array(d["embedding"], np.float32) for d in body["data"]]
    assert np.array_equal(vectors[0], vectors[3])
    assert np.array_equal(vectors[1], vectors[4])
    assert np.array_equal(vectors[1], live_api.inference.vector("quagga"))
    assert live_api.inference.calls[-1][1]["names"] == ["quagga"]
    assert live_api.inference.calls[-1][1]["field"] == "input"  # where errors about them point
    packed = embed(live_api, model=set_id, input=names, encoding_format="base64").json()["data"]
    for vector, entry in zip(vectors, packed, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), vector)
    assert live_api.snapshot() == before  # predicted on the fly, not stored


def test_dimensions_are_cut_to_unit_length(live_api: LiveApi) -> None:
    set_id = live_api.embedding_set({"cat": np.array([3.0, 4.0, 12.0])})
    (entry,) = embed(live_api, model=set_id, input="cat", dimensions=2).json()["data"]
    assert np.allclose(entry["embedding"], [0.6, 0.8])
    answer = problem(embed(live_api, model=set_id, input="cat", dimensions=4), 422, "this set has 3")
    assert answer["errors"][0]["pointer"] == "/dimensions"


@pytest.mark.parametrize(
    ("given", "words", "pointer"),
    [
        ([], "send 1 to 2,048", "/input"),
        (["cat"] * 2049, "holds 2,049 names", "/input"),
        (["cat", ""], "input/1 is empty", "/input/1"),
        ("", "is empty", "/input"),
        (["cat", "x" * 300], "at most 256", "/input/1"),
        ([1], "valid string", "/input"),
        (["unknown cat"], "no vector", ""),
    ],
)
def test_bad_inputs(live_api: LiveApi, given: Any, words: str, pointer: str) -> None:
    set_id = live_api.embedding_set({"cat": np.array([1.0])})
    answer = problem(embed(live_api, model=set_id, input=given), 422, words)
    if pointer:
        assert answer["errors"][0]["pointer"].startswith(pointer)
    problem(embed(live_api, model="no such set", input="cat"), 404, "no such set", "GET /v1/embedding-sets")


def test_a_name_whose_only_sets_are_not_ready(live_api: LiveApi) -> None:
    live_api.embedding_set({}, name="soon", status="queued", job_id="job_8")
    problem(embed(live_api, model="soon", input="cat"), 409, "still being built", "job_8")
    live_api.embedding_set({"cat": np.array([1.0])}, name="soon")
    live_api.embedding_set({}, name="soon", status="queued", job_id="job_9")
    assert embed(live_api, model="soon", input="cat").status_code == 200
