"""Frozen features against a network fine-tuned with the clusters, on real photos, through the service.

    UNSEEN_WEIGHTS_DIR=../shared/weights unseen serve &
    python bench/finetuning.py --data ../shared/data/animals

Both build an embedding set by VGSE; SJE on top, on image features of the set's own network, which is the default, and
of the network it began as, as the paper does; each at the size of the patches and at 224 pixels. Numbers come back
over REST; test rows are read by the evaluation only. Results are added to --out as they arrive.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from service.client import Client

Json = dict[str, Any]

COLUMNS: dict[str, Json] = {
    "frozen": {"mode": "frozen"},
    "fine-tuned, last quarter": {"mode": "finetune", "finetuned_share": 0.25},
    "fine-tuned, all layers": {"mode": "finetune", "finetuned_share": 1.0},
}


class Results:
    """Rows by column and seed, in a JSON file that is written after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Json] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, row: Json) -> None:
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1))


class Bench:
    """A folder's images and one knowledge source on a service; found by name if a former run uploaded them."""

    def __init__(self, client: Client, folder: Path, source: str, weights: str) -> None:
        self.client = client
        self.splits: Json = json.loads((folder / "splits.json").read_text())
        self.backbone = {"name": weights.split("-")[0], "weights": weights}
        rows = [row for row in client.list_all("datasets") if row["name"] == folder.name and row["n_images"]]
        self.dataset_id = str(rows[0]["id"] if rows else client.create_dataset(folder.name)["id"])
        if not rows:
            client.upload_folder(self.dataset_id, folder)
        job = client.add_knowledge(source, file=folder / "knowledge" / f"{source}.npz", kind="class_vectors")
        self.knowledge_id = str(client.wait(job)["resource"]["id"])


def build(bench: Bench, clustering: Json, patches: Json, seed: int) -> tuple[str, Json, float]:
    """An embedding set: its id, its summary, and the seconds it took."""
    started = time.perf_counter()
    job = bench.client.create_embedding_set(
        bench.dataset_id,
        bench.knowledge_id,
        seen_classes=bench.splits["seen_classes"],
        unseen_classes=bench.splits["unseen_classes"],
        method="vgse",
        relation="smo",
        params={
            "backbone": bench.backbone,
            "patches": patches,
            "clustering": clustering,
            "seed": seed,
            "validation_classes": bench.splits["validation_classes"],
        },
    )
    set_id = str(bench.client.wait(job)["resource"]["id"])
    return set_id, bench.client.embedding_set(set_id)["summary"], time.perf_counter() - started


def classify(bench: Bench, set_id: str, seed: int, backbone: Json | None, size: int) -> tuple[str, Json]:
    """SJE on the set: the classifier's id and metrics. backbone: None for the set's own."""
    own: Json = {} if backbone is None else {"backbone": backbone}
    job = bench.client.create_classifier(
        bench.dataset_id,
        embedding_set_id=set_id,
        method="sje",
        seed=seed,
        validation_classes=bench.splits["validation_classes"],
        image_size=size,
        **own,
    )
    classifier_id = str(bench.client.wait(job)["resource"]["id"])
    return classifier_id, bench.client.classifier(classifier_id)["metrics"]


def headline(metrics: Json) -> Json:
    """What the table shows of a classifier."""
    return {
        "t1": metrics["zsl"]["t1"],
        **{name: metrics["gzsl"][name] for name in "ush"},
        "validation_t1": metrics["validation"]["t1"],
        "network": metrics["backbone"]["digest"][:12],
    }


def run(bench: Bench, clustering: Json, patches: Json, seed: int, photo: Path) -> Json:
    """One row: losses, and the scores of SJE with the set's own network and with the one it began as."""
    set_id, summary, seconds = build(bench, clustering, patches, seed)
    history = summary["history"]
    fit = [entry["loss"] for entry in history if entry["stage"] == "fit"]
    row: Json = {
        "seconds": seconds,
        "epochs": summary["best_epoch"],
        "losses": [fit[0], fit[-1]],
        "chosen_by": [[entry["validation"], entry["validation_log_probability"]] for entry in history
                      if entry["stage"] == "choose"],
        "network": summary["backbone"]["digest"],
    }  # fmt: skip
    networks: list[tuple[str, Json | None, int]] = [("own", None, int(patches["size"]))]
    if clustering["mode"] == "finetune":
        networks += [("the one it began as", bench.backbone, int(patches["size"]))]
    networks += [("the one it began as", bench.backbone, 224)]
    for name, backbone, pixels in networks:
        classifier_id, metrics = classify(bench, set_id, seed, backbone, pixels)
        answer = bench.client.classify(photo, classifier_id=classifier_id, top_k=1)["data"][0]["predictions"][0]
        shown = f"{photo.parent.name}: {answer['label']} {answer['score']:.2f}"
        row[f"{name}, {pixels} px"] = {**headline(metrics), "photo": shown}
    return row


def markdown(results: Results) -> str:
    """A line for each way and network: means over seeds."""
    titles = ["clusters", "SJE on images of", "seconds", "epochs", "loss", "validation T1", "T1", "U", "S", "H"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for column in dict.fromkeys(key.split("|")[0] for key in results.rows):
        rows = [row for key, row in results.rows.items() if key.startswith(f"{column}|")]
        seconds, epochs = (f"{np.mean([row[name] for row in rows]):.0f}" for name in ("seconds", "epochs"))
        first, last = np.mean([row["losses"] for row in rows], axis=0)
        for network in (name for name in rows[0] if name.endswith(" px")):
            scores = [
                f"{100 * np.mean([row[network][name] for row in rows]):.1f}"
                for name in ("validation_t1", "t1", "u", "s", "h")
            ]
            lines.append(
                "| " + " | ".join([column, network, seconds, epochs, f"{first:.1f} to {last:.1f}", *scores]) + " |"
            )
            column = seconds = epochs = ""
    return "\n".join(lines)


def main() -> None:
    """Runs the missing rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/animals"))
    parser.add_argument("--knowledge", default="glove-300d")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4, help="at most, of fine-tuning; frozen features have 50")
    parser.add_argument("--patches", type=int, default=9, help="of an image")
    parser.add_argument("--size", type=int, default=64, help="side of a patch in pixels")
    parser.add_argument("--learning-rate", type=float, help="the network's; default: the service's")
    parser.add_argument("--clusters", type=int, default=150)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--weights", default="mobilenet_v2-imagenet1k.fp16.safetensors")
    parser.add_argument("--out", type=Path, default=Path("bench/out/finetuning.json"))
    options = parser.parse_args()
    results = Results(options.out)
    with Client(options.url) as client:
        bench = Bench(client, options.data, options.knowledge, options.weights)
        photo = options.data / bench.splits["test_unseen"][0]
        for seed in range(options.seeds):
            for column in options.columns:
                key = f"{column}|{seed}"
                if key in results.rows:
                    continue
                clustering = {"n_clusters": options.clusters, "batch_size": options.batch, **COLUMNS[column]}
                if clustering["mode"] == "finetune":
                    clustering |= {"epochs": options.epochs}
                    if options.learning_rate:
                        clustering["backbone_learning_rate"] = options.learning_rate
                patches = {"size": options.size, "n_patches": options.patches}
                results.add(key, run(bench, clustering, patches, seed, photo))
                print(f"{key}: {results.rows[key]}", file=sys.stderr)
    print(markdown(results))


if __name__ == "__main__":
    main()
