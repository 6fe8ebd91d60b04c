"""The inference process: holds models resident and answers the API's classify, relate and lookup calls.

A small ASGI app on a unix socket (or a URL). `python -m workers.inference` runs it. It reads database and store and
writes neither: what it predicts, the API stores.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from models.data.images import ImageLimits
from models.errors import ModelError
from service.core.errors import Invalid, ServiceError, Unavailable, problem_of
from service.core.logging import configure_logging
from service.core.process import COMPUTE_ENVIRONMENT, restart_with
from service.core.settings import Settings
from workers.engine import Engine, EngineBusy, ImageError
from workers.library import Library
from workers.predictions import Look
from workers.runner import open_services
from workers.runtime import choose_device

log = structlog.get_logger("unseen.inference")
Handler = Callable[[Request], Awaitable[Response]]


class Inference:
    """The routes, over one library of loaded models and one engine."""

    def __init__(self, library: Library, engine: Engine) -> None:
        self.library = library
        self.engine = engine

    async def health(self, _request: Request) -> Response:
        """The process answers and its engine's thread is alive."""
        if not self.engine.is_alive():
            raise Unavailable("The inference thread has died; the process restarts.", retry_after_s=3)
        return _json({"status": "ok", "device": self.engine.device, "resident": self.library.resident_names()})

    async def lookup(self, request: Request) -> Response:
        """How names resolve in a knowledge source."""
        body = orjson.loads(await request.body())
        found = await run_in_threadpool(self.library.lookup, body["knowledge_id"], body["names"])
        return _json({"resolutions": [dataclasses.asdict(resolution) for resolution in found.resolutions]})

    async def relate(self, request: Request) -> Response:
        """Vectors of new unseen classes of an embedding set."""
        body = orjson.loads(await request.body())
        classes = await run_in_threadpool(
            self.library.relate, body["embedding_set_id"], body["names"], body.get("relation")
        )
        return _json(
            {
                "classes": [
                    {"name": c.name, "vector": base64.b64encode(c.vector).decode(), "provenance": c.provenance}
                    for c in classes
                ]
            }
        )

    async def classify(self, request: Request) -> Response:
        """Predictions for images that follow the options in the body (see `service.inference_client`)."""
        options, images = split_body(await request.body())
        competing = await run_in_threadpool(
            self.library.competing, options["classifier_id"], options["scope"], options["class_names"]
        )
        gamma = competing.resident.gamma if options["gamma"] is None else float(options["gamma"])
        answers = await run_in_threadpool(
            self.engine.classify,
            competing.resident,
            images,
            class_names=competing.names,
            top_k=options["top_k"],
            gamma=gamma,
        )
        results = [_result(answer, competing.provenance if options["explain"] else None) for answer in answers]
        return _json({"gamma": gamma, "results": results})

    async def infer(self, request: Request) -> Response:
        """What images of classes that nobody has described are like."""
        options, images = split_body(await request.body())
        competing = await run_in_threadpool(
            self.library.competing, options["classifier_id"], "all", options["class_names"]
        )
        found = await run_in_threadpool(
            self.engine.infer, competing.resident, images, tau=options["tau"], top_k=options["top_k"]
        )
        return _json({"results": [_relatives(answer) for answer in found]})

    async def look(self, request: Request) -> Response:
        """Where a classifier looks in images, for the class named or the likeliest one."""
        options, images = split_body(await request.body())
        named = [options["class_name"]] if options["class_name"] is not None else None
        classifier_id = options["classifier_id"]
        competing = await run_in_threadpool(self.library.competing, classifier_id, "all", named)
        names = await run_in_threadpool(self.library.dimension_names, classifier_id)
        found = await run_in_threadpool(
            self.engine.look, competing.resident, images, class_names=competing.names, top_k=options["top_k"]
        )
        return _json({"results": [_look(answer, names) for answer in found]})


def split_body(body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Options and images out of a classify body: 4 bytes of length, JSON, then the images one after the other."""
    length = int.from_bytes(body[:4], "little")
    options: dict[str, Any] = orjson.loads(body[4 : 4 + length])
    images, start = [], 4 + length
    for size in options["sizes"]:
        images.append(body[start : start + size])
        start += size
    if start != len(body):
        raise Invalid("The body's length does not match the sizes it announces.")
    return options, images


def _result(answer: Any, provenance: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"predictions": [], "error": answer.reason}
    predictions = [{"label": p.label, "score": p.score, "seen": p.seen} for p in answer]
    if provenance is None:
        return {"predictions": predictions}
    explained = {p.label: provenance[p.label] for p in answer if p.label in provenance}
    return {"predictions": predictions, "explanation": {"provenance": explained}}


def _relatives(answer: Any) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"similar": [], "dissimilar": [], "error": answer.reason}
    return {
        side: [{"label": p.label, "score": p.score, "seen": p.seen} for p in getattr(answer, side)]
        for side in ("similar", "dissimilar")
    }


def _look(answer: Look | ImageError, names: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"prediction": None, "whole": None, "dimensions": [], "error": answer.reason}
    dimensions = [
        {"index": n, "name": names[n] if names else None, "strength": strength, "map": places}
        for n, strength, places in zip(answer.dimensions, answer.strengths, answer.local, strict=True)
    ]
    return {"prediction": dataclasses.asdict(answer.prediction), "whole": answer.whole, "dimensions": dimensions}


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _answering(handler: Handler) -> Handler:
    """Errors as problem+json with their status, as the API passes them on."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except EngineBusy:
            error: Exception = Unavailable("Too many images are waiting. Try again shortly.", retry_after_s=1)
        except (ServiceError, ModelError) as known:
            error = known
        except Exception as unknown:
            log.exception("inference failed", path=request.url.path)
            error = unknown
        body = problem_of(error)
        headers = {}
        if isinstance(error, ServiceError) and error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        return Response(orjson.dumps(body), status_code=body["status"], headers=headers)

    return answer


def create_inference_app(settings: Settings) -> Starlette:
    """The ASGI app; models are loaded when first asked for."""
    services = open_services(settings)
    device = choose_device(settings.device)
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    engine = Engine(device=device, limits=limits)
    inference = Inference(Library(services.database, services.store, settings, device=device), engine)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    routes: Sequence[tuple[str, str, Handler]] = (
        ("GET", "/health", inference.health),
        ("POST", "/lookup", inference.lookup),
        ("POST", "/relate", inference.relate),
        ("POST", "/classify", inference.classify),
        ("POST", "/infer", inference.infer),
        ("POST", "/look", inference.look),
    )
    return Starlette(
        routes=[Route(path, _answering(handler), methods=[method]) for method, path, handler in routes],
        lifespan=lifespan,
    )


def main() -> None:
    """Listens where the settings say: a unix socket, or http://host:port."""
    restart_with("workers.inference", COMPUTE_ENVIRONMENT)
    settings = Settings()
    configure_logging(settings.log_level)
    url = settings.inference_listen or settings.resolved_inference_url
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "loop": "uvloop", "http": "httptools"}
    if url.startswith("unix://"):
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        options["uds"] = url.removeprefix("unix://")
    else:
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        options |= {"host": host, "port": int(port or 8001)}
    uvicorn.run(create_inference_app(settings), **options)


if __name__ == "__main__":
    main()
