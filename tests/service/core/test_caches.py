"""What attempts record of their work for later ones, perhaps at the same time."""

from __future__ import annotations

from service.core import caches
from service.core.db import Database
from service.core.tables import FeatureRows


def test_what_is_recorded_twice_stays_once_as_it_was_said_last(database: Database) -> None:
    for shard in ("first", "second"):
        rows = [FeatureRows(spec="s", sha256=sha256, shard=shard, start=0, count=1) for sha256 in "ba"]
        with database.write() as session:
            caches.put_features(session, rows)
            caches.put_artifact(session, "k", shard, {"of": shard})
    with database.read() as session:
        found = caches.features(session, "s", ["a", "b"])
        artifact = caches.artifact(session, "k")
    assert {sha256: row.shard for sha256, row in found.items()} == {"a": "second", "b": "second"}
    assert artifact is not None
    assert (artifact.artifact, artifact.summary) == ("second", {"of": "second"})
