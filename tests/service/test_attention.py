"""POST /v1/classifiers/{id}/attention, and what dimensions are called, from the request to the maps."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.embedding.storage import HEADS_FILE, MANIFEST_FILE, load_heads
from models.zero_shot.base import load_classifier
from models.zero_shot.sc_egg import SCEGG
from service.answers import AttentionOut
from service.client import Client, UnseenError
from service.core.tables import Classifier, EmbeddingSet
from service.schemas import JobOut
from tests.service.harness import LiveApi, checked, png, problem
from tests.service.tasks import NETWORK, VECTORS, finish, knowledge, trained_classifier
from workers.embedding import build_embedding_set
from workers.library import CLASSIFIER_FILES
from workers.sources import unpack

RAW = {"content-type": "image/png"}
QUICK = {
    "epochs": 1, "steps_per_epoch": 2, "batch_size": 8, "hidden_dim": 8, "critic_steps": 1, "synthetic_per_class": 4,
    "embedding_epochs": 1, "compression_epochs": 1, "vector_dim": 4, "embedding_learning_rate": 1e-6,
}  # fmt: skip


def url(classifier_id: str) -> str:
    return f"/v1/classifiers/{classifier_id}/attention"


def test_maps_of_each_image_as_numbers(live_api: LiveApi) -> None:
    classifier = live_api.classifier(method="sc_egg")
    files = [("images", ("a.png", png(1))), ("images", ("b.png", b"junk"))]
    answer = live_api.client.post(url(classifier), files=files, data={"class_name": " okapi ", "top_k": "2"})
    body = checked(answer, AttentionOut)
    good, bad = body["data"]
    assert (body["classifier_id"], good["filename"], good["error"]) == (classifier, "a.png", None)
    assert [entry["index"] for entry in good["dimensions"]] == [0, 1]
    assert "not an image" in bad["error"]
    assert (bad["prediction"], bad["whole"], bad["dimensions"]) == (None, None, [])
    kind, sent = live_api.inference.calls[-1]
    assert (kind, sent["class_name"], sent["top_k"]) == ("look", "okapi", 2)


def test_a_picture_for_those_who_accept_one(live_api: LiveApi) -> None:
    classifier = live_api.classifier(method="sc_egg")
    headers = {**RAW, "accept": "image/jpeg"}
    answer = live_api.client.post(url(classifier), content=png(1), headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.format == "JPEG"
    assert shown.width > shown.height  # the photo, all dimensions, and two of them in a row
    files = [("images", ("a.png", png(1))), ("images", ("b.png", png(2)))]
    two = live_api.client.post(url(classifier), files=files, headers={"accept": "image/jpeg"})
    problem(two, 422, "2 were sent")
    problem(live_api.client.post(url(classifier), content=b"junk", headers=headers), 422, "could not be read")


def test_the_client_asks_for_both(live_api: LiveApi) -> None:
    classifier = live_api.classifier(method="sc_egg")
    with Client(str(live_api.client.base_url)) as client:
        found = client.attention(classifier, [png(1), png(2)], class_name="okapi", top_k=2)
        assert [row["index"] for row in found["data"]] == [0, 1]
        assert client.attention_picture(classifier, png(1), top_k=1)[:2] == b"\xff\xd8"
        for ask in (client.attention, client.attention_picture):
            with pytest.raises(UnseenError, match="timeout_s"):
                ask(classifier, png(1), timeout_s=0)


def test_bad_requests_say_what_is_wrong(live_api: LiveApi) -> None:
    classifier = live_api.classifier(method="sc_egg")
    for options, what in (("?top_k=0", "top_k"), ("?class_name=%20", "class_name")):
        refused = problem(live_api.client.post(url(classifier) + options, content=png(1), headers=RAW), 422, what)
        assert refused["errors"][0]["pointer"] == f"/query/{what}"
    problem(live_api.client.post(url(classifier), json={"inputs": ""}), 415, "multipart/form-data")
    problem(live_api.client.post(url("cl_none"), content=png(1), headers=RAW), 404, "cl_none")
    before, other = len(live_api.inference.calls), live_api.classifier(method="sje")
    asked = live_api.client.post(url(other) + "?class_name=unknown", content=png(1), headers=RAW)
    problem(asked, 422, "'sje'", "no attention maps")
    assert len(live_api.inference.calls) == before  # the class may well be unknown, but that is not what is wrong
    queued = live_api.classifier("queued", method="sc_egg")
    problem(live_api.client.post(url(queued), content=png(1), headers=RAW), 409, "queued")


def trained(api: LiveApi, method: str = "sc_egg", **fields: Any) -> dict[str, Any]:
    """A classifier of three attributes, from drawn photos."""
    params = QUICK if method == "sc_egg" else {}
    return trained_classifier(api, **{"method": method, "params": params, "image_size": 64, **fields})


def test_attributes_are_named_start_at_their_words_and_are_looked_for_in_a_photo(
    inferring_api: LiveApi, tmp_path: Any
) -> None:
    words = {"furry": [3.0, 0.0], "tail": [0.0, 2.0]}
    row = trained(
        inferring_api,
        knowledge_id=knowledge(inferring_api, VECTORS, ["furry", "quadrapedal", "tail"]),
        dimension_knowledge_id=knowledge(inferring_api, words),
        params={**QUICK, "center_vectors": False},
    )
    assert any("quadrapedal" in warning for warning in row["metrics"]["warnings"])
    with inferring_api.parts.database.read() as session:
        artifacts = session.get_one(Classifier, row["id"]).artifacts
    model = load_classifier(unpack(inferring_api.parts.store, artifacts, CLASSIFIER_FILES, tmp_path))
    assert isinstance(model, SCEGG)
    np.testing.assert_allclose(model.scen.vectors.numpy()[[0, 2]], [[1, 0], [0, 1]], atol=1e-3)
    answer = inferring_api.client.post(f"{url(row['id'])}?class_name=zebra&top_k=2", content=png(99), headers=RAW)
    (found,) = checked(answer, AttentionOut)["data"]
    assert found["prediction"]["label"] == "zebra"
    assert found["dimensions"][0]["strength"] >= found["dimensions"][1]["strength"]
    assert {entry["name"] for entry in found["dimensions"]} <= {"furry", "quadrapedal", "tail"}
    for places in (found["whole"], *(entry["map"] for entry in found["dimensions"])):
        assert np.shape(places)[0] == np.shape(places)[1] > 1
        assert np.sum(places) == pytest.approx(1, abs=1e-3)


def test_names_of_the_request_go_before_and_methods_without_places_are_refused(inferring_api: LiveApi) -> None:
    row = trained(inferring_api, knowledge_id=knowledge(inferring_api, VECTORS), dimension_names=["a", "b", "c"])
    (found,) = checked(inferring_api.client.post(url(row["id"]), content=png(9), headers=RAW), AttentionOut)["data"]
    assert sorted(entry["name"] for entry in found["dimensions"]) == ["a", "b", "c"]
    other = trained(inferring_api, "sje", knowledge_id=knowledge(inferring_api, VECTORS))
    problem(inferring_api.client.post(url(other["id"]), content=png(9), headers=RAW), 422, "no attention maps")


@pytest.mark.parametrize(("form", "width"), [("plain", 256), ("fused", QUICK["vector_dim"])])
def test_clusters_without_names_start_at_what_they_answer_to(
    live_api: LiveApi, tmp_path: Path, form: str, width: int
) -> None:
    parts = {
        "backbone": NETWORK,
        "patches": {"method": "grid", "n_patches": 4, "size": 32},
        "clustering": {"n_clusters": 4, "n_neighbors": 2, "epochs": 1},
        "relation": {"form": form},
    }
    dataset, words = live_api.filled_dataset({"cat": 4, "dog": 4}), knowledge(live_api)
    body = {"dataset_id": dataset, "knowledge_id": words, "unseen_classes": ["zebra"], "relation": "wavg"}
    job = checked(live_api.client.post("/v1/embedding-sets", json={**body, "params": parts}), JobOut, 202)
    assert finish(live_api, job["id"], {"build_embedding_set": build_embedding_set})["status"] == "succeeded"
    of_set = {"dataset_id": dataset, "knowledge_id": None, "embedding_set_id": job["resource"]["id"]}
    row = trained(live_api, **of_set, image_size=32)

    store, database = live_api.parts.store, live_api.parts.database
    with database.read() as session:
        ours = session.get_one(Classifier, row["id"]).artifacts
        sets = session.get_one(EmbeddingSet, of_set["embedding_set_id"]).artifacts
    model = load_classifier(unpack(store, ours, CLASSIFIER_FILES, tmp_path / "classifier"))
    heads = load_heads(unpack(store, sets, (HEADS_FILE, MANIFEST_FILE), tmp_path / "set"))[0]
    assert isinstance(model, SCEGG)
    assert model.scen.vectors.shape[1] == width
    if form == "plain":
        wanted = heads.directions() - heads.directions().mean(dim=0)
        wanted = torch.nn.functional.normalize(wanted, dim=1)
        torch.testing.assert_close(model.scen.vectors, wanted, atol=1e-3, rtol=0)


def test_vectors_and_names_that_do_not_fit_are_told_before_a_job_is_queued(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    plain, words = knowledge(api, VECTORS), knowledge(api, {"furry": [1.0]})
    body: dict[str, Any] = {
        "dataset_id": api.dataset(), "unseen_classes": ["zebra"], "method": "sc_egg", "knowledge_id": plain,
        "backbone": {"name": "small_cnn", "weights": "random"},
    }  # fmt: skip

    def pointers(status: int, **fields: Any) -> list[str]:
        answer = problem(api.client.post("/v1/classifiers", json={**body, **fields}), status, "")
        return [entry["pointer"] for entry in answer.get("errors", [])]

    assert "/dimension_names" in pointers(422, dimension_names=["one"])
    assert "/dimension_names" in pointers(422, dimension_knowledge_id=words)
    assert "/dimension_knowledge_id" in pointers(422, dimension_knowledge_id=words, method="sje")
    pointers(404, dimension_knowledge_id="kn_none")
