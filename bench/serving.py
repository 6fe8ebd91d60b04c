"""Classify over HTTP against the bare model loop, and against other servers on the same photos and network.

    python bench/serving.py [--data ../shared/data/animals] [--weights ../shared/weights/FILE] [--network resnet50]
        [--rival naive=PYTHON:bench/rivals/naive.py] [--rival litserve=PYTHON:bench/rivals/litserve_server.py]
        [--rival infinity=PYTHON:bench/rivals/infinity_server.py]

Starts a service of its own in a temporary folder, trains SJE on the folder's photos, and sends one photo a
request at each concurrency. In turns with it, round by round, in this process: the network alone on decoded batches
(`network`), a plain loop that decodes 32 photos and computes them (`loop`), and one photo after the other from its file
(`one by one`). Rivals run in an environment of their own; see bench/rivals. Without options: the demo's pictures and an
untrained network, whose speed is the same. The client is a bare socket a connection, some 0.1 ms a request. Prints one
JSON object, to standard error Markdown; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import CREATURES
from models.backbones import create_backbone
from models.backends.base import Place
from models.backends.choice import fast_network
from service.client import Client
from service.local import LocalService, free_port
from workers.engine import prepare_image

Json = dict[str, Any]
SIDE = 224
CONCURRENCY = (1, 8, 32, 128)


def request_of(photo: bytes, server: str, path: str = "/predict") -> bytes:
    """The whole HTTP request, as the server wants it: the file as it is, or in JSON."""
    kind, body, text = "application/json", photo, base64.b64encode(photo).decode()
    if server == "litserve":
        body = json.dumps({"image": text}).encode()
    elif server == "infinity":
        path, data = "/embeddings", f"data:image/jpeg;base64,{text}"
        asked = {"model": "photos", "input": [data], "modality": "image", "encoding_format": "base64"}
        body = json.dumps(asked).encode()
    else:
        kind = "image/jpeg"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _connection(port: int, requests: list[bytes], taken: Iterator[int], took: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in taken:
        began = time.perf_counter()
        writer.write(requests[number % len(requests)])
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.partition(b"\r\n")[0]:
            raise RuntimeError(f"Port {port} answered {answer[:200]!r}")
        fields = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:-2])
        await reader.readexactly(int(fields[b"content-length"]))
        took.append(time.perf_counter() - began)
    writer.close()


async def _load(port: int, requests: list[bytes], concurrency: int, n_requests: int) -> list[float]:
    took: list[float] = []
    taken = iter(range(n_requests))
    await asyncio.gather(*(_connection(port, requests, taken, took) for _ in range(concurrency)))
    return took


def load(port: int, requests: list[bytes], concurrency: int, n_requests: int) -> Json:
    """Images a second and latencies in ms."""
    began = time.perf_counter()
    took = asyncio.run(_load(port, requests, concurrency, n_requests))
    images_per_s = len(took) / (time.perf_counter() - began)
    p50, p95, p99 = (1000 * float(np.percentile(took, q)) for q in (50, 95, 99))
    return {"images_per_s": images_per_s, "p50": p50, "p95": p95, "p99": p99}


def trained(client: Client, data: Path, network: str, weights: str) -> str:
    """The id of an SJE classifier on the folder's photos."""
    splits = json.loads((data / "splits.json").read_text())
    knowledge = client.wait(
        client.add_knowledge("classes", file=data / "knowledge" / "attributes.npz", kind="attributes")
    )
    dataset = client.create_dataset("photos")
    client.upload_folder(dataset["id"], data)
    job = client.create_classifier(
        dataset["id"],
        knowledge_id=knowledge["resource"]["id"],
        method="sje",
        backbone={"name": network, "weights": weights},
        **{name: splits[name] for name in ("seen_classes", "unseen_classes", "validation_classes")},
    )
    return str(client.wait(job)["resource"]["id"])


class Rival(NamedTuple):
    """A server of somebody else's. It sleeps unless it is measured: some are busy with waiting."""

    port: int
    group: int

    @contextmanager
    def awake(self) -> Iterator[None]:
        """For a while."""
        os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGSTOP)


@contextmanager
def rival(command: str, network: str, weights: Path, threads: int) -> Iterator[Rival]:
    """One that answers."""
    python, _, script = command.partition(":")
    port = free_port()
    environment = {
        **os.environ,
        "PORT": str(port),
        "WEIGHTS": str(weights.resolve()),
        "NETWORK": network,
        "THREADS": str(threads),
    }
    process = subprocess.Popen([python, script], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    sys.exit(f"{script} ended while starting.")
                time.sleep(0.2)
        yield Rival(port, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rate(work: Callable[[], int], seconds: float) -> tuple[float, float]:
    """Images a second, and ms a call in the median."""
    work()
    began, took, n_images = time.perf_counter(), [], 0
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        n_images += work()
        took.append(time.perf_counter() - start)
    return n_images / (time.perf_counter() - began), 1000 * median(took)


def measure(args: argparse.Namespace, photos: list[bytes], folder: Path) -> Json:
    """All rounds."""
    own = create_backbone(args.network, weights=args.weights)
    torch.set_num_threads(args.threads)
    network = fast_network(own, Place(SIDE, folder / "networks", args.threads))
    batch = torch.stack([prepare_image(photo, SIDE) for photo in photos[:32]])

    def alone() -> int:
        return len(network.features(batch))

    def loop() -> int:
        return len(network.features(torch.stack([prepare_image(photo, SIDE) for photo in photos[:32]])))

    turn = iter(range(10**9))

    def one_by_one() -> int:
        return len(network.features(prepare_image(photos[next(turn) % len(photos)], SIDE)[None]))

    rounds: list[Json] = []
    with ExitStack() as stack:
        os.environ["UNSEEN_THREADS"] = str(args.threads)
        service = stack.enter_context(LocalService(folder / "data", weights_dir=args.weights and args.weights.parent))
        with Client(service.url) as client:
            service.wait_until_ready(client)
            classifier = trained(client, args.data, args.network, args.weights.name if args.weights else "random")
        path = f"/v1/classify?classifier_id={classifier}"
        servers = {"unseen": (service.port, [request_of(photo, "unseen", path) for photo in photos])}
        awake: dict[str, Callable[[], AbstractContextManager[None]]] = {"unseen": nullcontext}
        for named in args.rival:
            name, _, command = named.partition("=")
            requests = [request_of(photo, name) for photo in photos]
            other = stack.enter_context(rival(command, args.network, args.weights, args.threads))
            servers[name], awake[name] = (other.port, requests), other.awake
        for name, (port, requests) in servers.items():
            with awake[name]():
                load(port, requests, 8, 64)
        time.sleep(args.settle)  # the network is prepared behind the first requests
        for _ in range(args.rounds):
            measured: Json = {"network": rate(alone, 3), "loop": rate(loop, 3), "one by one": rate(one_by_one, 3)}
            measured["servers"] = {}
            for concurrency in CONCURRENCY:
                for name, (port, requests) in servers.items():
                    n_requests = max(args.requests, 2 * concurrency)
                    with awake[name]():
                        found = load(port, requests, concurrency, n_requests)
                    measured["servers"].setdefault(name, {})[str(concurrency)] = found
            rounds.append(measured)
    return medians(rounds)


def medians(rounds: list[Json]) -> Json:
    """One result of all rounds."""
    return {
        "network": {"images_per_s": median(r["network"][0] for r in rounds)},
        "loop": {"images_per_s": median(r["loop"][0] for r in rounds)},
        "one_by_one": {
            "images_per_s": median(r["one by one"][0] for r in rounds),
            "p50": median(r["one by one"][1] for r in rounds),
        },
        "servers": {
            name: {
                c: {what: median(r["servers"][name][c][what] for r in rounds) for what in row}
                for c, row in rows.items()
            }
            for name, rows in rounds[0]["servers"].items()
        },
    }


def markdown(found: Json) -> str:
    """The table of a result."""
    raw, loop = found["network"]["images_per_s"], found["loop"]["images_per_s"]
    lines = [
        "| server | at a time | images a second | ÷ network alone | ÷ loop | p50 ms | p95 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found["servers"].items():
        for concurrency, row in rows.items():
            numbers = " | ".join(f"{row[what]:.1f}" for what in ("p50", "p95", "p99"))
            speed = row["images_per_s"]
            lines.append(
                f"| {name} | {concurrency} | {speed:.1f} | {speed / raw:.2f} | {speed / loop:.2f} | {numbers} |"
            )
    alone = found["one_by_one"]
    overhead = found["servers"]["unseen"]["1"]["p50"] - alone["p50"]
    lines.append(
        f"\nThe network alone, 32 at a time: {raw:.1f} images a second; with decoding, in a loop: {loop:.1f}; one "
        f"photo after the other from its file: {alone['images_per_s']:.1f}, {alone['p50']:.1f} ms each. HTTP adds "
        f"{overhead:.1f} ms."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CREATURES, help="folder with images/, splits.json and knowledge/")
    parser.add_argument("--weights", type=Path, help="the network's; rivals need them")
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--rival", action="append", default=[], help="NAME=PYTHON:SCRIPT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=192, help="at each concurrency")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds between first requests and measuring")
    args = parser.parse_args()
    if args.rival and not args.weights:
        parser.error("--rival needs --weights: all must compute the same network.")
    photos = [path.read_bytes() for path in sorted((args.data / "images").glob("*/*"))[::11][:96]]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, photos, Path(folder))
    print(json.dumps(found, indent=1))
    print(markdown(found), file=sys.stderr)


if __name__ == "__main__":
    main()
