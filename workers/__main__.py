"""`python -m workers`: one worker process, configured by `UNSEEN_…` variables."""

from __future__ import annotations

from service.core.logging import configure_logging
from service.core.migrations import upgrade
from service.core.process import compute_environment, restart_with
from service.core.settings import Settings


def main() -> None:
    """Starts the worker; returns after SIGTERM or SIGINT."""
    settings = Settings()
    restart_with("workers", compute_environment(settings.threads))
    configure_logging(settings.log_level)
    _work(settings)


def _work(settings: Settings) -> None:
    # Imported late: the variables above must be set before torch is. Importing it here, once, lets every work-horse
    # start with it; it must not compute anything in this process, which forks.
    import torch
    import torch._dynamo  # or the first step of an optimizer imports it, 2 s in every job

    from workers.runner import open_services, run_job
    from workers.tasks import TASKS
    from workers.worker import serve

    def run(job_id: str, worker_id: str) -> None:
        # Products with numbers below 1e-38, which saturated generators make, take up to 45 times as long.
        torch.set_flush_denormal(True)
        run_job(job_id, worker_id=worker_id, tasks=TASKS, services=open_services(settings))

    services = open_services(settings, pooled=False)
    upgrade(services.database.engine)
    serve(services, run, settings.device)


if __name__ == "__main__":
    main()
