"""Follows jobs for many clients at once, with one connection to Redis and one look into the database.

While anybody watches, one task takes turns: a blocking XREAD over the streams of all watched jobs, then the state of
each job that was told about, is newly watched, or was not looked at for a second. Clients have no queues: a job's
newest events lie here once, each client has its place among them, and one that is behind them reads the stream itself.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis import ConnectionError as ConnectionLost
from redis import RedisError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.core import events, jobs
from service.core.events import Event, Position
from service.core.logging import get_logger

SILENCE_S = 1.0  # a client hears something about this often at least
KEPT_EVENTS = 256
BATCH = 100  # events of one job in one answer of Redis
LIVE_CONNECTIONS = 2  # the blocking read, and what ends it
PAST_CONNECTIONS = 2  # for clients that are behind: they cannot hold up the others
LOOKS = 20  # at states in one turn, beside those of jobs that were told about
_WAKE_EXPIRY_S = 60
_log = get_logger(__name__)

Json = dict[str, Any]


class _Feed:
    """A watched job: its newest events, and its state as it was read after them."""

    def __init__(self) -> None:
        self.n_watches = 0
        self.is_open = False
        self.start = self.end = events.ORIGIN  # `recent` has what came after `start`, up to `end`
        self.recent: deque[tuple[Position, Event]] = deque()
        self.state: Json = {}
        self.error: Exception | None = None
        self.n_begun = self.n_ended = 0  # turns
        self.n_news = 0  # turns of which all who watch should hear
        self.due = 0.0
        self._heard = 0.0
        self._turned = asyncio.Event()
        self._told = asyncio.Event()

    def open(self, position: Position) -> None:
        """What comes after `position` will be read."""
        self.is_open = True
        self.start = self.end = position

    def begin(self) -> None:
        """A turn begins: the state will be read."""
        self.n_begun += 1
        self.due = time.monotonic() + SILENCE_S

    def finish(self, told: Iterable[Event], state: Json | Exception) -> None:
        """The turn's events, and the state as it was read after them, or why it could not be read."""
        before = (self.end, self.state)
        for event in told:
            self.end = events.position(event.id)
            self.recent.append((self.end, event))
            if len(self.recent) > KEPT_EVENTS:
                self.start, _ = self.recent.popleft()
        self.error = state if isinstance(state, Exception) else None
        self.state = self.state if isinstance(state, Exception) else state
        self.n_ended = self.n_begun
        self._turned = _set_and_renewed(self._turned)
        now = time.monotonic()
        # A turn for the sake of somebody who comes is no reason to tell all others that nothing is new.
        if self.error or before != (self.end, self.state) or now - self._heard >= SILENCE_S:
            self._heard = now
            self.n_news += 1
            self._told = _set_and_renewed(self._told)

    async def next_turn(self) -> None:
        """Returns when a turn that began after this call has ended."""
        n_begun = self.n_begun
        while self.n_ended <= n_begun:
            await self._turned.wait()

    async def news(self, n_heard: int) -> None:
        """Returns when there are more news than `n_heard`."""
        while self.n_news <= n_heard:
            await self._told.wait()

    def after(self, position: Position) -> list[Event]:
        """The events after `position`, which is not before `start`."""
        found: list[Event] = []
        for at, event in reversed(self.recent):
            if at <= position:
                break
            found.append(event)
        return found[::-1]


class Watch:
    """One client's place among a job's events. `state` is the job as it was read after those given out so far."""

    def __init__(self, feed: _Feed, after: str | None, missed: Callable[[Position], Awaitable[list[Event]]]) -> None:
        self._feed = feed
        self._missed = missed
        self._position = feed.end if after is None else events.position(after)
        self._hear()

    @property
    def cursor(self) -> str:
        """The id of the last event given out; at first, where the client began."""
        return events.event_id(self._position)

    async def next(self) -> list[Event]:
        """The events after those given out, in order; [] if the state changed, or a second went by, without any.

        While Redis is away only the state is told. Raises what reading the state raised.
        """
        feed = self._feed
        while True:
            if self._position < feed.start:
                start = feed.start
                try:
                    missed = await self._missed(self._position)
                except RedisError:
                    await feed.news(self._n_heard)
                    self._hear()
                    return []
                if missed:
                    self._position = events.position(missed[-1].id)
                    return missed
                self._position = start  # the stream has dropped what lay between
            elif self._position < feed.end or self._n_heard < feed.n_news:
                found = feed.after(self._position)
                self._position = max(self._position, feed.end)
                self._hear()
                return found
            else:
                await feed.news(self._n_heard)

    def _hear(self) -> None:
        self._n_heard = self._feed.n_news
        self.state = self._feed.state
        if self._feed.error is not None:
            raise self._feed.error


class Fanout:
    """The watched jobs of this process. `state_of` reads a job from the database, in a thread."""

    def __init__(self, redis_url: str, state_of: Callable[[str], Json]) -> None:
        self._live = _client(redis_url, LIVE_CONNECTIONS)
        self._past = _client(redis_url, PAST_CONNECTIONS)
        self._state_of = state_of
        self._feeds: dict[str, _Feed] = {}
        self._changed = asyncio.Event()
        self._wake_key = f"unseen:wake:{secrets.token_hex(8)}"
        self._woken = "0-0"
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, job_id: str, after: str | None = None) -> AsyncIterator[Watch]:
        """Follows a job from the event `after` on, or from now on. Begins with its state, read after this call.

        Raises what reading the state raises.
        """
        feed = self._feeds.setdefault(job_id, _Feed())
        feed.n_watches += 1
        feed.due = 0.0
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            await feed.next_turn()
            yield Watch(feed, after, lambda position: self._missed(job_id, position))
        finally:
            feed.n_watches -= 1
            if not feed.n_watches:
                del self._feeds[job_id]

    async def close(self) -> None:
        """Ends the reading and closes the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._live.aclose()
        await self._past.aclose()

    async def _run(self) -> None:
        while self._feeds:
            self._changed.clear()
            try:
                await self._turn(dict(self._feeds))
            except Exception as error:  # none is known; those who watch must not wait for ever
                _log.exception("fanout_failed")
                for feed in self._feeds.values():
                    feed.begin()
                    feed.finish([], error)
                await asyncio.sleep(SILENCE_S)

    async def _turn(self, feeds: Mapping[str, _Feed]) -> None:
        try:
            told = await self._wait(feeds)
        except RedisError as error:
            _log.debug("events_unreadable", error=type(error).__name__)
            told = {}
            for feed in feeds.values():
                if not feed.is_open:
                    feed.open(events.ORIGIN)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _seconds_left(feeds))
        now = time.monotonic()
        looks = sorted((key for key in feeds if feeds[key].due <= now), key=lambda key: feeds[key].due)[:LOOKS]
        due = {key: feeds[key] for key in {*told, *looks} if feeds[key].n_watches}
        if not due:
            return
        for feed in due.values():
            feed.begin()
        states = await asyncio.to_thread(self._states, list(due))
        ended = {key: told.get(key, []) for key, state in states.items() if _is_terminal(state)}
        if ended:  # what was told before the end, and after the read above
            cursors = {key: some[-1].id if some else events.event_id(due[key].end) for key, some in ended.items()}
            with suppress(RedisError):
                for key, rest in (await self._read(self._live, cursors)).items():
                    told[key] = [*ended[key], *rest]
        for key, feed in due.items():
            feed.finish(told.get(key, []), states[key])

    async def _wait(self, feeds: Mapping[str, _Feed]) -> dict[str, list[Event]]:
        """New events by job, as soon as there are any, a look at a state is due, or somebody comes."""
        closed = {job_id: feed for job_id, feed in feeds.items() if not feed.is_open}
        if closed:
            async with self._live.pipeline(transaction=False) as pipeline:
                for job_id in closed:
                    pipeline.xrevrange(events.key(job_id), count=1)
                for feed, answer in zip(closed.values(), await pipeline.execute(), strict=True):
                    feed.open(events.position(events.newest_id(answer)))
        cursors = {job_id: events.event_id(feed.end) for job_id, feed in feeds.items()}
        block_ms = math.ceil(1000 * _seconds_left(feeds))
        if not block_ms:
            return await self._read(self._live, cursors, count=BATCH)
        reading = asyncio.ensure_future(self._read(self._live, cursors, count=BATCH, block_ms=block_ms))
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({reading, changing}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                with suppress(RedisError):
                    await self._wake()
            return await reading
        finally:
            reading.cancel()
            changing.cancel()
            await asyncio.wait({reading, changing})  # a read that is cut off closes its connection first

    async def _wake(self) -> None:
        """Ends the blocking read, or the next one."""
        async with self._live.pipeline(transaction=False) as pipeline:
            pipeline.xadd(self._wake_key, events.fields("wake", {}), maxlen=1, approximate=False)
            pipeline.expire(self._wake_key, _WAKE_EXPIRY_S)
            await pipeline.execute()

    async def _read(
        self, redis: Redis, cursors: Mapping[str, str], count: int | None = None, block_ms: int | None = None
    ) -> dict[str, list[Event]]:
        """Events by job after these cursors. Raises RedisError."""
        streams: dict[Any, Any] = {events.key(job_id): cursor for job_id, cursor in cursors.items()}
        if block_ms is not None:
            streams[self._wake_key] = self._woken
        found = events.parse(await redis.xread(streams, count=count, block=block_ms))
        if self._wake_key in found:
            self._woken = found.pop(self._wake_key)[-1].id
        return {job_id: found[events.key(job_id)] for job_id in cursors if events.key(job_id) in found}

    async def _missed(self, job_id: str, position: Position) -> list[Event]:
        found = await self._read(self._past, {job_id: events.event_id(position)}, count=BATCH)
        return found.get(job_id, [])

    def _states(self, job_ids: Iterable[str]) -> dict[str, Json | Exception]:
        states: dict[str, Json | Exception] = {}
        for job_id in job_ids:
            try:
                states[job_id] = self._state_of(job_id)
            except Exception as error:  # for those who watch this job
                states[job_id] = error
        return states


def _client(url: str, n_connections: int) -> Redis:
    """A client that waits for one of its connections, at most a second, and does not wait for a Redis that is away."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=n_connections,
        timeout=1,
        socket_connect_timeout=3,
        socket_timeout=3,
        retry=Retry(NoBackoff(), 1, (ConnectionLost,)),
    )
    return Redis.from_pool(pool)


def _seconds_left(feeds: Mapping[str, _Feed]) -> float:
    """Until the first look at a state is due."""
    return max(0.0, min(feed.due for feed in feeds.values()) - time.monotonic())


def _is_terminal(state: Json | Exception) -> bool:
    return not isinstance(state, Exception) and state["status"] in jobs.TERMINAL


def _set_and_renewed(event: asyncio.Event) -> asyncio.Event:
    event.set()
    return asyncio.Event()
