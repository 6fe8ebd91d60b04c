"""A method that works on feature maps, from photos to a live answer; and what has no maps is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.backbone_parts import Trunk
from models.backbones import create_backbone
from models.zero_shot.apn_spatial import APNSpatial
from models.zero_shot.base import load_classifier
from service.answers import ClassifyOut
from service.core.tables import Classifier, Dataset
from service.schemas import JobOut, MethodOut
from tests.service.harness import LiveApi, checked, png, problem
from tests.service.tasks import VECTORS, knowledge, trained_classifier
from workers.engine import prepare_image
from workers.library import CLASSIFIER_FILES
from workers.sources import unpack

QUICK = {
    "epochs": 1, "steps_per_epoch": 2, "batch_size": 8, "hidden_dim": 8, "critic_steps": 1, "synthetic_per_class": 4,
    "embedding_epochs": 1, "compression_epochs": 1, "vector_dim": 4,
}  # fmt: skip


APN = {"epochs": 2, "warmup_epochs": 1, "batch_size": 4}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("sc_egg", QUICK),
        ("apn_spatial", APN),
        ("apn_spatial", {**APN, "mode": "finetune", "backbone_learning_rate": 0.1}),
    ],
)
def test_a_classifier_on_maps_trains_on_photos_and_classifies_one(
    inferring_api: LiveApi, method: str, params: dict[str, Any]
) -> None:
    row = trained_classifier(inferring_api, method=method, params=params)
    assert row["metrics"]["backbone"]["feature_dim"] == 256  # of the network; a map has several places of as many
    form = {"classifier_id": row["id"], "class_names": "cat,dog,zebra"}
    answer = inferring_api.client.post("/v1/classify", files={"images": ("a.png", png(99))}, data=form)
    (found,) = checked(answer, ClassifyOut)["data"]
    assert found["error"] is None
    assert sorted(entry["label"] for entry in found["predictions"]) == ["cat", "dog", "zebra"]


def test_live_answers_are_those_of_the_network_that_learned_with_the_classifier(
    inferring_api: LiveApi, tmp_path: Path
) -> None:
    params = {**APN, "mode": "finetune", "backbone_learning_rate": 0.1, "early_stopping": False}
    made = trained_classifier(inferring_api, method="apn_spatial", params=params)
    form = {"classifier_id": made["id"], "class_names": "cat,dog,zebra", "gamma": "0"}
    answer = inferring_api.client.post("/v1/classify", files={"images": ("a.png", png(99))}, data=form)
    told = {entry["label"]: entry["score"] for entry in checked(answer, ClassifyOut)["data"][0]["predictions"]}
    with inferring_api.parts.database.read() as session:
        row = session.get_one(Classifier, made["id"])
    model = load_classifier(unpack(inferring_api.parts.store, row.artifacts, CLASSIFIER_FILES, tmp_path))
    pixels = prepare_image(png(99), 32)[None]
    trunk = Trunk(create_backbone("small_cnn", weights=None), 32, row.params["finetuned_share"])
    vectors = np.array([[1.0, 0.0, 0.2], [0.0, 1.0, 0.1], [0.7, 0.7, 1.0]], np.float32)
    features = trunk.features(pixels).to(torch.float16).numpy().astype(np.float32)
    scores = np.exp(model.scores(features, vectors)[0].astype(np.float64) / model.temperature_)
    wanted = scores / scores.sum()
    assert [told[name] for name in ("cat", "dog", "zebra")] == pytest.approx(wanted, abs=1e-4)
    assert isinstance(model, APNSpatial)
    assert model.network.tail is not None
    with torch.no_grad():
        learned, before = (tail(torch.from_numpy(features)) for tail in (model.network.tail, trunk.tail()))
    assert not torch.allclose(learned, before)
    place = f"/v1/classifiers/{made['id']}/attention"
    looked = inferring_api.client.post(place, content=png(99), headers={"Content-Type": "image/png"})
    assert looked.status_code == 200, looked.text


def test_groups_of_attributes_come_from_the_names_of_the_knowledge(inferring_api: LiveApi) -> None:
    names = ["coat::striped", "coat::plain", "size::large"]
    source = knowledge(inferring_api, VECTORS, names)
    row = trained_classifier(inferring_api, knowledge_id=source, method="apn_spatial", params=APN)
    assert row["params"]["attribute_groups"] == [0, 0, 1]


def test_networks_whose_last_layers_cannot_be_trained_apart_are_refused_at_once(live_api: LiveApi) -> None:
    body: dict[str, Any] = {
        "dataset_id": live_api.dataset(),
        "knowledge_id": live_api.knowledge(),
        "unseen_classes": ["zebra"],
        "method": "apn_spatial",
        "params": {"mode": "finetune"},
        "backbone": {"name": "vit_b_32", "weights": "random"},
    }
    answer = problem(live_api.client.post("/v1/classifiers", json=body), 422, "cannot be trained apart")
    assert "/params/mode" in [entry["pointer"] for entry in answer["errors"]]
    body["params"] = {"mode": "finetune", "normalize": "minmax"}
    body["backbone"]["name"] = "resnet18"
    problem(live_api.client.post("/v1/classifiers", json=body), 422, "'normalize' must be 'none'")


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
    for name, wanted in (("sc_egg", "spatial"), ("apn_spatial", "spatial"), ("apn", "pooled"), ("tf_vaegan", "pooled")):
        assert checked(live_api.client.get(f"/v1/methods/{name}"), MethodOut)["features"] == wanted
