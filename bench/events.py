"""Event streams: what many clients that follow one job cost Redis and the API.

    python bench/events.py [--against NAME=TREE] [--clients 1 100 500] [--events 20] [--interval 0.3] [--rounds 3]

Starts a Valkey and an API in a temporary folder, opens so many streams of one running job, and publishes events as a
worker does. `--against` measures another checkout in turns with this one. Prints one JSON object, to standard error
Markdown; medians over the rounds. Connections and commands are the API's; its queue has one connection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np
from redis import Redis

from service.core import events, jobs
from service.core.db import Database, make_engine
from service.core.embedded import EmbeddedValkey
from service.core.process import launch
from service.core.settings import Settings
from service.core.tables import Job
from service.local import free_port, private_environment

HERE = Path(__file__).resolve().parents[1]
COMMANDS = ("xread", "xrevrange", "xadd", "expire")
PROGRESS = {"phase": "features", "completed": 0, "total": 1000, "fraction": 0.5, "eta_s": 12.5, "phases": []}

Row = dict[str, float]


class Api(NamedTuple):
    """A running API, its database and its Redis."""

    port: int
    pid: int
    database: Database
    redis: Redis

    def cpu_s(self) -> float:
        """Seconds of CPU that its threads have taken."""
        return (
            sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat")) / 1e9
        )

    def n_commands(self) -> int:
        """Commands about streams that Redis has carried out."""
        found: Any = self.redis.info("commandstats")
        return sum(found.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in COMMANDS)

    def n_connections(self) -> int:
        """Its connections to Redis."""
        return len(self.redis.client_list()) - 1

    def add_job(self) -> str:
        """A running job that no worker knows of."""
        url = f"http://127.0.0.1:{self.port}/v1/datasets"
        dataset = httpx.post(url, json={"name": "pets"}).raise_for_status().json()
        with self.database.write() as session:
            job = jobs.create_job(session, "import_archive", dataset["id"], {})
            job.status = "running"
        return job.id

    def end(self, job_id: str) -> None:
        """The job has succeeded."""
        with self.database.write() as session:
            session.get_one(Job, job_id).status = "succeeded"
        events.publish_status(self.redis, self.database, job_id)


@contextmanager
def running(tree: Path, folder: Path) -> Iterator[Api]:
    """The API of a checkout, with a Redis of its own, until the end of the block."""
    settings = Settings(data_dir=folder)
    settings.make_dirs()
    valkey = EmbeddedValkey(folder / "valkey", folder / "s")
    valkey.start()
    port = free_port()
    environment = private_environment(os.environ) | {
        "UNSEEN_DATA_DIR": str(folder),
        "UNSEEN_REDIS_URL": valkey.url,
        "PYTHONPATH": str(tree),
    }
    command = [sys.executable, "-m", "service.cli", "api", "--port", str(port)]
    with (folder / "api.log").open("wb") as log:
        process = subprocess.Popen(launch(command), env=environment, cwd=tree, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        database = Database(make_engine(settings.resolved_database_url))
        with Redis.from_url(valkey.url) as redis:
            yield Api(port, process.pid, database, redis)
        database.close()
    finally:
        process.terminate()
        process.wait()
        valkey.stop()


async def follow(port: int, job_id: str, opened: asyncio.Event) -> list[float]:
    """Reads a stream to its end; ms from the publishing of each event to its arrival."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    delays: list[float] = []
    while line := await reader.readline():
        if line.startswith(b"event: status"):
            opened.set()
        elif line.startswith(b"event: progress"):
            sent = json.loads((await reader.readline()).removeprefix(b"data: "))["sent"]
            delays.append(1000 * (time.perf_counter() - sent))
        elif line.startswith(b"event: end"):
            break
    writer.close()
    return delays


async def measure(api: Api, n_clients: int, n_events: int, interval_s: float) -> Row:
    """One job from its first event to its last."""
    job_id = api.add_job()
    began, streams = time.perf_counter(), []
    for _ in range(n_clients):
        opened = asyncio.Event()
        streams.append(asyncio.create_task(follow(api.port, job_id, opened)))
        await opened.wait()
    opened_s = time.perf_counter() - began
    await asyncio.sleep(3)
    cpu_s, at = api.cpu_s(), time.perf_counter()
    await asyncio.sleep(5)
    silent = (api.cpu_s() - cpu_s) / (time.perf_counter() - at)
    n_commands, cpu_s = api.n_commands(), api.cpu_s()
    n_connections = 0
    for number in range(n_events):
        events.publish(api.redis, job_id, "progress", {**PROGRESS, "completed": number, "sent": time.perf_counter()})
        await asyncio.sleep(interval_s)
        n_connections = max(n_connections, api.n_connections())
    api.end(job_id)
    n_published = 2 * (n_events + 1)
    delays = [delay for some in await asyncio.gather(*streams) for delay in some]
    return {
        "connections": n_connections,
        "commands_per_event": (api.n_commands() - n_commands - n_published) / n_events,
        "cpu_ms_per_delivered_event": 1000 * (api.cpu_s() - cpu_s) / len(delays),
        "lost_events": n_events * n_clients - len(delays),
        "delay_p50_ms": float(np.percentile(delays, 50)),
        "delay_p95_ms": float(np.percentile(delays, 95)),
        "cpu_share_in_silence": silent,
        "opening_ms_per_client": 1000 * opened_s / n_clients,
    }


def markdown(found: dict[str, dict[str, Row]]) -> str:
    """The table of a result."""
    lines = [
        "| API | clients | connections | commands an event | CPU ms a delivery | delay p50 ms | p95 | lost events "
        "| CPU in silence | ms to open |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for n_clients, row in rows.items():
            connections, commands, cpu_ms, n_lost, p50, p95, silent, opening_ms = row.values()
            lines.append(
                f"| {name} | {n_clients} | {connections:.0f} | {commands:.1f} | {cpu_ms:.3f} | {p50:.0f} | {p95:.0f} "
                f"| {n_lost:.0f} | {silent:.1%} | {opening_ms:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", action="append", default=[], help="NAME=TREE, another checkout")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--interval", type=float, default=0.3, help="seconds between events")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    trees = {"this": HERE, **{name: Path(tree).resolve() for name, _, tree in (a.partition("=") for a in args.against)}}
    rounds: dict[str, dict[str, list[Row]]] = {name: {str(n): [] for n in args.clients} for name in trees}
    for _ in range(args.rounds):
        for n_clients in args.clients:
            for name, tree in trees.items():
                with tempfile.TemporaryDirectory() as folder, running(tree, Path(folder)) as api:
                    row = asyncio.run(measure(api, n_clients, args.events, args.interval))
                rounds[name][str(n_clients)].append(row)
    found = {
        name: {n: {what: median(row[what] for row in rows) for what in rows[0]} for n, rows in counts.items()}
        for name, counts in rounds.items()
    }
    print(json.dumps(found, indent=1))
    print(markdown(found), file=sys.stderr)


if __name__ == "__main__":
    main()
