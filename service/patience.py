"""An end to connections on which no request comes: uvicorn itself waits forever for the end of a request's headers."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def protocol_with_patience(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which closes a connection whose first request has not all its headers after `seconds`.

    One that has been answered is closed when the next request's headers take once to twice as long. What requests cost
    does not change: each connection looks every `seconds` whether a request has come since it looked last.
    """

    class PatientProtocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._look, None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self, answered: object) -> None:
            """answered: the last request, if that had been answered at the last look; None before the first."""
            if self.cycle is answered:
                self.transport.close()
                return
            is_waiting = self.cycle is None or self.cycle.response_complete
            self._timer = self.loop.call_later(seconds, self._look, self.cycle if is_waiting else self)

    return PatientProtocol
