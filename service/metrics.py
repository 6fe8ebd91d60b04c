"""GET /metrics in Prometheus' text format: this process's requests, and what the whole service has to do.

Requests are counted as they end. Everything else is asked for when somebody looks: jobs and workers of the database,
images of the inference process. What cannot be told at that moment is left out, so that one part that is down does not
hide the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from service.core import repositories
from service.core.db import Database
from service.core.errors import Unavailable
from service.core.settings import Settings
from service.inference_client import InferenceClient

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ENGINE = (
    (CounterMetricFamily, "images", "Images computed since it started, probes too.", "n_images"),
    (CounterMetricFamily, "batches", "Batches they were computed in.", "n_batches"),
    (GaugeMetricFamily, "waiting_images", "Images accepted and not yet answered.", "n_waiting"),
    (GaugeMetricFamily, "classifiers", "Classifiers in memory.", "n_classifiers"),
    (GaugeMetricFamily, "model_bytes", "Memory that these take, with their networks.", "model_bytes"),
)
"""What the inference process tells, and the keys it has there."""
T = TypeVar("T")
disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of the page, and nobody draws them


class RequestMetrics:
    """Counts and times of the requests that this process has answered."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self._n = Counter("unseen_http_requests", "Requests answered.", (*labels, "status"), registry=self.registry)
        self._seconds = Histogram(
            "unseen_http_request_duration_seconds",
            "From a request's headers to the last byte of its answer.",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self._open = Gauge("unseen_http_requests_in_progress", "Requests under way.", registry=self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def began(self) -> None:
        """A request has come."""
        self._open.inc()

    def ended(self, scope: Scope, status: int, seconds: float) -> None:
        """It is over. Labels take few values whatever is asked for: routes as declared, methods that exist."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._open.dec()
        self._n.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


async def metrics_page(
    requests: RequestMetrics, database: Database, inference: InferenceClient, settings: Settings
) -> bytes:
    """The page, whole."""
    tables, engine = await asyncio.gather(
        _unless_down(run_in_threadpool(_of_database, database, settings)),
        _unless_down(inference.stats()),
    )
    now = CollectorRegistry(auto_describe=False)
    now.register(_Told([*(tables or ()), *_of_inference(engine)]))
    return bytes(generate_latest(requests.registry) + generate_latest(now))


class _Told(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


async def _unless_down(asked: Awaitable[T]) -> T | None:
    try:
        return await asked
    except (Unavailable, SQLAlchemyError):
        return None


def _of_database(database: Database, settings: Settings) -> list[Metric]:
    with database.read() as session:
        counts = repositories.count_jobs(session)
        workers = repositories.live_workers(session, settings.lost_after_s)
    jobs = GaugeMetricFamily("unseen_jobs", "Jobs the database knows, by kind and status.", labels=("kind", "status"))
    for (kind, status), n in counts.items():
        jobs.add_metric((kind, status), n)
    return [jobs, GaugeMetricFamily("unseen_workers", "Workers heard of just now.", value=len(workers))]


def _of_inference(stats: dict[str, Any] | None) -> list[Metric]:
    up = GaugeMetricFamily("unseen_inference_up", "Whether the inference process answers.", value=stats is not None)
    if stats is None:
        return [up]
    return [up, *(kind(f"unseen_inference_{name}", text, value=stats[key]) for kind, name, text, key in ENGINE)]
