"""What Alembic runs: the migrations, inside the transaction that `upgrade` has opened."""

from __future__ import annotations

from alembic import context

from service.core.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("Migrations run through service.core.migrations.upgrade(engine), which holds the lock.")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
