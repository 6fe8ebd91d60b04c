"""Talks to the inference process over its unix socket (or URL). The API itself never loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson

from service.core.errors import ERRORS, Problem, ServiceError, Unavailable
from service.core.settings import Settings
from service.json import dumps

_BY_STATUS = {error.status: error for error in ERRORS if error.status not in (401, 403, 500)}


CONNECT_S = 5.0
GRACE_S = 5.0
STATS_S = 5.0
"""Prometheus gives a page up after ten seconds."""
KEEP_S = 4.0
"""How long an idle connection is kept: less than the other side keeps it, or a request could meet a closed one."""


class InferenceClient:
    """Pooled connections to the inference process; every failure becomes an error with a status."""

    def __init__(self, settings: Settings) -> None:
        url = settings.resolved_inference_url
        self._socket = url.removeprefix("unix://") if url.startswith("unix://") else None
        self._base = "http://inference" if self._socket else url.rstrip("/")
        self._timeout_s = settings.inference_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def health(self) -> dict[str, Any]:
        """The process's own report; Unavailable when it does not answer."""
        return await self._send("GET", "/health", b"")

    async def stats(self) -> dict[str, Any]:
        """What it has computed and holds: see `workers.inference.Inference.stats`."""
        return await self._send("GET", "/stats", b"", STATS_S)

    async def lookup(self, knowledge_id: str, names: Sequence[str]) -> dict[str, Any]:
        """How names resolve in a knowledge source: {'resolutions': […]}."""
        return await self._send("POST", "/lookup", dumps({"knowledge_id": knowledge_id, "names": list(names)}))

    async def relate(
        self, embedding_set_id: str, names: Sequence[str], relation: str | None = None, *, field: str = "class_names"
    ) -> dict[str, Any]:
        """Vectors of new unseen classes: {'classes': [{'name', 'vector' (base64), 'provenance'}]}.

        field: where in the caller's request the names stand, for errors.
        """
        body = {"embedding_set_id": embedding_set_id, "names": list(names), "relation": relation, "field": field}
        return await self._send("POST", "/relate", dumps(body))

    async def classify(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Predictions for images."""
        return await self._send_images("/classify", options, images)

    async def infer(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Similar and dissimilar classes of images."""
        return await self._send_images("/infer", options, images)

    async def look(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Where a classifier looks in images."""
        return await self._send_images("/look", options, images)

    async def _send_images(self, path: str, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Options hold `timeout_s`; the process answers for it, a little later at most."""
        return await self._send("POST", path, _body(options, images), options["timeout_s"] + GRACE_S)

    async def _send(self, method: str, path: str, content: bytes, timeout_s: float | None = None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s, sock_connect=CONNECT_S)
        try:
            async with self._opened().request(method, self._base + path, data=content, timeout=timeout) as response:
                body, status = await response.read(), response.status
        except TimeoutError:
            raise Unavailable(
                "The inference process took too long. Send fewer images, or try again.", retry_after_s=5
            ) from None
        except (aiohttp.ClientError, OSError):
            raise Unavailable(
                "The inference process is not answering; it restarts by itself. Try again.", retry_after_s=3
            ) from None
        if status != 200:
            raise _error_of(status, body, response.headers.get("retry-after"))
        try:
            answer: dict[str, Any] = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise _unusable() from None
        return answer

    def _opened(self) -> aiohttp.ClientSession:
        """The session, which belongs to the event loop that first asks."""
        if self._session is None:
            options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEP_S}
            connector = (
                aiohttp.UnixConnector(self._socket, **options) if self._socket else aiohttp.TCPConnector(**options)
            )
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), skip_auto_headers=("User-Agent",)
            )
        return self._session


def _body(options: dict[str, Any], images: Sequence[bytes]) -> bytes:
    """The options (length as 4 bytes, JSON), then the images' bytes, untouched."""
    header = dumps({**options, "sizes": [len(image) for image in images]})
    return b"".join([len(header).to_bytes(4, "little"), header, *images])


def _error_of(status: int, content: bytes, retry_after: str | None) -> ServiceError:
    """The refusal as the caller's; the process's own failures are ours to hide."""
    try:
        body = orjson.loads(content)
        kind = _BY_STATUS[status]
        problems = [Problem(p["pointer"], p["message"]) for p in body.get("errors", [])]
        return kind(body["detail"], problems=problems, retry_after_s=int(retry_after) if retry_after else None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return _unusable()


def _unusable() -> Unavailable:
    return Unavailable("The inference process gave no usable answer. Try again.", retry_after_s=3)
