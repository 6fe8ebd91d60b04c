"""Answers long work: the job row is committed with the resource, queued after the commit, answered with 202."""

from __future__ import annotations

from typing import Any

from service.core import jobs, repositories
from service.core.db import Database
from service.core.tables import Job
from service.deps import Parts
from service.json import FastJSON

JOB_HEADERS = {
    "Location": {"description": "The job: /v1/jobs/{id}.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before asking for it.", "schema": {"type": "integer"}},
}


def submit(parts: Parts, job: Job) -> FastJSON:
    """Queues a committed job and answers 202 with its location and body.

    If Redis is away the job is safe in the database and the reconciler queues it later.
    """
    parts.queue.enqueue(job.id, job.token)
    headers = {"Location": f"/v1/jobs/{job.id}", "Retry-After": "1"}
    return FastJSON(job_out(parts.database, job), status_code=202, headers=headers)


def job_out(database: Database, job: Job) -> dict[str, Any]:
    """A job as the contract shows it, with its place in the queue and the resource it makes or fills."""
    position = None
    if job.status == "queued":
        with database.read() as session:
            position = jobs.queue_position(session, job)
    return {**jobs.job_view(job, position), "max_attempts": job.max_attempts, "resource": resource_out(job.resource_id)}


def current_job(database: Database, job_id: str) -> dict[str, Any]:
    """A job as it is now. Raises NotFound."""
    with database.read() as session:
        job = repositories.get(session, Job, job_id)
    return job_out(database, job)


def resource_out(resource_id: str) -> dict[str, str]:
    """Kind, id and path of a resource, told from the prefix of its id."""
    kind, path = _RESOURCES[resource_id.split("_", 1)[0]]
    return {"kind": kind, "id": resource_id, "href": f"/v1/{path}/{resource_id}"}


_RESOURCES = {
    "ds": ("dataset", "datasets"),
    "kn": ("knowledge", "knowledge"),
    "es": ("embedding_set", "embedding-sets"),
    "cl": ("classifier", "classifiers"),
    "pr": ("predictions", "predictions"),
}
