"""Datasets: create, list, page, describe, delete; classes, images, thumbnails."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image as Picture

from service.core.tables import Dataset
from service.schemas import ClassOut, DatasetOut, ImageOut, Page
from tests.service.harness import LiveApi, checked, problem


def test_a_dataset_comes_back_as_created(live_api: LiveApi) -> None:
    body = {"name": "Vögel 🐦", "description": "d", "metadata": {"a": [1, {"b": None}]}, "test_fraction": 0.5}
    response = live_api.client.post("/v1/datasets", json=body)
    made = checked(response, DatasetOut, 201)
    assert response.headers["location"] == f"/v1/datasets/{made['id']}"
    assert {name: made[name] for name in body} == body
    assert (made["n_images"], made["n_classes"], made["kind"]) == (0, 0, "images")
    assert checked(live_api.client.get(f"/v1/datasets/{made['id']}"), DatasetOut) == made


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({}, "/name", "required"),
        ({"name": ""}, "/name", "at least 1 character"),
        ({"name": "   "}, "/name", "pattern"),
        ({"name": "a\x07b"}, "/name", "pattern"),
        ({"name": "x" * 201}, "/name", "at most 200"),
        ({"name": "x", "test_fraction": 2}, "/test_fraction", "less than or equal to 0.9"),
        ({"name": "x", "describtion": "d"}, "/describtion", "Did you mean 'description'?"),
        ({"name": "x", "metadata": {"a": 2**70}}, "/metadata", "64-bit"),
        ({"name": "x", "metadata": {"a": "x" * 70_000}}, "/metadata", "at most 65,536"),
        ({"name": "x", "metadata": {"a": "\x00"}}, "/metadata", "JSON cannot carry"),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_with_its_place(
    live_api: LiveApi, body: dict[str, object], pointer: str, words: str
) -> None:
    before = live_api.snapshot()
    answer = problem(live_api.client.post("/v1/datasets", json=body), 422, words)
    assert [entry["pointer"] for entry in answer["errors"]] == [pointer]
    assert live_api.snapshot() == before


@pytest.mark.parametrize("text", ['"\\ud800"', "NaN", "-Infinity"])
def test_metadata_that_could_not_be_given_back_is_refused(live_api: LiveApi, text: str) -> None:
    raw = b'{"name": "x", "metadata": {"a": ' + text.encode() + b"}}"
    response = live_api.client.post("/v1/datasets", content=raw, headers={"content-type": "application/json"})
    problem(response, 422, "metadata")
    assert live_api.client.get("/v1/datasets").status_code == 200  # nothing in the list that cannot be shown


def test_pages_neither_lose_nor_repeat_while_datasets_come(live_api: LiveApi) -> None:
    ids = [live_api.dataset(name=f"d{i}") for i in range(7)]
    first = checked(live_api.client.get("/v1/datasets?limit=3"), Page[DatasetOut])
    live_api.dataset(name="newer")
    second = live_api.client.get("/v1/datasets", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [row["id"] for row in first["data"] + second["data"]] == ids[::-1][:6]
    assert first["has_more"]


def test_the_last_page_says_so(live_api: LiveApi) -> None:
    dataset_id = live_api.filled_dataset({"cat": 2, "dog": 2})
    page = live_api.client.get(f"/v1/datasets/{dataset_id}/images?limit=3").json()
    last = live_api.client.get(
        f"/v1/datasets/{dataset_id}/images", params={"limit": 3, "cursor": page["next_cursor"]}
    ).json()
    assert (len(page["data"]), page["has_more"]) == (3, True)
    assert (len(last["data"]), last["has_more"], last["next_cursor"]) == (1, False, None)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=many"])
def test_limits_of_a_page(live_api: LiveApi, query: str) -> None:
    assert problem(live_api.client.get(f"/v1/datasets?{query}"), 422)["errors"][0]["pointer"] == "/query/limit"


def test_cursors_from_elsewhere_are_refused(live_api: LiveApi) -> None:
    for _ in range(2):
        live_api.dataset()
    ours = live_api.client.get("/v1/datasets?limit=1").json()["next_cursor"]
    forged = base64.urlsafe_b64encode(b"ds_0").decode()
    for path, cursor in (("/v1/knowledge", ours), ("/v1/datasets", forged), ("/v1/datasets", "ä"), ("/v1/jobs", "x")):
        problem(live_api.client.get(path, params={"cursor": cursor}), 422, "next_cursor")


def test_classes_and_images_by_class(live_api: LiveApi) -> None:
    dataset_id = live_api.filled_dataset({"zebra": 1, "cat": 2, "Ärmel": 1})
    page = checked(live_api.client.get(f"/v1/datasets/{dataset_id}/classes?limit=2"), Page[ClassOut])
    rest = live_api.client.get(
        f"/v1/datasets/{dataset_id}/classes", params={"limit": 2, "cursor": page["next_cursor"]}
    ).json()
    assert [(c["class_name"], c["n_images"]) for c in page["data"] + rest["data"]] == [
        ("cat", 2), ("zebra", 1), ("Ärmel", 1)
    ]  # fmt: skip
    images = live_api.client.get(f"/v1/datasets/{dataset_id}/images?class_name=cat").json()["data"]
    assert [image["class_name"] for image in images] == ["cat", "cat"]
    assert set(images[0]) == set(ImageOut.model_fields)
    thumbnail = live_api.client.get(images[0]["thumbnail"] + "?side=16")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert max(Picture.open(io.BytesIO(thumbnail.content)).size) <= 16


def test_classes_of_a_feature_dataset(live_api: LiveApi) -> None:
    dataset_id = live_api.dataset()
    with live_api.parts.database.write() as session:
        row = session.get_one(Dataset, dataset_id)
        row.kind = "features"
        row.summary = {"n_rows": 5, "n_classes": 2, "classes": {"b": 3, "a": 2}, "train_classes": {"a": 1}}
    assert live_api.client.get(f"/v1/datasets/{dataset_id}").json()["n_images"] == 5
    data = live_api.client.get(f"/v1/datasets/{dataset_id}/classes").json()["data"]
    assert data == [
        {"class_name": "a", "n_images": 2, "n_train": 1, "n_test": 1},
        {"class_name": "b", "n_images": 3, "n_train": 0, "n_test": 3},
    ]


def test_an_image_belongs_to_its_dataset_only(live_api: LiveApi) -> None:
    dataset_id, other = live_api.filled_dataset({"cat": 1}), live_api.dataset()
    image = live_api.client.get(f"/v1/datasets/{dataset_id}/images").json()["data"][0]["id"]
    problem(live_api.client.get(f"/v1/datasets/{other}/images/{image}/thumbnail"), 404, image)
    problem(live_api.client.get(f"/v1/datasets/{dataset_id}/images/im_x/thumbnail"), 404, "im_x")


def test_delete_only_what_nothing_uses(live_api: LiveApi) -> None:
    dataset_id = live_api.filled_dataset({"cat": 1})
    set_id = live_api.embedding_set({"cat": [1.0]}, dataset_id=dataset_id)
    before = live_api.snapshot()
    problem(live_api.client.delete(f"/v1/datasets/{dataset_id}"), 409, "in use", set_id)
    assert live_api.snapshot() == before
    assert live_api.client.delete(f"/v1/embedding-sets/{set_id}").status_code == 204
    assert live_api.client.delete(f"/v1/datasets/{dataset_id}").status_code == 204
    problem(live_api.client.get(f"/v1/datasets/{dataset_id}"), 404, dataset_id)
    problem(live_api.client.delete(f"/v1/datasets/{dataset_id}"), 404)
    assert live_api.snapshot()["rows"]["images"] == before["rows"]["images"] - 1


def test_a_dataset_with_a_running_import_stays(live_api: LiveApi) -> None:
    job_id = live_api.add_job()
    dataset_id = live_api.job(job_id)["resource"]["id"]
    problem(live_api.client.delete(f"/v1/datasets/{dataset_id}"), 409, job_id)
