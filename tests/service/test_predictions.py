"""Batch classification, from a dataset to pages, files and counts; by the real task and a real network."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from service.answers import PredictedImage, PredictionsOut
from service.client import Client
from service.core.artifacts import image_key
from service.core.tables import Dataset, Image
from service.schemas import ClassifierOut, JobOut
from tests.service.harness import LiveApi, checked, forged_cursor, png, problem
from tests.service.tasks import TASKS, finish, trained_classifier
from workers.dataset_predictions import classify_dataset

DO = {**TASKS, "classify_dataset": classify_dataset}


@pytest.fixture
def trained(own_api: LiveApi) -> str:
    """A small trained classifier of cats, dogs and zebras."""
    dataset_id = own_api.filled_dataset({"cat": 6, "dog": 6})
    return str(trained_classifier(own_api, dataset_id=dataset_id)["id"])


def predicted(api: LiveApi, **body: Any) -> dict[str, Any]:
    """The finished predictions."""
    job = checked(api.client.post("/v1/predictions", json=body), JobOut, 202)
    assert (job["kind"], job["resource"]["kind"]) == ("classify_dataset", "predictions")
    early = api.client.get(f"{job['resource']['href']}/items")
    problem(early, 409, "queued", job["id"])
    ended = finish(api, job["id"], DO)
    assert ended["status"] == "succeeded", ended["error"]
    return checked(api.client.get(job["resource"]["href"]), PredictionsOut)


def items(api: LiveApi, predictions_id: str, limit: int = 100) -> list[dict[str, Any]]:
    """All pages."""
    found, cursor = [], None
    while True:
        query = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        page = api.client.get(f"/v1/predictions/{predictions_id}/items", params=query).json()
        found += [PredictedImage.model_validate(item).model_dump() for item in page["data"]]
        cursor = page["next_cursor"]
        if not page["has_more"]:
            return found


def test_every_image_of_a_dataset_is_classified_as_one_alone_would_be(own_api: LiveApi, trained: str) -> None:
    fresh = own_api.filled_dataset({"zebra": 3, "cat": 2, "unicorn": 2})
    row = predicted(own_api, dataset_id=fresh, top_k=2, min_score=0.0)
    assert (row["classifier_id"], row["status"], row["summary"]["n_images"]) == (trained, "ready", 7)
    assert sum(row["summary"]["labels"].values()) == 7
    found = items(own_api, row["id"], limit=3)
    assert [item["index"] for item in found] == list(range(7))
    assert [item["class_name"] for item in found] == ["cat"] * 2 + ["unicorn"] * 2 + ["zebra"] * 3
    assert found == items(own_api, row["id"])
    url = f"/v1/predictions/{row['id']}/items"
    problem(own_api.client.get(url, params={"cursor": forged_cursor(url, "x")}), 422, "/query/cursor")
    with Client(f"http://127.0.0.1:{own_api.port}") as client:
        assert list(client.predicted_images(row["id"])) == found
        assert client.create_predictions(fresh, top_k=1)["kind"] == "classify_dataset"
    assert all(len(item["predictions"]) == 2 and not item["abstained"] for item in found)
    right = {
        name: [item["predictions"][0]["label"] == name for item in found if item["class_name"] == name]
        for name in ("cat", "zebra")
    }
    t1 = sum(sum(marks) / len(marks) for marks in right.values()) / 2
    assert row["summary"]["agreement"] == {"t1": pytest.approx(t1), "n_images": 5, "n_classes": 2}
    exported = own_api.client.get(f"/v1/predictions/{row['id']}/export")
    assert [json.loads(line) for line in exported.text.splitlines()] == found
    table = own_api.client.get(f"/v1/predictions/{row['id']}/export?format=csv").text
    for line, item in zip(csv.DictReader(io.StringIO(table)), found, strict=True):
        assert (line["class_name"], line["label_1"]) == (item["class_name"], item["predictions"][0]["label"])
        assert float(line["score_2"]) == item["predictions"][1]["score"]
        assert (line["abstained"], line["error"]) == ("false", "")


def test_scope_classes_and_abstention(own_api: LiveApi, trained: str) -> None:
    fresh = own_api.filled_dataset({"zebra": 2, "cat": 2})
    row = predicted(
        own_api, dataset_id=fresh, classifier_id=trained, class_names=["zebra", "dog"], only_classes=["zebra"],
        min_score=1.0, name="mine",
    )  # fmt: skip
    found = items(own_api, row["id"])
    assert [(item["class_name"], item["abstained"]) for item in found] == [("zebra", True)] * 2
    assert {p["label"] for item in found for p in item["predictions"]} == {"zebra", "dog"}
    assert (row["name"], row["summary"]["n_abstained"]) == ("mine", 2)
    only = predicted(own_api, dataset_id=fresh, scope="unseen")
    assert {p["label"] for item in items(own_api, only["id"]) for p in item["predictions"]} == {"zebra"}


def test_an_image_that_cannot_be_read_any_more_is_told_alone(own_api: LiveApi, trained: str) -> None:
    fresh = own_api.filled_dataset({"zebra": 14})  # of which the classifier has seen all but two
    with own_api.parts.database.read() as session:
        broken = session.query(Image).filter(Image.dataset_id == fresh, Image.filename == "14.png").one()
    path = own_api.parts.store.local_path(image_key(broken.sha256))
    path.chmod(0o600)
    path.write_bytes(png(500)[:60])
    row = predicted(own_api, dataset_id=fresh)
    assert (row["summary"]["n_images"], row["summary"]["n_failed"]) == (14, 1)
    for item in items(own_api, row["id"]):
        assert (item["error"] is not None) == (item["image_id"] == broken.id) == (item["predictions"] == [])


def test_what_is_wrong_is_told_before_the_job(own_api: LiveApi, trained: str) -> None:
    def refused(status: int, *words: str, **body: Any) -> None:
        problem(own_api.client.post("/v1/predictions", json=body), status, *words)

    empty, full = own_api.dataset(), own_api.filled_dataset({"cat": 1})
    refused(404, "ds_x", dataset_id="ds_x")
    refused(404, "cl_x", dataset_id=full, classifier_id="cl_x")
    refused(422, "no images yet", dataset_id=empty)
    refused(422, "no class 'cow'", dataset_id=full, only_classes=["cow"])
    refused(422, "top_k", dataset_id=full, top_k=0)
    refused(409, "queued", dataset_id=full, classifier_id=own_api.classifier("queued"))
    with own_api.parts.database.write() as session:
        session.get_one(Dataset, empty).kind = "features"
    refused(422, "feature vectors", dataset_id=empty)
    refused(422, "precomputed features", dataset_id=full, classifier_id=own_api.classifier())


def test_predictions_keep_what_they_are_made_of(own_api: LiveApi, trained: str) -> None:
    fresh = own_api.filled_dataset({"zebra": 1})
    row = predicted(own_api, dataset_id=fresh, classifier_id=trained)
    for used in (f"/v1/datasets/{fresh}", f"/v1/classifiers/{trained}"):
        problem(own_api.client.delete(used), 409, row["id"])
    assert own_api.client.get("/v1/predictions").json()["data"][0]["id"] == row["id"]
    assert own_api.client.delete(f"/v1/predictions/{row['id']}").status_code == 204
    problem(own_api.client.get(f"/v1/predictions/{row['id']}/export"), 404)
    trained_on = checked(own_api.client.get(f"/v1/classifiers/{trained}"), ClassifierOut)["dataset_id"]
    assert own_api.client.delete(f"/v1/classifiers/{trained}").status_code == 204
    assert own_api.client.delete(f"/v1/datasets/{trained_on}").status_code == 204
