"""Settings, database, migrations, ids, logs and processes."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import ValidationError
from sqlalchemy import event, literal_column, select
from sqlalchemy.exc import DBAPIError, OperationalError

from service.core import process, repositories, tables
from service.core.db import Database, make_engine, utc_now
from service.core.errors import NotFound
from service.core.ids import PREFIXES, new_id
from service.core.logging import redact
from service.core.migrations import upgrade
from service.core.process import compute_environment, host_id, is_dead, settle, usable_cores
from service.core.settings import Settings
from tests.workers.harness import ROOT, is_alive, wait_until


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.Base.metadata) == []
        assert context.get_current_revision() == "0003"
    upgrade(database.engine)  # a second time changes nothing


def test_many_processes_may_upgrade_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    failures: list[BaseException] = []

    def run() -> None:
        engine = make_engine(url)
        try:
            upgrade(engine)
        except BaseException as error:
            failures.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_times_come_back_in_utc(database: Database) -> None:
    moment = utc_now()
    elsewhere = moment.astimezone(timezone(timedelta(hours=5)))
    with database.write() as session:
        session.add(tables.CachedArtifact(key="k", artifact="a", created_at=elsewhere))
    with database.read() as session:
        row = session.get(tables.CachedArtifact, "k")
        assert row is not None
        assert row.created_at == moment
        assert row.created_at.utcoffset() == timedelta(0)


def test_a_hot_path_reads_what_is_committed_now_and_waits_for_no_writer(database: Database) -> None:
    def add(classifier_id: str, method: str, status: str) -> tables.Classifier:
        return tables.Classifier(id=classifier_id, name="x", dataset_id="ds_1", method=method, status=status)

    async def read() -> None:
        with pytest.raises(NotFound, match="no ready classifier of method 'psr'"):
            await repositories.classifier_now(database, None, "psr")
        with database.write() as session:
            session.add(tables.Dataset(id="ds_1", name="x"))
            session.flush()
            session.add(add("cl_1", "psr", "ready"))
            session.flush()
            with pytest.raises(NotFound, match="no classifier 'cl_1'"):  # not committed yet
                await repositories.classifier_now(database, "cl_1")
        assert (await repositories.classifier_now(database, "cl_1")).id == "cl_1"
        with database.write() as session:
            session.add_all([add("cl_2", "sje", "ready"), add("cl_3", "sje", "failed")])
        with database.read() as session:
            expected = repositories.classifier_state(session, "cl_2")
        assert await repositories.classifier_now(database, "cl_2") == expected
        assert (await repositories.classifier_now(database, None)).id == "cl_2"
        assert (await repositories.classifier_now(database, None, "psr")).id == "cl_1"

    asyncio.run(read())


def test_a_hot_path_raises_sqlalchemys_errors_and_recovers(tmp_path: Path) -> None:
    lost = Database(make_engine(f"sqlite:///{tmp_path / 'no folder' / 'unseen.db'}"))
    with pytest.raises(OperationalError, match="unable to open"):
        asyncio.run(lost.first(select(literal_column("1"))))

    connections: list[Any] = []
    database = Database(make_engine(f"sqlite:///{tmp_path / 'unseen.db'}"))
    event.listen(database.engine, "connect", lambda connection, _: connections.append(connection))
    for _ in range(2):
        assert asyncio.run(database.first(select(literal_column("1")))) == (1,)
        connections[-1].close()
        with pytest.raises(DBAPIError, match="closed database"):
            asyncio.run(database.first(select(literal_column("1"))))
    database.close()


def test_an_error_rolls_a_transaction_back(database: Database) -> None:
    def broken() -> None:
        with database.write() as session:
            session.add(tables.CachedArtifact(key="k", artifact="a"))
            session.flush()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        broken()
    with database.read() as session:
        assert session.get(tables.CachedArtifact, "k") is None


def test_ids_are_prefixed_unique_and_sort_by_time() -> None:
    ids = [new_id("job") for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(id_.startswith("job_") and len(id_) == 30 for id_ in ids)
    assert [id_[:14] for id_ in ids] == sorted(id_[:14] for id_ in ids)
    assert len(set(PREFIXES.values())) == len(PREFIXES)


def test_settings_travel_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path, heartbeat_s=0.5, queue="other", weights_dir=tmp_path / "w", port=1)
    environment = settings.to_environment()
    assert "UNSEEN_HOST" not in environment  # a default
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices_are_those_that_workers_know(device: str) -> None:
    assert Settings(device=device).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "CPU", "cpu,cuda"])
def test_other_devices_are_refused_at_once(device: str) -> None:
    with pytest.raises(ValidationError, match=f"'{device}' is no device; use auto, cpu, cuda or cuda:N"):
        Settings(device=device)


def test_sockets_of_a_deep_data_directory_lie_in_a_private_short_one(tmp_path: Path) -> None:
    shallow = Settings(data_dir=Path("/srv/unseen"))
    assert shallow.run_dir == Path("/srv/unseen/run")
    deep = tmp_path / ("x" * 80) / ("y" * 80)
    settings, same, other = Settings(data_dir=deep), Settings(data_dir=deep), Settings(data_dir=deep / "z")
    assert settings.run_dir == same.run_dir != other.run_dir
    assert len(settings.resolved_inference_url.removeprefix("unix://")) <= 100
    settings.make_dirs()
    assert settings.run_dir.stat().st_mode & 0o777 == 0o700
    settings.run_dir.rmdir()
    settings.run_dir.symlink_to(tmp_path)  # somebody else was there first
    with pytest.raises(OSError, match=r"belongs to somebody else|File exists"):
        settings.make_dirs()
    settings.run_dir.unlink()


def test_passwords_do_not_reach_the_log() -> None:
    assert redact("redis://user:hunter2@host:6379/0 and redis://:pw@h") == "redis://***@host:6379/0 and redis://***@h"
    code = (
        "from service.core.logging import configure_logging, get_logger; import logging; configure_logging('info');"
        "get_logger('x').info('at', url='redis://:hunter2@h'); logging.getLogger('y').warning('at %s', 'a://u:hunter2@h')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count("***@h") == 2
    assert "hunter2" not in done.stderr + done.stdout


def test_what_libraries_tell_of_their_every_step_stays_out_of_the_log() -> None:
    code = (
        "from service.core.logging import configure_logging; import logging; configure_logging('info');"
        "[logging.getLogger(f'{name}.passes').info('a step') for name in ('onnx_ir', 'onnxscript', 'httpx')];"
        "logging.getLogger('onnx_ir.passes').warning('trouble'); logging.getLogger('other').info('news')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a step" not in done.stderr
    assert "trouble" in done.stderr
    assert "news" in done.stderr


def test_whether_a_process_is_dead_is_only_said_of_this_host() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert is_dead(host_id(), child.pid)
    assert not is_dead(host_id(), os.getpid())
    assert not is_dead("other/boot/pid:[1]", child.pid)


def test_a_launched_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; from service.core.process import launch;"
        f"p = subprocess.Popen(launch(['sleep', '60'])); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid));"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(child))


def test_the_core_imports_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys, service.supervisor, service.core.reconciler, service.core.events, service.core.embedded;"
        "assert not {'torch', 'fastapi', 'workers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("quota", "most"), [("max 100000", None), ("150000 100000", 2), ("20000 100000", 1), ("", None)]
)
def test_cores_are_those_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, most: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(process, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(5)), raising=False)
    assert usable_cores() == (most or 5)


def test_every_library_computes_with_the_threads_asked_for() -> None:
    code = (
        "import numpy, scipy.linalg, torch, threadpoolctl; "
        "print(torch.get_num_threads(), *(pool['num_threads'] for pool in threadpoolctl.threadpool_info()))"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(
        command, env={**inherited, **compute_environment(1)}, capture_output=True, text=True, check=True, timeout=120
    )
    assert set(answer.stdout.split()) == {"1"}
    assert compute_environment(0)["OMP_NUM_THREADS"] == str(usable_cores())


class Ring:
    """Holds itself, so that only the cycle collector ends it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_when_a_server_has_started_is_not_looked_through_again() -> None:
    thresholds = gc.get_threshold()
    before = Ring()
    there = weakref.ref(before)
    try:
        settle()
        after = Ring()
        new = weakref.ref(after)
        del before, after
        gc.collect()
        assert there() is not None
        assert new() is None
        assert gc.get_threshold() > thresholds
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
