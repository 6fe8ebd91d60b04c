"""Health, readiness, metrics, version, and the catalog of methods."""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from models.catalog import METHODS, Method
from models.errors import UnknownName
from service.core import repositories
from service.core.errors import NotFound, Unavailable
from service.deps import Parts, PartsDep
from service.json import FastJSON
from service.metrics import metrics_page
from service.problems import documented
from service.schemas import MethodOut, Readiness

router = APIRouter(tags=["system"])


def package_version() -> str:
    """The installed version of the distribution."""
    try:
        return metadata.version("unseen")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "0.0.0"


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """To the documentation, whatever path a proxy puts before both."""
    return RedirectResponse("docs")


@router.get("/healthz")
async def health() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    """Version of the service and of its contract."""
    return {"version": package_version(), "api": "v1"}


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(parts: PartsDep) -> Response:
    """200 when Redis, database, store, a live worker and the inference process all answer; 503 otherwise."""
    names = ("database", "redis", "store", "worker", "inference")
    checks = await asyncio.gather(
        *(run_in_threadpool(check, parts) for check in (_database, _redis, _store, _worker)),
        _inference(parts),
        return_exceptions=True,
    )
    report = {n: str(c) if not isinstance(c, BaseException) else _reason(c) for n, c in zip(names, checks, strict=True)}
    is_ready = all(state == "ok" for state in report.values())
    headers = {} if is_ready else {"Retry-After": "2"}
    return FastJSON({"ready": is_ready, "checks": report}, status_code=200 if is_ready else 503, headers=headers)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, parts: PartsDep) -> Response:
    """Prometheus' text format: requests of this process, jobs and workers, and what the inference process does."""
    page = await metrics_page(request.app.state.request_metrics, parts.database, parts.inference, parts.settings)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/methods", response_model=list[MethodOut], tags=["methods"])
async def list_methods() -> Response:
    """Every method with its parameters, defaults, bounds and paper."""
    return FastJSON([_method_out(method) for method in METHODS])


@router.get("/v1/methods/{name}", response_model=MethodOut, tags=["methods"], responses=documented(NotFound))
async def get_method(name: str) -> Response:
    """One method."""
    for method in METHODS:
        if method.name == name:
            return FastJSON(_method_out(method))
    raise NotFound(str(UnknownName("method", name, [method.name for method in METHODS])))


def _method_out(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "kind": method.kind,
        "summary": method.summary,
        "paper": method.paper,
        "url": method.url,
        "features": method.features,
        "takes_dimension_vectors": method.takes_dimension_vectors,
        "parameters": method.params.model_json_schema(),
    }


def _database(parts: Parts) -> str:
    with parts.database.read() as session:
        session.execute(text("SELECT 1"))
    return "ok"


def _redis(parts: Parts) -> str:
    parts.redis.ping()
    return "ok"


def _store(parts: Parts) -> str:
    parts.store.check()
    return "ok"


def _worker(parts: Parts) -> str:
    with parts.database.read() as session:
        workers = repositories.live_workers(session, parts.settings.lost_after_s)
    return "ok" if workers else f"no worker was heard of in the last {parts.settings.lost_after_s:g} s"


async def _inference(parts: Parts) -> str:
    await parts.inference.health()
    return "ok"


def _reason(error: BaseException) -> str:
    return error.detail if isinstance(error, Unavailable) else type(error).__name__
