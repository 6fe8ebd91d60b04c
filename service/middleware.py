"""What every request passes through: request id, authentication, rate limit, body limits with a time limit."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import ANONYMOUS, Authenticator
from service.core.disconnect import CLIENT_GONE, CallerGone
from service.core.errors import Invalid, TooLarge, TooSlow, Unavailable
from service.core.settings import Settings
from service.metrics import RequestMetrics
from service.problems import problem_response
from service.rate_limit import RateLimiter

log = structlog.get_logger("unseen.access")
_REQUEST_ID = re.compile(r"^[\x21-\x7e]{1,128}$")
MIN_BYTES_PER_S = 1024
_SMALL_BYTES = 2**20  # never refused for what others hold
_LARGE_UPLOADS = ("/archive", "/features", "/v1/knowledge")


class Gate:
    """The outermost ASGI layer: sets `scope['state']['caller']`, echoes X-Request-Id, enforces limits, answers every
    error that nothing inside it has answered, and counts what was answered."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, authenticator: Authenticator, metrics: RequestMetrics
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.settings = settings
        self.authenticator = authenticator
        self.rate_limiter = RateLimiter(settings.rate_limit_per_minute)
        self.held_bytes = 0  # of all requests under way whose bodies end up in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Of headers sent twice the first counts, as for the routes.
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        request_id = headers.get(b"x-request-id", "")
        if not _REQUEST_ID.match(request_id):
            request_id = secrets.token_hex(8)
        began = time.perf_counter()
        status = held = 0
        content_type = headers.get(b"content-type", "").lower()
        is_streamed = _is_streamed(scope["path"], content_type)
        self.metrics.began()

        def hold(n_bytes: int) -> None:
            nonlocal held
            if is_streamed:
                return
            held += n_bytes
            self.held_bytes += n_bytes
            if self.held_bytes > self.settings.max_held_bytes and _SMALL_BYTES < held < self.held_bytes:
                raise Unavailable("Other requests hold too much memory at the moment. Try again.", retry_after_s=2)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            caller = self.authenticator.check(
                scope["method"], scope["path"], headers.get(b"authorization"), headers.get(b"x-api-key")
            )
            scope.setdefault("state", {})["caller"] = caller
            if caller != ANONYMOUS:
                self.rate_limiter.take(caller)
            if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
                raise Invalid("The address holds a NUL character (%00). Remove it.")
            limit = self.limit_of(scope["path"], content_type)
            declared = headers.get(b"content-length", "")
            if declared.isdigit() and int(declared) > limit:
                raise TooLarge(_too_large(int(declared), limit))
            await self.app(scope, self.limited(receive, limit, hold), send_with_id)
        except (ClientDisconnect, CallerGone):
            status = CLIENT_GONE
        except Exception as error:
            if status:  # the answer is on its way; all that is left is to cut the connection
                raise
            await problem_response(error, scope["path"])(scope, receive, send_with_id)
        finally:
            self.held_bytes -= held
            took_s = time.perf_counter() - began
            self.metrics.ended(scope, status, took_s)
            took_ms = round(1000 * took_s, 1)
            log.debug("request", method=scope["method"], path=scope["path"], status=status, ms=took_ms, id=request_id)

    def limit_of(self, path: str, content_type: str) -> int:
        """The most bytes a body of this route and type may have."""
        if _is_streamed(path, content_type):
            return self.settings.max_archive_bytes
        if content_type.startswith("multipart/"):
            return self.settings.max_body_bytes
        if content_type.startswith(("image/", "application/octet-stream")):
            return self.settings.max_image_bytes
        return self.settings.max_json_bytes

    def limited(self, receive: Receive, limit: int, hold: Callable[[int], object]) -> Receive:
        """`receive` that refuses bodies past `limit` bytes and senders that stall or trickle; `hold` hears of bytes."""
        began = time.monotonic()
        pause_s = self.settings.request_timeout_s
        total = 0
        finished = False

        async def limited_receive() -> Message:
            nonlocal total, finished
            if finished:
                return await receive()
            allowed_s = began + pause_s + total / MIN_BYTES_PER_S - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, min(pause_s, allowed_s))):
                    message = await receive()
            except TimeoutError:
                raise TooSlow(
                    f"The body did not arrive in time: send it without pauses of {pause_s:g} s or more, "
                    f"at {MIN_BYTES_PER_S:,} bytes a second at least."
                ) from None
            if message["type"] == "http.request":
                n_bytes = len(message.get("body", b""))
                total += n_bytes
                hold(n_bytes)
                finished = not message.get("more_body", False)
                if total > limit:
                    raise TooLarge(_too_large(total, limit))
            else:
                finished = True
            return message

        return limited_receive


def _is_streamed(path: str, content_type: str) -> bool:
    """Whether the body goes to the disk piece by piece."""
    return path.endswith(_LARGE_UPLOADS) and not content_type.startswith("application/json")


def _too_large(size: int, limit: int) -> str:
    return (
        f"The body has {size:,} bytes or more; this route takes at most {limit:,}. "
        "Send fewer files a request, or an archive."
    )
