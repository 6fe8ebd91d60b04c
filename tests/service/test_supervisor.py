"""The supervisor: what falls over comes back, what is stopped stops in order, and nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import supervisor as supervisor_module
from service.core import process as process_module
from service.core.queue import connect
from service.core.settings import Settings
from service.supervisor import default_parts, devices
from tests.workers.harness import ROOT, is_alive, wait_until

Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The data directory; short enough for a socket in it is not promised."""
    return tmp_path / "home"


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts supervisors on one data directory; its log is `supervisor.log` beside it."""
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "UNSEEN_DATA_DIR": str(home)}
        with (home.parent / "supervisor.log").open("ab") as log:
            command = [sys.executable, "-m", "tests.service.toy_supervisor"]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def pid_of(home: Path, name: str, other_than: int = 0) -> int:
    """Waits for the part's pid file."""

    def read() -> int:
        path = home / f"{name}.pid"
        return int(path.read_text() or 0) if path.exists() else 0

    wait_until(lambda: read() not in (0, other_than))
    return read()


def valkey_pid(home: Path) -> int:
    with connect(Settings(data_dir=home).resolved_redis_url) as client:
        return int(client.info("server")["process_id"])


def test_parts_come_back_and_stop_in_order(home: Path, start: Start) -> None:
    supervisor = start()
    first, last = pid_of(home, "first"), pid_of(home, "last")
    with connect(Settings(data_dir=home).resolved_redis_url) as client:
        client.set("kept", "yes")
        client.config_set("appendfsync", "always")
        client.set("kept", "still")
    os.kill(first, signal.SIGKILL)
    assert pid_of(home, "first", other_than=first) != first
    old = valkey_pid(home)
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not is_alive(old))
    with connect(Settings(data_dir=home).resolved_redis_url) as client:
        wait_until(lambda: answers(client.get))
        assert client.get("kept") == b"still"
    new = valkey_pid(home)
    assert is_alive(last)
    assert pid_of(home, "last") == last  # nobody else was disturbed

    began = time.monotonic()
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert time.monotonic() - began < 10
    assert (home / "stopped").read_text().split() == ["last", "first"]
    assert not is_alive(new)
    log = (home.parent / "supervisor.log").read_text()
    assert "first     | hello from first" in log
    assert log.count("hello from first") == 2


def answers(get: Callable[[str], object]) -> bool:
    from redis import RedisError

    try:
        return get("kept") is not None
    except RedisError:
        return False


def test_nothing_outlives_a_killed_supervisor_and_a_second_start_resumes(home: Path, start: Start) -> None:
    supervisor = start()
    pids = [pid_of(home, "first"), pid_of(home, "last"), valkey_pid(home)]
    refused = start()
    assert refused.wait(60) == 3
    assert "already runs" in (home.parent / "supervisor.log").read_text()
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    (home / "first.pid").unlink()
    again = start()
    assert pid_of(home, "first") not in pids
    again.send_signal(signal.SIGINT)
    assert again.wait(30) == 0


def test_one_worker_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert devices("auto") == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices("auto") == ["cpu"]
    assert devices("cuda:1") == ["cuda:1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    parts = default_parts(Settings(port=1234))
    assert [part.name for part in parts] == ["inference", "worker-0", "worker-1", "api"]
    assert [part.environment.get("UNSEEN_DEVICE") for part in parts] == ["cuda:0", "cuda:0", "cuda:1", None]
    assert "1234" in parts[-1].command


@pytest.mark.parametrize(
    ("cores", "gpus", "workers", "asked", "each"),
    [
        (2, "", 1, 0, 2),
        (2, "", 2, 0, 1),
        (16, "", 3, 0, 5),
        (16, "0,1", 2, 0, 4),
        (1, "", 4, 0, 1),
        (16, "0,1", 1, 12, 12),
    ],
)
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: str, workers: int, asked: int, each: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(supervisor_module, "usable_cores", lambda: cores)
    monkeypatch.setattr(process_module, "usable_cores", lambda: cores)
    inference, *working, api = default_parts(Settings(threads=asked, workers=workers))
    assert len(working) == workers * max(1, len(gpus.split(",")))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert [part.environment[name] for part in working] == [str(each)] * len(working)
        assert inference.environment[name] == str(asked or cores)
        assert name not in api.environment
    assert [part.environment["UNSEEN_THREADS"] for part in (inference, *working)] == [
        str(asked),
        *[str(each)] * len(working),
    ]
    if gpus:
        assert [part.environment["UNSEEN_DEVICE"] for part in working] == sorted(["cuda:0", "cuda:1"] * workers)
