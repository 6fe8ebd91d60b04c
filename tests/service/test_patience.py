"""Connections on which no request comes are closed; those that wait for an answer are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from service.patience import protocol_with_patience

SECONDS = 10.0
Scenario = Callable[[Callable[[], Awaitable[None]], asyncio.Event, asyncio.Event, int], Awaitable[None]]


class SkippingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


def run(scenario: Scenario) -> None:
    """scenario: gets what lets `SECONDS` pass, what tells that a request has come, what has it answered, the port."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        come, answer = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            come.set()
            await answer.wait()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        async def wait() -> None:
            loop.skipped_s += SECONDS
            await asyncio.sleep(0.001)

        config = uvicorn.Config(app, lifespan="off", log_level="critical", timeout_keep_alive=1000)
        protocol = protocol_with_patience(SECONDS)
        server = await loop.create_server(
            lambda: protocol(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
        )
        await scenario(wait, come, answer, server.sockets[0].getsockname()[1])
        server.close()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(asyncio.wait_for(serve(), timeout=1000))


def test_a_connection_without_a_request_is_closed() -> None:
    async def scenario(wait: Callable[[], Awaitable[None]], come: Any, answer: Any, port: int) -> None:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: "):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            while not reader.at_eof():
                await wait()
            writer.close()
        assert not come.is_set()

    run(scenario)


def test_a_slow_answer_is_waited_for_and_a_next_request_that_never_ends_is_not() -> None:
    async def scenario(
        wait: Callable[[], Awaitable[None]], come: asyncio.Event, answer: asyncio.Event, port: int
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await come.wait()
        for _ in range(3):
            await wait()
        answer.set()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(b"GET / HTTP/1.1\r\n")
        while not reader.at_eof():
            await wait()
        writer.close()

    run(scenario)
