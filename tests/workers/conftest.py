"""Fixtures around real worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from service.core.db import Database
from service.core.queue import JobQueue
from service.core.settings import Settings
from tests.workers.harness import WorkerProcess, World
from tests.workers.zygote import Zygote


@pytest.fixture
def world(settings: Settings, database: Database, queue: JobQueue) -> World:
    """Database, queue and settings in one hand."""
    return World(settings, database, queue)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What workers are forked from."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def start_worker(world: World, zygote: Zygote) -> Iterator[Callable[[], WorkerProcess]]:
    """Starts workers; all of them are gone after the test."""
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        started.append(WorkerProcess(world, zygote))
        return started[-1]

    yield start
    with ExitStack() as stack:  # every one of them, whatever happens to the others
        for worker in started:
            stack.callback(worker.close)
