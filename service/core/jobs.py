"""Jobs: every change of state, as a compare-and-set on one row.

queued ──► running ──► succeeded | failed | cancelled        (terminal states are final)
   │          └─► cancelling ──► cancelled | failed
   └─► cancelled                                              failed | cancelled ──retry──► queued

An attempt is known by its `token`, which grows by one with each claim. Whoever writes for an attempt must still hold
the newest token; the functions below raise `StaleAttempt` otherwise, inside the transaction that was to publish the
results, so that nothing of a stale attempt becomes visible. Nothing here knows Redis or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, CursorResult, func, select, union_all, update
from sqlalchemy.orm import Session

from models.errors import Cancelled
from service.core.db import utc_now
from service.core.errors import Conflict, NotFound, WorkerLost, problem_of
from service.core.ids import new_id
from service.core.tables import Classifier, Dataset, EmbeddingSet, Job, Knowledge, PredictionSet

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE = ("running", "cancelling")
_UNFINISHED_RESOURCE = ("queued", "importing")
# What a job makes, by the prefix of its id, and the status it has until the job ends.
_MADE: dict[str, tuple[type[EmbeddingSet] | type[Classifier] | type[PredictionSet] | type[Knowledge], str]] = {
    "es": (EmbeddingSet, "queued"),
    "cl": (Classifier, "queued"),
    "pr": (PredictionSet, "queued"),
    "kn": (Knowledge, "importing"),
}


class StaleAttempt(Exception):
    """This attempt of the job is over: another one runs, or the job has ended. Publish nothing."""


def create_job(session: Session, kind: str, resource_id: str, payload: dict[str, Any], max_attempts: int = 3) -> Job:
    """Adds a queued job. If `resource_id` names an unfinished row that has no job yet, the row gets this one's id."""
    job = Job(id=new_id("job"), kind=kind, resource_id=resource_id, payload=payload, max_attempts=max_attempts)
    job.status, job.progress, job.attempts, job.token = "queued", {}, 0, 0
    job.created_at = job.queued_at = utc_now()
    session.add(job)
    session.flush()
    made = _MADE.get(resource_id.split("_", 1)[0])
    if made is not None:
        table = made[0]
        unowned = (table.id == resource_id) & table.job_id.is_(None) & table.status.in_(_UNFINISHED_RESOURCE)
        session.execute(update(table).where(unowned).values(job_id=job.id))
    return job


def has_resource() -> ColumnElement[bool]:
    """Of jobs: what they make or fill has not been deleted."""
    ids = (select(table.id) for table in (Dataset, Knowledge, EmbeddingSet, Classifier, PredictionSet))
    return Job.resource_id.in_(union_all(*ids))


def get_job(session: Session, job_id: str) -> Job:
    """The job; `NotFound` if there is none."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def claim(session: Session, job_id: str, worker_id: str) -> Job | None:
    """Starts an attempt: queued to running. None if the job is not queued (taken, ended, unknown)."""
    now = utc_now()
    values = {
        "status": "running",
        "worker_id": worker_id,
        "attempts": Job.attempts + 1,
        "token": Job.token + 1,
        "heartbeat_at": now,
        "started_at": func.coalesce(Job.started_at, now),
    }
    return _reloaded(session, job_id) if _move(session, job_id, ("queued",), values) else None


def heartbeat(session: Session, job_id: str, token: int) -> str:
    """A sign of life of an attempt; answers the job's status: 'running' or 'cancelling'."""
    _update_attempt(session, job_id, token, ACTIVE, heartbeat_at=utc_now())
    return _status(session, job_id)


def report_progress(session: Session, job_id: str, token: int, progress: dict[str, Any]) -> bool:
    """Stores progress (also a sign of life); False if a cancel was asked for, so the attempt should stop."""
    _update_attempt(session, job_id, token, ACTIVE, progress=progress, heartbeat_at=utc_now())
    return _status(session, job_id) == "running"


def set_payload(session: Session, job_id: str, token: int, payload: dict[str, Any]) -> None:
    """What the next attempt is given (also a sign of life)."""
    _update_attempt(session, job_id, token, ACTIVE, payload=payload, heartbeat_at=utc_now())


def hold(session: Session, job_id: str, token: int) -> None:
    """Call first in the transaction that publishes results: nobody else can end or restart the job until it ends.

    Raises `StaleAttempt` if the attempt is over and `Cancelled` if a cancel was asked for meanwhile.
    """
    if heartbeat(session, job_id, token) == "cancelling":
        raise Cancelled


def finish(session: Session, job_id: str, token: int, result: dict[str, Any]) -> None:
    """The attempt succeeded. A cancel that came before wins: raises `Cancelled`, and nothing is published."""
    hold(session, job_id, token)
    progress = {**(get_job(session, job_id).progress or {}), "fraction": 1.0, "eta_s": 0.0}
    _update_attempt(
        session,
        job_id,
        token,
        ("running",),
        status="succeeded",
        result=result,
        progress=progress,
        finished_at=utc_now(),
    )


def fail(session: Session, job_id: str, token: int, problem: dict[str, Any]) -> None:
    """The attempt failed for good; what it was to make becomes 'failed' in the same transaction."""
    _update_attempt(session, job_id, token, ACTIVE, status="failed", error=problem, finished_at=utc_now())
    _set_resource(session, job_id, _UNFINISHED_RESOURCE, "failed")


def cancelled(session: Session, job_id: str, token: int) -> None:
    """The attempt stopped because a cancel was asked for."""
    _update_attempt(session, job_id, token, ACTIVE, status="cancelled", finished_at=utc_now())
    _set_resource(session, job_id, _UNFINISHED_RESOURCE, "failed")


def request_cancel(session: Session, job_id: str) -> Job:
    """Cancels a queued job at once and asks a running one to stop; `Conflict` if the job has ended."""
    now = utc_now()
    ended = {"status": "cancelled", "cancel_requested_at": now, "finished_at": now}
    if _move(session, job_id, ("queued",), ended):
        _set_resource(session, job_id, _UNFINISHED_RESOURCE, "failed")
        return _reloaded(session, job_id)
    _move(session, job_id, ("running",), {"status": "cancelling", "cancel_requested_at": now})
    job = _reloaded(session, job_id)
    if job.status in TERMINAL:
        raise Conflict(f"Job {job_id} has already ended ({job.status}); only queued and running jobs can be cancelled.")
    return job


def retry(session: Session, job_id: str) -> Job:
    """Queues a failed or cancelled job again with fresh attempts; `Conflict` in any other state, `NotFound` where what
    it was to make or fill has been deleted."""
    fresh = {
        "status": "queued",
        "attempts": 0,
        "progress": {},
        "error": None,
        "worker_id": None,
        "queued_at": utc_now(),
        "started_at": None,
        "finished_at": None,
        "cancel_requested_at": None,
    }
    is_queued_again = _move(session, job_id, ("failed", "cancelled"), fresh, has_resource())
    job = _reloaded(session, job_id)
    if not is_queued_again:
        if job.status in ("failed", "cancelled"):
            raise NotFound(f"Job {job_id} cannot be retried: {job.resource_id!r} has been deleted.")
        raise Conflict(f"Job {job_id} is {job.status}; only failed and cancelled jobs can be retried.")
    _set_resource(session, job_id, ("failed",), None)
    return job


def release(
    session: Session,
    job_id: str,
    token: int,
    reason: str,
    *,
    counted: bool = True,
    problem: dict[str, Any] | None = None,
) -> Literal["queued", "failed", "cancelled"]:
    """Ends an attempt whose worker is gone: back to the queue, or failed when no attempt is left.

    `reason` is a sentence for the job's owner, `problem` what to show instead when the last attempt met a known error.
    With `counted=False` (an orderly shutdown) the attempt costs nothing. A job that was to be cancelled is cancelled.
    """
    if heartbeat(session, job_id, token) == "cancelling":
        cancelled(session, job_id, token)
        return "cancelled"
    job = _reloaded(session, job_id)
    if counted and job.attempts >= job.max_attempts:
        lost = WorkerLost(f"The job was tried {job.attempts} times and never ended. The last time: {reason}")
        fail(session, job_id, token, problem or problem_of(lost))
        return "failed"
    attempts = job.attempts if counted else max(job.attempts - 1, 0)
    _update_attempt(
        session, job_id, token, ("running",), status="queued", worker_id=None, attempts=attempts, queued_at=utc_now()
    )
    return "queued"


def queue_position(session: Session, job: Job) -> int | None:
    """How many queued jobs come before this one (0: next); None if it is not queued."""
    if job.status != "queued":
        return None
    before = (Job.queued_at < job.queued_at) | ((Job.queued_at == job.queued_at) & (Job.id < job.id))
    return session.scalar(select(func.count()).select_from(Job).where(Job.status == "queued", before)) or 0


def unended_jobs(session: Session, statuses: Sequence[str]) -> list[Job]:
    """Every job in one of these states, oldest first."""
    return list(session.scalars(select(Job).where(Job.status.in_(statuses)).order_by(Job.queued_at, Job.id)))


def oldest_unended(session: Session) -> datetime | None:
    """When the oldest job that has not ended was created."""
    return session.scalar(select(func.min(Job.created_at)).where(Job.status.not_in(TERMINAL)))


def job_view(job: Job, queue_position: int | None) -> dict[str, Any]:
    """The job as the REST contract shows it."""
    return {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "progress": progress_view(job.progress),
        "queue_position": queue_position,
        "attempts": job.attempts,
        "created_at": _timestamp(job.created_at),
        "started_at": _timestamp(job.started_at),
        "finished_at": _timestamp(job.finished_at),
        "result": job.result,
        "error": job.error,
    }


def progress_view(progress: dict[str, Any] | None) -> dict[str, Any]:
    """Progress with every field of the contract present."""
    empty: dict[str, Any] = {
        "phase": None,
        "completed": 0,
        "total": None,
        "fraction": 0.0,
        "eta_s": None,
        "phases": [],
    }
    return {**empty, **(progress or {})}


def _timestamp(when: datetime | None) -> str | None:
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z") if when is not None else None


def _move(session: Session, job_id: str, statuses: Sequence[str], values: dict[str, Any], *more: Any) -> bool:
    """The compare-and-set that all of this rests on: True if the job was in one of `statuses` (and `more` held)."""
    session.flush()
    condition = (Job.id == job_id, Job.status.in_(statuses), *more)
    result = session.execute(update(Job).where(*condition).values(values).execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return bool(result.rowcount)


def _reloaded(session: Session, job_id: str) -> Job:
    """The row as it is now, past whatever the session remembers."""
    job = session.scalar(select(Job).where(Job.id == job_id).execution_options(populate_existing=True))
    if job is None:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


def _status(session: Session, job_id: str) -> str:
    return session.scalar(select(Job.status).where(Job.id == job_id)) or ""


def _update_attempt(session: Session, job_id: str, token: int, statuses: Sequence[str], **values: Any) -> None:
    if not _move(session, job_id, statuses, values, Job.token == token):
        raise StaleAttempt(f"Attempt {token} of job {job_id} is over.")


def _set_resource(session: Session, job_id: str, when: Sequence[str], status: str | None) -> None:
    """Moves what the job makes (never what it only uses) from one of `when` to `status`; None: its waiting status."""
    resource_id = session.scalar(select(Job.resource_id).where(Job.id == job_id)) or ""
    made = _MADE.get(resource_id.split("_", 1)[0])
    if made is None:
        return
    table, waiting = made
    mine = (table.id == resource_id) & (table.job_id == job_id) & table.status.in_(when)
    session.execute(update(table).where(mine).values(status=status or waiting))
