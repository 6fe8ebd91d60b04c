"""Many clients that follow jobs through one connection to a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service import fanout as fanout_module
from service.core import events
from service.core.embedded import EmbeddedValkey
from service.core.errors import NotFound
from service.fanout import CONNECTIONS, KEPT_EVENTS, SILENCE_S, Fanout, Watch
from tests.service.harness import LiveApi

JOB, OTHER = "job_one", "job_two"


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server that nobody else talks to, and that the test may stop."""
    server = EmbeddedValkey(tmp_path / "valkey", tmp_path / "s")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(own_valkey: EmbeddedValkey) -> Iterator[Redis]:
    """The test's own connection to it."""
    with Redis.from_url(own_valkey.url) as client:
        yield client


class States:
    """Stands for the database: what a job's state is, and how often it was asked for."""

    def __init__(self) -> None:
        self.status = "running"
        self.broken: set[str] = set()
        self.n_reads = 0

    def __call__(self, job_id: str) -> dict[str, Any]:
        """The state of any job."""
        self.n_reads += 1
        if job_id in self.broken:
            raise NotFound("There is no such job.")
        return {"id": job_id, "status": self.status}


@asynccontextmanager
async def fanned_out(url: str, states: States | None = None) -> AsyncIterator[Fanout]:
    """One for this event loop."""
    fanout = Fanout(url, states or States())
    try:
        yield fanout
    finally:
        await fanout.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """The test in a loop of its own, not for ever."""
    asyncio.run(asyncio.wait_for(test(), 60))


def publish(redis: Redis, numbers: range, job_id: str = JOB, **more: Any) -> list[str]:
    """Events with these numbers; their ids."""
    ids = [events.publish(redis, job_id, "progress", {"completed": number, **more}) for number in numbers]
    assert None not in ids
    return [str(event_id) for event_id in ids]


async def take(watch: Watch, n_events: int) -> list[int]:
    """The numbers of so many events, or of more if they come together."""
    found: list[int] = []
    while len(found) < n_events:
        found += [event.data["completed"] for event in await watch.next()]
    return found


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def n_reads(redis: Redis) -> int:
    """How many XREADs the server has carried out."""
    stats: Any = redis.info("commandstats")
    return int(stats.get("cmdstat_xread", {"calls": 0})["calls"])


class Stream:
    """A client over a bare socket, which reads when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.ids: list[str] = []
        self.numbers: list[int] = []

    @classmethod
    async def open(cls, api: LiveApi, job_id: str, last_id: str | None = None, path: str = "/events") -> Stream:
        """A client that has asked and been told the job's status."""
        stream = cls(*await asyncio.open_connection("127.0.0.1", api.port, limit=2**20))
        head = f"GET /v1/jobs/{job_id}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        stream.writer.write((head + (f"Last-Event-ID: {last_id}\r\n" if last_id else "") + "\r\n").encode())
        if path == "/events":
            while not (await stream.reader.readline()).startswith(b"event: status"):
                pass
        return stream

    async def rest(self) -> Stream:
        """Reads to the end of the job."""
        event_id = ""
        while not (line := (await self.reader.readline()).decode()).startswith("event: end"):
            assert line, "the stream broke off"
            name, _, value = line.strip().partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and '"completed"' in value and '"status"' not in value:
                self.ids.append(event_id)
                self.numbers.append(int(value.partition('"completed":')[2].partition(",")[0].rstrip("}")))
        self.writer.close()
        return self


# ---- over HTTP --------------------------------------------------------------------------------


def test_fifty_clients_take_as_many_connections_as_one(
    start_api: Callable[..., LiveApi], own_valkey: EmbeddedValkey, own_redis: Redis
) -> None:
    api = start_api(redis_url=own_valkey.url)
    job_ids = [api.add_job("running") for _ in range(3)]

    async def test() -> None:
        n_before = len(own_redis.client_list())
        streams = await asyncio.gather(*(Stream.open(api, job_ids[number % 3]) for number in range(50)))
        reading = [asyncio.create_task(stream.rest()) for stream in streams]
        most = 0
        for number in range(40):
            for job_id in job_ids:
                publish(own_redis, range(number, number + 1), job_id)
            most = max(most, len(own_redis.client_list()))
            await asyncio.sleep(0.01)
        assert most - n_before <= CONNECTIONS
        for job_id in job_ids:
            api.set_job(job_id, status="succeeded")
        for stream in await asyncio.gather(*reading):
            assert stream.numbers == list(range(40))

    run(test)


def test_clients_that_come_in_the_middle_miss_and_repeat_nothing(live_api: LiveApi) -> None:
    redis, job_id = live_api.parts.redis, live_api.add_job("running")

    async def test() -> None:
        ids = publish(redis, range(KEPT_EVENTS))
        ids = publish(redis, range(400), job_id)
        reading = []
        for number in range(400, 520):  # some are behind what is kept, some are not, and more is told meanwhile
            if number % 10 == 0:
                opening = Stream.open(live_api, job_id, ids[3 * (number - 400)])
                reading.append(asyncio.create_task(_all(opening)))
            ids += publish(redis, range(number, number + 1), job_id)
            await asyncio.sleep(0.005)
        live_api.set_job(job_id, status="failed")
        for number, stream in enumerate(await asyncio.gather(*reading)):
            assert stream.ids == ids[30 * number + 1 :]
            assert stream.numbers == list(range(30 * number + 1, 520))

    async def _all(opening: Coroutine[Any, Any, Stream]) -> Stream:
        return await (await opening).rest()

    run(test)


def test_a_client_that_does_not_read_holds_up_nobody_and_loses_nothing(live_api: LiveApi) -> None:
    redis, job_id = live_api.parts.redis, live_api.add_job("running")

    async def test() -> None:
        slow = await Stream.open(live_api, job_id)
        quick = asyncio.create_task((await Stream.open(live_api, job_id)).rest())
        for number in range(0, 800, 20):  # 16 MB, more than sockets hold
            await asyncio.to_thread(publish, redis, range(number, number + 20), job_id, text="x" * 20_000)
        (feed,) = live_api.parts.fanout._feeds.values()
        assert len(feed.recent) == KEPT_EVENTS
        live_api.set_job(job_id, status="succeeded")
        assert (await quick).numbers == list(range(800))
        assert (await slow.rest()).numbers == list(range(800))

    run(test)


@pytest.mark.parametrize("path", ["/events", "?wait=60"])
def test_a_client_that_hangs_up_is_forgotten(live_api: LiveApi, path: str) -> None:
    job_id, fanout = live_api.add_job("running"), live_api.parts.fanout

    async def test() -> None:
        stream = await Stream.open(live_api, job_id, path=path)
        await until(lambda: job_id in fanout._feeds)
        stream.writer.close()
        await until(lambda: not fanout._feeds, timeout_s=0.9 * SILENCE_S)

    run(test)


def test_a_long_poll_hears_of_the_end_at_once(live_api: LiveApi) -> None:
    job_id = live_api.add_job("running")

    async def test() -> None:
        poll = await Stream.open(live_api, job_id, path="?wait=60")
        await asyncio.sleep(0.3)  # the look at the state that comes by itself is 0.7 s away
        began = time.monotonic()
        live_api.set_job(job_id, status="succeeded")
        events.publish_status(live_api.parts.redis, live_api.parts.database, job_id)
        assert b'"status":"succeeded"' in await poll.reader.read()
        assert time.monotonic() - began < 0.5 * SILENCE_S
        poll.writer.close()

    run(test)


# ---- by itself --------------------------------------------------------------------------------


def test_processes_read_for_themselves(redis: Redis, valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        async with (
            fanned_out(valkey.url) as one,
            fanned_out(valkey.url) as two,
            one.watch(JOB) as first,
            two.watch(JOB) as second,
            two.watch(JOB, "0-0") as third,
        ):
            publish(redis, range(300))
            for watch in (first, second, third):
                assert await take(watch, 300) == list(range(300))

    run(test)


def test_who_comes_wakes_the_reader(redis: Redis, valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        async with fanned_out(valkey.url) as fanout, fanout.watch(JOB):
            for number in range(5):
                await asyncio.sleep(0.1)  # by now it waits for JOB alone
                began = time.monotonic()
                async with fanout.watch(f"{OTHER}{number}") as watch:
                    publish(redis, range(1), f"{OTHER}{number}")
                    assert await take(watch, 1) == [0]
                assert time.monotonic() - began < 0.5 * SILENCE_S
        assert redis.ttl(fanout._wake_key) > 0

    run(test)


def test_what_nobody_watches_is_not_read(own_redis: Redis, own_valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        async with fanned_out(own_valkey.url) as fanout:
            assert n_reads(own_redis) == 0
            async with fanout.watch(OTHER) as watch:
                async with fanout.watch(JOB):
                    pass
                await watch.next()  # a second later
                with own_redis.monitor() as monitor:
                    command = await asyncio.to_thread(_next_read, monitor)
                assert events.key(OTHER) in command
                assert events.key(JOB) not in command
            task = fanout._task
            assert task is not None
            await until(task.done, 2 * SILENCE_S)
            n_read = n_reads(own_redis)
            await asyncio.sleep(1.5 * SILENCE_S)
            assert n_reads(own_redis) == n_read
            async with fanout.watch(JOB) as watch:
                publish(own_redis, range(3))
                assert await take(watch, 3) == [0, 1, 2]

    def _next_read(monitor: Any) -> str:
        return next(str(seen["command"]) for seen in monitor.listen() if seen["command"].lower().startswith("xread"))

    run(test)


def test_a_server_that_restarts_loses_and_repeats_nothing(own_redis: Redis, own_valkey: EmbeddedValkey) -> None:
    states = States()

    async def test() -> None:
        async with fanned_out(own_valkey.url, states) as fanout, fanout.watch(JOB) as watch:
            publish(own_redis, range(400))
            assert await take(watch, 400) == list(range(400))
            await asyncio.to_thread(own_valkey.stop)
            states.status = "cancelling"
            while watch.state["status"] != "cancelling":
                assert await watch.next() == []
            assert await watch.next() == []  # a sign of life
            async with fanout.watch(JOB) as late:  # who comes now is told the state, and of events when there are any
                assert late.state["status"] == "cancelling"
                assert await late.next() == []
                await asyncio.to_thread(own_valkey.start)
                publish(own_redis, range(400, 420))
                assert await take(watch, 20) == list(range(400, 420))
                assert (await take(late, 20))[-20:] == list(range(400, 420))

    run(test)


def test_a_client_behind_waits_while_redis_is_away(own_redis: Redis, own_valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        async with fanned_out(own_valkey.url) as fanout:
            publish(own_redis, range(300))
            async with fanout.watch(JOB, "0-0") as watch:
                await asyncio.to_thread(own_valkey.stop)
                for _ in range(2):
                    assert await watch.next() == []
                await asyncio.to_thread(own_valkey.start)
                assert await take(watch, 300) == list(range(300))

    run(test)


def test_what_the_stream_has_dropped_is_passed_over(redis: Redis, valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        publish(redis, range(10))
        redis.xtrim(events.key(JOB), maxlen=0, approximate=False)
        async with fanned_out(valkey.url) as fanout, fanout.watch(JOB, "1-0") as watch:
            publish(redis, range(10, 12))
            assert await take(watch, 2) == [10, 11]
            assert watch.cursor == events.event_id(fanout._feeds[JOB].end)

    run(test)


def test_a_cursor_from_the_future_harms_nobody_else(redis: Redis, valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        async with (
            fanned_out(valkey.url) as fanout,
            fanout.watch(JOB, "99999999999999999999-0") as ahead,
            fanout.watch(JOB) as watch,
        ):
            publish(redis, range(2))
            assert await take(watch, 2) == [0, 1]
            assert await ahead.next() == []

    run(test)


def test_states_are_read_once_for_all(redis: Redis, valkey: EmbeddedValkey) -> None:
    states = States()

    async def test() -> None:
        async with fanned_out(valkey.url, states) as fanout, fanout.watch(JOB) as watch:
            others = [fanout.watch(JOB) for _ in range(50)]
            await asyncio.gather(*(other.__aenter__() for other in others))
            assert states.n_reads <= 5
            # That others came was nothing to tell: it is a second since it heard something.
            began = time.monotonic()
            assert await watch.next() == []
            assert time.monotonic() - began > 0.5 * SILENCE_S
            await asyncio.gather(*(other.__aexit__(None, None, None) for other in others))

    run(test)


def test_a_state_that_cannot_be_read_is_a_matter_of_its_job(redis: Redis, valkey: EmbeddedValkey) -> None:
    states = States()
    states.broken = {OTHER}

    async def test() -> None:
        async with fanned_out(valkey.url, states) as fanout, fanout.watch(JOB) as watch:
            with pytest.raises(NotFound):
                async with fanout.watch(OTHER):
                    pass
            assert list(fanout._feeds) == [JOB]
            publish(redis, range(2))
            assert await take(watch, 2) == [0, 1]
            states.broken = {JOB}
            with pytest.raises(NotFound):
                await take(watch, 1)

    run(test)


def test_a_failure_of_the_reader_reaches_those_who_wait(
    redis: Redis, valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout_module, "SILENCE_S", 0.2)

    async def test() -> None:
        async with fanned_out(valkey.url) as fanout:
            with pytest.raises(UnicodeEncodeError):
                async with fanout.watch("job_\ud800"):  # cannot be sent
                    pass
            async with fanout.watch(JOB) as watch:
                publish(redis, range(2))
                assert await take(watch, 2) == [0, 1]

    run(test)
