"""`unseen bench`: measures the cells of a benchmark over REST, keeps each result at once, and writes the tables.

Every number is the service's own evaluation: settings are chosen on validation classes, test rows are only read by it.
An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from service.bench_plan import (
    BEST_ON_TEST,
    BenchSpec,
    Cell,
    cell_key,
    cells,
    dataset_folder,
    dataset_spec,
    full_params,
    knowledge_files,
    photos_folder,
)
from service.cli_output import console
from service.client import Client, UnseenError
from service.client_http import Json
from service.client_uploads import guess_kind

METRICS = {"t1": "T1", "u": "U", "s": "S", "h": "H", "ausuc": "AUSUC"} | {
    name: f"{measure.upper()} of the epoch best on test rows (not a result)" for name, measure in BEST_ON_TEST.items()
}
RESULTS_FILE = "results.json"


class Results:
    """Rows by cell, in a JSON file that is replaced after each one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / RESULTS_FILE
        self.rows: dict[str, Json] = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}

    def has(self, key: str) -> bool:
        """Whether the cell was measured; one that failed is tried again."""
        return "error" not in self.rows.get(key, {"error": "missing"})

    def add(self, key: str, row: Json) -> None:
        """Keep a cell's row."""
        self.rows[key] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False), "utf-8")
        part.replace(self._path)


class _Dataset:
    """A dataset on the service, its split and its knowledge; found by name if a former run made it.

    photos: the dataset that embeddings are made of; the same one where images are given.
    """

    def __init__(self, client: Client, spec: BenchSpec, name: str, data: Path) -> None:
        self.client, self.name = client, name
        self.spec = dataset_spec(spec, name)
        self.folder = dataset_folder(spec, name, data)
        self.files = knowledge_files(spec, name, self.folder)
        self._knowledge: dict[str, str] = {}
        row = self._found(name) or self._made()
        self.dataset_id = self.photos_id = str(row["id"])
        if (photos := photos_folder(spec, name, data)) is not None:
            self.photos_id = str((self._found(f"{name} photos") or self._uploaded(f"{name} photos", photos))["id"])
        self.split: Json = row["summary"] if row["kind"] == "features" else self._photo_split()
        if fingerprint := row["summary"].get("fingerprint"):
            console.print(f"{escape(name)}: split {escape(json.dumps(fingerprint))}", soft_wrap=True)

    def knowledge(self, source: str, file: Path | None = None) -> str:
        """The id of a knowledge source of this dataset, or of another file."""
        if source not in self._knowledge:
            name = f"{self.name}/{source}"
            ready = [r for r in self.client.list_all("knowledge") if r["name"] == name and r["status"] == "ready"]
            if ready:
                self._knowledge[source] = str(ready[0]["id"])
            else:
                path = file or self.files[source]
                kind = "attributes" if source in ("attributes", "att") else guess_kind(path)
                job = self.client.wait(self.client.add_knowledge(name, file=path, kind=kind))
                self._knowledge[source] = str(job["resource"]["id"])
        return self._knowledge[source]

    def _found(self, name: str) -> Json | None:
        rows = [row for row in self.client.list_all("datasets") if row["name"] == name and row["n_images"]]
        return self.client.get(rows[0]["id"]) if rows else None

    def _uploaded(self, name: str, folder: Path) -> Json:
        dataset_id = str(self.client.create_dataset(name)["id"])
        report = self.client.upload_folder(dataset_id, folder)
        if report.rejected:
            console.print(f"{escape(name)}: {len(report.rejected)} images were rejected", style="yellow")
        return self.client.get(dataset_id)

    def _made(self) -> Json:
        mats = {"res101": self.folder / "res101.mat", "att_splits": self.folder / "att_splits.mat"}
        features, splits = self.folder / "features.npz", self.folder / "splits.json"
        if not features.is_file() and not mats["att_splits"].is_file():
            return self._uploaded(self.name, self.folder)
        dataset_id = str(self.client.create_dataset(self.name)["id"])
        if features.is_file():
            self.client.wait(self.client.upload_features(dataset_id, features=features, splits=splits))
        else:
            if not mats["res101"].is_file():
                raise UnseenError(
                    f"Dataset {self.name!r} lacks {mats['res101']}: the features of the proposed splits come from "
                    "their authors' archive xlsa17.zip. Put the file there."
                )
            self.client.wait(self.client.upload_features(dataset_id, **mats))
        return self.client.get(dataset_id)

    def _photo_split(self) -> Json:
        path = self.folder / "splits.json"
        if not path.is_file():
            raise UnseenError(f"Dataset {self.name!r} has no {path}: it says which classes are unseen.")
        split: Json = json.loads(path.read_text("utf-8"))
        return split


class Runner:
    """Measures cells on a service."""

    def __init__(self, client: Client, spec: BenchSpec, data: Path) -> None:
        self._client, self._spec, self._data = client, spec, data
        self._datasets: dict[str, _Dataset] = {}
        self._embedding_sets: dict[tuple[str, str, str, int], Json] = {}

    def measure(self, cell: Cell) -> Json:
        """T1, U, S, H and how they came about; UnseenError where the service refuses, or a job fails."""
        started = time.monotonic()
        if cell.dataset not in self._datasets:
            self._datasets[cell.dataset] = _Dataset(self._client, self._spec, cell.dataset, self._data)
        dataset, classifier = self._datasets[cell.dataset], self._spec.classifiers[cell.classifier]
        request: Json = {
            "method": classifier.method,
            "params": classifier.params,
            "seed": cell.seed,
            "validation_classes": dataset.split.get("validation_classes"),
        }
        if classifier.search is not None:
            request["search"] = classifier.search
        if (words := classifier.dimension_words) is not None:
            request["dimension_knowledge_id"] = dataset.knowledge(words, self._data / words)
        if "epochs" in full_params(classifier) and set(BEST_ON_TEST) & set(self._spec.metrics):
            request["best_on_test"] = True
        if dataset.spec.image_size is not None:
            request["image_size"] = dataset.spec.image_size
        relation = None
        if self._spec.embeddings[cell.embedding] is None:
            request |= {name: dataset.split[name] for name in ("seen_classes", "unseen_classes")}
            request |= {"knowledge_id": dataset.knowledge(cell.knowledge), "backbone": dataset.spec.backbone}
        else:
            embedding_set = self._embedding_set(dataset, cell)
            relation = embedding_set["summary"]["relation"]
            request["embedding_set_id"] = embedding_set["id"]
        job = self._client.wait(self._client.create_classifier(dataset.dataset_id, **request))
        row = self._client.classifier(job["resource"]["id"])
        metrics = row["metrics"]
        chosen, best = (relation or {}).get("chosen") or {}, metrics.get("best_on_test", {})
        return {
            "t1": metrics["zsl"]["t1"],
            **{name: metrics["gzsl"][name] for name in ("u", "s", "h", "ausuc") if name in metrics["gzsl"]},
            **{name: best[of]["value"] for name, of in BEST_ON_TEST.items() if of in best},
            "validation": {name: metrics["validation"].get(name) for name in ("t1", "h", "setting")},
            "best_epoch": metrics["best_epoch"],
            "searched": metrics.get("search", {}).get("trials"),
            "relation": relation and {"name": relation["name"], **relation["params"]},
            "reason": chosen.get("reason"),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _embedding_set(self, dataset: _Dataset, cell: Cell) -> Json:
        key = (cell.dataset, cell.knowledge, cell.embedding, cell.seed)
        if key not in self._embedding_sets:
            asked = dict(self._spec.embeddings[cell.embedding] or {})
            params = {"seed": cell.seed, "validation_classes": dataset.split.get("validation_classes")}
            if dataset.spec.backbone is not None:
                params["backbone"] = dataset.spec.backbone
            asked["params"] = {**params, **asked.get("params", {})}
            job = self._client.create_embedding_set(
                dataset.photos_id,
                dataset.knowledge(cell.knowledge),
                seen_classes=dataset.split["seen_classes"],
                unseen_classes=dataset.split["unseen_classes"],
                **asked,
            )
            self._embedding_sets[key] = self._client.embedding_set(self._client.wait(job)["resource"]["id"])
        return self._embedding_sets[key]


def run(client: Client, spec: BenchSpec, data: Path, results: Results) -> int:
    """Measures what is missing; the number of cells that failed."""
    runner, n_failed = Runner(client, spec, data), 0
    everything = list(cells(spec, data))
    for number, cell in enumerate(everything, 1):
        key = cell_key(spec, cell)
        if results.has(key):
            continue
        where = f"{number}/{len(everything)} {cell.dataset}, {cell.knowledge}, {cell.embedding}, {cell.classifier}"
        try:
            row = runner.measure(cell)
            found = ", ".join(f"{METRICS[m]} {100 * row[m]:.1f}" for m in ("t1", "h"))
            console.print(f"{escape(where)}, seed {cell.seed}: {found} ({row['seconds']:.0f} s)", soft_wrap=True)
        except UnseenError as error:
            row, n_failed = {"error": str(error)}, n_failed + 1
            console.print(f"{escape(where)}, seed {cell.seed}: [red]{escape(str(error))}[/]", soft_wrap=True)
        results.add(key, row)
    return n_failed


def write_tables(spec: BenchSpec, data: Path, results: Results, paper: list[Json]) -> str:
    """Writes table.md and table.csv beside the results; the Markdown."""
    text = markdown(spec, data, results, paper)
    results.folder.mkdir(parents=True, exist_ok=True)
    (results.folder / "table.md").write_text(text, "utf-8")
    with (results.folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "knowledge", "embedding", "classifier", "seed", *METRICS, "seconds", "error"])
        for cell in cells(spec, data):
            row = results.rows.get(cell_key(spec, cell), {})
            names = [cell.dataset, cell.knowledge, cell.embedding, cell.classifier, cell.seed]
            writer.writerow([*names, *(row.get(m, "") for m in METRICS), row.get("seconds", ""), row.get("error", "")])
    return text


def markdown(spec: BenchSpec, data: Path, results: Results, paper: list[Json]) -> str:
    """A table for each metric, in percent: mean ± standard deviation over seeds, the paper's number in brackets."""
    parts = [f"# {spec.title}"]
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Cell]]] = {}
    for cell in cells(spec, data):
        columns = groups.setdefault((cell.dataset, cell.knowledge), {})
        columns.setdefault((cell.embedding, cell.classifier), []).append(cell)
    methods = [(e, c) for e in spec.embeddings for c in spec.classifiers]
    titles = [_title(spec, *names) for names in methods]
    for metric in spec.metrics:
        grid = [
            [_shown(spec, results, of_group.get(m, []), metric, paper) for m in methods] for of_group in groups.values()
        ]
        heads = [f"{name}, {source}" for name, source in groups]
        if len(methods) > len(groups):  # the longer side runs down the page
            grid, heads, titles_across = [list(row) for row in zip(*grid, strict=True)], titles, heads
        else:
            titles_across = titles
        lines = [f"**{METRICS[metric]}, %**", "", "| | " + " | ".join(titles_across) + " |"]
        lines.append("|---" * (len(titles_across) + 1) + "|")
        lines += [f"| {head} | " + " | ".join(row) + " |" for head, row in zip(heads, grid, strict=True)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _title(spec: BenchSpec, embedding: str, classifier: str) -> str:
    """What tells the columns apart."""
    several = [
        name for name, choice in ((embedding, spec.embeddings), (classifier, spec.classifiers)) if len(choice) > 1
    ]
    return ", ".join(several) or classifier


def _shown(spec: BenchSpec, results: Results, of_cell: list[Cell], metric: str, paper: list[Json]) -> str:
    if not of_cell:
        return "–"
    rows = [results.rows.get(cell_key(spec, cell), {}) for cell in of_cell]
    values = [100 * row[metric] for row in rows if metric in row]
    shown = f"{np.mean(values):.1f}" if values else "failed" if any(rows) else ""
    if len(values) > 1:
        shown += f" ± {np.std(values):.1f}"
    if values and len(values) < len(of_cell):
        shown += f" ({len(values)} of {len(of_cell)} seeds)"
    told = _paper_value(spec, of_cell[0], metric, paper)
    return shown if told is None else f"{shown} [{told:.1f}]".strip()


def _paper_value(spec: BenchSpec, cell: Cell, metric: str, paper: list[Json]) -> float | None:
    if spec.paper is None:
        return None
    names: dict[str, Any] = {"classifier": cell.classifier, "embedding": cell.embedding, "knowledge": cell.knowledge}
    method = spec.paper.methods.get(cell.embedding, spec.paper.method).format(**names)
    for row in paper:
        if (
            row["source"].startswith(spec.paper.source)
            and row["method"].casefold() == method.casefold()
            and row["dataset"].casefold() == cell.dataset.casefold()
            and row["metric"] == METRICS[metric]
        ):
            return float(row["value"])
    return None
