"""Deletes artifacts that nothing refers to: of deleted resources, of attempts that died before they recorded them.

An artifact is written before the row that names it, and content that is there already is not written again. So one that
no row names may be about to get its row. Therefore it goes in two steps, each after `orphan_age_s`: first out of sight,
then for good, and whatever a row names in between comes back. Any number of collectors may run at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from service.core import jobs, repositories
from service.core.artifacts import ArtifactStore, image_key
from service.core.db import Database
from service.core.errors import NotFound, Unavailable
from service.core.logging import get_logger
from service.core.settings import Settings

Item = TypeVar("Item")
_SOON_S, _EVERY_S = 60.0, 3600.0
_CHUNK = 500
_log = get_logger(__name__)


class Collector:
    """Call `step` now and then, or `run` in a thread. `clock` tells Unix time, as the store does."""

    def __init__(
        self, database: Database, store: ArtifactStore, settings: Settings, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._store = store
        self._age_s = settings.orphan_age_s
        self._clock = clock

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set, through every failure of database and store."""
        pause_s = _SOON_S
        while not stop.wait(pause_s):
            pause_s = _EVERY_S
            try:
                if self.step(stop):
                    pause_s = _SOON_S  # rows that were just being written are missing theirs only for so long
            except (Unavailable, DBAPIError) as error:
                _log.warning("collector_step_failed", error=str(error))
            except Exception:  # a thread that ends here would never collect again
                _log.exception("collector_step_failed")

    def step(self, stop: threading.Event | None = None) -> int:
        """Looks once at every artifact, unless `stop` is set meanwhile; tells how many it moved out of sight."""
        stop = stop or threading.Event()
        n_condemned = self._condemn_orphans(stop)
        n_pardoned, n_purged = self._settle_condemned(stop)
        if n_condemned or n_pardoned or n_purged:
            _log.info("artifacts_collected", condemned=n_condemned, pardoned=n_pardoned, deleted=n_purged)
        return n_condemned

    def _condemn_orphans(self, stop: threading.Event) -> int:
        n_condemned = 0
        named, before = self._named_by_resources(), self._settled_before()
        for keys in _chunks(self._store.iter_keys(), stop):
            used = named | self._named_by_images(keys)
            for key in keys:
                with suppress(NotFound):  # another collector was quicker
                    if key not in used and self._store.is_written_before(key, before):
                        self._store.condemn(key, self._clock())
                        n_condemned += 1
        return n_condemned

    def _settle_condemned(self, stop: threading.Event) -> tuple[int, int]:
        n_pardoned = n_purged = 0
        named, before = self._named_by_resources(), self._settled_before()
        for chunk in _chunks(self._store.iter_condemned(), stop):
            used = named | self._named_by_images([condemned.key for condemned in chunk])
            for condemned in chunk:
                if condemned.key in used and not self._store.exists(condemned.key):
                    self._store.pardon(condemned)
                    n_pardoned += 1
                elif condemned.since < before:  # nor sooner where the key exists: it may just be on its way out, too
                    self._store.purge(condemned)
                    n_purged += 1
        return n_pardoned, n_purged

    def _settled_before(self) -> float:
        """What was written before this has its row by now, if it ever gets one. Long jobs add theirs at their end."""
        with self._database.read() as session:
            oldest = jobs.oldest_unended(session)
        times = [self._clock()] if oldest is None else [self._clock(), oldest.timestamp()]
        return min(times) - self._age_s

    def _named_by_resources(self) -> set[str]:
        with self._database.read() as session:
            return repositories.artifact_keys(session)

    def _named_by_images(self, keys: Sequence[str]) -> set[str]:
        with self._database.read() as session:
            found = repositories.stored_contents(session, [key.rsplit("/", 1)[1] for key in keys])
        return {image_key(sha256) for sha256 in found}


def _chunks(items: Iterator[Item], stop: threading.Event) -> Iterator[list[Item]]:
    """`items` in short lists, until `stop` is set."""
    while not stop.is_set() and (chunk := list(islice(items, _CHUNK))):
        yield chunk
