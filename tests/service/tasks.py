"""Runs queued import jobs in the test's own process, by the real runner."""

from __future__ import annotations

from typing import Any

from tests.service.harness import LiveApi
from workers.imports import import_archive, import_features, index_knowledge
from workers.runner import Services, TaskFunction, run_job

TASKS: dict[str, TaskFunction] = {
    "import_archive": import_archive,
    "import_features": import_features,
    "index_knowledge": index_knowledge,
}


def finish(api: LiveApi, job_id: str, tasks: dict[str, TaskFunction] = TASKS) -> dict[str, Any]:
    """Runs the job to its end; the job as the API then shows it."""
    parts = api.parts
    services = Services(api.settings, parts.database, parts.store, parts.redis, parts.queue)
    run_job(job_id, worker_id="test", tasks=tasks, services=services)
    return api.job(job_id)
