"""The database schema's history. `upgrade` brings any database to the newest version; every process calls it."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

_LOCK = 0x756E7365656E  # any number, the same everywhere: "unseen" in ASCII


def upgrade(engine: Engine) -> None:
    """Applies what is missing in one transaction; of several processes one does it and the others wait."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    # SQLite: a write transaction is the lock. PostgreSQL: an advisory lock that ends with the transaction.
    with engine.execution_options(unseen_write=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
