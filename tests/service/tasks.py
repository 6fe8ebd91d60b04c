"""Runs queued import jobs in the test's own process, by the real runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.schemas import ClassifierOut, JobOut
from tests.service.harness import LiveApi, checked
from workers.imports import import_archive, import_features, index_knowledge
from workers.runner import Services, TaskFunction, run_job
from workers.training import train_classifier

TASKS: dict[str, TaskFunction] = {
    "import_archive": import_archive,
    "import_features": import_features,
    "index_knowledge": index_knowledge,
}
NETWORK = {"name": "small_cnn", "weights": "random"}
VECTORS = {"cat": [1.0, 0.0, 0.2], "dog": [0.0, 1.0, 0.1], "zebra": [0.7, 0.7, 1.0]}


def finish(api: LiveApi, job_id: str, tasks: dict[str, TaskFunction] = TASKS) -> dict[str, Any]:
    """Runs the job to its end; the job as the API then shows it."""
    parts = api.parts
    services = Services(api.settings, parts.database, parts.store, parts.redis, parts.queue)
    run_job(job_id, worker_id="test", tasks=tasks, services=services)
    return api.job(job_id)


def knowledge(api: LiveApi, vectors: Mapping[str, list[float]] = VECTORS, names: list[str] | None = None) -> str:
    """The id of a source that has these vectors, read in; `names`: of its attributes, if it is one of such."""
    body: dict[str, Any] = {"name": "k", "vectors": dict(vectors)}
    body |= {"kind": "attributes", "attribute_names": names} if names else {}
    job = api.client.post("/v1/knowledge", json=body).json()
    assert finish(api, job["id"])["status"] == "succeeded"
    return str(job["resource"]["id"])


def trained_classifier(api: LiveApi, **fields: Any) -> dict[str, Any]:
    """A classifier of cats, dogs and zebras as the API shows it, trained on images of the first two."""
    body = {
        "unseen_classes": ["zebra"],
        "method": "eszsl",
        "backbone": NETWORK,
        "image_size": 32,
        "dataset_id": fields.get("dataset_id") or api.filled_dataset({"cat": 4, "dog": 4}),
        "knowledge_id": fields.get("knowledge_id") or knowledge(api),
        **fields,
    }
    job = checked(api.client.post("/v1/classifiers", json=body), JobOut, 202)
    ended = finish(api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "succeeded", ended["error"]
    return checked(api.client.get(job["resource"]["href"]), ClassifierOut)
