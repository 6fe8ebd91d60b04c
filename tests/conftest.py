"""Real servers for the tests: an embedded Valkey, a database, an artifact store. Nothing is faked.

`UNSEEN_TEST_POSTGRES_URL` (an empty database that may be wiped) runs the same tests on PostgreSQL instead of SQLite.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from redis import Redis

    from service.core.artifacts import ArtifactStore
    from service.core.db import Database
    from service.core.embedded import EmbeddedValkey
    from service.core.queue import JobQueue
    from service.core.settings import Settings
    from tests.service.harness import LiveApi

# Before anything imports torch or numpy.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the person who runs the tests must not leak into them."""
    _clean_environment(monkeypatch)


def _clean_environment(patch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("UNSEEN_") and not name.startswith("UNSEEN_TEST_"):
            patch.delenv(name)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One server for the whole run; tests that kill a server start their own."""
    from service.core.embedded import EmbeddedValkey

    folder = tmp_path_factory.mktemp("valkey")
    server = EmbeddedValkey(folder, folder / "s")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis(valkey: EmbeddedValkey) -> Iterator[Redis]:
    """A client of the session's server, emptied for this test."""
    from service.core.queue import connect

    client = connect(valkey.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server that nobody else talks to, and that the test may stop."""
    from service.core.embedded import EmbeddedValkey

    server = EmbeddedValkey(tmp_path / "valkey", tmp_path / "s")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(own_valkey: EmbeddedValkey) -> Iterator[Redis]:
    """The test's own connection to it."""
    from redis import Redis

    with Redis.from_url(own_valkey.url) as client:
        yield client


@pytest.fixture
def settings(tmp_path: Path, valkey: EmbeddedValkey) -> Settings:
    """An own data directory, the session's server, and short waits."""
    from service.core.settings import Settings

    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=os.environ.get("UNSEEN_TEST_POSTGRES_URL", ""),
        redis_url=valkey.url,
        queue=f"test-{secrets.token_hex(4)}",
        heartbeat_s=0.2,
        lost_after_s=1.5,
        reconcile_s=0.2,
        cancel_kill_s=1.0,
    )
    settings.make_dirs()
    return settings


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """A fresh database at the newest schema."""
    from sqlalchemy import text

    from service.core.db import Database, make_engine
    from service.core.migrations import upgrade

    database = Database(make_engine(settings.resolved_database_url))
    if database.engine.dialect.name == "postgresql":
        with database.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    upgrade(database.engine)
    yield database
    database.close()


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    """An empty artifact store on the local disk."""
    from service.core.artifacts import ArtifactStore

    return ArtifactStore(settings.resolved_store_url, settings.cache_dir)


@pytest.fixture
def queue(redis: Redis, settings: Settings) -> JobQueue:
    """The queue that the settings name, empty."""
    from service.core.queue import JobQueue

    return JobQueue(redis, settings.queue)


@pytest.fixture(scope="module")
def live_api(valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApi]:
    """The API on a real socket, shared by a file's tests: each makes resources of its own."""
    with pytest.MonkeyPatch.context() as patch:
        _clean_environment(patch)
        api = _start_api(tmp_path_factory.mktemp("api"), valkey.url)
    yield api
    api.close()


@pytest.fixture
def start_api(valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveApi]]:
    """Starts APIs with settings of the test's choice; all of them are gone after it."""
    started: list[LiveApi] = []

    def start(**settings: Any) -> LiveApi:
        started.append(_start_api(tmp_path_factory.mktemp("api"), valkey.url, **settings))
        return started[-1]

    yield start
    for api in started:
        api.close()


def _start_api(folder: Path, valkey_url: str, **settings: Any) -> LiveApi:
    import structlog

    from service.core.settings import Settings
    from tests.service.harness import LiveApi

    # By default every traceback is drawn with all its variables, which takes longer than the tests.
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
    )
    return LiveApi(
        Settings(
            **{"data_dir": folder / "data", "redis_url": valkey_url, "reconcile_s": 0.2, "backend": "torch", **settings}
        )
    )
