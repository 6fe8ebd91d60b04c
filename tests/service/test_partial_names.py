"""A class name of which only some words are known is used and warned of, from the lookup to the trained classifier."""

from __future__ import annotations

from typing import Any

import pytest

from models.errors import MissingKnowledge
from service.schemas import ClassifierOut, EmbeddingSetOut
from tests.service.harness import LiveApi, checked
from tests.service.tasks import TASKS, finish
from workers.embedding import build_embedding_set
from workers.library import Library
from workers.runner import TaskFunction
from workers.training import train_classifier

ALL_TASKS: dict[str, TaskFunction] = {
    **TASKS,
    "build_embedding_set": build_embedding_set,
    "train_classifier": train_classifier,
}
NETWORK = {"name": "small_cnn", "weights": "random"}
WARNING = (
    "Of 'arctic fox' the knowledge source knows 'fox' but not 'arctic', so its vector says nothing about the latter."
)


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, str]:
    """Photos of two classes, and word vectors that lack the word 'arctic'."""
    words = b"cat 1 0 0\ndog 0 1 0\nfox 1 1 0\npolar 0 0 1\n"
    form = {"name": "words", "kind": "word_vectors"}
    job = live_api.client.post("/v1/knowledge", files={"file": ("words.txt", words)}, data=form).json()
    assert finish(live_api, job["id"])["status"] == "succeeded"
    return {
        "dataset_id": live_api.filled_dataset({"cat": 4, "dog": 4}),
        "knowledge_id": job["resource"]["id"],
    }


def made(api: LiveApi, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The job that made a resource, ended well."""
    response = api.client.post(path, json=body)
    assert response.status_code == 202, response.text
    job = finish(api, response.json()["id"], ALL_TASKS)
    assert job["status"] == "succeeded", job["error"]
    return job


def test_an_embedding_set_says_which_names_are_half_known(live_api: LiveApi, inputs: dict[str, str]) -> None:
    params = {"backbone": NETWORK, "patches": {"method": "whole", "n_patches": 1, "size": 32}}
    body = {**inputs, "method": "backbone", "relation": "wavg", "params": params}
    job = made(live_api, "/v1/embedding-sets", {**body, "unseen_classes": ["arctic fox", "polar fox"]})
    assert job["result"]["n_warnings"] == 1
    row = checked(live_api.client.get(job["resource"]["href"]), EmbeddingSetOut)
    assert [warning.split(" Near")[0] for warning in row["summary"]["warnings"]] == [WARNING]
    classes = live_api.client.get(f"{job['resource']['href']}/classes").json()["data"]
    known = {c["name"]: c["provenance"]["knowledge"] for c in classes if not c["seen"]}
    assert known == {
        "arctic fox": "partial: fox (without arctic)",
        "polar fox": "averaged tokens: polar, fox",
    }
    library = Library(live_api.parts.database, live_api.parts.store, live_api.settings, device="cpu")
    (live,) = library.relate(row["id"], ["red fox"])
    assert live.provenance["knowledge"] == "partial: fox (without red)"
    with pytest.raises(MissingKnowledge) as unknown:
        library.relate(row["id"], ["xyzzy"], field="input")
    assert unknown.value.field == "input"


def test_a_classifier_on_raw_knowledge_says_so_too(live_api: LiveApi, inputs: dict[str, str]) -> None:
    body = {**inputs, "method": "eszsl", "backbone": NETWORK, "image_size": 32, "evaluate": False}
    job = made(live_api, "/v1/classifiers", {**body, "unseen_classes": ["arctic fox"]})
    row = checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)
    assert [warning.split(" Near")[0] for warning in row["metrics"]["warnings"]] == [WARNING]
