"""A network fine-tuned with the clusters is kept with the set, and images are recognised by it from then on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.core import repositories
from service.core.tables import Classifier, EmbeddingSet
from tests.service.harness import LiveApi
from tests.service.tasks import TASKS, finish
from workers.backbones import BACKBONE_FILE
from workers.embedding import build_embedding_set
from workers.library import Library
from workers.runner import TaskFunction
from workers.training import train_classifier

ALL_TASKS: dict[str, TaskFunction] = {
    **TASKS,
    "build_embedding_set": build_embedding_set,
    "train_classifier": train_classifier,
}
CLUSTERING = {"mode": "finetune", "n_clusters": 4, "n_neighbors": 2, "epochs": 1, "backbone_learning_rate": 1e-3}
VECTORS = {"cat": [1.0, 0, 0], "dog": [0, 1.0, 0], "fox": [0.5, 0.5, 0], "wolf": [0, 0.6, 0.4], "bear": [0.2, 0.2, 0.6]}
SEEN = ["cat", "dog", "wolf"]


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, Any]:
    """Photos of three classes, and vectors of two more."""
    job = live_api.client.post("/v1/knowledge", json={"name": "five", "kind": "class_vectors", "vectors": VECTORS})
    assert finish(live_api, job.json()["id"])["status"] == "succeeded"
    return {
        "dataset_id": live_api.filled_dataset(dict.fromkeys(SEEN, 3)),
        "knowledge_id": job.json()["resource"]["id"],
        "unseen_classes": ["fox", "bear"],
    }


def made(api: LiveApi, path: str, body: dict[str, Any]) -> str:
    """The id of the resource that a job made."""
    response = api.client.post(path, json=body)
    assert response.status_code == 202, response.text
    job = finish(api, response.json()["id"], ALL_TASKS)
    assert job["status"] == "succeeded", job["error"]
    return str(job["resource"]["id"])


def embedding_set(
    api: LiveApi, inputs: dict[str, Any], relation: str = "wavg", weights: str = "random", **clustering: Any
) -> EmbeddingSet:
    params = {
        "backbone": {"name": "small_cnn", "weights": weights},
        "scratch": {"epochs": 1},
        "patches": {"method": "grid", "n_patches": 4, "size": 32},
        "clustering": {**CLUSTERING, **clustering},
    }
    body = {**inputs, "method": "vgse", "relation": relation, "params": params}
    set_id = made(api, "/v1/embedding-sets", body)
    with api.parts.database.read() as session:
        return repositories.get(session, EmbeddingSet, set_id)


def classifier(api: LiveApi, made_from: EmbeddingSet, **fields: Any) -> Classifier:
    body = {"dataset_id": made_from.dataset_id, "embedding_set_id": made_from.id, "method": "eszsl", "evaluate": False}
    classifier_id = made(api, "/v1/classifiers", {**body, **fields})
    with api.parts.database.read() as session:
        return repositories.get(session, Classifier, classifier_id)


def test_images_are_recognised_by_the_network_that_was_trained(live_api: LiveApi, inputs: dict[str, Any]) -> None:
    trained = embedding_set(live_api, inputs)
    frozen = embedding_set(live_api, inputs, mode="frozen")
    digests = [row.summary["backbone"]["digest"] for row in (trained, frozen)]
    assert digests[0] != digests[1]
    assert BACKBONE_FILE in trained.artifacts
    assert BACKBONE_FILE not in frozen.artifacts
    own, plain = classifier(live_api, trained), classifier(live_api, frozen)
    assert [row.metrics["backbone"]["digest"] for row in (own, plain)] == digests
    library = Library(live_api.parts.database, live_api.parts.store, live_api.settings, device="cpu")
    for row, digest in zip((own, plain), digests, strict=True):
        assert library.competing(library.state(row.id), "all", None).resident.backbone.digest == digest
    asked = classifier(live_api, trained, backbone={"name": "small_cnn", "weights": "random"}, image_size=32)
    assert asked.metrics["backbone"]["digest"] == digests[1]  # the caller's choice comes first


def test_another_relation_takes_the_trained_network_along(live_api: LiveApi, inputs: dict[str, Any]) -> None:
    first, second = embedding_set(live_api, inputs), embedding_set(live_api, inputs, relation="smo")
    assert first.artifacts[BACKBONE_FILE] == second.artifacts[BACKBONE_FILE]
    assert first.summary["backbone"] == second.summary["backbone"]
    assert first.summary["history"] == second.summary["history"]


def test_a_network_from_scratch_is_replaced_by_the_one_it_became(live_api: LiveApi, inputs: dict[str, Any]) -> None:
    trained = embedding_set(live_api, inputs, weights="scratch")
    frozen = embedding_set(live_api, inputs, weights="scratch", mode="frozen")
    assert trained.artifacts[BACKBONE_FILE] != frozen.artifacts[BACKBONE_FILE]
    own = classifier(live_api, trained)
    assert own.metrics["backbone"]["digest"] == trained.summary["backbone"]["digest"]
    assert own.artifacts[BACKBONE_FILE] == trained.artifacts[BACKBONE_FILE]


def test_classes_without_a_share_in_training_have_none_in_the_network(
    live_api: LiveApi, inputs: dict[str, Any]
) -> None:
    """The images of a class that is asked for as unseen change nothing, whatever they show."""
    dataset_id = live_api.filled_dataset({**dict.fromkeys(SEEN, 3), "fox": 3})
    without = embedding_set(live_api, {**inputs, "seen_classes": SEEN})
    with_fox = embedding_set(live_api, {**inputs, "dataset_id": dataset_id, "seen_classes": SEEN})
    networks = [live_api.parts.store.read_bytes(row.artifacts[BACKBONE_FILE]) for row in (without, with_fox)]
    assert np.array_equal(*(np.frombuffer(network, np.uint8) for network in networks))
