"""Many clients that follow jobs through one connection to a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis import Redis

from service import fanout as fanout_module
from service.core import events
from service.core.embedded import EmbeddedValkey
from service.core.errors import NotFound
from service.fanout import LOOKS, PAST_CONNECTIONS, SILENCE_S, Fanout, Watch

JOB, OTHER = "job_one", "job_two"


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


def test_clients_behind_hold_up_nobody(redis: Redis, valkey: EmbeddedValkey) -> None:
    async def test() -> None:
        publish(redis, range(300))
        async with fanned_out(valkey.url) as fanout, fanout.watch(JOB, "0-0") as behind, fanout.watch(JOB) as watch:
            pool = fanout._past.connection_pool
            taken = [await pool.get_connection() for _ in range(PAST_CONNECTIONS)]  # as if others were reading
            publish(redis, range(300, 310))
            assert await take(watch, 10) == list(range(300, 310))
            assert await behind.next() == []
            for connection in taken:
                await pool.release(connection)
            assert await take(behind, 310) == list(range(310))

    run(test)


def test_more_silent_jobs_than_one_turn_looks_at(redis: Redis, valkey: EmbeddedValkey) -> None:
    states = States()

    async def test() -> None:
        async with fanned_out(valkey.url, states) as fanout, AsyncExitStack() as stack:
            comers = [stack.enter_async_context(fanout.watch(f"job_{number}")) for number in range(3 * LOOKS)]
            watches = await asyncio.gather(*comers)
            states.status = "cancelling"
            for watch in watches:
                while watch.state["status"] != "cancelling":
                    assert await watch.next() == []

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
    key = fanout_module.events.key

    def broken(job_id: str) -> str:
        if job_id != JOB:
            raise LookupError(job_id)
        return key(job_id)

    monkeypatch.setattr(fanout_module.events, "key", broken)

    async def test() -> None:
        async with fanned_out(valkey.url) as fanout:
            with pytest.raises(LookupError):
                async with fanout.watch("job_other"):
                    pass
            async with fanout.watch(JOB) as watch:
                publish(redis, range(2))
                assert await take(watch, 2) == [0, 1]

    run(test)
