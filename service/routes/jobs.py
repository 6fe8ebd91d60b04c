"""Jobs: list, follow (long-poll, Server-Sent Events), cancel, retry."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from service.core import events, jobs, repositories
from service.core.disconnect import unless_gone
from service.core.errors import Conflict, Invalid, NotFound
from service.core.jobs import TERMINAL
from service.core.tables import Job
from service.deps import PagingDep, Parts, PartsDep
from service.json import FastJSON, dumps
from service.problems import documented
from service.schemas import JobOut, Page
from service.submit import current_job, job_out, submit

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
STREAM_S = 600.0  # a stream ends after this long and tells the client to come back, so that they cannot pile up
_EVENT_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


@router.get("", response_model=Page[JobOut])
def list_jobs(
    parts: PartsDep,
    paging: PagingDep,
    status: Annotated[JobStatus | None, Query()] = None,
    resource_id: Annotated[str | None, Query(max_length=40, description="Jobs that make or fill this.")] = None,
) -> Response:
    """Jobs, newest first."""
    where = []
    if status is not None:
        where.append(Job.status == status)
    if resource_id is not None:
        where.append(Job.resource_id == resource_id)
    with parts.database.read() as session:
        rows, more = repositories.page(session, Job, limit=paging.limit, cursor=paging.after, where=where)
    return FastJSON(paging.out([job_out(parts.database, row) for row in rows], more, lambda: rows[-1].id))


@router.get("/{job_id}", response_model=JobOut, responses=documented(NotFound))
async def get_job(
    job_id: str,
    request: Request,
    parts: PartsDep,
    wait: Annotated[float, Query(ge=0, le=60, description="Answer when the job has ended, at most this many s.")] = 0,
) -> Response:
    """One job; `?wait=30` answers as soon as it has ended, or after 30 s."""
    view = await run_in_threadpool(current_job, parts.database, job_id)
    if wait and view["status"] not in TERMINAL:
        with suppress(TimeoutError):
            await asyncio.wait_for(unless_gone(request.receive, _ended(parts, job_id)), wait)
        view = await run_in_threadpool(current_job, parts.database, job_id)
    return FastJSON(view, headers={} if view["status"] in TERMINAL else {"Retry-After": "1"})


async def _ended(parts: Parts, job_id: str) -> None:
    async with parts.fanout.watch(job_id) as watch:
        while watch.state["status"] not in TERMINAL:
            await watch.next()


@router.post("/{job_id}/cancel", status_code=202, response_model=JobOut, responses=documented(NotFound, Conflict))
def cancel_job(job_id: str, parts: PartsDep) -> Response:
    """Cancels a job: at once if it waits, within seconds if it runs."""
    with parts.database.write() as session:
        repositories.get(session, Job, job_id)
        job = jobs.request_cancel(session, job_id)
    events.publish_status(parts.redis, parts.database, job.id)
    return FastJSON(job_out(parts.database, job), status_code=202)


@router.post("/{job_id}/retry", status_code=202, response_model=JobOut, responses=documented(NotFound, Conflict))
def retry_job(job_id: str, parts: PartsDep) -> Response:
    """Queues a failed or cancelled job again; finished steps are taken from the cache."""
    with parts.database.write() as session:
        repositories.get(session, Job, job_id)
        job = jobs.retry(session, job_id)
    events.publish_status(parts.redis, parts.database, job.id)
    return submit(parts, job)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **documented(NotFound)},
)
async def stream_events(
    job_id: str,
    parts: PartsDep,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Server-Sent Events: `status` and `progress`; resumable with Last-Event-ID; `end` when the job has ended."""
    if last_event_id is not None and not _EVENT_ID.fullmatch(last_event_id):
        raise Invalid("Last-Event-ID is not an `id` that this stream gave out; leave it out to follow from now on.")
    view = await run_in_threadpool(current_job, parts.database, job_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    stream = _events(parts, view, last_event_id)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _events(parts: Parts, view: dict[str, Any], after: str | None) -> AsyncIterator[bytes]:
    """The current state first, then what Redis tells; the state is looked at when Redis is silent or away."""
    deadline = time.monotonic() + STREAM_S
    if view["status"] in TERMINAL:
        yield _sse("status", view)
    else:
        async with parts.fanout.watch(view["id"], after) as watch:
            view = watch.state
            yield _sse("status", view)
            while view["status"] not in TERMINAL and time.monotonic() < deadline:
                entries, fresh = await watch.next(), watch.state
                news = [_sse(entry.event, entry.data, entry.id) for entry in entries if entry.event == "progress"]
                if fresh["status"] != view["status"] or (not entries and fresh["progress"] != view["progress"]):
                    news.append(_sse("status", fresh, watch.cursor))
                elif not entries:
                    news.append(b": still here\n\n")
                if news:
                    yield b"".join(news)
                view = fresh
    if view["status"] in TERMINAL:
        yield _sse("end", view)
    else:
        yield b"retry: 500\nevent: reconnect\ndata: {}\n\n"


def _sse(event: str, data: Any, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event}\ndata: ".encode() + dumps(data) + b"\n\n"
