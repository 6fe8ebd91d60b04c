"""Talks to the inference process over its unix socket (or URL). The API itself never loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import orjson

from service.core.errors import ERRORS, Problem, ServiceError, Unavailable
from service.core.settings import Settings
from service.json import dumps

_BY_STATUS = {error.status: error for error in ERRORS if error.status not in (401, 403, 500)}


class InferenceClient:
    """One pooled connection to the inference process; every failure becomes an error with a status."""

    def __init__(self, settings: Settings) -> None:
        url = settings.resolved_inference_url
        uds = url.removeprefix("unix://") if url.startswith("unix://") else None
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=uds, limits=httpx.Limits(max_connections=256)),
            base_url="http://inference" if uds else url,
            timeout=httpx.Timeout(settings.inference_timeout_s, connect=5.0),
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def health(self) -> dict[str, Any]:
        """The process's own report; Unavailable when it does not answer."""
        return await self._send("GET", "/health", b"")

    async def lookup(self, knowledge_id: str, names: Sequence[str]) -> dict[str, Any]:
        """How names resolve in a knowledge source: {'resolutions': […]}."""
        return await self._send("POST", "/lookup", dumps({"knowledge_id": knowledge_id, "names": list(names)}))

    async def relate(self, embedding_set_id: str, names: Sequence[str], relation: str | None = None) -> dict[str, Any]:
        """Vectors of new unseen classes: {'classes': [{'name', 'vector' (base64), 'provenance'}]}."""
        body = {"embedding_set_id": embedding_set_id, "names": list(names), "relation": relation}
        return await self._send("POST", "/relate", dumps(body))

    async def classify(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Predictions for images."""
        return await self._send("POST", "/classify", _body(options, images))

    async def infer(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Similar and dissimilar classes of images."""
        return await self._send("POST", "/infer", _body(options, images))

    async def look(self, options: dict[str, Any], images: Sequence[bytes]) -> dict[str, Any]:
        """Where a classifier looks in images."""
        return await self._send("POST", "/look", _body(options, images))

    async def _send(self, method: str, path: str, content: bytes) -> dict[str, Any]:
        try:
            response = await self._client.request(method, path, content=content)
        except httpx.TimeoutException:
            raise Unavailable(
                "The inference process took too long. Send fewer images, or try again.", retry_after_s=5
            ) from None
        except httpx.HTTPError:
            raise Unavailable(
                "The inference process is not answering; it restarts by itself. Try again.", retry_after_s=3
            ) from None
        if response.status_code != 200:
            raise _error_of(response)
        try:
            answer: dict[str, Any] = orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise _unusable() from None
        return answer


def _body(options: dict[str, Any], images: Sequence[bytes]) -> bytes:
    """The options (length as 4 bytes, JSON), then the images' bytes, untouched."""
    header = dumps({**options, "sizes": [len(image) for image in images]})
    return b"".join([len(header).to_bytes(4, "little"), header, *images])


def _error_of(response: httpx.Response) -> ServiceError:
    """The refusal as the caller's; the process's own failures are ours to hide."""
    try:
        body = orjson.loads(response.content)
        kind = _BY_STATUS[response.status_code]
        problems = [Problem(p["pointer"], p["message"]) for p in body.get("errors", [])]
        retry = response.headers.get("retry-after")
        return kind(body["detail"], problems=problems, retry_after_s=int(retry) if retry else None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return _unusable()


def _unusable() -> Unavailable:
    return Unavailable("The inference process gave no usable answer. Try again.", retry_after_s=3)
