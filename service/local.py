"""A whole service of one's own: `unseen serve` as a child process in a data directory, on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from service.client import Client, ServiceUnreachable, UnseenError
from service.core.process import launch

LOG_FILE = "serve.log"
_STOP_S = 20.0
_OWN = ("DEVICE", "WORKERS", "THREADS", "BACKEND", "LOG_LEVEL", "WEIGHTS_DIR", "MAX_")
"""Settings of the environment that reach it: what the machine offers, never somebody's database or Redis."""


class LocalService:
    """Started by `with`, stopped at its end; dies with this process. `url` is where it listens."""

    def __init__(self, data_dir: Path, *, port: int | None = None, weights_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self.port = port or free_port()
        self._weights_dir = weights_dir
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What all of its parts have to say."""
        return self.data_dir / LOG_FILE

    def __enter__(self) -> Self:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(self.port)]
        environment = private_environment(os.environ) | {"UNSEEN_DATA_DIR": str(self.data_dir)}
        if self._weights_dir is not None:
            environment["UNSEEN_WEIGHTS_DIR"] = str(self._weights_dir.resolve())
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the service in order.
            self._process = subprocess.Popen(
                launch(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self, client: Client, timeout: float = 300.0) -> None:
        """Returns when every part works; UnseenError with the end of the log if it ended or takes too long."""
        deadline = time.monotonic() + timeout
        reason = ""
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise UnseenError(f"The service ended while starting.{self._last_words()}")
            try:
                state = client.ready()
                if state["ready"]:
                    return
                reason = "; ".join(f"{name}: {text}" for name, text in state["checks"].items() if text != "ok")
            except ServiceUnreachable:
                reason = "the API does not answer yet"
            time.sleep(0.2)
        raise UnseenError(f"The service was not ready within {timeout:g} s ({reason}).{self._last_words()}")

    def stop(self) -> None:
        """Ends the service and all of its parts; stopping twice is fine."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its parts die with it
            self._process.wait()
        self._process = None

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in [f"The end of {self.log}:", *lines]) if lines else ""


def private_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the settings that would tie a private service to somebody's other one."""
    kept = tuple(f"UNSEEN_{name}" for name in _OWN)
    return {
        name: value for name, value in environment.items() if not name.startswith("UNSEEN_") or name.startswith(kept)
    }


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_port_free(host: str, port: int) -> bool:
    """Whether one can listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
