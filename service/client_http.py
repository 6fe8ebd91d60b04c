"""Requests of the Python client: retries that cannot do anything twice, and errors in plain words. httpx only."""

from __future__ import annotations

import ipaddress
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

Json = dict[str, Any]
RETRIED = (429, 503)
LONGEST_PAUSE_S = 10.0


class UnseenError(Exception):
    """Base of what the client raises; the text tells what to do."""


class ServiceUnreachable(UnseenError):
    """Nothing answers at the address, or the connection broke again and again."""


class ApiError(UnseenError):
    """The service refused. `status` is the HTTP status, `problem` its problem+json, `errors` every single problem."""

    def __init__(self, status: int, problem: Json) -> None:
        self.status = status
        self.problem = problem
        self.errors: list[Json] = [entry for entry in problem.get("errors") or [] if isinstance(entry, dict)]
        super().__init__(self._text())

    def _text(self) -> str:
        detail = str(self.problem.get("detail") or self.problem.get("title") or "no reason given")
        lines = [f"{entry.get('pointer') or '/'}: {entry.get('message')}" for entry in self.errors]
        shown = [line for line in lines[:20] if not (len(lines) == 1 and str(self.errors[0].get("message")) == detail)]
        if len(lines) > 20:
            shown.append(f"and {len(lines) - 20} more")
        return "\n  ".join([f"{detail} (HTTP {self.status})", *shown])


@dataclass(frozen=True)
class Form:
    """A multipart body. `files`: (field, file name, content); a path is read anew at each attempt, never at once."""

    files: tuple[tuple[str, str, bytes | Path], ...]
    fields: Mapping[str, str] = field(default_factory=dict)

    def opened(self, stack: ExitStack) -> list[tuple[str, tuple[str, Any, str]]]:
        """httpx's `files=`; handles are closed with `stack`. UnseenError for a file that cannot be read."""
        parts = []
        for name, filename, content in self.files:
            if isinstance(content, Path):
                try:
                    handle: Any = stack.enter_context(content.open("rb"))
                except OSError as error:
                    raise UnseenError(f"{content} cannot be read: {error.strerror}.") from error
            else:
                handle = content
            parts.append((name, (filename, handle, "application/octet-stream")))
        return parts


class Transport:
    """One connection pool to one service. Repeats what is safe to repeat: every POST carries an Idempotency-Key."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout: float,
        retries: int,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            address = urlsplit(base_url)
            is_address = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:  # a port that is no number
            is_address = False
        if not is_address:
            raise UnseenError(f"{base_url!r} is no address of a service; write it like http://127.0.0.1:8000.")
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._sleep = sleep
        self._client = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            transport=transport,
            trust_env=not is_loopback(address.hostname or ""),  # a proxy cannot reach this machine's loopback
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def json(self, method: str, path: str, **options: Any) -> Any:
        """`request`, parsed."""
        response = self.request(method, path, **options)
        return response.json() if response.content else None

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Any = None,
        json: Any = None,
        form: Form | None = None,
        content: bytes | Path | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
        retries: int | None = None,
    ) -> httpx.Response:
        """Sends, again after 429, 503 and broken connections. ApiError for any status >= 400 but those in `accept`."""
        sent = dict(headers or {})
        if method == "POST":
            sent["Idempotency-Key"] = uuid.uuid4().hex
        if form is not None:
            # One boundary for all attempts: the same key must come with the same bytes.
            sent["Content-Type"] = f"multipart/form-data; boundary={uuid.uuid4().hex}"
        left = self._retries if retries is None else retries
        was_cut = False
        for attempt in range(left + 1):
            is_last = attempt == left
            try:
                with ExitStack() as stack:
                    body = _body(stack, json, form, content)
                    response = self._client.request(method, path, params=params, headers=sent, **body)
            except httpx.UnsupportedProtocol as error:
                raise UnseenError(f"{self.base_url}: {error}") from error
            except httpx.TransportError as error:
                if is_last:
                    raise self.unreachable(error) from error
                was_cut = True
                self._sleep(_backoff(attempt))
                continue
            if response.status_code < 400 or response.status_code in accept:
                return response
            # After a cut the first attempt may still be at work: its key answers 409 until it is done.
            in_flight = was_cut and response.status_code == 409 and "retry-after" in response.headers
            if is_last or not (response.status_code in RETRIED or in_flight):
                raise api_error(response)
            self._sleep(_pause(response, attempt))
        raise AssertionError("unreachable")

    @contextmanager
    def stream(
        self, path: str, *, params: Any = None, headers: Mapping[str, str] | None = None, timeout: float | None = None
    ) -> Iterator[httpx.Response]:
        """An open GET, once. httpx.TransportError when it breaks; ApiError for an error status."""
        wait = httpx.Timeout(timeout, connect=5.0) if timeout else httpx.USE_CLIENT_DEFAULT
        opened: AbstractContextManager[httpx.Response] = self._client.stream(
            "GET", path, params=params, headers=dict(headers or {}), timeout=wait
        )
        with opened as response:
            if response.status_code >= 400:
                response.read()
                raise api_error(response)
            yield response

    def unreachable(self, error: Exception) -> ServiceUnreachable:
        """The error for a service that does not answer."""
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServiceUnreachable(
                f"Nothing answers at {self.base_url}. Start the service with 'unseen serve' (or 'make serve'), "
                "or give the address of one that runs."
            )
        if isinstance(error, httpx.TimeoutException):
            return ServiceUnreachable(
                f"{self.base_url} took too long to answer. Try again, or allow more time (timeout=...)."
            )
        reason = str(error) or type(error).__name__
        return ServiceUnreachable(f"The connection to {self.base_url} broke: {reason}. Try again.")


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_error(response: httpx.Response) -> ApiError:
    """What a refusal says, whether it is problem+json or something between here and the service."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"title": response.reason_phrase, "detail": response.text[:300].strip() or response.reason_phrase}
    return ApiError(response.status_code, problem)


def _body(stack: ExitStack, json: Any, form: Form | None, content: bytes | Path | None) -> dict[str, Any]:
    if form is not None:
        return {"data": dict(form.fields), "files": form.opened(stack)}
    if isinstance(content, Path):
        try:
            return {"content": stack.enter_context(content.open("rb"))}
        except OSError as error:
            raise UnseenError(f"{content} cannot be read: {error.strerror}.") from error
    if content is not None:
        return {"content": content}
    return {"json": json} if json is not None else {}


def _backoff(attempt: int) -> float:
    return float(0.2 * 2**attempt * random.uniform(0.75, 1.25))


def _pause(response: httpx.Response, attempt: int) -> float:
    """What Retry-After asks for, if that is bearable; else a growing pause."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), LONGEST_PAUSE_S) if asked.isdigit() else _backoff(attempt)
