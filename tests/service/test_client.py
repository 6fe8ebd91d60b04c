"""The client against the real API on a socket."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unseen
from service.client import ApiError, Client, UnseenError, WaitTimeout
from service.core.db import Database
from service.core.tables import EmbeddingClass, EmbeddingSet, Knowledge
from tests.service.harness import LiveApi, png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seen classes and an unseen one, with a splits.json, one damaged file and one duplicate."""
    root = tmp_path / "photos"
    for number, name in enumerate(("cat", "grizzly_bear", "zebra")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(3):
            (root / "images" / name / f"{i}.png").write_bytes(png(10 * number + i))
    (root / "images" / "cat" / "broken.png").write_bytes(b"no picture")
    (root / "images" / "cat" / "again.png").write_bytes(png(0))
    splits = {
        "seen_classes": ["cat", "grizzly_bear"],
        "unseen_classes": ["zebra"],
        "train": [f"images/{name}/{i}.png" for name in ("cat", "grizzly_bear") for i in (0, 1)],
        "test_seen": ["images/cat/2.png", "images/grizzly_bear/2.png"],
        "test_unseen": [f"images/zebra/{i}.png" for i in range(3)],
    }
    (root / "splits.json").write_text(json.dumps(splits))
    return root


def test_a_folder_arrives_with_its_splits(client: Client, folder: Path) -> None:
    dataset = client.create_dataset("photos", description="three classes")
    seen_progress: list[tuple[int, int]] = []
    report = client.upload_folder(dataset["id"], folder, on_progress=lambda n, total: seen_progress.append((n, total)))
    assert (report.n_accepted, report.n_duplicates) == (9, 1)
    assert [entry["filename"] for entry in report.rejected] == ["images/cat/broken.png"]
    assert report.unseen_classes == ("zebra",)
    assert seen_progress[-1] == (11, 11)
    stored = client.get(dataset["id"])
    assert (stored["n_images"], stored["n_classes"]) == (9, 3)
    classes = client._http.json("GET", f"/v1/datasets/{dataset['id']}/classes")["data"]
    assert {c["class_name"]: (c["n_train"], c["n_test"]) for c in classes} == {
        "cat": (2, 1),
        "grizzly_bear": (2, 1),
        "zebra": (0, 3),
    }


def test_a_second_upload_of_a_folder_adds_nothing(client: Client, folder: Path) -> None:
    dataset_id = client.create_dataset("photos")["id"]
    client.upload_folder(dataset_id, folder)
    assert client.upload_folder(dataset_id, folder).n_accepted == 0
    assert client.get(dataset_id)["n_images"] == 9


def test_a_folder_without_images_is_an_error_of_the_client(client: Client, tmp_path: Path) -> None:
    for folder, reason in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "holds no files in class folders")):
        with pytest.raises(UnseenError, match=reason):
            client.upload_folder("ds_1", folder)


def test_images_as_paths_bytes_and_named_bytes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / 'a "quoted" näme.png'
    path.write_bytes(png(1))
    dataset_id = client.create_dataset("mixed")["id"]
    sources = [path, png(2), ("third.png", png(3))]
    answer = client.upload_images(dataset_id, sources, labels=["a", "b", "a"], split="train")
    assert [entry["class_name"] for entry in answer["accepted"]] == ["a", "b", "a"]
    with pytest.raises(UnseenError, match="2 labels were given for 1"):
        client.upload_images(dataset_id, [png(4)], labels=["a", "b"])
    with pytest.raises(UnseenError, match=r"missing\.png cannot be read"):
        client.upload_images(dataset_id, [tmp_path / "missing.png"], "a")


def test_refusals_tell_every_problem(client: Client) -> None:
    with pytest.raises(ApiError, match="There is no") as caught:
        client.get("ds_unknown")
    assert caught.value.status == 404
    with pytest.raises(ApiError) as caught:
        client.create_dataset("", test_fraction=5)
    assert caught.value.status == 422
    assert {entry["pointer"] for entry in caught.value.errors} == {"/name", "/test_fraction"}
    assert "/test_fraction: " in str(caught.value)
    with pytest.raises(UnseenError, match="is no id of a resource"):
        client.get("../secrets")


def test_knowledge_from_vectors_and_file_makes_jobs(client: Client, tmp_path: Path) -> None:
    job = client.add_knowledge("inline", vectors={"cat": np.array([1.0, 0.5]), "zebra": [0.0, 1.0]})
    assert job["kind"] == "index_knowledge"
    assert client.get(job["resource"]["id"])["kind"] == "class_vectors"
    np.savez(tmp_path / "table.npz", class_names=["cat"], vectors=[[1.0]], attribute_names=["furry"])
    job = client.add_knowledge("file", file=tmp_path / "table.npz")
    assert client.get(job["resource"]["id"])["kind"] == "attributes"
    with pytest.raises(UnseenError, match="Give one of"):
        client.add_knowledge("nothing")
    assert [k["name"] for k in client.list_all("knowledge")] == ["file", "inline"]


def test_an_estimate_of_a_classifier_trains_nothing(client: Client, own_api: LiveApi) -> None:
    vectors = {name: np.eye(3)[i] for i, name in enumerate(("cat", "dog", "zebra"))}
    dataset_id = own_api.filled_dataset({"cat": 1, "dog": 1})
    body: dict[str, Any] = {
        "embedding_set_id": own_api.embedding_set(vectors, unseen=("zebra",)),
        "backbone": {"name": "small_cnn", "weights": "random"},
    }
    fits = client.create_classifier(dataset_id, validate_only=True, **body)
    assert (fits["valid"], fits["n_images"]) == (True, 2)
    assert fits["memory_bytes"] > 0
    wrong = client.create_classifier(dataset_id, validate_only=True, method="sjee", seen_classes=["cat"], **body)
    assert {problem["pointer"] for problem in wrong["problems"]} == {"/method", "/seen_classes"}
    assert list(client.list_all("classifiers")) == []
    assert list(client.list_all("jobs")) == []
    assert client.create_classifier(dataset_id, **body)["kind"] == "train_classifier"


def test_class_embeddings_travel_as_float32(client: Client, api_database: Database) -> None:
    dataset_id = client.create_dataset("d")["id"]
    vectors = np.random.default_rng(0).standard_normal((120, 7)).astype("<f4")
    with api_database.write() as session:
        session.add(Knowledge(id="kn_1", name="k", kind="class_vectors", status="ready"))
        session.flush()
        session.add(
            EmbeddingSet(
                id="es_1",
                name="mine",
                dataset_id=dataset_id,
                knowledge_id="kn_1",
                method="vgse",
                relation="smo",
                status="ready",
                dim=7,
            )
        )
        session.flush()
        for i, vector in enumerate(vectors):
            session.add(
                EmbeddingClass(
                    embedding_set_id="es_1",
                    name=f"class {i}",
                    position=i,
                    is_seen=i < 100,
                    vector=vector.tobytes(),
                    provenance={},
                )
            )
    names, seen, found = client.class_embeddings("es_1")
    assert names == [f"class {i}" for i in range(120)]
    assert seen.sum() == 100
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors)
    some = client.class_embeddings("es_1", ["class 119", "class 3"])
    np.testing.assert_array_equal(some.vectors, vectors[[119, 3]])
    answer = client.embeddings("mine", "class 5", encoding_format="base64")
    assert base64.b64decode(answer["data"][0]["embedding"]) == vectors[5].tobytes()


def test_export_writes_the_whole_file_or_nothing(client: Client, api_database: Database, tmp_path: Path) -> None:
    test_class_embeddings_travel_as_float32(client, api_database)
    path = client.export("es_1", tmp_path / "out.npz")
    with np.load(path, allow_pickle=False) as stored:
        assert stored["class_names"].shape == (120,)
    with pytest.raises(UnseenError, match="no format to export"):
        client.export("es_1", tmp_path / "out.xlsx")
    with pytest.raises(UnseenError, match="cannot be written"):
        client.export("es_1", tmp_path / "no folder" / "out.npz")
    with pytest.raises(ApiError, match="There is no"):
        client.export("es_2", tmp_path / "other.npz")
    assert [p.name for p in tmp_path.glob("*") if "out" in p.name or "other" in p.name] == ["out.npz"]


def test_methods_and_version(client: Client) -> None:
    assert {"vgse", "sje"} <= {method["name"] for method in client.methods()}
    assert client.version()["api"] == "v1"


def test_readiness_names_what_is_missing(client: Client) -> None:
    assert client.ready()["checks"]["database"] == "ok"
    with pytest.raises(WaitTimeout, match="worker: no worker was heard of"):
        client.wait_until_ready(timeout=0)


def test_the_package_offers_the_client() -> None:
    assert unseen.Client is Client
    assert unseen.__version__
