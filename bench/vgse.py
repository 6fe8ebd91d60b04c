"""VGSE on real photos, through the service: embeddings against their baselines, in T1 and H, mean of seeds.

    UNSEEN_WEIGHTS_DIR=../shared/weights unseen serve &
    python bench/vgse.py --data ../shared/data

Each folder of --data holds images/, splits.json and knowledge/*.npz. Every number comes back over REST; test rows are
read by the evaluation only. Results are added to --out as they arrive: an interrupted run goes on where it stopped;
`--report` prints the Markdown tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from service.client import Client

Json = dict[str, Any]
RIDGE = 0.1
NO_CLASS = {"class_weight": 0.0, "semantic_weight": 0.0}
NO_SEMANTIC = {"semantic_weight": 0.0}


def columns() -> dict[str, Json | None]:
    """Column name -> embedding-set request (None: the raw knowledge vectors), in the order of the table."""
    smo = {"relation": "smo"}

    def relation(**params: Any) -> Json:
        return {"params": {"relation": params}}

    return {
        "raw vectors": None,
        "k-means-SMO": {"method": "kmeans", **smo},
        "backbone-SMO": {"method": "backbone", **smo},
        "clu+pel": {**smo, "params": {"clustering": NO_CLASS}},
        "+cls": {**smo, "params": {"clustering": NO_SEMANTIC}},
        "VGSE-SMO α=0": smo,
        "α=-1": {**smo, **relation(alpha=-1)},
        f"α=-1, ridge {RIDGE}": {**smo, **relation(alpha=-1, ridge=RIDGE)},
        "WAvg": {"relation": "wavg"},
        "SMO α=0, ridge 1, centred": {**smo, **relation(form="centred", ridge=1.0)},
        "the same, fused": {**smo, **relation(form="fused", ridge=1.0)},
        "WAvg of all, η=10, fused": {"relation": "wavg", **relation(form="fused", n_neighbors=10_000, eta=10.0)},
        "auto": {"relation": "auto"},
    }


class Results:
    """Numbers by (set, knowledge, column, seed), kept in a JSON file after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Json] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Json) -> None:
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1))


class Bench:
    """One dataset with its knowledge sources on a service."""

    def __init__(self, client: Client, folder: Path, weights: str, sources: list[str]) -> None:
        self.client = client
        self.splits: Json = json.loads((folder / "splits.json").read_text())
        self.backbone = {"name": weights.split("-")[0], "weights": weights}
        self.name = folder.name
        self.dataset_id = self._dataset(folder)
        self.knowledge = {name: self._knowledge(folder / "knowledge" / f"{name}.npz") for name in sources}

    def _dataset(self, folder: Path) -> str:
        for row in self.client.list_all("datasets"):
            if row["name"] == self.name and row["n_images"]:
                return str(row["id"])
        dataset_id = str(self.client.create_dataset(self.name)["id"])
        report = self.client.upload_folder(dataset_id, folder)
        print(f"{self.name}: {report.n_accepted} images uploaded, {len(report.rejected)} rejected", file=sys.stderr)
        return dataset_id

    def _knowledge(self, path: Path) -> str:
        name = f"{self.name}/{path.stem}"
        for row in self.client.list_all("knowledge"):
            if row["name"] == name and row["status"] == "ready":
                return str(row["id"])
        kind = "attributes" if path.stem == "attributes" else "class_vectors"
        job = self.client.wait(self.client.add_knowledge(name, file=path, kind=kind))
        return str(job["resource"]["id"])

    def run(self, source: str, request: Json | None, seed: int) -> Json:
        """One cell: builds the set (unless raw), trains SJE, returns T1, U, S, H and the relation used."""
        common: Json = {"method": "sje", "seed": seed, "validation_classes": self.splits["validation_classes"]}
        relation = None
        if request is None:
            job = self.client.create_classifier(
                self.dataset_id,
                knowledge_id=self.knowledge[source],
                seen_classes=self.splits["seen_classes"],
                unseen_classes=self.splits["unseen_classes"],
                backbone=self.backbone,
                **common,
            )
        else:
            params = {
                **request.get("params", {}),
                "backbone": self.backbone,
                "seed": seed,
                "validation_classes": self.splits["validation_classes"],
            }
            built = self.client.create_embedding_set(
                self.dataset_id,
                self.knowledge[source],
                seen_classes=self.splits["seen_classes"],
                unseen_classes=self.splits["unseen_classes"],
                **{**request, "params": params},
            )
            set_id = self.client.wait(built)["resource"]["id"]
            relation = self.client.embedding_set(set_id)["summary"]["relation"]
            job = self.client.create_classifier(self.dataset_id, embedding_set_id=set_id, **common)
        metrics = self.client.classifier(self.client.wait(job)["resource"]["id"])["metrics"]
        chosen = (relation or {}).get("chosen") or {}
        return {
            "t1": metrics["zsl"]["t1"],
            **{name: metrics["gzsl"][name] for name in ("u", "s", "h")},
            "relation": relation and {"name": relation["name"], **relation["params"]},
            "reason": chosen.get("reason"),
        }


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """(set, knowledge, column, seed): every cell once before any is repeated with another seed."""
    for seed in range(options.seeds):
        for name in options.sets:
            for path in sorted((options.data / name / "knowledge").glob("*.npz")):
                if options.knowledge is None or path.stem in options.knowledge:
                    yield from (
                        (name, path.stem, c, seed) for c in columns() if not options.columns or c in options.columns
                    )


def markdown(results: Results) -> str:
    """Two tables, T1 and H in percent: mean ± standard deviation over seeds."""
    parts = []
    for metric, title in (("t1", "T1"), ("h", "H")):
        lines = [f"**{title}, %**", "", "| set, knowledge | " + " | ".join(columns()) + " |"]
        lines.append("|---" * (len(columns()) + 1) + "|")
        pairs = dict.fromkeys(tuple(key.split("|")[:2]) for key in results.rows)
        for name, source in pairs:
            row = []
            for column in columns():
                prefix = f"{name}|{source}|{column}|"
                values = [100 * r[metric] for key, r in results.rows.items() if key.startswith(prefix)]
                row.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
            lines.append(f"| {name}, {source} | " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    chosen = [
        f"- {key.replace('|', ', ')}: {row['relation']['name']} "
        f"{ {k: v for k, v in row['relation'].items() if k != 'name'} }: {row['reason']}"
        for key, row in results.rows.items()
        if "|auto|" in key and row.get("relation")
    ]
    return "\n\n".join([*parts, "What `auto` chose:\n\n" + "\n".join(chosen)])


def main() -> None:
    """Runs the missing cells and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="*", default=["animals", "caltech101", "tiny188"])
    parser.add_argument("--columns", nargs="*", help="default: all")
    parser.add_argument("--knowledge", nargs="*", help="names of knowledge files; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--weights", default="mobilenet_v2-imagenet1k.fp16.safetensors", help="a file of UNSEEN_WEIGHTS_DIR"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out/vgse.json"))
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, run nothing")
    options = parser.parse_args()
    results = Results(options.out)
    if not options.report:
        with Client(options.url) as client:
            benches: dict[str, Bench] = {}
            for name, source, column, seed in cells(options):
                key = f"{name}|{source}|{column}|{seed}"
                if key in results:
                    continue
                if name not in benches:
                    sources = [path.stem for path in sorted((options.data / name / "knowledge").glob("*.npz"))]
                    benches[name] = Bench(client, options.data / name, options.weights, sources)
                results.add(key, benches[name].run(source, columns()[column], seed))
                print(f"{key}: T1 {100 * results.rows[key]['t1']:.1f}", file=sys.stderr)
    print(markdown(results))


if __name__ == "__main__":
    main()
