"""A real worker on a real queue: success, failure, cancel, forged messages, shutdown."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import orjson
from rq import Queue
from rq.job import Callback, Job
from rq.serializers import JSONSerializer

from service.core import jobs
from tests.workers.harness import WorkerProcess, World, events_of, is_alive, reconciling, wait_until
from workers.worker import REFUSED_KEY, refusal

StartWorker = Callable[[], WorkerProcess]


def test_jobs_end_as_they_should(world: World, start_worker: StartWorker) -> None:
    """One worker, one after the other: most of what can become of a job."""
    start_worker()
    good = world.add("count", {"n": 20})
    wrong = world.add("refuse", {})
    buggy = world.add("bug", {})
    unknown = world.add("nonsense", {})
    flaky = world.add("flaky", {"times": 1})
    full = world.add("flaky", {"times": 9}, max_attempts=2)
    dying = world.add("die", {"times": 1})
    doomed = world.add("die", {"times": 9}, max_attempts=2)

    job = world.ended(good)
    assert (job.status, job.attempts, world.effect(good)) == ("succeeded", 1, "1")
    assert job.progress["phase"] == "counting"
    assert job.progress["fraction"] == 1.0
    assert job.result is not None
    assert job.result["kind"] == "toy"

    job = world.ended(wrong)
    assert (job.status, job.attempts) == ("failed", 1)  # the same input would fail again
    assert job.error is not None
    assert job.error["errors"] == [
        {"pointer": "/params/n_clusters", "message": "There are fewer images than clusters."}
    ]
    for job_id in (buggy, unknown):
        job = world.ended(job_id)
        assert (job.status, job.attempts) == ("failed", 1)
        assert "secret" not in str(job.error)

    job = world.ended(flaky)
    assert (job.status, job.attempts, world.effect(flaky)) == ("succeeded", 2, "2")
    job = world.ended(full)
    assert (job.status, job.attempts) == ("failed", 2)
    assert job.error is not None
    assert job.error["detail"] == "The artifact store is full."

    job = world.ended(dying)
    assert (job.status, job.attempts, world.effect(dying)) == ("succeeded", 2, "2")
    job = world.ended(doomed)
    assert (job.status, job.attempts) == ("failed", 2)
    assert job.error is not None
    assert job.error["title"] == "Worker lost"
    assert "memory" in job.error["detail"]

    wait_until(lambda: not list(world.settings.scratch_dir.iterdir()))
    wait_until(lambda: world.queue.in_hand() == [])
    stream = events_of(world.queue.redis, good, "0-0")
    statuses = [event.data["status"] for event in stream if event.event == "status"]
    assert statuses == ["running", "succeeded"]


def test_a_cancel_stops_work_that_reports_and_kills_work_that_does_not(world: World, start_worker: StartWorker) -> None:
    start_worker()
    heeding = world.add("count", {"n": 10_000})
    world.began(heeding)
    asked = time.monotonic()
    world.cancel(heeding)
    assert world.ended(heeding).status == "cancelled"
    assert time.monotonic() - asked < 2

    for kind in ("stubborn", "grip"):
        job_id = world.add(kind, {"seconds": 60})
        pid = world.began(job_id)
        asked = time.monotonic()
        world.cancel(job_id)
        assert world.ended(job_id).status == "cancelled"
        assert time.monotonic() - asked < world.settings.cancel_kill_s + 3
        assert not is_alive(pid)
        assert world.effect(job_id) is None

    with world.database.write() as session:
        token = jobs.retry(session, heeding).token
    world.queue.enqueue(heeding, token)
    wait_until(lambda: world.job(heeding).status == "running")
    world.cancel(heeding)
    assert world.ended(heeding).status == "cancelled"


def test_a_job_that_holds_the_interpreter_is_not_taken_for_lost(world: World, start_worker: StartWorker) -> None:
    start_worker()
    with reconciling(world):
        job_id = world.add("grip", {"seconds": 2 * world.settings.lost_after_s})
        job = world.ended(job_id)
    assert (job.status, job.attempts) == ("succeeded", 1)


def test_sigterm_hands_the_job_back_without_costing_an_attempt(world: World, start_worker: StartWorker) -> None:
    first = start_worker()
    job_id = world.add("count", {"n": 300})
    horse = world.began(job_id)
    first.kill(signal.SIGTERM)
    assert first.process.wait(30) == 0
    assert not is_alive(horse)
    job = world.job(job_id)
    assert (job.status, job.attempts) == ("queued", 0)
    assert world.workers() == []
    assert world.queue.contains(job_id)
    start_worker()
    job = world.ended(job_id)
    assert (job.status, job.attempts, world.effect(job_id)) == ("succeeded", 1, "2")


def test_an_idle_worker_leaves_at_once(start_worker: StartWorker) -> None:
    worker = start_worker()
    time.sleep(0.3)
    began = time.monotonic()
    worker.kill(signal.SIGINT)
    assert worker.process.wait(30) == 0
    assert time.monotonic() - began < 10  # it would wait for a message for 15 s


def test_forged_messages_run_nothing(world: World, start_worker: StartWorker, tmp_path: Path) -> None:
    """Whoever can write to Redis must not be able to run code in the worker."""
    trap = tmp_path / "owned"
    rq = Queue(world.settings.queue, connection=world.queue.redis, serializer=JSONSerializer)
    job_id = world.add("count", {"n": 1}, enqueue=False)
    rq.enqueue_call("os.system", args=(f"touch {trap}",))
    rq.enqueue_call("workers.tasks.run_job", args=(job_id, f"touch {trap}"))
    rq.enqueue_call("workers.tasks.run_job", args=(f"{job_id}; touch {trap}",))
    rq.enqueue_call("workers.tasks.run_job", args=(job_id,), on_failure=Callback("os.system"))
    rq.enqueue_call("workers.tasks.run_job", args=(job_id,), kwargs={"context_factory": "os.system"})
    broken = rq.enqueue_call("workers.tasks.run_job", args=(job_id,))
    world.queue.redis.hset(broken.key, "data", b"\x80\x04cos\nsystem\n")  # a pickle
    crooked = rq.enqueue_call("workers.tasks.run_job", args=(job_id,))
    world.queue.redis.hset(crooked.key, "created_at", b"not a time")
    worker = start_worker()
    wait_until(lambda: world.queue.redis.llen(REFUSED_KEY) >= 6)
    refused = [orjson.loads(entry)["reason"] for entry in world.queue.redis.lrange(REFUSED_KEY, 0, -1)]
    assert sorted(set(refused)) == [
        "it cannot be decoded",
        "it carries callbacks",
        "its arguments are not one job id",
        "its function is not on the allow-list",
    ]
    assert world.job(job_id).status == "queued"
    good = world.add("count", {"n": 1})  # and the worker still works
    assert world.ended(good).status == "succeeded"
    assert not trap.exists()
    assert worker.process.poll() is None


def test_refusal_imports_nothing(world: World) -> None:
    message = Job.create("no_such_module.boom", args=(), connection=world.queue.redis, serializer=JSONSerializer)
    assert refusal(message) == "its function is not on the allow-list"
    proper = Job.create(
        "workers.tasks.run_job", args=("job_" + "0" * 26,), connection=world.queue.redis, serializer=JSONSerializer
    )
    assert refusal(proper) is None


def test_commands_from_redis_change_nothing(world: World, start_worker: StartWorker) -> None:
    """They are hints to look at the database, whatever they say."""
    start_worker()
    job_id = world.add("count", {"n": 100})
    world.began(job_id)
    channel = f"rq:pubsub:{world.workers()[0].id}"
    for payload in (b"{", b"[]", b"\xff", b'{"command": "shutdown"}', b'{"command": "kill-horse"}'):
        assert world.queue.redis.publish(channel, payload) == 1
    world.queue.stop(job_id, world.workers()[0].id)
    job = world.ended(job_id)
    assert (job.status, job.attempts) == ("succeeded", 1)
