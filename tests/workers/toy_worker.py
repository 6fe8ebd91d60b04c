"""A real worker with toy tasks: `python -m tests.workers.toy_worker`. Each attempt appends a line to `runs.log`."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

from sqlalchemy.orm import Session

from models.base import Progress
from models.errors import InvalidInput
from service.core import tables
from service.core.errors import Unavailable
from service.core.logging import configure_logging
from service.core.settings import Settings
from workers.runner import Publisher, TaskContext, TaskFunction, open_services, run_job
from workers.worker import serve


def note(context: TaskContext) -> None:
    """One line an attempt: token and pid."""
    path = context.settings.data_dir / "runs.log"
    with path.open("a") as log:
        log.write(f"{context.job.id} {context.job.token} {os.getpid()}\n")


def publish(context: TaskContext) -> Publisher:
    """One row a job: a second publication would break the primary key."""

    def publisher(session: Session) -> dict[str, Any]:
        session.add(tables.CachedArtifact(key=f"effect-{context.job.id}", artifact=str(context.job.token)))
        return {"kind": "toy", "id": context.job.resource_id, "href": "/toy", "token": context.job.token}

    return publisher


def count(context: TaskContext) -> Publisher:
    """Counts to `n`, `pause_s` a step, and reports each."""
    note(context)
    context.progress.set_phases([("counting", 1.0)])
    n = context.job.payload["n"]
    (context.scratch_dir / "half-done").write_text("x")
    for i in range(n):
        time.sleep(context.job.payload.get("pause_s", 0.01))
        context.progress(Progress("counting", i + 1, n))
    return publish(context)


def stubborn(context: TaskContext) -> Publisher:
    """Never looks whether it should stop."""
    note(context)
    time.sleep(context.job.payload["seconds"])
    return publish(context)


def grip(context: TaskContext) -> Publisher:
    """Holds the interpreter's lock, as some C code does: no other thread of the process runs."""
    note(context)
    ctypes.PyDLL(None).usleep(int(context.job.payload["seconds"] * 1e6))
    return publish(context)


def die(context: TaskContext) -> Publisher:
    """Ends as the kernel's out-of-memory killer would have it, the first `times` attempts."""
    note(context)
    if context.job.attempts <= context.job.payload["times"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(context)


def refuse(context: TaskContext) -> Publisher:
    """Finds its input wrong."""
    note(context)
    raise InvalidInput("There are fewer images than clusters.", field="params/n_clusters")


def flaky(context: TaskContext) -> Publisher:
    """Meets a full disk the first `times` attempts."""
    note(context)
    if context.job.attempts <= context.job.payload["times"]:
        raise Unavailable("The artifact store is full.")
    return publish(context)


def bug(context: TaskContext) -> Publisher:
    """Has a mistake in it."""
    note(context)
    raise KeyError("secret detail")


TASKS: dict[str, TaskFunction] = {
    "count": count,
    "stubborn": stubborn,
    "grip": grip,
    "die": die,
    "refuse": refuse,
    "flaky": flaky,
    "bug": bug,
}


def main() -> None:
    """As `python -m workers`, with the toy tasks."""
    settings = Settings()
    configure_logging(settings.log_level)

    def run(job_id: str, worker_id: str) -> None:
        run_job(job_id, worker_id=worker_id, tasks=TASKS, services=open_services(settings))

    serve(open_services(settings, pooled=False), run, "cpu")


if __name__ == "__main__":
    main()
