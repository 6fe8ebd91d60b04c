"""Memory of whole jobs: what importing images and building a VGSE embedding set hold at most, for N and 10 N images.

    python bench/memory.py [--data examples/creatures] [--images 960] [--backbone mobilenet_v2]

Starts a service of its own in a temporary folder and drives it over REST; every job runs in a fresh process, whose
memory is read from /proc all the while. Images are those of --data (images/<class>/, splits.json, knowledge/), each
many times with a slight turn. Prints one JSON object and, to standard error, a Markdown table. `anonymous` is what the
process itself allocated; `resident` counts mapped files too, which the kernel takes back when it needs the room.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it would not find its neighbours
from bench import CREATURES
from service.client import Client
from service.local import LocalService

Json = dict[str, Any]
MIB = 2**20
PAUSE_S = 0.05


class Watch:
    """Reads the memory of the worker's child while a job runs: the most so far, overall and by phase."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.worker = next(
            p for p in psutil.Process().children(recursive=True) if p.cmdline()[-2:] == ["-m", "workers"]
        )

    def job(self, client: Client, job: Json) -> Json:
        """The job's peaks in MiB, once it has succeeded."""
        peaks: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        high = 0.0
        began = asked = time.monotonic()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(PAUSE_S)
            for process in self.worker.children():
                now = memory_of(process.pid)
                high = max(high, now.pop("high", 0.0))
                phase = peaks[(job.get("progress") or {}).get("phase") or "start"]
                for name, value in now.items():
                    phase[name] = max(phase[name], value)
            if time.monotonic() - asked > 0.5:
                job, asked = client.job(job["id"]), time.monotonic()
        if job["status"] != "succeeded":
            sys.exit(f"Job {job['id']} {job['status']}: {job['error']}")
        anonymous = max((phase["anonymous"] for phase in peaks.values()), default=0.0)
        phases = {name: {what: round(value) for what, value in values.items()} for name, values in peaks.items()}
        seconds = round(time.monotonic() - began, 1)
        return {"resident": round(high), "anonymous": round(anonymous), "seconds": seconds, "phases": phases}


def memory_of(pid: int) -> dict[str, float]:
    """MiB of a process: the highest resident set so far, resident now, anonymous now; nothing if it has gone."""
    names = {"VmHWM:": "high", "VmRSS:": "resident", "RssAnon:": "anonymous"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines]
    return {names[field[0]]: int(field[1]) / 1024 for field in fields if field and field[0] in names}


def write_archive(path: Path, data: Path, classes: list[str], n_images: int, *, turned_by: float = 0) -> None:
    """About `n_images` images of `classes`, in equal parts: the folder's own in turn, each time turned a bit more.

    turned_by: degrees that all are turned by at the start, so that no two archives share an image.
    """
    per_class = -(-n_images // len(classes))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in classes:
            sources = sorted((data / "images" / name).iterdir())
            pictures = [Image.open(source).convert("RGB") for source in sources[:per_class]]
            for number in range(per_class):
                turned = pictures[number % len(pictures)].rotate(
                    turned_by + 0.5 * (number // len(pictures)), Image.Resampling.BILINEAR
                )
                out = io.BytesIO()
                turned.save(out, "JPEG", quality=90)
                archive.writestr(f"{name}/{number:06d}.jpg", out.getvalue())


def request_embeddings(
    client: Client, args: argparse.Namespace, dataset_id: str, knowledge_id: str, seed: int = 0
) -> Json:
    """The job of a VGSE embedding set with the command line's network, size of patches and epochs."""
    return client.create_embedding_set(
        dataset_id,
        knowledge_id,
        unseen_classes=json.loads((args.data / "splits.json").read_text())["unseen_classes"],
        params={
            "seed": seed,
            "backbone": {"name": args.backbone, "weights": "random"},
            "patches": {"size": args.size},
            "clustering": {"epochs": args.epochs},
        },
    )


def measure(args: argparse.Namespace, n_images: int, folder: Path) -> Json:
    """Both jobs for `n_images` images."""
    splits = json.loads((args.data / "splits.json").read_text())
    archive = folder / f"{n_images}.zip"
    write_archive(archive, args.data, splits["seen_classes"], n_images)
    with LocalService(folder / f"data-{n_images}") as service, Client(service.url) as client:
        service.wait_until_ready(client)
        watch = Watch(service)
        knowledge = client.wait(client.add_knowledge("classes", file=args.data / "knowledge" / "attributes.npz"))
        dataset = client.create_dataset("images")
        imported = watch.job(client, client.upload_archive(dataset["id"], archive))
        job = request_embeddings(client, args, dataset["id"], knowledge["resource"]["id"])
        embedded = watch.job(client, job)
        summary = client.embedding_set(client.job(job["id"])["resource"]["id"])["summary"]
    n_features = (summary["n_patches"] + summary["n_images"]) * summary["backbone"]["feature_dim"]
    return {
        "n_images": n_images,
        "n_train": summary["n_images"],
        "n_patches": summary["n_patches"],
        "features_mib": round(2 * n_features / MIB),  # float16, on disk
        "import": imported,
        "embedding": embedded,
    }


def table(results: list[Json]) -> str:
    """Markdown: a row for each job and phase, resident / anonymous MiB for each number of images."""
    lines = [
        "| | " + " | ".join(f"{r['n_images']:,} images" for r in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    lines.append("| features on disk, MiB | " + " | ".join(f"{r['features_mib']}" for r in results) + " |")
    for job in ("import", "embedding"):
        cells = [f"**{r[job]['resident']}** / {r[job]['anonymous']}" for r in results]
        lines.append(f"| {job}: peak | " + " | ".join(cells) + " |")
        for phase in results[-1][job]["phases"]:
            found = [r[job]["phases"].get(phase) for r in results]
            cells = [f"{f['resident']} / {f['anonymous']}" if f else "" for f in found]
            lines.append(f"| {job}: {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CREATURES)
    parser.add_argument("--images", type=int, default=960, help="N; the second run has ten times as many")
    parser.add_argument("--backbone", default="mobilenet_v2", help="untrained: memory does not depend on the weights")
    parser.add_argument("--size", type=int, default=32, help="side of a patch in pixels; small ones are quick")
    parser.add_argument("--epochs", type=int, default=5, help="of the clustering")
    args = parser.parse_args()
    results: list[Json] = []
    for n_images in (args.images, 10 * args.images):
        with tempfile.TemporaryDirectory(prefix="unseen-memory-") as folder:
            results.append(measure(args, n_images, Path(folder)))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results), file=sys.stderr)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
