"""What was computed once and need not be again: features by image and spec, derived artifacts by digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.core.repositories import by_content
from service.core.tables import Base, CachedArtifact, FeatureRows


def features(session: Session, spec: str, sha256s: Sequence[str]) -> dict[str, FeatureRows]:
    """sha256 -> where its features of this spec lie, for those that are cached."""
    return by_content(session, FeatureRows, sha256s, FeatureRows.spec == spec)


def put_features(session: Session, rows: Sequence[FeatureRows]) -> None:
    """Records a shard's rows, in place of earlier ones of the same images."""
    names = [column.name for column in FeatureRows.__table__.columns]
    # In one order, so that two attempts with the same images never wait for each other.
    ordered = sorted(rows, key=lambda row: row.sha256)
    _put(session, FeatureRows, [{name: getattr(row, name) for name in names} for row in ordered])


def artifact(session: Session, key: str) -> CachedArtifact | None:
    """A derived artifact by the digest of all that determines it."""
    return session.get(CachedArtifact, key)


def put_artifact(session: Session, key: str, artifact_key: str, summary: dict[str, Any]) -> None:
    """Records a derived artifact, in place of an earlier one."""
    _put(session, CachedArtifact, [{"key": key, "artifact": artifact_key, "summary": summary}])


def _put(session: Session, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Inserts rows; where another attempt, perhaps still at work, has the same keys, the later one's values stay."""
    keys = [column.name for column in table.__table__.primary_key]
    insert: Any = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(table)
    values = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    session.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), rows)
