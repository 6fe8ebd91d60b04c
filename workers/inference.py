"""The inference process: holds models resident and answers the API's classify, relate and lookup calls.

A small ASGI app on a unix socket (or a URL). `python -m workers.inference` runs it. It reads database and store and
writes neither: what it predicts, the API stores.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
import structlog
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from models.data.images import ImageLimits
from models.errors import ModelError
from service.core.disconnect import CLIENT_GONE, CallerGone, unless_gone
from service.core.errors import Invalid, ServiceError, TooLate, Unavailable, problem_of
from service.core.logging import configure_logging
from service.core.process import compute_environment, restart_with, settle
from service.core.repositories import ClassifierState
from service.core.settings import Settings
from workers.engine import Engine, EngineBusy, EngineClosed, EngineSick, EngineTooLate, ImageError
from workers.heads import Heads, Preparable
from workers.known_classes import Competing
from workers.library import Library
from workers.predictions import Look, Resident
from workers.runner import open_services
from workers.runtime import choose_device

log = structlog.get_logger("unseen.inference")
Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
SICK = 70
"""Exit status: the device failed."""


class Inference:
    """The routes, over one library of loaded models and one engine."""

    def __init__(self, library: Library, engine: Engine) -> None:
        self.library = library
        self.engine = engine
        self.heads = Heads()

    async def health(self, _request: Request) -> Response:
        """The process answers, and its device computes: an image went through a network now or moments ago."""
        await run_in_threadpool(self.engine.probe)
        return _json({"status": "ok", "device": self.engine.device, "resident": self.library.resident_names()})

    async def stats(self, _request: Request) -> Response:
        """Images and batches since the start, images waiting, models in memory and their bytes."""
        n_classifiers, model_bytes = self.library.held()
        stats = dataclasses.asdict(self.engine.stats())
        return _json({**stats, "n_classifiers": n_classifiers, "model_bytes": model_bytes})

    def warm_up(self) -> None:
        """Load the newest classifier and send an image through it, so that the first request finds all in place.

        Classifiers that have much to prepare do so when somebody asks: the image goes through the network alone.
        """
        try:
            self.library.forget_deleted()
            newest = self.library.newest_classifier()
            if newest is not None:
                resident = self.library.competing(self.library.state(newest), "all", None).resident
                if isinstance(resident.classifier, Preparable) and not resident.classifier.is_ready(
                    resident.embeddings
                ):
                    self.engine.grey(resident.backbone, resident.size).result()
                    return
                blank = io.BytesIO()
                Image.new("RGB", (64, 64)).save(blank, "JPEG")
                self.engine.classify(resident, [blank.getvalue()]).result()
        except Exception as error:  # whoever asks for it will hear what is wrong with it
            log.warning("warm-up failed", error=str(error))

    async def lookup(self, request: Request) -> Response:
        """How names resolve in a knowledge source."""
        body = orjson.loads(await request.body())
        found = await run_in_threadpool(self.library.lookup, body["knowledge_id"], body["names"])
        return _json({"resolutions": [dataclasses.asdict(resolution) for resolution in found.resolutions]})

    async def relate(self, request: Request) -> Response:
        """Vectors of new unseen classes of an embedding set."""
        body = orjson.loads(await request.body())
        asked = body["embedding_set_id"], body["names"], body.get("relation")
        classes = await run_in_threadpool(self.library.relate, *asked, field=body.get("field", "class_names"))
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
        return await _in_time(request, self._classify)

    async def infer(self, request: Request) -> Response:
        """What images of classes that nobody has described are like."""
        return await _in_time(request, self._infer)

    async def look(self, request: Request) -> Response:
        """Where a classifier looks in images, for the class named or the likeliest one."""
        return await _in_time(request, self._look)

    async def _classify(self, asked: _Asked) -> Response:
        options = asked.options
        competing = await self._competing(asked, options["scope"], options["class_names"])
        gamma = competing.resident.gamma if options["gamma"] is None else float(options["gamma"])
        how = {"class_names": competing.names, "top_k": options["top_k"], "gamma": gamma}
        answers = await asked.answers(self.engine.classify, competing.resident, **how)
        results = [_result(answer, competing.provenance if options["explain"] else None) for answer in answers]
        return _json({"gamma": gamma, "results": results})

    async def _infer(self, asked: _Asked) -> Response:
        options = asked.options
        competing = await self._competing(asked, "all", options["class_names"])
        how = {"tau": options["tau"], "top_k": options["top_k"]}
        found = await asked.answers(self.engine.infer, competing.resident, **how)
        return _json({"results": [_relatives(answer) for answer in found]})

    async def _look(self, asked: _Asked) -> Response:
        options = asked.options
        named = [options["class_name"]] if options["class_name"] is not None else None
        competing = await self._competing(asked, "all", named)
        names = await run_in_threadpool(self.library.dimension_names, options["classifier"]["id"])
        how = {"class_names": competing.names, "top_k": options["top_k"]}
        found = await asked.answers(self.engine.look, competing.resident, **how)
        return _json({"results": [_look(answer, names) for answer in found]})

    async def _competing(self, asked: _Asked, scope: str, names: Sequence[str] | None) -> Competing:
        """The classes of a request, by the state of the classifier as the API has just read it."""
        state = ClassifierState(**asked.options["classifier"])
        competing = self.library.competing_at_once(state, scope) if names is None else None
        if competing is None:
            # Shielded, so that a load whose caller's time is over keeps its place among the threads until it ends.
            competing = await asyncio.shield(run_in_threadpool(self.library.competing, state, scope, names))
        resident = self.heads.ready(competing.resident)
        if resident is None:
            resident = await unless_gone(asked.receive, self.heads.prepared(competing.resident))
        return competing if resident is competing.resident else dataclasses.replace(competing, resident=resident)


@dataclass(frozen=True)
class _Asked:
    """A request about images, with ASGI's channel of its caller. deadline: on the monotonic clock."""

    options: dict[str, Any]
    images: list[bytes]
    receive: Receive
    deadline: float

    async def answers(self, submit: Callable[..., Future[list[T]]], resident: Resident, **how: Any) -> list[T]:
        """What the engine answers; it is spared the rest when nobody waits any more, or the time is over."""
        future = submit(resident, self.images, timeout_s=self.deadline - time.monotonic(), **how)
        return await unless_gone(self.receive, asyncio.wrap_future(future))


async def _in_time(request: Request, handle: Callable[[_Asked], Awaitable[Response]]) -> Response:
    """What `handle` answers within the time that the request gives; loading and training count like all else."""
    began = time.monotonic()
    options, images = split_body(await request.body())
    deadline = began + options["timeout_s"]
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await handle(_Asked(options, images, request.receive, deadline))
    except TimeoutError:
        raise EngineTooLate from None


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
    if provenance is None:
        return {"predictions": answer}
    explained = {p.label: provenance[p.label] for p in answer if p.label in provenance}
    return {"predictions": answer, "explanation": {"provenance": explained}}


def _relatives(answer: Any) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"similar": [], "dissimilar": [], "error": answer.reason}
    return {"similar": answer.similar, "dissimilar": answer.dissimilar}


def _look(answer: Look | ImageError, names: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(answer, ImageError):
        return {"prediction": None, "whole": None, "dimensions": [], "error": answer.reason}
    dimensions = [
        {"index": n, "name": names[n] if names else None, "strength": strength, "map": places}
        for n, strength, places in zip(answer.dimensions, answer.strengths, answer.local, strict=True)
    ]
    return {"prediction": answer.prediction, "whole": answer.whole, "dimensions": dimensions}


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _answering(handler: Handler) -> Handler:
    """Errors as problem+json with their status, as the API passes them on."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (CallerGone, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)  # nobody is there to read it
        except EngineBusy:
            error: Exception = Unavailable("Too many images are waiting. Try again shortly.", retry_after_s=1)
        except EngineTooLate:
            error = TooLate("The time given for the request was over before it could be answered.")
        except EngineSick as sick:
            error = Unavailable(f"{sick} The inference process restarts if that lasts.", retry_after_s=5)
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


def watch(engine: Engine, *, every_s: float = 10.0, tries: int = 3, end: Callable[[int], object] = os._exit) -> None:
    """Probe the device for as long as the engine runs; end the process when it failed `tries` times in a row.

    A CUDA context that has failed never recovers, and a thread that hangs cannot be ended: only a new process helps,
    which the supervisor, or the container's restart policy, starts.
    """
    n_failed = 0
    while True:
        try:
            engine.probe()
            n_failed = 0
        except EngineClosed:
            return
        except EngineSick as sick:
            n_failed += 1
            log.error("the device is sick", reason=str(sick), times=n_failed)
            if n_failed >= tries:
                end(SICK)
                return
        time.sleep(every_s)


class _Direct(Starlette):
    """Requests go straight to the handler of their method and path: router and middleware took a fifth of the time
    that this process's event loop had for a request, and its handlers answer every error themselves."""

    def __init__(self, handlers: Mapping[tuple[str, str], Handler], **options: Any) -> None:
        super().__init__(**options)
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; what is no request, or for nobody, is Starlette's."""
        handler = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await super().__call__(scope, receive, send)
        else:
            response = await handler(Request(scope, receive))
            await response(scope, receive, send)


def create_inference_app(settings: Settings, started: Callable[[], object] | None = None) -> Starlette:
    """The ASGI app; models are loaded when first asked for. started: called when it is warm."""
    services = open_services(settings)
    device = choose_device(settings.device)
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    settings = settings.model_copy(update={"threads": settings.threads or torch.get_num_threads()})
    torch.set_num_threads(settings.threads)
    # A CPU's threads take images one by one: small batches cost nothing, and the next one fills threads that are free.
    batching: dict[str, Any] = {"max_batch": 4 * settings.threads, "max_wait_ms": 0.0, "batches_ahead": 1}
    engine = Engine(device=device, limits=limits, **(batching if device == "cpu" else {}))
    inference = Inference(Library(services.database, services.store, settings, device=device), engine)

    def warm_up() -> None:
        inference.warm_up()
        if started is not None:
            started()

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
        threading.Thread(target=watch, args=(engine,), name="watchdog", daemon=True).start()
        yield
        engine.close()

    handlers: dict[tuple[str, str], Handler] = {
        ("GET", "/health"): inference.health,
        ("GET", "/stats"): inference.stats,
        ("POST", "/lookup"): inference.lookup,
        ("POST", "/relate"): inference.relate,
        ("POST", "/classify"): inference.classify,
        ("POST", "/infer"): inference.infer,
        ("POST", "/look"): inference.look,
    }
    return _Direct({asked: _answering(handler) for asked, handler in handlers.items()}, lifespan=lifespan)


def main() -> None:
    """Listens where the settings say: a unix socket, or http://host:port."""
    settings = Settings()
    restart_with("workers.inference", compute_environment(settings.threads))
    configure_logging(settings.log_level)
    url = settings.inference_listen or settings.resolved_inference_url
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "loop": "uvloop", "http": "httptools"}
    if url.startswith("unix://"):
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        options["uds"] = url.removeprefix("unix://")
    else:
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        options |= {"host": host, "port": int(port or 8001)}
    app = create_inference_app(settings, started=settle)
    # From here on only the engine's thread computes in parallel. Where others do as well, libgomp counts more threads
    # than cores and lets all of them sleep at each wait: a network of many small layers then takes twice the time.
    torch.set_num_threads(1)
    uvicorn.run(app, **options)


if __name__ == "__main__":
    main()
