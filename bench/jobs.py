"""Embedding jobs through the service: two workers against one, and a second job on cached features against the first.

    python bench/jobs.py [--data examples/creatures] [--images 480] [--backbone mobilenet_v2] [--rounds 3]

Starts services of its own in temporary folders, with one worker and with two in turns, and gives each two embedding
jobs at once, on images of their own; then the same two with other clusters, whose features are cached. Prints one JSON
object: seconds from the first request until both have ended, and the two ratios, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import CREATURES
from bench.memory import request_embeddings, write_archive
from service.client import Client
from service.local import LocalService

Json = dict[str, Any]


def measure(args: argparse.Namespace, archives: list[Path], n_workers: int, folder: Path) -> dict[str, float]:
    """Seconds of both first jobs, and of both on cached features."""
    os.environ["UNSEEN_WORKERS"] = str(n_workers)
    with LocalService(folder) as service, Client(service.url) as client:
        service.wait_until_ready(client)
        knowledge = client.wait(client.add_knowledge("classes", file=args.data / "knowledge" / "attributes.npz"))
        datasets = [client.create_dataset(archive.stem)["id"] for archive in archives]
        for dataset, archive in zip(datasets, archives, strict=True):
            client.wait(client.upload_archive(dataset, archive))

        def both(seed: int) -> float:
            began = time.monotonic()
            jobs = [
                request_embeddings(client, args, dataset, knowledge["resource"]["id"], seed) for dataset in datasets
            ]
            for job in jobs:
                client.wait(job)
            return time.monotonic() - began

        return {"first": both(0), "cached": both(1)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CREATURES)
    parser.add_argument("--images", type=int, default=480, help="of each of the two jobs")
    parser.add_argument("--backbone", default="mobilenet_v2", help="untrained: time does not depend on the weights")
    parser.add_argument("--size", type=int, default=96, help="side of a patch in pixels")
    parser.add_argument("--epochs", type=int, default=5, help="of the clustering")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    classes = json.loads((args.data / "splits.json").read_text())["seen_classes"]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(prefix="unseen-jobs-") as name:
        folder = Path(name)
        archives = [folder / "one.zip", folder / "other.zip"]
        for archive, degrees in zip(archives, (0.0, 10.0), strict=True):
            write_archive(archive, args.data, classes, args.images, turned_by=degrees)
        for number in range(args.rounds):
            rounds.append({})
            for n_workers in (1, 2) if number % 2 == 0 else (2, 1):
                took = measure(args, archives, n_workers, folder / f"data-{number}-{n_workers}")
                rounds[-1][str(n_workers)] = {what: round(seconds, 1) for what, seconds in took.items()}
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    result = {
        "rounds": rounds,
        "two_workers_over_one": statistics.median(r["2"]["first"] / r["1"]["first"] for r in rounds),
        "cached_over_first": statistics.median(r["1"]["cached"] / r["1"]["first"] for r in rounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
