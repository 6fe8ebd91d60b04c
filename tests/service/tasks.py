"""Runs queued import jobs in the test's own process, by the real runner."""

from __future__ import annotations

from typing import Any

from tests.service.harness import LiveApi
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


def trained_classifier(api: LiveApi) -> str:
    """A classifier of cats, dogs and zebras, trained on images of the first two."""
    job = api.client.post("/v1/knowledge", json={"name": "k", "vectors": VECTORS}).json()
    assert finish(api, job["id"])["status"] == "succeeded"
    body = {
        "dataset_id": api.filled_dataset({"cat": 6, "dog": 6}),
        "knowledge_id": job["resource"]["id"],
        "unseen_classes": ["zebra"],
        "method": "eszsl",
        "backbone": NETWORK,
        "image_size": 32,
    }
    job = api.client.post("/v1/classifiers", json=body).json()
    ended = finish(api, job["id"], {"train_classifier": train_classifier})
    assert ended["status"] == "succeeded", ended["error"]
    return str(job["resource"]["id"])
