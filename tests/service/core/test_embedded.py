"""The embedded server: one a folder, data kept over a kill, damaged data set aside."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.core.embedded import EmbeddedValkey
from service.core.errors import Conflict
from service.core.queue import connect
from tests.workers.harness import is_alive, wait_until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A started server."""
    server = EmbeddedValkey(tmp_path / "valkey", tmp_path / "s")
    server.start()
    yield server
    server.stop()


def test_data_survives_a_kill(server: EmbeddedValkey) -> None:
    with connect(server.url) as client:
        client.config_set("appendfsync", "always")
        client.set("a", "1")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("port")["port"] == "0"
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running())
    server.restart()
    with connect(server.url) as client:
        assert client.get("a") == b"1"


def test_damaged_data_is_set_aside(server: EmbeddedValkey) -> None:
    with connect(server.url) as client:
        client.set("a", "1")
    server.stop()
    (file,) = (server.folder / "appendonlydir").glob("*.incr.aof")
    file.write_bytes(b"*nonsense" * 100)
    server.start()
    with connect(server.url) as client:
        assert client.get("a") is None
        assert client.set("b", "2")
    assert list(server.folder.glob("appendonlydir.damaged-*"))


def test_a_second_server_on_the_folder_is_refused(server: EmbeddedValkey) -> None:
    second = EmbeddedValkey(server.folder, server.socket)
    with pytest.raises(Conflict, match="already uses"):
        second.start()
    with connect(server.url) as client:
        assert client.ping()


def test_stop_leaves_nothing_and_start_works_again(server: EmbeddedValkey) -> None:
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert not is_alive(pid)
    assert server.pid is None
    server.start()
    assert server.is_running()
