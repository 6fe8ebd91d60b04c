"""The Python client against an API of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from service.client import Client
from service.core.db import Database
from tests.service.harness import LiveApi


@pytest.fixture
def own_api(start_api: Callable[..., LiveApi]) -> LiveApi:
    """An API that no other test sees, without workers."""
    return start_api()


@pytest.fixture
def client(own_api: LiveApi) -> Iterator[Client]:
    """A client of that API."""
    with Client(f"http://127.0.0.1:{own_api.port}", retries=2) as client:
        yield client


@pytest.fixture
def api_database(own_api: LiveApi) -> Database:
    """That API's own database."""
    return own_api.parts.database
