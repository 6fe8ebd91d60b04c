"""Builds the API: the only place where its parts are made and wired."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from threading import Event, Thread

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service import problems
from service.auth import Authenticator
from service.core import migrations
from service.core.artifacts import ArtifactStore
from service.core.db import Database, make_engine
from service.core.garbage import Collector
from service.core.queue import JobQueue, connect
from service.core.reconciler import Reconciler
from service.core.settings import Settings
from service.deps import Parts
from service.fanout import Fanout
from service.idempotency import Idempotency
from service.inference_client import InferenceClient
from service.metrics import RequestMetrics
from service.middleware import Gate
from service.openapi import openapi_document
from service.routes import (
    attention,
    classifiers,
    classify,
    datasets,
    embedding_sets,
    embeddings,
    infer,
    jobs,
    knowledge,
    predictions,
    system,
    uploads,
)
from service.submit import current_job

DESCRIPTION = "Class embeddings, and zero-shot classification, for classes you have no pictures of."
ROUTERS = (
    classify, embeddings, datasets, uploads, knowledge, embedding_sets, classifiers, predictions, attention, infer,
    jobs, system,
)  # fmt: skip
"""Those asked most come first: a request tries them in turn."""


def make_parts(settings: Settings) -> Parts:
    """Connects to database, store, Redis and inference process; nothing is contacted before it is needed."""
    connection = connect(settings.resolved_redis_url)
    database = Database(make_engine(settings.resolved_database_url))
    return Parts(
        settings=settings,
        database=database,
        store=ArtifactStore(settings.resolved_store_url, settings.cache_dir),
        redis=connection,
        queue=JobQueue(connection, settings.queue),
        inference=InferenceClient(settings),
        fanout=Fanout(settings.resolved_redis_url, partial(current_job, database)),
    )


def create_app(settings: Settings | None = None, started: Callable[[], object] | None = None) -> FastAPI:
    """The API. Its parts exist while it runs; the reconciler and the collector run beside it.

    started: called when all is in place.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.make_dirs()
        parts = app.state.parts = make_parts(settings)
        migrations.upgrade(parts.database.engine)
        reconciler = Reconciler(parts.database, parts.redis, parts.queue, settings)
        collector = Collector(parts.database, parts.store, settings)
        stop = Event()
        threads = [Thread(target=part.run, args=(stop,), daemon=True) for part in (reconciler, collector)]
        for thread in threads:
            thread.start()
        if started is not None:
            started()
        yield
        stop.set()
        for thread in threads:
            thread.join(timeout=10)
        await parts.inference.close()
        await parts.fanout.close()
        parts.redis.close()
        parts.database.close()

    app = FastAPIOffline(
        title="Unseen",
        description=DESCRIPTION,
        version=system.package_version(),
        lifespan=lifespan,
        redoc_url=None,
        static_url="/docs/static",
        favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # else it may ask a public server about the document
    )
    for module in ROUTERS:
        app.include_router(module.router)
    problems.install(app)
    requests = app.state.request_metrics = RequestMetrics()
    app.add_middleware(Idempotency, database=lambda: app.state.parts.database)
    app.add_middleware(Gate, settings=settings, authenticator=Authenticator(settings), metrics=requests)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app
