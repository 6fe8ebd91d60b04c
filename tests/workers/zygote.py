"""Forks toy workers on request, so that a test does not wait for a second and a half of imports for each.

Each worker is a process of its own, as one started from a shell; the zygote has no threads and no connections.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The test's end: a child process that answers one JSON line with another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.zygote"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, **request: Any) -> Any:
        """Sends a request and returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the zygote; workers still running end with it."""
        self._process.communicate(timeout=30)


class Forked:
    """A worker's process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, zygote: Zygote, environment: Mapping[str, str], log: Path) -> None:
        self._zygote = zygote
        self._code: int | None = None
        self.pid: int = zygote.ask(do="fork", environment=dict(environment), log=str(log))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask(do="poll", pid=self.pid)
        return self._code

    def wait(self, timeout: float = 60.0) -> int:
        """Waits for the end."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("toy worker", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Signals it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)


def _fork(environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        from tests.workers import toy_worker

        toy_worker.main()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    """Serves requests until its input ends."""
    import tests.workers.toy_worker  # noqa: F401 - what every worker needs, once

    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "fork":
            answer: int | None = _fork(request["environment"], request["log"])
            living.add(answer or 0)
        else:
            answer = _poll(request["pid"])
            if answer is not None:
                living.discard(request["pid"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in living:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
