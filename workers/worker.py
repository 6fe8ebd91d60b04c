"""The worker process: takes job ids from one queue and runs each in a forked child, the work-horse.

RQ provides the hand-over (queue, registration, commands). What RQ would do with a message beyond that is replaced:
the function named in it is compared with the allow-list and never imported, its callbacks and webhooks are refused,
and RQ's registries are not cleaned, because their clean-up runs callbacks named in Redis. Redis may vanish and come
back at any time; what is true stands in the database.

The parent never runs torch (its threads would not survive the fork) and has no database connection open while it
forks. It watches the horse: signs of life, cancels that are not heeded, attempts that are over.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import orjson
import redis.exceptions
from rq import Queue, Worker
from rq.exceptions import StopRequested
from rq.job import Job as Message
from rq.serializers import JSONSerializer
from sqlalchemy.exc import DBAPIError

from service.core import events, jobs, tables
from service.core.jobs import StaleAttempt
from service.core.logging import get_logger
from service.core.process import die_with_parent
from service.core.queue import ALLOWED_FUNCTIONS, JOB_ID
from workers.runner import Services, scratch_path
from workers.vitals import Vitals

RunInHorse = Callable[[str, str], object]
"""Runs a job to its end in the child: `run(job_id, worker_id)`. It opens its own database and Redis connections."""

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.25, 5.0
REFUSED_KEY = "unseen:refused"
_log = get_logger(__name__)


def refusal(message: Message) -> str | None:
    """Why a message must not be run; None for a proper one. Imports and calls nothing that the message names."""
    try:
        if message.func_name not in ALLOWED_FUNCTIONS or message.instance is not None:
            return "its function is not on the allow-list"
        args, kwargs = message.args, message.kwargs
    except Exception:
        return "it cannot be decoded"
    if kwargs or len(args) != 1 or not isinstance(args[0], str) or JOB_ID.fullmatch(args[0]) is None:
        return "its arguments are not one job id"
    callbacks = ("_success_callback_name", "_failure_callback_name", "_stopped_callback_name")
    if any(getattr(message, name, None) for name in callbacks) or getattr(message, "webhooks", None):
        return "it carries callbacks"
    return None


class JobWorker(Worker):
    """One worker on exactly one queue."""

    max_connection_wait_time = _MAX_PAUSE_S

    def __init__(self, services: Services, run: RunInHorse, vitals: Vitals) -> None:
        self._services = services
        self._run = run
        self._vitals = vitals
        self._is_idle = False
        queue = Queue(services.queue.name, connection=services.redis, serializer=JSONSerializer)
        super().__init__(
            [queue],
            name=vitals.worker_id,
            connection=services.redis,
            serializer=JSONSerializer,
            worker_ttl=30,  # an idle worker waits at most 15 s for a message before it looks around
            log_job_description=False,
        )

    @property
    def is_stopping(self) -> bool:
        """Whether the process was asked to end."""
        return bool(self._stop_requested)

    def register_birth(self) -> None:
        """Registers in Redis, over what an earlier connection of the same process may have left there."""
        self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]  # RQ has no types

    def teardown(self) -> None:
        """Leaves Redis, also when it is away: a listener that stayed would come back with it."""
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        for leave in (self.register_death, self.unsubscribe):
            with suppress(redis.exceptions.RedisError):
                leave()  # type: ignore[no-untyped-call]  # RQ has no types

    def run_maintenance_tasks(self) -> None:
        """Nothing: the reconciler looks after lost jobs, and RQ's own way would run callbacks named in Redis."""

    def handle_payload(self, message: Any) -> None:
        """A command from Redis: look at the database now. Commands are hints and trusted with nothing else."""
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            if orjson.loads(message["data"]).get("command") == "stop-job":
                self._vitals.look_now()

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """Waits for a message; only here may a signal end the loop at once."""
        self._is_idle = True
        try:
            return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
        finally:
            self._is_idle = False

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a handler
        """On SIGTERM or SIGINT: stop the horse, hand its job back, leave."""
        self._stop_requested = True
        if self._horse_pid:
            self.kill_horse()
        elif self._is_idle:
            raise StopRequested

    request_force_stop = request_stop

    def execute_job(self, job: Message, queue: Queue) -> None:  # noqa: ARG002 - RQ's signature
        """Checks the message and runs its job in a child."""
        reason = refusal(job)
        if reason is not None:
            self._refuse(job, reason)
        elif self._stop_requested:
            self._services.queue.enqueue(job.args[0])
        else:
            self._run_in_horse(job.args[0])
        self._forget(job)

    def _refuse(self, message: Message, reason: str) -> None:
        _log.error("message_refused", message_id=message.id[:80], reason=reason)
        with suppress(redis.exceptions.RedisError):
            self.connection.lpush(REFUSED_KEY, orjson.dumps({"id": message.id[:80], "reason": reason}))
            self.connection.ltrim(REFUSED_KEY, 0, 99)

    def _forget(self, message: Message) -> None:
        """Removes the message from Redis; the reconciler repeats it if Redis is away."""
        with suppress(redis.exceptions.RedisError):
            self._services.queue.drop_in_hand(message.id)
            self.connection.delete(message.key)

    def _run_in_horse(self, job_id: str) -> None:
        with self._vitals.quiet():
            parent_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._be_horse(job_id, parent_pid)
        with suppress(OSError):  # the child does it too; whoever is first
            os.setpgid(pid, pid)
        self._horse_pid = pid
        if self._stop_requested:
            self.kill_horse()
        with self._vitals.watching(job_id, self.kill_horse):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with suppress(OSError):  # what the horse started dies with it; its pid is still ours until the next line
                os.killpg(pid, signal.SIGKILL)
            _, wait_status = os.waitpid(pid, 0)
        self._horse_pid = 0
        self._settle(job_id, os.waitstatus_to_exitcode(wait_status))

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kills the horse and all that it started."""
        pid = self._horse_pid
        if pid:
            with suppress(OSError):
                os.killpg(pid, sig)
            with suppress(OSError):  # before the child has its own group
                os.kill(pid, sig)

    def _be_horse(self, job_id: str, parent_pid: int) -> None:
        """The child; never returns."""
        code = 1
        try:
            with suppress(OSError):
                os.setpgid(0, 0)
            die_with_parent(parent_pid)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            random.seed()
            self._run(job_id, self.name)
            code = 0
        except BaseException:
            _log.exception("work_horse_failed", job_id=job_id)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _settle(self, job_id: str, exit_code: int) -> None:
        """After the horse has gone: if it left its job unended, hand the job back or end it."""
        database = self._services.database
        status = None
        try:
            with database.write() as session:
                job = session.get(tables.Job, job_id)
                if job is None or job.worker_id != self.name:  # not claimed: another worker has it, scratch and all
                    return
                token = job.token
                if job.status in jobs.ACTIVE:
                    counted = not self._stop_requested
                    status = jobs.release(session, job_id, token, _epitaph(exit_code), counted=counted)
        except (DBAPIError, StaleAttempt) as error:  # the reconciler will see the silence
            _log.warning("settle_failed", job_id=job_id, error=type(error).__name__)
            return
        shutil.rmtree(scratch_path(self._services.settings, job_id, token), ignore_errors=True)
        if status is not None:
            _log.warning("work_horse_lost", job_id=job_id, exit_code=exit_code, status=status)
            if status == "queued":
                self._services.queue.enqueue(job_id, token)
            events.publish_status(self._services.redis, database, job_id)


def _epitaph(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed (signal 9), most often because the machine ran out of memory."
    if exit_code < 0:
        return f"its process was ended by signal {-exit_code} ({signal.Signals(-exit_code).name})."
    return f"its process ended with code {exit_code} before the job did."


def new_worker_id() -> str:
    """A name for this process that no other has."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


def serve(services: Services, run: RunInHorse, device: str = "cpu") -> None:
    """Works until SIGTERM or SIGINT, through any loss of Redis. `services` must not pool database connections."""
    stopping = False

    def stop(_signum: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        raise StopRequested

    def listen() -> None:
        """Until a signal, or until RQ leaves its loop because Redis went away."""
        nonlocal stopping
        worker = JobWorker(services, run, vitals)
        try:
            worker.work(logging_level=None)
        finally:
            stopping = stopping or worker.is_stopping
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    pause_s = _MIN_PAUSE_S
    with Vitals(services, new_worker_id(), device) as vitals, suppress(StopRequested):
        while not stopping:
            began = time.monotonic()
            try:
                listen()
            except redis.exceptions.RedisError as error:
                _log.warning("redis_unreachable", error=type(error).__name__)
            if not stopping:
                is_steady = time.monotonic() - began > 10
                pause_s = _MIN_PAUSE_S if is_steady else min(pause_s * 2, _MAX_PAUSE_S)
                _log.warning("worker_loop_left", again_in_s=pause_s)
                time.sleep(pause_s)
