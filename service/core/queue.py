"""The queue: hands ids of queued jobs to workers through Redis (RQ). The database stays the truth.

Losing a message, or all of Redis, loses nothing: the reconciler queues again what the database knows and Redis does
not. Delivering one twice does no harm either: only one claim succeeds.
"""

from __future__ import annotations

import json
import re
from typing import Any

from redis import Redis, RedisError
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.command import PUBSUB_CHANNEL_TEMPLATE
from rq.serializers import JSONSerializer

from service.core.logging import get_logger

RUN_JOB = "workers.tasks.run_job"
ALLOWED_FUNCTIONS = frozenset({RUN_JOB})
JOB_ID = re.compile(r"job_[0-9a-z]{26}")
_log = get_logger(__name__)


def connect(url: str) -> Redis:
    """A Redis client that reconnects by itself; nothing is sent before the first command."""
    client: Redis = Redis.from_url(
        url,
        socket_connect_timeout=3,
        socket_timeout=10,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
    )
    return client


class JobQueue:
    """One named queue of job ids."""

    def __init__(self, redis: Redis, name: str) -> None:
        self.redis = redis
        self.name = name
        self.rq = Queue(name, connection=redis, serializer=JSONSerializer)

    @staticmethod
    def message_id(job_id: str, token: int) -> str:
        """The RQ id of the message that starts the attempt after attempt `token`."""
        return f"{job_id}-{token + 1}"

    def enqueue(self, job_id: str, token: int = 0) -> bool:
        """Hands over a queued job; False (and a log line) if Redis cannot take it, which the reconciler repairs.

        Call it after the commit that made the job 'queued', with the job's `token` (0 for a new job).
        """
        try:
            self.rq.enqueue_call(
                RUN_JOB,
                args=(job_id,),
                job_id=self.message_id(job_id, token),
                timeout=-1,
                result_ttl=0,
                failure_ttl=60,
                description=job_id,
            )
        except RedisError as error:
            _log.warning("enqueue_failed", job_id=job_id, error=type(error).__name__)
            return False
        return True

    def waiting(self) -> list[str]:
        """Message ids in the queue, next first. Raises RedisError."""
        return _texts(self.redis.lrange(self.rq.key, 0, -1))

    def in_hand(self) -> list[str]:
        """Message ids that a worker has taken and not yet dropped. Raises RedisError."""
        return _texts(self.redis.lrange(self.rq.intermediate_queue_key, 0, -1))

    def drop_in_hand(self, message_id: str) -> bool:
        """Forgets a message that a worker had taken; True for the one caller that removed it. Raises RedisError."""
        return bool(self.redis.lrem(self.rq.intermediate_queue_key, 1, message_id))

    def position(self, job_id: str) -> int | None:
        """Place in the queue (0: next), or None if the job does not wait there or Redis cannot say."""
        try:
            waiting = self.waiting()
        except RedisError:
            return None
        return next((i for i, message in enumerate(waiting) if message.rsplit("-", 1)[0] == job_id), None)

    def contains(self, job_id: str) -> bool:
        """Whether the job waits here or has just been taken by a worker. Raises RedisError."""
        return any(message.rsplit("-", 1)[0] == job_id for message in (*self.waiting(), *self.in_hand()))

    def stop(self, job_id: str, worker_id: str) -> bool:
        """Tells a worker to look at once whether it should still run the job; it asks the database, not us."""
        command = json.dumps({"command": "stop-job", "job_id": job_id})
        try:
            self.redis.publish(PUBSUB_CHANNEL_TEMPLATE % worker_id, command)
        except RedisError as error:
            _log.warning("stop_failed", job_id=job_id, error=type(error).__name__)
            return False
        return True


def _texts(values: Any) -> list[str]:
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]
