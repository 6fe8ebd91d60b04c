"""The database tables: the record of truth for every resource and job."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.core.db import utc_now


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone, always UTC, also on SQLite, which forgets zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Any) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, _dialect: Any) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Base(DeclarativeBase):
    """All tables; JSON columns hold what is shown, never what is searched."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: UtcDateTime,
        str: String(255),
        bytes: LargeBinary,
    }


class Dataset(Base):
    """Labelled images, or feature vectors in their place."""

    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    description: Mapped[str] = mapped_column(Text, default="")
    kind: Mapped[str] = mapped_column(String(16), default="images")  # images | features
    test_fraction: Mapped[float] = mapped_column(Float, default=0.2)
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    artifacts: Mapped[dict[str, Any]] = mapped_column(default=dict)  # kind=features: file name -> store key
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)  # kind=features: sizes, classes, fingerprint
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Image(Base):
    """One accepted image; its bytes lie in the artifact store under their sha256."""

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("dataset_id", "sha256"),
        Index("ix_images_dataset_class", "dataset_id", "class_name"),
        Index("ix_images_sha256", "sha256"),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    sha256: Mapped[str] = mapped_column(String(64))
    class_name: Mapped[str] = mapped_column(String(256))
    filename: Mapped[str] = mapped_column(String(512), default="")
    width: Mapped[int]
    height: Mapped[int]
    size_bytes: Mapped[int]
    split: Mapped[str | None] = mapped_column(String(8), default=None)  # train | test | None: by test_fraction
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Knowledge(Base):
    """A source of outside knowledge about classes."""

    __tablename__ = "knowledge"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(String(16))  # word_vectors | class_vectors | attributes | text_encoder
    status: Mapped[str] = mapped_column(String(16), default="importing")  # importing | ready | failed
    dim: Mapped[int | None] = mapped_column(default=None)
    n_entries: Mapped[int | None] = mapped_column(default=None)
    artifacts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    job_id: Mapped[str | None] = mapped_column(String(40), default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class EmbeddingSet(Base):
    """Class embeddings of seen and unseen classes, and how they were made."""

    __tablename__ = "embedding_sets"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    knowledge_id: Mapped[str] = mapped_column(ForeignKey("knowledge.id"))
    method: Mapped[str] = mapped_column(String(32))
    relation: Mapped[str] = mapped_column(String(32))
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)  # seen and unseen classes as asked for
    status: Mapped[str] = mapped_column(String(16), default="queued")  # queued | ready | failed
    dim: Mapped[int | None] = mapped_column(default=None)
    artifacts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    version: Mapped[int] = mapped_column(Integer, default=1)  # grows when live classes are added
    job_id: Mapped[str | None] = mapped_column(String(40), default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class EmbeddingClass(Base):
    """One class's vector: little-endian float32."""

    __tablename__ = "embedding_classes"
    embedding_set_id: Mapped[str] = mapped_column(ForeignKey("embedding_sets.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    position: Mapped[int]
    is_seen: Mapped[bool]
    vector: Mapped[bytes]
    provenance: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Classifier(Base):
    """A trained zero-shot classifier."""

    __tablename__ = "classifiers"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    embedding_set_id: Mapped[str | None] = mapped_column(ForeignKey("embedding_sets.id"), default=None)
    knowledge_id: Mapped[str | None] = mapped_column(ForeignKey("knowledge.id"), default=None)
    method: Mapped[str] = mapped_column(String(32))
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)
    status: Mapped[str] = mapped_column(String(16), default="queued")  # queued | ready | failed
    artifacts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    job_id: Mapped[str | None] = mapped_column(String(40), default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


RESULTS_FILE, OFFSETS_FILE = "predictions.jsonl", "offsets.i64"
"""Artifacts of predictions: a line for each image; where each begins and the last ends, little-endian int64."""


class PredictionSet(Base):
    """What a classifier said of all images of a dataset."""

    __tablename__ = "predictions"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    classifier_id: Mapped[str] = mapped_column(ForeignKey("classifiers.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)
    status: Mapped[str] = mapped_column(String(16), default="queued")  # queued | ready | failed
    artifacts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    job_id: Mapped[str | None] = mapped_column(String(40), default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Job(Base):
    """One piece of long work. `token` fences attempts: only the holder of the newest may write."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_status", "status", "created_at"),)
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16), default="queued")
    resource_id: Mapped[str] = mapped_column(String(40), index=True)  # what the job makes or fills
    payload: Mapped[dict[str, Any]] = mapped_column(default=dict)
    attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    token: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(64), default=None)
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    queued_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None] = mapped_column(default=None)
    heartbeat_at: Mapped[datetime | None] = mapped_column(default=None)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(default=None)
    finished_at: Mapped[datetime | None] = mapped_column(default=None)


class Worker(Base):
    """A live worker process and its last sign of life."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str] = mapped_column(String(32), default="cpu")
    started_at: Mapped[datetime] = mapped_column(default=utc_now)
    heartbeat_at: Mapped[datetime] = mapped_column(default=utc_now)


class FeatureRows(Base):
    """Where the cached features of one image lie: rows [start, start + count) of a shard."""

    __tablename__ = "feature_rows"
    spec: Mapped[str] = mapped_column(String(64), primary_key=True)  # digest of backbone, weights and patching
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    shard: Mapped[str] = mapped_column(String(80))  # artifact key
    start: Mapped[int]
    count: Mapped[int]


class CachedArtifact(Base):
    """A derived artifact that later work may reuse, such as a backbone trained from scratch."""

    __tablename__ = "cached_artifacts"
    key: Mapped[str] = mapped_column(String(96), primary_key=True)
    artifact: Mapped[str] = mapped_column(String(80))
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class IdempotencyKey(Base):
    """A POST that was or is being answered; replayed for the same key and body."""

    __tablename__ = "idempotency_keys"
    key: Mapped[str] = mapped_column(String(320), primary_key=True)  # caller, route and the header's value
    body_sha256: Mapped[str | None] = mapped_column(String(64), default=None)
    status: Mapped[int | None] = mapped_column(default=None)
    headers: Mapped[dict[str, Any]] = mapped_column(default=dict)
    body: Mapped[bytes | None] = mapped_column(default=None)
    locked_until: Mapped[datetime] = mapped_column(default=utc_now)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
