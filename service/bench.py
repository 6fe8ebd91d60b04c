"""`unseen bench`: measures the cells of a benchmark over REST, keeps each result at once, and writes the tables.

Every number is the service's own evaluation: settings are chosen on validation classes, test rows are only read by it.
An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from models.errors import ModelError
from service.bench_plan import (
    BEST_ON_TEST,
    METRICS,
    SEEN_T1,
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
from service.client_uploads import guess_kind, read_folder

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
        self.client, self.spec = client, dataset_spec(spec, name)
        self.name = name if self.spec.path is None else f"{name}, {_digest(self.spec.path)}"
        self.folder = dataset_folder(spec, name, data)
        self.files = knowledge_files(spec, name, self.folder)
        self._knowledge: dict[str, str] = {}
        row = self._features() or self._photos(self.name, self.folder)
        self.dataset_id = self.photos_id = str(row["id"])
        if (photos := photos_folder(spec, name, data)) is not None:
            self.photos_id = str(self._photos(f"{name} photos, {_digest(str(self.spec.photos))}", photos)["id"])
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

    def _found(self, name: str, kind: Literal["images", "features"]) -> Json | None:
        rows = (row for row in self.client.list_all("datasets") if (row["name"], row["kind"]) == (name, kind))
        return next((self.client.get(row["id"]) for row in rows if row["n_images"]), None)

    def _photos(self, name: str, folder: Path) -> Json:
        """The dataset of a folder's photos, all of them: what an interrupted run left out is added.

        Sending a folder again is safe, as content is accepted once, but takes as long as it did before; so it is left
        out where the dataset has as many images as the folder.
        """
        found = self._found(name, "images")
        if found is not None and found["n_images"] >= len(read_folder(folder)[0]):
            return found
        dataset_id = str((found or self.client.create_dataset(name))["id"])
        report = self.client.upload_folder(dataset_id, folder)
        if report.rejected:
            console.print(f"{escape(name)}: {len(report.rejected)} images were rejected", style="yellow")
        return self.client.get(dataset_id)

    def _features(self) -> Json | None:
        """The dataset of the folder's features; None where it holds photos."""
        mats = {"res101": self.folder / "res101.mat", "att_splits": self.folder / "att_splits.mat"}
        features, splits = self.folder / "features.npz", self.folder / "splits.json"
        if not features.is_file() and not mats["att_splits"].is_file():
            return None
        if (found := self._found(self.name, "features")) is not None:
            return found
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
        report = read_folder(self.folder)[1]
        sides = {"seen_classes": report.seen_classes, "unseen_classes": report.unseen_classes}
        if missing := [name for name, classes in sides.items() if classes is None]:
            raise UnseenError(
                f"Dataset {self.name!r}: {self.folder / 'splits.json'} has no {' and no '.join(missing)}."
            )
        return sides | {"validation_classes": report.validation_classes}


def _digest(folder: str) -> str:
    """Keeps a dataset apart on the service from one of the same name that was made of another folder."""
    return hashlib.sha256(folder.encode()).hexdigest()[:8]


class Runner:
    """Measures cells on a service."""

    def __init__(self, client: Client, spec: BenchSpec, data: Path) -> None:
        self._client, self._spec, self._data = client, spec, data
        self._datasets: dict[str, _Dataset] = {}
        self._embedding_sets: dict[tuple[str, str, str, int], Json] = {}

    def measure(self, cell: Cell) -> Json:
        """T1, U, S, H and how they came about, those without test images left out.

        UnseenError where the service refuses, a job fails or no measure of the plan has test images; ModelError where
        the dataset's folder cannot be used.
        """
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
        metrics, chosen = row["metrics"], (relation or {}).get("chosen") or {}
        measured = _measured(metrics)
        if not set(measured) & set(self._spec.metrics):
            raise UnseenError(
                f"Dataset {dataset.name!r} has no test images for {', '.join(METRICS[m] for m in self._spec.metrics)}: "
                "T1 needs some of unseen classes, U, S, H and AUSUC of seen classes too."
            )
        return {
            **measured,
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


def _measured(metrics: Json) -> Json:
    """The measures of a plan that a classifier's metrics hold; without test images of a side, some are missing."""
    best = metrics.get("best_on_test", {})
    found = {**(metrics["zsl"] or {}), **(metrics["gzsl"] or {}), SEEN_T1: metrics.get(SEEN_T1)}
    found |= {name: best[of]["value"] for name, of in BEST_ON_TEST.items() if of in best}
    return {name: found[name] for name in METRICS if found.get(name) is not None}


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
            found = ", ".join(f"{METRICS[m]} {100 * row[m]:.1f}" for m in spec.metrics if m in row)
            console.print(f"{escape(where)}, seed {cell.seed}: {found} ({row['seconds']:.0f} s)", soft_wrap=True)
        except (UnseenError, ModelError) as error:
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
    shown = f"{np.mean(values):.1f}" if values else "failed" if any("error" in row for row in rows) else ""
    if len(values) > 1:
        shown += f" ± {np.std(values):.1f}"
    if values and len(values) < len(of_cell):
        shown += f" ({len(values)} of {len(of_cell)} seeds)"
    told = paper_value(spec, of_cell[0], metric, paper)
    return shown if told is None else f"{shown} [{told:.1f}]".strip()


def paper_value(spec: BenchSpec, cell: Cell, metric: str, paper: list[Json]) -> float | None:
    """What the papers' tables tell of a cell, in percent."""
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
