"""The embedded server: one a folder, data kept over a kill, damaged data set aside."""

from __future__ import annotations

import os
import signal

import pytest

from service.core.embedded import EmbeddedValkey
from service.core.errors import Conflict
from service.core.queue import connect
from tests.workers.harness import is_alive, wait_until


def test_data_survives_a_kill(own_valkey: EmbeddedValkey) -> None:
    with connect(own_valkey.url) as client:
        client.config_set("appendfsync", "always")
        client.set("a", "1")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("port")["port"] == "0"
    assert own_valkey.pid is not None
    os.kill(own_valkey.pid, signal.SIGKILL)
    wait_until(lambda: not own_valkey.is_running())
    own_valkey.restart()
    with connect(own_valkey.url) as client:
        assert client.get("a") == b"1"


def test_damaged_data_is_set_aside(own_valkey: EmbeddedValkey) -> None:
    with connect(own_valkey.url) as client:
        client.set("a", "1")
    own_valkey.stop()
    (file,) = (own_valkey.folder / "appendonlydir").glob("*.incr.aof")
    file.write_bytes(b"*nonsense" * 100)
    own_valkey.start()
    with connect(own_valkey.url) as client:
        assert client.get("a") is None
        assert client.set("b", "2")
    assert list(own_valkey.folder.glob("appendonlydir.damaged-*"))


def test_a_second_server_on_the_folder_is_refused(own_valkey: EmbeddedValkey) -> None:
    second = EmbeddedValkey(own_valkey.folder, own_valkey.socket)
    with pytest.raises(Conflict, match="already uses"):
        second.start()
    with connect(own_valkey.url) as client:
        assert client.ping()


def test_stop_leaves_nothing_and_start_works_again(own_valkey: EmbeddedValkey) -> None:
    pid = own_valkey.pid
    assert pid is not None
    own_valkey.stop()
    own_valkey.stop()
    assert not is_alive(pid)
    assert own_valkey.pid is None
    own_valkey.start()
    assert own_valkey.is_running()
