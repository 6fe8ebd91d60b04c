"""The first schema."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates every table, those that others refer to first."""
    _datasets()
    _embedding_sets()
    _classifiers()
    _jobs()
    _caches()


def downgrade() -> None:
    """Removes every table and all that is in them."""
    dependent = ["embedding_classes", "classifiers", "embedding_sets", "images"]
    free = ["jobs", "workers", "idempotency_keys", "feature_rows", "cached_artifacts", "knowledge", "datasets"]
    for table in dependent + free:
        op.drop_table(table)


def _id(name: str = "id", **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(40), **options)


def _text(name: str, length: int, nullable: bool = False, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), nullable=nullable, **options)


def _integer(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _json(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=nullable)


def _time(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _datasets() -> None:
    op.create_table(
        "datasets",
        _id(primary_key=True),
        _text("name", 255),
        sa.Column("description", sa.Text(), nullable=False),
        _text("kind", 16),
        sa.Column("test_fraction", sa.Float(), nullable=False),
        _json("meta"),
        _json("artifacts"),
        _json("summary"),
        _time("created_at"),
    )
    op.create_table(
        "images",
        _id(primary_key=True),
        _id("dataset_id", nullable=False),
        _text("sha256", 64),
        _text("class_name", 256),
        _text("filename", 512),
        _integer("width"),
        _integer("height"),
        _integer("size_bytes"),
        _text("split", 8, nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], ondelete="CASCADE"),
        sa.UniqueConstraint("dataset_id", "sha256"),
    )
    op.create_index("ix_images_dataset_class", "images", ["dataset_id", "class_name"])


def _embedding_sets() -> None:
    op.create_table(
        "knowledge",
        _id(primary_key=True),
        _text("name", 255),
        _text("kind", 16),
        _text("status", 16),
        _integer("dim", nullable=True),
        _integer("n_entries", nullable=True),
        _json("artifacts"),
        _json("summary"),
        _id("job_id", nullable=True),
        _time("created_at"),
    )
    op.create_table(
        "embedding_sets",
        _id(primary_key=True),
        _text("name", 255),
        _id("dataset_id", nullable=False),
        _id("knowledge_id", nullable=False),
        _text("method", 32),
        _text("relation", 32),
        _json("params"),
        _json("request"),
        _text("status", 16),
        _integer("dim", nullable=True),
        _json("artifacts"),
        _json("summary"),
        _integer("version"),
        _id("job_id", nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"]),
        sa.ForeignKeyConstraint(["knowledge_id"], ["knowledge.id"]),
    )
    op.create_index("ix_embedding_sets_name", "embedding_sets", ["name"])
    op.create_table(
        "embedding_classes",
        _id("embedding_set_id", primary_key=True),
        _text("name", 256, primary_key=True),
        _integer("position"),
        sa.Column("is_seen", sa.Boolean(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        _json("provenance"),
        _time("created_at"),
        sa.ForeignKeyConstraint(["embedding_set_id"], ["embedding_sets.id"], ondelete="CASCADE"),
    )


def _classifiers() -> None:
    op.create_table(
        "classifiers",
        _id(primary_key=True),
        _text("name", 255),
        _id("dataset_id", nullable=False),
        _id("embedding_set_id", nullable=True),
        _id("knowledge_id", nullable=True),
        _text("method", 32),
        _json("params"),
        _json("request"),
        _text("status", 16),
        _json("artifacts"),
        _json("metrics"),
        _id("job_id", nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"]),
        sa.ForeignKeyConstraint(["embedding_set_id"], ["embedding_sets.id"]),
        sa.ForeignKeyConstraint(["knowledge_id"], ["knowledge.id"]),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        _id(primary_key=True),
        _text("kind", 32),
        _text("status", 16),
        _id("resource_id", nullable=False),
        _json("payload"),
        _integer("attempts"),
        _integer("max_attempts"),
        _integer("token"),
        _text("worker_id", 64, nullable=True),
        _json("progress"),
        _json("result", nullable=True),
        _json("error", nullable=True),
        _time("created_at"),
        _time("queued_at"),
        _time("started_at", nullable=True),
        _time("heartbeat_at", nullable=True),
        _time("cancel_requested_at", nullable=True),
        _time("finished_at", nullable=True),
    )
    op.create_index("ix_jobs_status", "jobs", ["status", "created_at"])
    op.create_index("ix_jobs_resource_id", "jobs", ["resource_id"])
    op.create_table(
        "workers",
        _text("id", 64, primary_key=True),
        _text("host", 255),
        _integer("pid"),
        _text("device", 32),
        _time("started_at"),
        _time("heartbeat_at"),
    )


def _caches() -> None:
    op.create_table(
        "feature_rows",
        _text("spec", 64, primary_key=True),
        _text("sha256", 64, primary_key=True),
        _text("shard", 80),
        _integer("start"),
        _integer("count"),
    )
    op.create_table(
        "cached_artifacts",
        _text("key", 96, primary_key=True),
        _text("artifact", 80),
        _json("summary"),
        _time("created_at"),
    )
    op.create_table(
        "idempotency_keys",
        _text("key", 320, primary_key=True),
        _text("body_sha256", 64, nullable=True),
        _integer("status", nullable=True),
        _json("headers"),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        _time("locked_until"),
        _time("created_at"),
    )
