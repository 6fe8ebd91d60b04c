"""An API of the test's own, with or without real inference, and the Python client against it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from service.client import Client
from service.core.db import Database
from tests.service.harness import LiveApi, Server


@pytest.fixture
def own_api(start_api: Callable[..., LiveApi]) -> LiveApi:
    """An API that no other test sees, without workers."""
    return start_api()


@pytest.fixture
def inferring_api(own_api: LiveApi) -> Iterator[LiveApi]:
    """An API whose inference process is the real one."""
    from workers.inference import create_inference_app  # it loads torch, which most tests do without

    own_api.stop_inference()
    socket = own_api.settings.resolved_inference_url.removeprefix("unix://")
    warm = threading.Event()
    server = Server(create_inference_app(own_api.settings, started=warm.set), uds=socket, lifespan="on")
    assert warm.wait(60)
    yield own_api
    server.stop()


@pytest.fixture
def client(own_api: LiveApi) -> Iterator[Client]:
    """A client of that API."""
    with Client(f"http://127.0.0.1:{own_api.port}", retries=2) as client:
        yield client


@pytest.fixture
def api_database(own_api: LiveApi) -> Database:
    """That API's own database."""
    return own_api.parts.database
