"""Checkpoints of a job's training in the artifact store, so that whichever worker takes the job next goes on there."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from models.zero_shot.checkpoints import FileCheckpoints, State
from service.core import jobs
from service.core.errors import ServiceError
from service.core.logging import get_logger
from workers.runner import TaskContext

_FIELD = "checkpoint"
_log = get_logger(__name__)


class JobCheckpoints:
    """The newest checkpoint of one job; its key stands in the job's row, fenced like all that an attempt writes."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._payload = dict(context.job.payload)

    def load(self) -> State | None:
        """What a lost attempt left; None where there is nothing that can be read."""
        key = self._payload.get(_FIELD)
        if key is None:
            return None
        try:
            state = FileCheckpoints(self._context.store.local_path(key)).load()
        except ServiceError as error:  # gone: training anew costs time only
            _log.warning("checkpoint_lost", job_id=self._context.job.id, error=str(error))
            return None
        _log.info("checkpoint_found", job_id=self._context.job.id, usable=state is not None)
        return state

    def save(self, state: State) -> None:
        """Replaces it. A store or database that is away costs the checkpoint, not the job."""
        path = self._context.scratch_dir / "checkpoint.pt"
        FileCheckpoints(path).save(state)
        before = self._payload.get(_FIELD)
        try:
            key = self._context.store.put_file(path, move=True)
            payload = {**self._payload, _FIELD: key}
            with self._context.database.write() as session:
                jobs.set_payload(session, self._context.job.id, self._context.job.token, payload)
            self._payload = payload
            if before is not None and before != key:
                self._context.store.delete(before)  # of this job alone; a day's worth of them would fill the disk
        except (ServiceError, DBAPIError) as error:
            _log.warning("checkpoint_not_kept", job_id=self._context.job.id, error=str(error))
