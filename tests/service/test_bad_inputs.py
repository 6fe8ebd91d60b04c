"""What makes no classifier is refused before a job is queued, wherever it can be known by then."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import numpy as np
import pytest

from models.catalog import METHODS
from models.training_memory import PROCESS_BYTES
from service import classifier_cost
from service.schemas import ClassifierEstimate, ClassifierOut, JobOut
from tests.service.harness import LiveApi, checked, problem
from tests.service.tasks import finish
from workers import training_inputs
from workers.training import train_classifier

CLASSIFIERS = {method.name: method for method in METHODS if method.kind == "classifier"}
SMALL = {"name": "small_cnn", "weights": "random"}


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, str]:
    """A dataset and an embedding set over its classes and one more."""
    vectors = {name: np.eye(4)[i] for i, name in enumerate(("cat", "dog", "cow", "zebra"))}
    dataset_id = live_api.filled_dataset({"cat": 1, "dog": 1, "cow": 1})
    return {"dataset_id": dataset_id, "embedding_set_id": live_api.embedding_set(vectors, unseen=("zebra",))}


def refused(api: LiveApi, body: dict[str, Any], pointer: str, *words: str) -> None:
    """422 that says the words and points there; nothing was queued."""
    before = api.snapshot()
    raw = json.dumps(body)  # writes infinity as `Infinity`, which JSON does not know
    answer = problem(
        api.client.post("/v1/classifiers", content=raw, headers={"Content-Type": "application/json"}), 422, *words
    )
    assert pointer in [entry["pointer"] for entry in answer["errors"]]
    assert api.snapshot() == before


def bounds() -> list[tuple[str, str, Any]]:
    """Each numeric parameter of each method with a value past each of its bounds."""
    found = []
    for name, method in CLASSIFIERS.items():
        for parameter, schema in method.params.model_json_schema()["properties"].items():
            for part in (schema, *schema.get("anyOf", ())):
                if part.get("type") not in ("integer", "number"):
                    continue
                past = [part["minimum"] - 1] if "minimum" in part else []
                past += [part["exclusiveMinimum"]] if "exclusiveMinimum" in part else []
                past += [part["maximum"] + 1] if "maximum" in part else []
                past += [part["exclusiveMaximum"]] if "exclusiveMaximum" in part else []
                assert len(past) == 2, f"{name}.{parameter} needs two bounds"
                found += [(name, parameter, value) for value in past]
    return found


def test_every_number_has_bounds_and_past_them_is_refused(live_api: LiveApi, inputs: dict[str, str]) -> None:
    worst: dict[str, dict[str, Any]] = {}
    for name, parameter, value in bounds():
        worst.setdefault(f"{name} {value > 0}", {})[parameter] = value
    for key, params in worst.items():
        body = {**inputs, "method": key.split()[0], "params": params}
        answer = problem(live_api.client.post("/v1/classifiers", json=body), 422)
        assert {f"/params/{parameter}" for parameter in params} <= {entry["pointer"] for entry in answer["errors"]}


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", '"much"', "[1]", "{}"])
def test_what_is_no_number_is_refused(live_api: LiveApi, inputs: dict[str, str], text: str) -> None:
    raw = json.dumps({**inputs, "params": {"learning_rate": "@"}}).replace('"@"', text)
    before = live_api.snapshot()
    answer = live_api.client.post("/v1/classifiers", content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert live_api.snapshot() == before


def features(api: LiveApi, **changes: Any) -> tuple[str, dict[str, Any]]:
    """A dataset filled with a file of features, of six classes with two images each; and the job that filled it."""
    labels = np.repeat(np.arange(6), 2)
    arrays = {
        "features": np.random.default_rng(0).random((12, 3)),
        "labels": labels,
        "class_names": np.array([f"kind {i}" for i in range(6)]),
        "train_rows": np.arange(0, 8),
        "test_unseen_rows": np.arange(8, 12),
        **changes,
    }
    out = io.BytesIO()
    np.savez(out, **arrays)
    dataset_id = api.dataset()
    job = api.client.post(f"/v1/datasets/{dataset_id}/features", files={"features": ("f.npz", out.getvalue())}).json()
    return dataset_id, finish(api, job["id"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((12, 3), np.nan), "holds NaN or infinite numbers in 12 row(s)"),
        (np.full((12, 3), np.inf, np.float32), "NaN or infinite"),
        (np.full((12, 3), 1e300), "NaN or infinite"),  # in float32
        (np.full((12, 3), 1e30), "would overflow"),
        (np.zeros((12, 0)), "nothing in it"),
        (np.zeros((0, 3)), "0 rows"),
        (np.zeros((12, 3), complex), "complex128"),
        (np.full((12, 3), "many"), "matrix of numbers"),
        (np.full((12, 3), True), "matrix of numbers"),
        (np.zeros((12, 3, 2)), "3-dimensional"),
    ],
)
def test_unusable_features_never_become_a_dataset(live_api: LiveApi, values: Any, words: str) -> None:
    dataset_id, job = features(live_api, features=values)
    assert job["status"] == "failed"
    assert words in job["error"]["detail"]
    vectors = {f"kind {i}": np.eye(6)[i] for i in range(6)}
    body = {
        "dataset_id": dataset_id,
        "embedding_set_id": live_api.embedding_set(vectors, unseen=("kind 4", "kind 5")),
    }
    refused(live_api, body, "/seen_classes", "no class 'kind 0'")


@pytest.mark.parametrize("method", [name for name, row in CLASSIFIERS.items() if row.features == "spatial"])
def test_pooled_features_are_refused_by_methods_that_look_at_places(live_api: LiveApi, method: str) -> None:
    dataset_id, job = features(live_api)
    assert job["status"] == "succeeded", job["error"]
    vectors = {f"kind {i}": np.eye(6)[i] for i in range(6)}
    body = {"dataset_id": dataset_id, "embedding_set_id": live_api.embedding_set(vectors, unseen=("kind 4", "kind 5"))}
    refused(live_api, {**body, "method": method}, "/method", "places of a feature map", "pooled")


def test_training_that_no_worker_can_hold_is_refused(
    live_api: LiveApi, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {**inputs, "method": "sc_egg", "backbone": {"name": "resnet50", "weights": "random"}, "image_size": 224}

    def estimate() -> dict[str, Any]:
        before = live_api.snapshot()
        found = checked(live_api.client.post("/v1/classifiers?validate_only=true", json=body), ClassifierEstimate)
        assert live_api.snapshot() == before
        return found

    fits = estimate()
    assert fits["valid"]
    assert 3 * 4 * 49 * 2048 < fits["memory_bytes"] - PROCESS_BYTES < 5 * 3 * 4 * 49 * 2048
    for module in (classifier_cost, training_inputs):
        monkeypatch.setattr(module, "memory_bytes", lambda: 10**9)
    assert [problem["pointer"] for problem in estimate()["problems"]] == ["/method"]
    refused(live_api, body, "/method", "GB in memory", "a worker has 1.0 GB")
    monkeypatch.setattr(classifier_cost, "memory_bytes", lambda: None)  # unknown here, and too little there
    small = {**inputs, "backbone": SMALL, "image_size": 32, "method": "eszsl"}
    job = checked(live_api.client.post("/v1/classifiers", json=small), JobOut, 202)
    ended = finish(live_api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "failed"
    assert "a worker has 1.0 GB" in ended["error"]["detail"]


def test_folds_that_let_ten_classes_take_a_turn_are_counted(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"sort {i}" for i in range(12)]
    vectors = {name: np.eye(13)[i] for i, name in enumerate([*names, "zebra"])}
    body = {
        "dataset_id": live_api.filled_dataset(dict.fromkeys(names, 1)),
        "embedding_set_id": live_api.embedding_set(vectors, unseen=("zebra",)),
        "method": "f_vaegan",
        "backbone": SMALL,
        "image_size": 32,
    }

    def copies(**changes: Any) -> float:
        answer = live_api.client.post("/v1/classifiers?validate_only=true", json=body | changes)
        needed = int(checked(answer, ClassifierEstimate)["memory_bytes"])
        return (needed - PROCESS_BYTES) / (4 * 256 * len(names))

    assert copies() == 1 + 5 + 1  # two of twelve are chosen, so five groups take a turn
    assert copies(params={"folds": 1}) == 1 + 1 + 1
    assert copies(params={"folds": 100}) == 1 + 6 + 1  # there are no more
    assert copies(validation_classes=names[:5]) == 1 + 2 + 1
    assert copies(validation_classes=[]) == 1 + 1 + 1
    named = live_api.embedding_set(vectors, unseen=("zebra",), summary={"validation_classes": ["gone", *names[:3]]})
    assert copies(embedding_set_id=named) == 1 + 4 + 1
    monkeypatch.setattr(training_inputs, "memory_bytes", lambda: PROCESS_BYTES + 6 * 4 * 256 * len(names))
    job = checked(live_api.client.post("/v1/classifiers", json=body), JobOut, 202)
    ended = finish(live_api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "failed"
    assert "fewer folds" in ended["error"]["detail"]


def knowledge(api: LiveApi, vectors: dict[str, list[float]]) -> httpx.Response:
    return api.client.post("/v1/knowledge", json={"name": "k", "vectors": vectors})


def test_attributes_that_a_class_lacks_are_refused(live_api: LiveApi) -> None:
    problem(knowledge(live_api, {"cat": [1.0, 0.0], "dog": [0.0, 0.0]}), 422, "'dog' is all zero")
    problem(knowledge(live_api, {"cat": [1.0, 0.0], "dog": [1.0]}), 422, "dog")
    dataset_id = live_api.filled_dataset({"cat": 1, "dog": 1})
    body = {"dataset_id": dataset_id, "knowledge_id": live_api.knowledge(), "backbone": SMALL}
    refused(live_api, {**body, "unseen_classes": ["unknown beast"]}, "/unseen_classes", "no vector for 'unknown beast'")


def trained(api: LiveApi, body: dict[str, Any]) -> dict[str, Any]:
    job = checked(api.client.post("/v1/classifiers", json=body), JobOut, 202)
    ended = finish(api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "succeeded", ended["error"]
    return checked(api.client.get(job["resource"]["href"]), ClassifierOut)["metrics"]


@pytest.mark.parametrize("method", ["sje", "eszsl", "conse"])
def test_classes_of_one_image_and_too_few_to_validate_on_are_enough(live_api: LiveApi, method: str) -> None:
    vectors = {"cat": [1.0, 0.0, 0.5], "dog": [0.0, 1.0, 0.5], "zebra": [1.0, 1.0, 0.5]}  # the last says nothing
    job = checked(knowledge(live_api, vectors), JobOut, 202)
    finish(live_api, job["id"])
    body = {
        "dataset_id": live_api.filled_dataset({"cat": 1, "dog": 1}),
        "knowledge_id": job["resource"]["id"],
        "unseen_classes": ["zebra"],
        "method": method,
        "backbone": SMALL,
        "image_size": 32,
    }
    metrics = trained(live_api, body)
    assert metrics["gamma"] == 0
    assert metrics["validation"]["classes"] == []
    if method == "sje":
        refused(live_api, {**body, "search": {}}, "/search", "needs validation classes")
