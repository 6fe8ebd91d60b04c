"""`python -m workers`: one worker process, configured by `UNSEEN_…` variables."""

from __future__ import annotations

import os
import sys

from service.core.logging import configure_logging
from service.core.migrations import upgrade
from service.core.settings import Settings

# glibc gives large blocks back to the kernel at once and asks for them again at the next step; a batch of images
# then spends a third of its time on page faults. These keep them. Read at the start of a process only.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


def main() -> None:
    """Starts the worker; returns after SIGTERM or SIGINT."""
    settings = Settings()
    wanted = dict(MALLOC)
    if settings.threads:
        wanted |= {
            name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", "workers", *sys.argv[1:]], {**os.environ, **missing})
    configure_logging(settings.log_level)
    _work(settings)


def _work(settings: Settings) -> None:
    # Imported late: the variables above must be set before torch is. Importing it here, once, lets every work-horse
    # start with it; it must not compute anything in this process, which forks.
    from workers.runner import open_services, run_job
    from workers.tasks import TASKS
    from workers.worker import serve

    def run(job_id: str, worker_id: str) -> None:
        run_job(job_id, worker_id=worker_id, tasks=TASKS, services=open_services(settings))

    services = open_services(settings, pooled=False)
    upgrade(services.database.engine)
    serve(services, run, settings.device)


if __name__ == "__main__":
    main()
