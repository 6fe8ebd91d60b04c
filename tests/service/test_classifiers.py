"""Classifiers: what a request may say, and what it is told before a job is queued."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models import small_cnn
from models.evaluation import Report, gzsl_report, near_chance
from models.params import ScratchParams
from models.small_cnn import train_small_cnn
from models.zero_shot import checkpoints
from models.zero_shot.checkpoints import Run
from models.zero_shot.f_vaegan import FVAEGAN
from models.zero_shot.sje import SJE
from service.core import repositories
from service.core.tables import Classifier
from service.schemas import ClassifierOut, JobOut, Page
from tests.service.harness import LiveApi, checked, problem
from tests.service.tasks import finish, knowledge, trained_classifier
from workers.embedding import build_embedding_set
from workers.runner import TaskFunction
from workers.training import train_classifier

SMALL = {"name": "small_cnn", "weights": "random"}
SCRATCH = {"name": "small_cnn", "weights": "scratch"}
VALIDATION = ["kind 0", "kind 1"]
TASKS: dict[str, TaskFunction] = {"train_classifier": train_classifier}


@pytest.fixture(scope="module")
def inputs(live_api: LiveApi) -> dict[str, str]:
    """A dataset and an embedding set over its classes and one more."""
    vectors = {name: np.eye(4)[i] for i, name in enumerate(("cat", "dog", "cow", "polar_bear"))}
    dataset_id = live_api.filled_dataset({"cat": 1, "dog": 1, "cow": 1})
    return {"dataset_id": dataset_id, "embedding_set_id": live_api.embedding_set(vectors, unseen=("polar_bear",))}


def body_on(api: LiveApi, n_seen: int = 6, **fields: Any) -> dict[str, Any]:
    """A request for a quick classifier on so many seen classes of three images each, and a zebra."""
    names = [f"kind {i}" for i in range(n_seen)]
    return {
        "dataset_id": api.filled_dataset(dict.fromkeys(names, 3)),
        "knowledge_id": knowledge(api, {name: np.eye(8)[i].tolist() for i, name in enumerate([*names, "zebra"])}),
        "unseen_classes": ["zebra"],
        "backbone": SMALL,
        "image_size": 32,
        "evaluate": False,
        **fields,
    }


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
    named = {"seen_classes": ["Cat", "COW"], "unseen_classes": ["Polar Bear"]}
    request = request_of(live_api, create(live_api, {**inputs, **named}).json())
    assert (request["seen_classes"], request["unseen_classes"]) == (["cat", "cow"], ["polar_bear"])


def test_raw_knowledge_needs_a_backbone(live_api: LiveApi, inputs: dict[str, str]) -> None:
    body = {"dataset_id": inputs["dataset_id"], "knowledge_id": live_api.knowledge(), "unseen_classes": ["zebra"]}
    problem(create(live_api, body), 422, "which network makes the image features")
    checked(create(live_api, {**body, "backbone": SMALL}), JobOut, 202)


def test_a_network_is_trained_from_scratch_as_asked(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ScratchParams] = []

    def watched(images: Any, labels: Any, params: ScratchParams, **options: Any) -> Any:
        asked.append(params)
        return train_small_cnn(images, labels, params, **options)

    monkeypatch.setattr(small_cnn, "train_small_cnn", watched)
    vectors = {"cat": [1.0, 0.0], "dog": [0.0, 1.0], "zebra": [1.0, 1.0]}
    body = {
        "dataset_id": live_api.filled_dataset({"cat": 4, "dog": 4}),
        "knowledge_id": knowledge(live_api, vectors),
        "unseen_classes": ["zebra"],
        "method": "eszsl",
        "backbone": SCRATCH,
        "scratch": {"epochs": 2, "batch_size": 3},
        "evaluate": False,
    }
    for _ in range(2):  # the second one finds the network of the first
        job = checked(create(live_api, body), JobOut, 202)
        ended = finish(live_api, job["id"], TASKS)
        assert ended["status"] == "succeeded", ended["error"]
    assert asked == [ScratchParams(epochs=2, batch_size=3)]
    with live_api.parts.database.read() as session:
        assert (repositories.measured_training_rate(session, "small_cnn") or 0) > 0


def test_parameters_are_searched_on_validation_classes(live_api: LiveApi) -> None:
    body = body_on(
        live_api,
        validation_classes=VALIDATION,
        params={"epochs": 2, "normalize": "l2", "folds": 1},
        search={"trials": 3, "metric": "t1"},
    )
    job = checked(create(live_api, body), JobOut, 202)
    ended = finish(live_api, job["id"], TASKS)
    assert ended["status"] == "succeeded", ended["error"]
    row = checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)
    assert ended["progress"]["phases"][2:6] == ["search", "choosing", "calibrating", "training"]
    trials = row["metrics"]["search"]["trials"]
    assert [set(trial["params"]) for trial in trials] == [{"learning_rate", "scale"}] * 3
    best = max(trials, key=lambda trial: trial["t1"])
    assert {name: row["params"][name] for name in best["params"]} == best["params"]
    assert (row["params"]["epochs"], row["params"]["normalize"]) == (2, "l2")


def test_the_best_epoch_on_test_rows_is_reported_beside(live_api: LiveApi) -> None:
    params = {"epochs": 5, "steps_per_epoch": 3, "batch_size": 8, "hidden_dim": 16, "folds": 1}
    fields = {"validation_classes": VALIDATION, "method": "f_vaegan", "params": params, "evaluate": True}
    request = body_on(live_api, best_on_test=True, **fields) | {"unseen_classes": ["kind 4", "kind 5"]}
    plain = {**request, "best_on_test": False}
    rows = []
    for body in (request, plain):
        job = checked(create(live_api, body), JobOut, 202)
        assert finish(live_api, job["id"], TASKS)["status"] == "succeeded"
        rows.append(checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)["metrics"])
    watched, without = rows
    best = watched.pop("best_on_test")
    assert "not a result" in best["note"]
    assert [entry["epoch"] for entry in best["curve"]] == [1, 2, 3, 4, 5]
    assert best["t1"]["value"] == max(entry["t1"] for entry in best["curve"])
    assert watched == without, "what is reported beside changes nothing"
    # The second training is the first one: at the chosen epoch it has the classifier's own T1.
    assert best["curve"][watched["best_epoch"] - 1]["t1"] == watched["zsl"]["t1"]


@pytest.mark.parametrize(("fields", "told"), [({"method": "eszsl"}, "epochs"), ({"evaluate": False}, "evaluate")])
def test_the_best_epoch_on_test_rows_needs_epochs_and_test_rows(
    live_api: LiveApi, inputs: dict[str, str], fields: dict[str, Any], told: str
) -> None:
    answer = create(live_api, {**inputs, "best_on_test": True, **fields})
    (found,) = problem(answer, 422)["errors"]
    assert found["pointer"] == "/best_on_test"
    assert told in found["message"]


def test_a_retried_training_goes_on_from_its_checkpoint(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0.0)
    small = {"epochs": 4, "steps_per_epoch": 3, "batch_size": 8, "hidden_dim": 16}
    body = body_on(live_api, validation_classes=VALIDATION, method="f_vaegan", params=small)
    began: list[int] = []
    original = FVAEGAN._epochs

    def watched(self: FVAEGAN, train: Any, run: Run, epochs: int, on_progress: Any) -> Any:
        began.append(len(run.history))
        for entry in original(self, train, run, epochs, on_progress):
            if entry["epoch"] == 3 and len(began) == 1:
                raise RuntimeError("the machine burns")
            yield entry

    monkeypatch.setattr(FVAEGAN, "_epochs", watched)
    job = checked(create(live_api, body), JobOut, 202)
    assert finish(live_api, job["id"], TASKS)["status"] == "failed"
    checked(live_api.client.post(f"/v1/jobs/{job['id']}/retry"), JobOut, 202)
    assert finish(live_api, job["id"], TASKS)["status"] == "succeeded"
    assert began[:2] == [0, 2]
    again = checked(create(live_api, body), JobOut, 202)
    assert finish(live_api, again["id"], TASKS)["status"] == "succeeded"
    resumed, plain = (
        checked(live_api.client.get(j["resource"]["href"]), ClassifierOut)["metrics"] for j in (job, again)
    )
    assert resumed["history"] == plain["history"]
    assert resumed["validation"] == plain["validation"]


def test_a_retried_search_goes_on_with_its_trials(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0.0)
    body = body_on(live_api, validation_classes=VALIDATION, params={"epochs": 2, "folds": 1}, search={"trials": 5})
    begun = 0
    broken = {4, 8}  # in the fourth trial; then, with the search done, in the training
    original = SJE._make_network

    def watched(self: SJE, *inputs: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun in broken:
            raise RuntimeError("the machine burns")
        return original(self, *inputs)

    monkeypatch.setattr(SJE, "_make_network", watched)
    job = checked(create(live_api, body), JobOut, 202)
    for _ in broken:
        assert finish(live_api, job["id"], TASKS)["status"] == "failed"
        checked(live_api.client.post(f"/v1/jobs/{job['id']}/retry"), JobOut, 202)
    ended = finish(live_api, job["id"], TASKS)
    assert ended["status"] == "succeeded", ended["error"]
    assert begun <= 5 + 1 + 1 + 3  # five trials, one of them twice, the broken training, and the one that ended
    broken.clear()
    again = checked(create(live_api, body), JobOut, 202)
    assert finish(live_api, again["id"], TASKS)["status"] == "succeeded"
    resumed, plain = (checked(live_api.client.get(j["resource"]["href"]), ClassifierOut) for j in (job, again))
    assert resumed["params"] == plain["params"]
    for row in (resumed, plain):
        for trial in row["metrics"]["search"]["trials"]:
            trial.pop("seconds")
    assert resumed["metrics"] == plain["metrics"]


@pytest.mark.parametrize(
    ("images", "test_fraction", "warning"),
    [
        ({"cat": 6, "dog": 6}, 0.5, "No test images of unseen classes: T1, U and H cannot be measured."),
        ({"cat": 2, "dog": 2, "zebra": 1}, 0.0, "No test images of seen classes: U, S and H cannot be measured."),
        ({"cat": 6, "dog": 6, "zebra": 1}, 0.5, None),
    ],
)
def test_what_cannot_be_measured_is_warned_of(
    live_api: LiveApi, images: dict[str, int], test_fraction: float, warning: str | None
) -> None:
    dataset_id = live_api.filled_dataset(images, test_fraction=test_fraction)
    source = knowledge(live_api)
    metrics = trained_classifier(live_api, dataset_id=dataset_id, knowledge_id=source)["metrics"]
    assert (metrics["zsl"] is None, metrics["gzsl"] is None) == ("zebra" not in images, warning is not None)
    assert [told.split(" Add")[0] for told in metrics["warnings"]] == ([warning] if warning else [])
    unasked = trained_classifier(live_api, dataset_id=dataset_id, knowledge_id=source, evaluate=False)["metrics"]
    assert unasked["warnings"] == []


def test_a_verdict_of_validation_near_chance_is_a_warning(live_api: LiveApi) -> None:
    body = body_on(live_api, method="eszsl", validation_classes=VALIDATION, params={"folds": 1})  # of noise
    body["dataset_id"] = live_api.filled_dataset({f"kind {i}": 6 for i in range(6)})
    job = checked(create(live_api, body), JobOut, 202)
    assert finish(live_api, job["id"], TASKS)["status"] == "succeeded"
    metrics = checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)["metrics"]
    assert metrics["warnings"] == near_chance(metrics["validation"]["t1"], 0.5) != []

    params = {"backbone": SMALL, "patches": {"method": "whole", "size": 32}}
    request = {key: body[key] for key in ("dataset_id", "knowledge_id", "unseen_classes")}
    job = live_api.client.post("/v1/embedding-sets", json={**request, "method": "backbone", "params": params}).json()
    ended = finish(live_api, job["id"], {"build_embedding_set": build_embedding_set})
    assert ended["status"] == "succeeded", ended["error"]
    summary = live_api.client.get(job["resource"]["href"]).json()["summary"]
    (warning,) = summary["warnings"]
    assert warning.startswith("On held-out seen classes T1 is")
    assert ended["result"]["n_warnings"] == 1


def test_a_small_device_gets_smaller_batches_and_the_job_says_so(
    live_api: LiveApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [4, 0]
    original = SJE._loss

    def loss(self: SJE, features: Any, labels: Any, embeddings: Any) -> Any:
        if len(features) > held[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, features, labels, embeddings)

    monkeypatch.setattr(SJE, "_loss", loss)
    body = body_on(live_api, n_seen=4, params={"epochs": 2, "batch_size": 8, "early_stopping": False})
    job = checked(create(live_api, body), JobOut, 202)
    ended = finish(live_api, job["id"], TASKS)
    assert ended["status"] == "succeeded", ended["error"]
    assert "batches of 4 are used" in ended["progress"]["notes"][0]
    row = checked(live_api.client.get(job["resource"]["href"]), ClassifierOut)
    assert row["params"]["batch_size"] == 4
    assert row["metrics"]["validation"]["out_of_memory"] in row["metrics"]["warnings"]
    held.pop(0)
    job = checked(create(live_api, body), JobOut, 202)
    live_api.set_job(job["id"], max_attempts=1)
    ended = finish(live_api, job["id"], TASKS)
    assert ended["status"] == "failed"
    assert "even hold batches of 1." in ended["error"]["detail"]


def test_confusions_are_with_the_classifier_and_not_in_lists(live_api: LiveApi) -> None:
    classifier_id = live_api.classifier()
    report = gzsl_report(np.eye(2), np.array([0, 1]), ["zebra", "cat"], np.array([False, True]), 0.0)
    with live_api.parts.database.write() as session:
        session.get_one(Classifier, classifier_id).metrics = {**Report(None, report).to_dict(), "gamma": 0.5}
    row = checked(live_api.client.get(f"/v1/classifiers/{classifier_id}"), ClassifierOut)
    assert row["metrics"]["gzsl"]["classes"] == ["zebra", "cat"]
    assert row["metrics"]["gzsl"]["confusion"] == [[0, 0, 1], [1, 1, 1]]
    rows = checked(live_api.client.get("/v1/classifiers"), Page[ClassifierOut])["data"]
    row["metrics"]["gzsl"].pop("confusion")
    assert next(r for r in rows if r["id"] == classifier_id) == row


@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"method": "sjee"}, "/method", "Did you mean 'sje'?"),
        ({"params": {"epoch": 3}}, "/params/epoch", "Did you mean 'epochs'?"),
        ({"params": {"epochs": 0}}, "/params/epochs", "greater than or equal to 1"),
        ({"knowledge_id": "both"}, "/embedding_set_id", "not both"),
        ({"embedding_set_id": None}, "/embedding_set_id", "either"),
        ({"unseen_classes": ["polar baer"]}, "/unseen_classes", "Did you mean 'polar_bear'?"),
        ({"unseen_classes": ["polar_bear", "COW"]}, "/unseen_classes", "learned from images of 'cow'"),
        ({"seen_classes": ["cat", "cow", "dgo"]}, "/seen_classes", "Did you mean 'dog'?"),
        ({"seen_classes": ["cat", "dog"], "unseen_classes": ["dog"]}, "/unseen_classes", "Both seen and unseen"),
        ({"seen_classes": ["cat"]}, "/seen_classes", "At least 2"),
        ({"validation_classes": ["polar_bear"]}, "/validation_classes", "must be seen"),
        ({"validation_classes": ["cow", "cow"]}, "/validation_classes", "more than once: 'cow'"),
        ({"backbone": {"name": "resnet51"}}, "/backbone/name", "Did you mean"),
        ({"sed": 1}, "/sed", "Did you mean 'seed'?"),
        ({"scratch": {"epochs": 3}}, "/scratch", "Nothing is trained from scratch"),
        ({"scratch": {"epochs": 3}, "backbone": SMALL}, "/scratch", "Nothing is trained from scratch"),
        ({"scratch": {"epochs": 0}, "backbone": SCRATCH}, "/scratch/epochs", "greater than or equal to 1"),
        ({"search": {"trials": 0}}, "/search/trials", "greater than or equal to 1"),
        ({"search": {}}, "/search", "needs validation classes"),
        ({"search": {}, "validation_classes": []}, "/search", "needs validation classes"),
        ({"search": {"metric": "t1"}, "validation_classes": ["cow"]}, "/search/metric", "single validation class"),
        ({"search": {}, "method": "eszsl", "validation_classes": ["cow"]}, "/search", "chooses its settings by itself"),
        (
            {"search": {}, "params": {"learning_rate": 0.1, "scale": 2, "normalize": "l2"}},
            "/search",
            "All that could be searched",
        ),
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
