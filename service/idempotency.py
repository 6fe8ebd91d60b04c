"""Idempotency-Key on every POST: same key and body, same answer; other body, 422; still in flight, 409."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.db import Database, utc_now
from service.core.errors import Conflict, Invalid
from service.core.tables import IdempotencyKey
from service.problems import problem_response

LEASE_S = 30.0  # a key held by a process that died is free again after this long
MAX_STORED_BYTES = 16 * 2**20


class Idempotency:
    """ASGI layer: records the answer of a POST with a key in the database and replays it."""

    def __init__(self, app: ASGIApp, *, database: Callable[[], Database]) -> None:
        self.app = app
        self.database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = _header(scope, b"idempotency-key") if scope["type"] == "http" and scope["method"] == "POST" else None
        if header is None:
            await self.app(scope, receive, send)
            return
        if not 1 <= len(header) <= 200:
            error = Invalid("Idempotency-Key must have 1 to 200 characters.")
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        caller = scope.get("state", {}).get("caller", "anonymous")
        query = scope.get("query_string", b"").decode("latin-1")
        digest = hashlib.sha256(f"{caller}\n{scope['path']}?{query}\n{header}".encode()).hexdigest()
        claimed = await run_in_threadpool(self._claim, digest)
        if claimed is None:
            await self._run(digest, scope, receive, send)
        elif claimed.status is None:
            error_409 = Conflict(
                "A request with this Idempotency-Key is still in flight; wait for its answer.", retry_after_s=1
            )
            await problem_response(error_409, scope["path"])(scope, receive, send)
        else:
            await self._replay(claimed, scope, receive, send)

    def _claim(self, digest: str) -> IdempotencyKey | None:
        """None: the key is ours now. Otherwise the row that holds it."""
        try:
            with self.database().write() as session:
                row = session.get(IdempotencyKey, digest)
                now = utc_now()
                if row is not None and (row.status is not None or row.locked_until > now):
                    return row
                if row is not None:
                    session.delete(row)
                    session.flush()
                session.add(IdempotencyKey(key=digest, locked_until=now + timedelta(seconds=LEASE_S)))
                return None
        except IntegrityError:  # another process was quicker
            return IdempotencyKey(key=digest, status=None)

    async def _run(self, digest: str, scope: Scope, receive: Receive, send: Send) -> None:
        body_hash = hashlib.sha256()
        start: dict[str, Any] = {}
        answer = bytearray()
        more = True

        async def hashing_receive() -> Message:
            nonlocal more
            message = await receive()
            if message["type"] == "http.request":
                body_hash.update(message.get("body", b""))
                more = message.get("more_body", False)
            return message

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                answer.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    # Recorded before the last byte leaves: whoever saw the answer can have it again.
                    while more:
                        if (await hashing_receive())["type"] == "http.disconnect":
                            break
                    await run_in_threadpool(self._finish, digest, body_hash.hexdigest(), start, bytes(answer))
            await send(message)

        renewal = asyncio.create_task(self._renew(digest))
        try:
            await self.app(scope, hashing_receive, recording_send)
        finally:
            renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewal
            await run_in_threadpool(self._release, digest)

    async def _renew(self, digest: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await run_in_threadpool(self._extend, digest)

    def _extend(self, digest: str) -> None:
        with self.database().write() as session:
            row = session.get(IdempotencyKey, digest)
            if row is not None and row.status is None:
                row.locked_until = utc_now() + timedelta(seconds=LEASE_S)

    def _finish(self, digest: str, body_sha256: str, start: dict[str, Any], body: bytes) -> None:
        status = int(start.get("status", 500))
        with self.database().write() as session:
            row = session.get(IdempotencyKey, digest)
            if row is None:
                return
            if status >= 500 or status in (408, 409, 413, 429) or len(body) > MAX_STORED_BYTES:
                session.delete(row)  # nothing was decided: the same key may try again
                return
            kept = {b"content-type", b"location", b"retry-after"}
            row.headers = {n.decode(): v.decode("latin-1") for n, v in start.get("headers", []) if n.lower() in kept}
            row.body_sha256, row.status, row.body = body_sha256, status, body

    def _release(self, digest: str) -> None:
        """Frees a key whose request ended without an answer."""
        with self.database().write() as session:
            row = session.get(IdempotencyKey, digest)
            if row is not None and row.status is None:
                session.delete(row)

    async def _replay(self, row: IdempotencyKey, scope: Scope, receive: Receive, send: Send) -> None:
        body_hash = hashlib.sha256()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body_hash.update(message.get("body", b""))
            if not message.get("more_body", False):
                break
        if body_hash.hexdigest() != row.body_sha256:
            error = Invalid("This Idempotency-Key was used with another body. Use a fresh key for a different request.")
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        headers = [(n.encode(), v.encode("latin-1")) for n, v in row.headers.items()]
        body = row.body or b""
        headers += [(b"content-length", str(len(body)).encode()), (b"idempotent-replayed", b"true")]
        await send({"type": "http.response.start", "status": row.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
