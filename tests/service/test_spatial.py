"""A method that works on feature maps, from photos to a live answer; and what has no maps is refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.answers import ClassifyOut
from service.core.tables import Dataset
from service.schemas import ClassifierOut, JobOut, MethodOut
from tests.service.harness import LiveApi, Server, checked, png, problem
from tests.service.tasks import finish
from workers.inference import create_inference_app
from workers.training import train_classifier

NETWORK = {"name": "small_cnn", "weights": "random"}
QUICK = {
    "epochs": 1, "steps_per_epoch": 2, "batch_size": 8, "hidden_dim": 8, "critic_steps": 1, "synthetic_per_class": 4,
    "embedding_epochs": 1, "compression_epochs": 1, "vector_dim": 4,
}  # fmt: skip


@pytest.fixture
def api(own_api: LiveApi) -> Iterator[LiveApi]:
    """An API whose inference process is the real one."""
    own_api.stop_inference()
    socket = own_api.settings.resolved_inference_url.removeprefix("unix://")
    server = Server(create_inference_app(own_api.settings), uds=socket, lifespan="on")
    yield own_api
    server.stop()


def knowledge(api: LiveApi) -> str:
    vectors = {"cat": [1.0, 0.0, 0.2], "dog": [0.0, 1.0, 0.1], "zebra": [0.7, 0.7, 1.0]}
    job = api.client.post("/v1/knowledge", json={"name": "k", "vectors": vectors}).json()
    assert finish(api, job["id"])["status"] == "succeeded"
    return str(job["resource"]["id"])


def test_a_classifier_on_maps_trains_on_photos_and_classifies_one(api: LiveApi) -> None:
    body = {
        "dataset_id": api.filled_dataset({"cat": 4, "dog": 4}),
        "knowledge_id": knowledge(api),
        "unseen_classes": ["zebra"],
        "method": "sc_egg",
        "params": QUICK,
        "backbone": NETWORK,
        "image_size": 32,
    }
    job = checked(api.client.post("/v1/classifiers", json=body), JobOut, 202)
    ended = finish(api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "succeeded", ended["error"]
    row = checked(api.client.get(job["resource"]["href"]), ClassifierOut)
    assert row["metrics"]["backbone"]["feature_dim"] == 256  # of the network; a map has several places of as many
    form = {"classifier_id": row["id"], "class_names": "cat,dog,zebra"}
    answer = api.client.post("/v1/classify", files={"images": ("a.png", png(99))}, data=form)
    (found,) = checked(answer, ClassifyOut)["data"]
    assert found["error"] is None
    assert sorted(entry["label"] for entry in found["predictions"]) == ["cat", "dog", "zebra"]


def test_precomputed_features_are_refused_before_a_job_is_queued(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    with live_api.parts.database.write() as session:
        row = session.get_one(Dataset, dataset_id)
        row.kind, row.summary = "features", {"train_classes": {"cat": 3, "dog": 3}}
    body: dict[str, Any] = {"dataset_id": dataset_id, "unseen_classes": ["zebra"], "method": "sc_egg"}
    body["knowledge_id"] = live_api.knowledge()
    before = live_api.snapshot()
    answer = problem(live_api.client.post("/v1/classifiers", json=body), 422, "places of a feature map", "'pooled'")
    assert [entry["pointer"] for entry in answer["errors"]] == ["/method"]
    assert live_api.snapshot() == before
    checked(live_api.client.post("/v1/classifiers", json={**body, "method": "tf_vaegan"}), JobOut, 202)


def test_methods_say_what_they_see(live_api: LiveApi) -> None:
    for name, wanted in (("sc_egg", "spatial"), ("tf_vaegan", "pooled")):
        assert checked(live_api.client.get(f"/v1/methods/{name}"), MethodOut)["features"] == wanted
