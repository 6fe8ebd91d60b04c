"""Jobs: list, follow (long-poll, Server-Sent Events), cancel, retry."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import redis
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from service.core import events, jobs, repositories
from service.core.errors import Conflict, Invalid, NotFound
from service.core.tables import Job
from service.deps import PagingDep, Parts, PartsDep
from service.json import FastJSON, dumps
from service.problems import documented
from service.schemas import JobOut, Page
from service.submit import job_out, submit

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
TERMINAL = ("succeeded", "failed", "cancelled")
STREAM_S = 600.0  # a stream ends after this long and tells the client to come back, so that they cannot pile up
POLL_S = 0.25
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
    return FastJSON(paging.out([job_out(parts, row) for row in rows], more, lambda: rows[-1].id))


@router.get("/{job_id}", response_model=JobOut, responses=documented(NotFound))
async def get_job(
    job_id: str,
    parts: PartsDep,
    wait: Annotated[float, Query(ge=0, le=60, description="Answer when the job has ended, at most this many s.")] = 0,
) -> Response:
    """One job; `?wait=30` answers as soon as it has ended, or after 30 s."""
    deadline = time.monotonic() + wait
    while True:
        view = await run_in_threadpool(_view, parts, job_id)
        if view["status"] in TERMINAL or time.monotonic() >= deadline:
            headers = {} if view["status"] in TERMINAL else {"Retry-After": "1"}
            return FastJSON(view, headers=headers)
        await asyncio.sleep(POLL_S)


@router.post("/{job_id}/cancel", status_code=202, response_model=JobOut, responses=documented(NotFound, Conflict))
def cancel_job(job_id: str, parts: PartsDep) -> Response:
    """Cancels a job: at once if it waits, within seconds if it runs."""
    with parts.database.write() as session:
        repositories.get(session, Job, job_id)
        job = jobs.request_cancel(session, job_id)
    events.publish_status(parts.redis, parts.database, job.id)
    return FastJSON(job_out(parts, job), status_code=202)


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
    request: Request,
    parts: PartsDep,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Server-Sent Events: `status` and `progress`; resumable with Last-Event-ID; `end` when the job has ended."""
    if last_event_id is not None and not _EVENT_ID.fullmatch(last_event_id):
        raise Invalid("Last-Event-ID is not an `id` that this stream gave out; leave it out to follow from now on.")
    cursor = last_event_id or await _newest_id(parts, job_id)  # before the state, so that nothing falls in between
    view = await run_in_threadpool(_view, parts, job_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    stream = _events(parts, request, view, cursor)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _events(parts: Parts, request: Request, view: dict[str, Any], cursor: str) -> AsyncIterator[bytes]:
    """The current state first, then what Redis tells; the database is asked when Redis is silent or away."""
    deadline = time.monotonic() + STREAM_S
    job_id = view["id"]
    yield _sse("status", view)
    while view["status"] not in TERMINAL and time.monotonic() < deadline:
        if await request.is_disconnected():
            return
        entries = await _next_events(parts, job_id, cursor)
        fresh = await run_in_threadpool(_view, parts, job_id)
        if fresh["status"] in TERMINAL:  # what was told before the end, and after the read above
            last = entries[-1].id if entries else cursor
            entries += await _next_events(parts, job_id, last, wait_ms=1)
        for entry in entries:
            cursor = entry.id
            if entry.event == "progress":
                yield _sse(entry.event, entry.data, entry.id)
        if fresh["status"] != view["status"] or (not entries and fresh["progress"] != view["progress"]):
            yield _sse("status", fresh, cursor)
        elif not entries:
            yield b": still here\n\n"
        view = fresh
    if view["status"] in TERMINAL:
        yield _sse("end", view)
    else:
        yield b"retry: 500\nevent: reconnect\ndata: {}\n\n"


async def _newest_id(parts: Parts, job_id: str) -> str:
    try:
        return events.newest_id(await parts.async_redis.xrevrange(events.key(job_id), count=1))
    except redis.RedisError:
        return "0-0"


async def _next_events(parts: Parts, job_id: str, cursor: str, wait_ms: int = 1000) -> list[events.Event]:
    """What came after `cursor`, waiting that long at most. Not in a thread: many streams wait at once."""
    try:
        return events.parse(await parts.async_redis.xread({events.key(job_id): cursor}, block=wait_ms))
    except redis.RedisError:
        await asyncio.sleep(1.0)
        return []


def _sse(event: str, data: Any, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event}\ndata: ".encode() + dumps(data) + b"\n\n"


def _view(parts: Parts, job_id: str) -> dict[str, Any]:
    with parts.database.read() as session:
        job = repositories.get(session, Job, job_id)
    return job_out(parts, job)
