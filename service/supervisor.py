"""`unseen serve`: every part of the embedded default as a child of one process, restarted when it falls over.

Order of start: Valkey, database schema, inference, workers, API; of stop: API, workers, inference, Valkey. Children
die with this process even if it is killed, and a second start on the same data directory is refused while one runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from service.core.db import make_engine
from service.core.embedded import EmbeddedValkey, FolderLock
from service.core.errors import ServiceError
from service.core.logging import get_logger
from service.core.migrations import upgrade
from service.core.process import compute_environment, launch, usable_cores
from service.core.settings import Settings

_STOP_S = 3.0  # for each group of parts, so that all of them end within ten seconds
_MAX_BACKOFF_S = 30.0
_STEADY_S = 60.0  # a part that ran this long starts again without delay
_log = get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """One child process; parts of a higher `stage` start later and stop earlier."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stage: int = 0


def devices(device: str) -> list[str]:
    """One entry a worker: the device named, or for 'auto' every NVIDIA GPU of this machine, else the CPU."""
    if device != "auto":
        return [device]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        n = len([entry for entry in visible.split(",") if entry.strip() and entry.strip() != "-1"])
    else:
        n = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    return [f"cuda:{i}" for i in range(n)] or ["cpu"]


def _computes(threads: int, device: str) -> dict[str, str]:
    return {**compute_environment(threads), "UNSEEN_THREADS": str(threads), "UNSEEN_DEVICE": device}


def default_parts(settings: Settings) -> list[Part]:
    """Inference, the workers, and the API.

    Workers share the cores; inference has them all, since it is idle between requests. A setting overrides both.
    """
    python = sys.executable
    api = [python, "-m", "service.cli", "api", "--host", settings.host, "--port", str(settings.port)]
    found = devices(settings.device)
    inference = Part("inference", [python, "-m", "workers.inference"], _computes(settings.threads, found[0]), 0)
    places = [device for device in found for _ in range(settings.workers)]
    share = settings.threads or max(1, usable_cores() // len(places))
    workers = [
        Part(f"worker-{i}" if len(places) > 1 else "worker", [python, "-m", "workers"], _computes(share, device), 1)
        for i, device in enumerate(places)
    ]
    return [inference, *workers, Part("api", api, {}, 2)]


class Supervisor:
    """Runs all parts until it is told to stop."""

    def __init__(self, settings: Settings, parts: Sequence[Part] | None = None) -> None:
        self.settings = settings
        self._parts = [_Child(part, settings) for part in (default_parts(settings) if parts is None else parts)]
        self._valkey: EmbeddedValkey | None = None
        self._stop = False

    def run(self) -> int:
        """Starts everything, keeps it going and returns 0 after SIGINT or SIGTERM; `Conflict` if already running."""
        self.settings.make_dirs()
        refusal = f"Unseen already runs on {self.settings.data_dir}; stop it, or set another UNSEEN_DATA_DIR."
        lock = FolderLock(self.settings.data_dir / "serve.lock", refusal)
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start()
            while not self._stop:
                self._look()
                time.sleep(0.1)
        finally:
            self._end()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            lock.release()
        return 0

    def stop(self) -> None:
        """Makes `run` return soon; callable from any thread."""
        self._stop = True

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    def _start(self) -> None:
        if not self.settings.redis_url:
            socket = self.settings.run_dir / "valkey.sock"
            self._valkey = EmbeddedValkey(self.settings.data_dir.resolve() / "valkey", socket)
            self._valkey.start()
        engine = make_engine(self.settings.resolved_database_url, pooled=False)
        upgrade(engine)
        engine.dispose()
        for child in sorted(self._parts, key=lambda c: c.part.stage):
            child.start()

    def _look(self) -> None:
        """Starts again what has ended."""
        if self._valkey is not None and not self._valkey.is_running():
            _log.error("part_ended", part="valkey")
            try:
                self._valkey.restart()
            except ServiceError as error:
                _log.error("part_failed", part="valkey", error=error.detail)
                time.sleep(1.0)
        for child in self._parts:
            child.look()

    def _end(self) -> None:
        for stage in sorted({child.part.stage for child in self._parts}, reverse=True):
            group = [child for child in self._parts if child.part.stage == stage]
            for child in group:
                child.ask_to_stop()
            deadline = time.monotonic() + _STOP_S / (1 if stage else 2)
            for child in group:
                child.wait(deadline)
        if self._valkey is not None:
            self._valkey.stop(timeout_s=2.0)


class _Child:
    """One part's process, its restarts and its output."""

    def __init__(self, part: Part, settings: Settings) -> None:
        self.part = part
        # An option that says the default again must win over a variable that says otherwise.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNSEEN_")}
        self._environment = {**inherited, **settings.to_environment(), **part.environment, "PYTHONUNBUFFERED": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._output: threading.Thread | None = None
        self._began = 0.0
        self._again_at: float | None = None
        self._backoff_s = 0.0

    def start(self) -> None:
        # A session of its own: Ctrl-C in the terminal reaches only the supervisor, which stops the parts in order.
        self._process = subprocess.Popen(
            launch(self.part.command),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._began, self._again_at = time.monotonic(), None
        self._output = threading.Thread(target=self._forward, args=(self._process,), daemon=True)
        self._output.start()

    def look(self) -> None:
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self.start()
        elif self._process is not None and (code := self._process.poll()) is not None:
            is_steady = now - self._began >= _STEADY_S
            self._backoff_s = 0.25 if is_steady or not self._backoff_s else min(2 * self._backoff_s, _MAX_BACKOFF_S)
            self._again_at = now + self._backoff_s
            _log.error("part_ended", part=self.part.name, exit_code=code, again_in_s=self._backoff_s)

    def ask_to_stop(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def wait(self, deadline: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(max(deadline - time.monotonic(), 0.05))
        except subprocess.TimeoutExpired:
            _log.warning("part_killed", part=self.part.name)
        with suppress(OSError):  # and what it may have left in its session
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._output is not None:
            self._output.join(timeout=1.0)

    def _forward(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        prefix = f"{self.part.name:<9} | ".encode()
        with process.stdout as lines:
            for line in lines:
                sys.stderr.buffer.write(prefix + line)
                sys.stderr.buffer.flush()
