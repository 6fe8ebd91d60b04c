"""Event streams and long-polls of many clients, over HTTP and against a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

import orjson
import pytest
from redis import Redis

from service.core import events
from service.core.embedded import EmbeddedValkey
from service.fanout import KEPT_EVENTS, LIVE_CONNECTIONS, PAST_CONNECTIONS, SILENCE_S
from tests.service.harness import LiveApi
from tests.service.test_fanout import publish, run, until


class Stream:
    """A client over a bare socket, which reads when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.ids: list[str] = []
        self.numbers: list[int] = []

    @classmethod
    async def open(cls, api: LiveApi, job_id: str, last_id: str | None = None, path: str = "/events") -> Self:
        """A client that has asked and been told the job's status."""
        stream = cls(*await asyncio.open_connection("127.0.0.1", api.port, limit=2**20))
        head = f"GET /v1/jobs/{job_id}{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        stream.writer.write((head + (f"Last-Event-ID: {last_id}\r\n" if last_id else "") + "\r\n").encode())
        if path == "/events":
            while not (await stream.reader.readline()).startswith(b"event: status"):
                pass
        return stream

    async def rest(self) -> Self:
        """Reads to the end of the job."""
        event_id = kind = ""
        while kind != "end":
            line = await self.reader.readline()
            assert line, "the stream broke off"
            name, _, value = line.decode().rstrip().partition(": ")
            if name == "id":
                event_id = value
            elif name == "event":
                kind = value
            elif name == "data" and kind == "progress":
                self.ids.append(event_id)
                self.numbers.append(orjson.loads(value)["completed"])
        self.writer.close()
        return self


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
        assert most - n_before <= LIVE_CONNECTIONS + PAST_CONNECTIONS
        for job_id in job_ids:
            api.set_job(job_id, status="succeeded")
        for stream in await asyncio.gather(*reading):
            assert stream.numbers == list(range(40))

    run(test)


def test_clients_that_come_in_the_middle_miss_and_repeat_nothing(live_api: LiveApi) -> None:
    redis, job_id = live_api.parts.redis, live_api.add_job("running")

    async def test() -> None:
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


def test_a_shutdown_does_not_wait_for_streams(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    job_id = api.add_job("running")

    async def test() -> None:
        stream = await Stream.open(api, job_id)
        began = time.monotonic()
        await asyncio.to_thread(api.close)
        assert time.monotonic() - began < 8  # of which streams have one second, and the service's threads the rest
        with suppress(ConnectionError):
            assert b"event: end" not in await stream.reader.read()
        stream.writer.close()

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
