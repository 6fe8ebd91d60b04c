"""Work for a caller who may hang up: it is dropped then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")
CLIENT_GONE = 499
"""The status, in logs and between processes, of an answer that nobody is there to read."""


class CallerGone(Exception):
    """Nobody waits for the answer any more."""


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and CallerGone raised, when the caller hangs up first.

    receive: ASGI's channel of a request whose body has been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone
        return working.result()
    finally:
        watching.cancel()
        working.cancel()  # does nothing to one that is done


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
