"""Stand-ins with exact answers: the inference process, which cannot run in a test's seconds, and hostile servers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from models.data.images import probe_image
from models.errors import UnreadableImage
from service.client import Client
from service.core.errors import Invalid, problem_of


class FakeInference:
    """Answers the API's calls by rules a test can foretell, and remembers them.

    A class name resolves unless it begins with 'unknown', and one that begins with 'half' only for its other words; its
    vector follows from the name alone; an image that can be read is of the class at the place that its size in bytes
    tells.
    """

    def __init__(self, dim: int = 4) -> None:
        self.dim = dim
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answer: Response | None = None  # given in place of everything else
        self.hold = threading.Event()  # while it is not set, classify does not answer
        self.hold.set()
        self.gone = threading.Event()  # set when a held caller hung up
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/lookup", self._lookup, methods=["POST"]),
                Route("/relate", self._relate, methods=["POST"]),
                Route("/classify", self._classify, methods=["POST"]),
                Route("/infer", self._infer, methods=["POST"]),
                Route("/look", self._look, methods=["POST"]),
            ]
        )

    def vector(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The unit vector of a class name."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        vector = np.random.default_rng(seed).standard_normal(self.dim)
        return (vector / np.linalg.norm(vector)).astype("<f4")

    async def _health(self, _request: Request) -> Response:
        return self.answer or _json({"status": "ok"})

    async def _lookup(self, request: Request) -> Response:
        body = self._noted("lookup", await request.body())
        return self.answer or _json({"resolutions": [_resolution(name) for name in body["names"]]})

    async def _relate(self, request: Request) -> Response:
        body = self._noted("relate", await request.body())
        unknown = [name for name in body["names"] if name.startswith("unknown")]
        if unknown:
            error = Invalid(f"The knowledge source has no vector for {unknown[0]!r}. Rename the class.")
            return Response(orjson.dumps(problem_of(error)), status_code=422)
        classes = [
            {
                "name": name,
                "vector": base64.b64encode(self.vector(name).tobytes()).decode(),
                "provenance": {"relation": body["relation"] or "smo", "contributions": []},
            }
            for name in body["names"]
        ]
        return self.answer or _json({"classes": classes})

    async def _infer(self, request: Request) -> Response:
        options, images = self._images("infer", await request.body())
        results = []
        for image in images:
            found = _predictions(image, {**options, "explain": False})
            results.append({"similar": found.pop("predictions"), "dissimilar": [], **found})
        return self.answer or _json({"results": results})

    async def _look(self, request: Request) -> Response:
        options, images = self._images("look", await request.body())
        results = []
        for image in images:
            found = _predictions(
                image, {**options, "class_names": None, "scope": "all", "explain": False, "gamma": None}
            )
            best = (found.pop("predictions") or [None])[0]
            shown = [{"index": n, "name": None, "strength": 1.0 - n, "map": [[0.7, 0.1], [0.1, 0.1]]} for n in range(2)]
            results.append(
                {"prediction": best, "whole": best and [[0.25] * 2] * 2, "dimensions": shown if best else [], **found}
            )
        return self.answer or _json({"results": results})

    async def _classify(self, request: Request) -> Response:
        options, images = self._images("classify", await request.body())
        while not self.hold.is_set():
            if await request.is_disconnected():
                self.gone.set()
                break
            await asyncio.sleep(0.01)
        results = [_predictions(image, options) for image in images]
        return self.answer or _json({"gamma": options["gamma"] or 0.0, "results": results})

    def _images(self, kind: str, raw: bytes) -> tuple[dict[str, Any], list[bytes]]:
        length = int.from_bytes(raw[:4], "little")
        options = self._noted(kind, raw[4 : 4 + length])
        images, start = [], 4 + length
        for size in options["sizes"]:
            images.append(raw[start : start + size])
            start += size
        return options, images

    def _noted(self, kind: str, raw: bytes) -> dict[str, Any]:
        body: dict[str, Any] = orjson.loads(raw)
        self.calls.append((kind, body))
        return body


def _resolution(name: str) -> dict[str, Any]:
    found, partial = not name.startswith("unknown"), name.startswith("half")
    return {
        "name": name,
        "found": found,
        "how": "partial" if partial else "exact" if found else "not found",
        "tokens": name.split()[1:] if partial else [name] if found else [],
        "missing_tokens": ["half"] if partial else [] if found else [name],
        "suggestions": [] if found and not partial else ["known"],
    }


def _predictions(image: bytes, options: dict[str, Any]) -> dict[str, Any]:
    try:
        probe_image(image)
    except UnreadableImage as error:
        return {"predictions": [], "error": error.reason}
    names = options["class_names"] or ["cat", "dog", "zebra"]
    turned = names[len(image) % len(names) :] + names[: len(image) % len(names)]
    shown = turned[: options["top_k"]]
    predictions = [{"label": n, "score": 1 / (i + 2), "seen": n != "zebra"} for i, n in enumerate(shown)]
    return (
        {"predictions": predictions, "explanation": {"top": shown[0]}}
        if options["explain"]
        else {"predictions": predictions}
    )


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def answering(handler: Callable[[httpx.Request], httpx.Response], **options: Any) -> Client:
    """A client whose requests `handler` answers; it never sleeps long."""
    client = Client("http://service.test", transport=httpx.MockTransport(handler), **options)
    client._http._sleep = lambda _: None
    return client
