"""Classifiers: what a request may say, and what it is told before a job is queued."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from service.core.tables import Classifier
from service.schemas import ClassifierOut, JobOut, Page
from tests.service.harness import LiveApi, checked, problem

SMALL = {"name": "small_cnn", "weights": "random"}


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, str]:
    """A dataset and an embedding set over its classes and one more."""
    vectors = {name: np.eye(4)[i] for i, name in enumerate(("cat", "dog", "cow", "polar_bear"))}
    dataset_id = live_api.filled_dataset({"cat": 1, "dog": 1, "cow": 1})
    return {"dataset_id": dataset_id, "embedding_set_id": live_api.embedding_set(vectors, unseen=("polar_bear",))}


def create(api: LiveApi, body: dict[str, Any]) -> httpx.Response:
    return api.client.post("/v1/classifiers", json=body)


def request_of(api: LiveApi, job: dict[str, Any]) -> dict[str, Any]:
    with api.parts.database.read() as session:
        return session.get_one(Classifier, job["resource"]["id"]).request


def test_classes_default_to_those_of_the_set(live_api: LiveApi, inputs: dict[str, str]) -> None:
    job = checked(create(live_api, {**inputs, "name": "c", "params": {"epochs": 3}}), JobOut, 202)
    row = checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)
    assert (row["status"], row["method"], row["params"]["epochs"], row["name"]) == ("queued", "sje", 3, "c")
    assert row["id"] in [r["id"] for r in checked(live_api.client.get("/v1/classifiers"), Page[ClassifierOut])["data"]]
    request = request_of(live_api, job)
    assert (request["seen_classes"], request["unseen_classes"]) == (["cat", "dog", "cow"], ["polar_bear"])


def test_named_classes_take_the_set_s_spelling(live_api: LiveApi, inputs: dict[str, str]) -> None:
    request = request_of(live_api, create(live_api, {**inputs, "unseen_classes": ["Polar Bear", "COW"]}).json())
    assert (request["seen_classes"], request["unseen_classes"]) == (["cat", "dog"], ["polar_bear", "cow"])


def test_raw_knowledge_needs_a_backbone(live_api: LiveApi, inputs: dict[str, str]) -> None:
    body = {"dataset_id": inputs["dataset_id"], "knowledge_id": live_api.knowledge(), "unseen_classes": ["zebra"]}
    problem(create(live_api, body), 422, "which network makes the image features")
    checked(create(live_api, {**body, "backbone": SMALL}), JobOut, 202)


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"method": "sjee"}, "/method", "Did you mean 'sje'?"),
        ({"params": {"epoch": 3}}, "/params/epoch", "Did you mean 'epochs'?"),
        ({"params": {"epochs": 0}}, "/params/epochs", "greater than or equal to 1"),
        ({"knowledge_id": "both"}, "/embedding_set_id", "not both"),
        ({"embedding_set_id": None}, "/embedding_set_id", "either"),
        ({"unseen_classes": ["polar baer"]}, "/unseen_classes", "Did you mean 'polar_bear'?"),
        ({"seen_classes": ["cat", "cow", "dgo"]}, "/seen_classes", "Did you mean 'dog'?"),
        ({"seen_classes": ["cat", "dog"], "unseen_classes": ["dog"]}, "/unseen_classes", "Both seen and unseen"),
        ({"seen_classes": ["cat"]}, "/seen_classes", "At least 2"),
        ({"validation_classes": ["polar_bear"]}, "/validation_classes", "must be seen"),
        ({"backbone": {"name": "resnet51"}}, "/backbone/name", "Did you mean"),
        ({"sed": 1}, "/sed", "Did you mean 'seed'?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(
    live_api: LiveApi, inputs: dict[str, str], body: dict[str, Any], pointer: str, words: str
) -> None:
    if body.get("knowledge_id"):
        body = {"knowledge_id": live_api.knowledge()}
    before = live_api.snapshot()
    answer = problem(create(live_api, {**inputs, **body}), 422, words)
    assert pointer in [entry["pointer"] for entry in answer["errors"]]
    assert live_api.snapshot() == before


def test_unknown_ids_and_sets_that_are_not_ready(live_api: LiveApi, inputs: dict[str, str]) -> None:
    problem(create(live_api, {**inputs, "dataset_id": "ds_x"}), 404, "ds_x")
    problem(create(live_api, {**inputs, "embedding_set_id": inputs["dataset_id"]}), 404, inputs["dataset_id"])
    queued = live_api.embedding_set({}, status="queued", job_id="job_7")
    problem(create(live_api, {**inputs, "embedding_set_id": queued}), 409, "job_7")
    problem(live_api.client.get("/v1/classifiers/cl_x"), 404, "cl_x")
