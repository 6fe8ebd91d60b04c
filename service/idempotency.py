"""Idempotency-Key on every POST: same key and body, same answer; other body, 422; still in flight, 409."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from datetime import timedelta

import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.db import Database, utc_now
from service.core.errors import Conflict, Invalid, ServiceError
from service.core.tables import IdempotencyKey
from service.problems import problem_response

LEASE_S = 30.0  # a key held by a process that died is free again after this long
MAX_STORED_BYTES = 16 * 2**20
NOT_RECORDED = (408, 409, 413, 429)  # the same request may fare better later
log = structlog.get_logger("unseen.api")


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
        body = _HashedBody(receive)
        start: Message = {}
        answer = bytearray()

        async def recording_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            answer.extend(message.get("body", b""))
            if not message.get("more_body", False):
                # Recorded before the first byte leaves: whoever saw the answer can have it again.
                digest_of_body = await body.digest_of_all()
                await run_in_threadpool(self._finish, digest, digest_of_body, start, bytes(answer))
                await send(start)
                await send({"type": "http.response.body", "body": bytes(answer)})

        renewal = asyncio.create_task(self._renew(digest))
        try:
            await self.app(scope, body.receive, recording_send)
        finally:
            renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewal
            if not start:  # ended without an answer
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

    def _finish(self, digest: str, body_sha256: str | None, start: Message, body: bytes) -> None:
        """Records an answer; frees the key where nothing was decided or the request (None) never came whole."""
        status = int(start["status"])
        undecided = status >= 500 or status in NOT_RECORDED or len(body) > MAX_STORED_BYTES or body_sha256 is None
        try:
            with self.database().write() as session:
                row = session.get(IdempotencyKey, digest)
                if row is None:
                    return
                if undecided:
                    session.delete(row)
                    return
                kept = {b"content-type", b"location", b"retry-after"}
                row.headers = {n.decode(): v.decode("latin-1") for n, v in start["headers"] if n.lower() in kept}
                row.body_sha256, row.status, row.body = body_sha256, status, body
        except DBAPIError as error:  # what was done is done: its answer must not be lost to this
            log.warning("idempotency key not recorded", status=status, error=type(error).__name__)

    def _release(self, digest: str) -> None:
        """Frees a key whose request ended without an answer."""
        with self.database().write() as session:
            row = session.get(IdempotencyKey, digest)
            if row is not None and row.status is None:
                session.delete(row)

    async def _replay(self, row: IdempotencyKey, scope: Scope, receive: Receive, send: Send) -> None:
        if await _HashedBody(receive).digest_of_all() != row.body_sha256:
            error = Invalid("This Idempotency-Key was used with another body. Use a fresh key for a different request.")
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        headers = [(n.encode(), v.encode("latin-1")) for n, v in row.headers.items()]
        body = row.body or b""
        headers += [(b"content-length", str(len(body)).encode()), (b"idempotent-replayed", b"true")]
        await send({"type": "http.response.start", "status": row.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _HashedBody:
    """A request's body on its way to the app."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._hash = hashlib.sha256()
        self._is_whole = False

    async def receive(self) -> Message:
        """The next message, hashed."""
        message = await self._receive()
        if message["type"] == "http.request" and not self._is_whole:
            self._hash.update(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
        return message

    async def digest_of_all(self) -> str | None:
        """The sha256 of the whole body, reading what the app left; None if the rest never came or is refused."""
        try:
            while not self._is_whole:
                if (await self.receive())["type"] == "http.disconnect":
                    return None
        except ServiceError:
            return None
        return self._hash.hexdigest()


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
