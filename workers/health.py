"""`python -m workers.health`: exit 0 while a worker of this host shows recent signs of life, for container checks."""

from __future__ import annotations

import sys

from service.core import repositories
from service.core.db import Database, make_engine
from service.core.process import host_id
from service.core.settings import Settings


def main() -> int:
    """0: a worker of this host was heard of lately; 1: none was, or the database does not answer."""
    settings = Settings()
    database = Database(make_engine(settings.resolved_database_url))
    with database.read() as session:
        workers = repositories.live_workers(session, settings.lost_after_s)
    return 0 if any(worker.host == host_id() for worker in workers) else 1


if __name__ == "__main__":
    sys.exit(main())
