"""Live events of jobs: one Redis stream a job. Losing Redis loses liveliness only; the state is in the database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
from redis import Redis, RedisError

from service.core import jobs
from service.core.db import Database
from service.core.logging import get_logger
from service.core.tables import Job

MAX_EVENTS = 1000
EXPIRY_S = 86_400
_log = get_logger(__name__)

Position = tuple[int, int]
"""An event's place in its stream. Ids in decimal do not sort; positions do."""
ORIGIN: Position = (0, 0)


@dataclass(frozen=True)
class Event:
    """One event; `id` is what a client hands back as `Last-Event-ID`."""

    id: str
    event: str  # status | progress
    data: dict[str, Any]


def key(job_id: str) -> str:
    """The name of the job's stream."""
    return f"unseen:events:{job_id}"


def position(event_id: str) -> Position:
    """The place of an id like '1700000000000-0'."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number)


def event_id(position: Position) -> str:
    """The id at that place."""
    return f"{position[0]}-{position[1]}"


def fields(event: str, data: dict[str, Any]) -> dict[Any, Any]:
    """An event as an entry of a stream."""
    return {"event": event, "data": orjson.dumps(data)}


def publish(redis: Redis, job_id: str, event: str, data: dict[str, Any]) -> str | None:
    """Appends an event and returns its id; None if Redis cannot take it."""
    try:
        with redis.pipeline(transaction=False) as pipeline:
            pipeline.xadd(key(job_id), fields(event, data), maxlen=MAX_EVENTS, approximate=True)
            pipeline.expire(key(job_id), EXPIRY_S)
            event_id = pipeline.execute()[0]
    except RedisError as error:
        _log.debug("event_lost", job_id=job_id, event_type=event, error=type(error).__name__)
        return None
    return str(event_id.decode() if isinstance(event_id, bytes) else event_id)


def publish_status(redis: Redis, database: Database, job_id: str) -> None:
    """Appends a `status` event with the job as it is now; call it after the commit that changed it."""
    with database.read() as session:
        job = session.get(Job, job_id)
        view = jobs.job_view(job, jobs.queue_position(session, job)) if job is not None else None
    if view is not None:
        publish(redis, job_id, "status", view)


def newest_id(answer: Any) -> str:
    """The id out of an XREVRANGE answer of one entry, '0-0' if there is none."""
    return str(answer[0][0].decode()) if answer else "0-0"


def parse(answer: Any) -> dict[str, list[Event]]:
    """Events by stream out of an XREAD answer, whether it came from a plain or an asyncio client."""
    streams = answer.items() if isinstance(answer, dict) else answer or []
    found = {}
    for name, entries in streams:
        # RESP3 wraps the entries of a stream once more.
        flat = entries[0] if entries and isinstance(entries[0], list) else entries
        found[name.decode()] = [_event(*entry) for entry in flat]
    return found


def _event(entry_id: bytes, entry: dict[bytes, bytes]) -> Event:
    try:
        return Event(entry_id.decode(), entry[b"event"].decode(), orjson.loads(entry[b"data"]))
    except (KeyError, ValueError):  # not written by this version; its neighbours are read on
        return Event(entry_id.decode(), "unknown", {})
