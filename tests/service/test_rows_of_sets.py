"""Embedding sets and classifiers over photos: what one has learned from, the other is not measured on."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from service.core.tables import CachedArtifact
from tests.service.harness import LiveApi, png
from tests.service.tasks import TASKS, VECTORS, finish, knowledge
from workers.embedding import build_embedding_set
from workers.runner import TaskFunction
from workers.training import train_classifier

ALL_TASKS: dict[str, TaskFunction] = {
    **TASKS,
    "build_embedding_set": build_embedding_set,
    "train_classifier": train_classifier,
}
PARAMS = {
    "backbone": {"name": "small_cnn", "weights": "random"},
    "patches": {"method": "whole", "n_patches": 1, "size": 32},
    "kmeans": {"n_clusters": 2},
}


def made(api: LiveApi, path: str, **body: Any) -> dict[str, Any]:
    """What a job made, as the API shows it."""
    response = api.client.post(path, json=body)
    assert response.status_code == 202, response.text
    job = finish(api, response.json()["id"], ALL_TASKS)
    assert job["status"] == "succeeded", job["error"]
    row: dict[str, Any] = api.client.get(job["resource"]["href"]).json()
    return row


def upload(api: LiveApi, dataset_id: str, class_name: str, *seeds: int) -> None:
    files = [("files", (f"{seed}.png", png(seed))) for seed in seeds]
    answer = api.client.post(f"/v1/datasets/{dataset_id}/images", files=files, data={"class_name": class_name})
    assert len(answer.json()["accepted"]) == len(seeds)


@pytest.fixture
def request_of_set(live_api: LiveApi) -> dict[str, Any]:
    """Four photos of each of two classes: too few to hold any out."""
    dataset_id = live_api.dataset(test_fraction=0.5)
    for i, name in enumerate(("cat", "dog")):
        upload(live_api, dataset_id, name, *range(10 * i, 10 * i + 4))
    vectors = {"dataset_id": dataset_id, "knowledge_id": knowledge(live_api, VECTORS), "unseen_classes": ["zebra"]}
    return {**vectors, "method": "kmeans", "params": PARAMS}


def test_what_a_set_has_learned_from_is_no_test_row_later(live_api: LiveApi, request_of_set: dict[str, Any]) -> None:
    embedding_set = made(live_api, "/v1/embedding-sets", relation="wavg", **request_of_set)
    for i, name in enumerate(("cat", "dog")):  # now half of the first four would be held out
        upload(live_api, embedding_set["dataset_id"], name, *range(10 * i + 4, 10 * i + 10))
    body = {"dataset_id": embedding_set["dataset_id"], "embedding_set_id": embedding_set["id"], "method": "eszsl"}
    metrics = made(live_api, "/v1/classifiers", **body)["metrics"]
    left_out = 20 - metrics["n_train"] - metrics["n_test_seen"]
    assert left_out > 0
    assert metrics["n_test_seen"] > 0
    assert f"{left_out} test images are left out: the embedding set learned from them." in metrics["warnings"]


def test_a_fit_that_the_store_has_lost_is_made_anew(live_api: LiveApi, request_of_set: dict[str, Any]) -> None:
    made(live_api, "/v1/embedding-sets", relation="wavg", **request_of_set)
    with live_api.parts.database.read() as session:
        query = select(CachedArtifact).where(CachedArtifact.key.startswith("fitted-"))
        keys = [key for fit in session.scalars(query) for key in fit.summary["files"].values()]
    for key in keys:
        live_api.parts.store.delete(key)
    made(live_api, "/v1/embedding-sets", relation="smo", **request_of_set)
