"""The job state machine: which moves there are, who may make them, what becomes of the resource."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from models.errors import Cancelled
from service.core import jobs, tables
from service.core.db import Database
from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.core.jobs import StaleAttempt


def add_job(database: Database, **options: Any) -> str:
    with database.write() as session:
        return jobs.create_job(session, "embed", "es_none", {"a": 1}, **options).id


def claim(database: Database, job_id: str, worker_id: str = "w") -> int:
    with database.write() as session:
        job = jobs.claim(session, job_id, worker_id)
        assert job is not None
        return job.token


def publish_and_finish(database: Database, job_id: str, token: int, effect: str) -> None:
    with database.write() as session:
        session.add(tables.CachedArtifact(key=effect, artifact="x"))
        jobs.finish(session, job_id, token, {})


def read(database: Database, job_id: str) -> tables.Job:
    with database.read() as session:
        return jobs.get_job(session, job_id)


def add_knowledge(database: Database, status: str = "importing") -> tuple[str, str]:
    with database.write() as session:
        resource = tables.Knowledge(id=new_id("knowledge"), name="k", kind="word_vectors", status=status)
        session.add(resource)
        return resource.id, jobs.create_job(session, "import_knowledge", resource.id, {}).id


def resource_status(database: Database, resource_id: str) -> str:
    with database.read() as session:
        row = session.get(tables.Knowledge, resource_id)
        assert row is not None
        return row.status


def test_a_job_runs_and_succeeds(database: Database) -> None:
    job_id = add_job(database)
    token = claim(database, job_id)
    with database.write() as session:
        assert jobs.report_progress(session, job_id, token, {"phase": "patches", "fraction": 0.5})
        jobs.finish(session, job_id, token, {"kind": "embedding_set", "id": "es_1"})
    job = read(database, job_id)
    assert (job.status, job.attempts, job.token) == ("succeeded", 1, 1)
    view = jobs.job_view(job, None)
    assert view["progress"] == {
        "phase": "patches", "completed": 0, "total": None, "fraction": 1.0, "eta_s": 0.0, "phases": []
    }  # fmt: skip
    assert view["result"] == {"kind": "embedding_set", "id": "es_1"}
    assert view["started_at"].endswith("Z")
    assert view["finished_at"] >= view["started_at"] >= view["created_at"]


def test_of_many_claims_one_wins(database: Database) -> None:
    job_id = add_job(database)
    won: list[str] = []

    def grab(name: str) -> None:
        with database.write() as session:
            if jobs.claim(session, job_id, name) is not None:
                won.append(name)

    threads = [threading.Thread(target=grab, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read(database, job_id).worker_id == won[0]


def test_claim_of_an_unknown_or_ended_job_is_none(database: Database) -> None:
    job_id = add_job(database)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
        assert jobs.claim(session, job_id, "w") is None
        assert jobs.claim(session, "job_" + "0" * 26, "w") is None


def test_a_stale_attempt_publishes_nothing(database: Database) -> None:
    job_id = add_job(database)
    old = claim(database, job_id)
    with database.write() as session:
        assert jobs.release(session, job_id, old, "gone") == "queued"
    new = claim(database, job_id)
    with pytest.raises(StaleAttempt):
        publish_and_finish(database, job_id, old, "made-by-old")
    for call in (jobs.heartbeat, jobs.cancelled, jobs.hold):
        with pytest.raises(StaleAttempt), database.write() as session:
            call(session, job_id, old)
    with pytest.raises(StaleAttempt), database.write() as session:
        jobs.fail(session, job_id, old, {})
    with pytest.raises(StaleAttempt), database.write() as session:
        jobs.report_progress(session, job_id, old, {})
    with database.read() as session:
        assert session.get(tables.CachedArtifact, "made-by-old") is None
    with database.write() as session:
        jobs.finish(session, job_id, new, {"ok": True})
    assert read(database, job_id).result == {"ok": True}


def test_a_terminal_state_is_final(database: Database) -> None:
    job_id = add_job(database)
    token = claim(database, job_id)
    with database.write() as session:
        jobs.fail(session, job_id, token, {"title": "no"})
    for move in (jobs.hold, jobs.cancelled):
        with pytest.raises(StaleAttempt), database.write() as session:
            move(session, job_id, token)
    with pytest.raises(Conflict, match="already ended"), database.write() as session:
        jobs.request_cancel(session, job_id)
    assert read(database, job_id).status == "failed"


def test_cancel_of_a_queued_job_is_immediate_and_of_a_running_one_is_asked_for(database: Database) -> None:
    waiting, running = add_job(database), add_job(database)
    token = claim(database, running)
    with database.write() as session:
        assert jobs.request_cancel(session, waiting).status == "cancelled"
        assert jobs.request_cancel(session, running).status == "cancelling"
        assert jobs.request_cancel(session, running).status == "cancelling"  # asking twice is fine
    with database.write() as session:
        assert jobs.report_progress(session, running, token, {}) is False
        jobs.cancelled(session, running, token)
    assert read(database, running).status == "cancelled"
    with pytest.raises(NotFound), database.write() as session:
        jobs.request_cancel(session, "job_unknown")


def test_a_cancel_that_came_first_wins_over_the_results(database: Database) -> None:
    job_id = add_job(database)
    token = claim(database, job_id)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    with pytest.raises(Cancelled):
        publish_and_finish(database, job_id, token, "late")
    with database.read() as session:
        assert session.get(tables.CachedArtifact, "late") is None


def test_retry_starts_afresh_but_never_reuses_a_token(database: Database) -> None:
    _, job_id = add_knowledge(database)
    token = claim(database, job_id)
    with pytest.raises(Conflict), database.write() as session:
        jobs.retry(session, job_id)
    with database.write() as session:
        jobs.fail(session, job_id, token, {"title": "no"})
    with database.write() as session:
        job = jobs.retry(session, job_id)
    assert (job.status, job.attempts, job.error, job.finished_at) == ("queued", 0, None, None)
    assert claim(database, job_id) == token + 1


def test_a_job_whose_resource_was_deleted_is_not_retried(database: Database) -> None:
    resource_id, job_id = add_knowledge(database)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
        session.delete(session.get_one(tables.Knowledge, resource_id))
    with pytest.raises(NotFound, match="has been deleted"), database.write() as session:
        jobs.retry(session, job_id)
    assert read(database, job_id).status == "cancelled"


def test_release_counts_attempts_and_gives_up_with_the_reason(database: Database) -> None:
    job_id = add_job(database, max_attempts=2)
    with database.write() as session:
        job = jobs.claim(session, job_id, "w")
        assert job is not None
        assert jobs.release(session, job_id, 1, "shutdown", counted=False) == "queued"
    for token, expected in ((2, "queued"), (3, "failed")):
        assert claim(database, job_id) == token
        with database.write() as session:
            assert jobs.release(session, job_id, token, "the power went away.") == expected
    error = read(database, job_id).error
    assert error is not None
    assert error["type"] == "urn:unseen:problem:worker-lost"
    assert "2 times" in error["detail"]
    assert "the power went away." in error["detail"]


def test_release_of_a_cancelling_job_cancels_it(database: Database) -> None:
    job_id = add_job(database)
    token = claim(database, job_id)
    with database.write() as session:
        jobs.request_cancel(session, job_id)
        assert jobs.release(session, job_id, token, "gone") == "cancelled"


def test_what_the_job_makes_follows_its_end(database: Database) -> None:
    resource_id, job_id = add_knowledge(database)
    with database.read() as session:
        row = session.get(tables.Knowledge, resource_id)
        assert row is not None
        assert row.job_id == job_id
    token = claim(database, job_id)
    with database.write() as session:
        jobs.fail(session, job_id, token, {})
    assert resource_status(database, resource_id) == "failed"
    with database.write() as session:
        jobs.retry(session, job_id)
    assert resource_status(database, resource_id) == "importing"
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    assert resource_status(database, resource_id) == "failed"


def test_what_a_job_only_uses_is_left_alone(database: Database) -> None:
    resource_id, job_id = add_knowledge(database, status="ready")
    token = claim(database, job_id)
    with database.write() as session:
        jobs.fail(session, job_id, token, {})
    assert resource_status(database, resource_id) == "ready"


def test_queue_position_counts_earlier_queued_jobs(database: Database) -> None:
    first, second, third = (add_job(database) for _ in range(3))
    claim(database, first)
    with database.read() as session:
        positions = [jobs.queue_position(session, jobs.get_job(session, j)) for j in (first, second, third)]
    assert positions == [None, 0, 1]
