"""`unseen bench`: the YAML file, which cells are measured and which are not again, tables with the papers' numbers."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from models.catalog import get_method
from models.classifier_params import SJEParams
from service import bench, bench_plan
from service.bench import Results, write_tables
from service.bench_plan import BenchSpec, cell_key, cells, full_params, read_spec
from service.client import UnseenError
from service.client_uploads import read_folder

ROOT = Path(__file__).resolve().parents[2]

PLAN = """
title: A small one
datasets:
  birds:
  fish: {path: water/fish, knowledge: [attributes]}
knowledge: [attributes, words]
embeddings:
  raw:
  VGSE: {relation: smo, params: {clustering: {epochs: 3}}}
classifiers:
  SJE: {method: sje}
  ESZSL: {method: eszsl, params: {gamma: 1}}
seeds: [0, 1]
paper: {source: Some Table 1, methods: {raw: "{classifier}"}, method: "{classifier}+{embedding}"}
"""
FISH = f"ds_fish, {hashlib.sha256(b'water/fish').hexdigest()[:8]}"
ONE = "title: t\ndatasets: {birds: }\nknowledge: [attributes]\nclassifiers: {SJE: {method: sje}}\nseeds: [0]\n"
PAPER = [
    {"source": "Some Table 1", "method": "SJE+vgse", "dataset": "Birds", "metric": "T1", "value": 61.2},
    {"source": "Some Table 1", "method": "SJE", "dataset": "birds", "metric": "H", "value": 7.0},
    {"source": "Some Table 2", "method": "ESZSL", "dataset": "birds", "metric": "T1", "value": 99.0},
]


class FakeClient:
    """Answers like the service, with T1 from the request; counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.sets: list[dict[str, Any]] = []
        self.refuses = ""
        self.n_images = {"birds": 3}
        self.uploads: list[tuple[str, str]] = []
        self.lacks: tuple[str, ...] = ()

    def list_all(self, kind: str) -> list[dict[str, Any]]:
        return [self.get(f"ds_{name}") for name in self.n_images] if kind == "datasets" else []

    def get(self, resource_id: str) -> dict[str, Any]:
        name = resource_id.removeprefix("ds_")
        return {"id": resource_id, "name": name, "kind": "images", "n_images": self.n_images[name], "summary": {}}

    def create_dataset(self, name: str) -> dict[str, Any]:
        self.n_images[name] = 0
        return {"id": f"ds_{name}"}

    def upload_folder(self, dataset_id: str, folder: Path) -> Any:
        self.uploads.append((dataset_id, folder.name))
        images, report = read_folder(folder)
        self.n_images[dataset_id.removeprefix("ds_")] = len(images)
        return report

    def add_knowledge(self, name: str, *, file: Path, kind: str) -> dict[str, Any]:
        return {"resource": {"id": f"kn_{name}"}, "kind": kind, "file": file}

    def wait(self, job: dict[str, Any]) -> dict[str, Any]:
        return job

    def create_embedding_set(self, dataset_id: str, knowledge_id: str, **request: Any) -> dict[str, Any]:
        self.sets.append({"dataset": dataset_id, "knowledge": knowledge_id, **request})
        return {"resource": {"id": f"es_{len(self.sets)}"}}

    def embedding_set(self, set_id: str) -> dict[str, Any]:
        return {"id": set_id, "summary": {"relation": {"name": "smo", "params": {"alpha": 0}}}}

    def create_classifier(self, dataset_id: str, **request: Any) -> dict[str, Any]:
        if request["method"] == self.refuses:
            raise UnseenError("No such luck.")
        self.asked.append({"dataset": dataset_id, **request})
        return {"resource": {"id": str(0.1 * (1 + request["seed"]))}}

    def classifier(self, classifier_id: str) -> dict[str, Any]:
        t1 = float(classifier_id)
        measured = {"zsl": {"t1": t1}, "gzsl": {"u": t1, "s": t1, "h": t1, "ausuc": t1}}
        best = {"best_on_test": {"t1": {"value": 2 * t1, "epoch": 3}}} if self.asked[-1].get("best_on_test") else {}
        absent: dict[str, Any] = dict.fromkeys(self.lacks)
        return {"metrics": {**measured, **best, "seen_t1": t1, **absent, "validation": {"t1": 0.5}, "best_epoch": 2}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    split = {"seen_classes": ["a", "b"], "unseen_classes": ["c"], "validation_classes": ["b"]}
    for folder, sources in (("birds", ("attributes", "words", "more")), ("water/fish", ("attributes",))):
        (tmp_path / folder / "knowledge").mkdir(parents=True)
        (tmp_path / folder / "splits.json").write_text(json.dumps(split))
        for name in "abc":
            (tmp_path / folder / "images" / name).mkdir(parents=True)
            (tmp_path / folder / "images" / name / "1.jpg").write_bytes(b"")
        for source in sources:
            (tmp_path / folder / "knowledge" / f"{source}.npz").write_bytes(b"")
    return tmp_path


def spec_of(folder: Path, text: str = PLAN) -> BenchSpec:
    path = folder / "plan.yaml"
    path.write_text(text)
    return read_spec(path)


def run(client: Any, spec: BenchSpec, data: Path, results: Results) -> int:
    """The plan, with a client that stands in for the real one."""
    return bench.run(client, spec, data, results)


def test_all_cells_are_measured_once_with_their_settings(data: Path) -> None:
    spec, client, results = spec_of(data), FakeClient(), Results(data / "out")
    assert run(client, spec, data, results) == 0
    assert len(client.asked) == len(list(cells(spec, data))) == 3 * 2 * 2 * 2
    assert len(client.sets) == 3 * 2  # both classifiers share an embedding set
    assert client.sets[0]["params"] == {"seed": 0, "validation_classes": ("b",), "clustering": {"epochs": 3}}
    raw = client.asked[0]
    assert (raw["dataset"], raw["knowledge_id"], raw["validation_classes"]) == (
        "ds_birds",
        "kn_birds/attributes",
        ("b",),
    )
    assert (raw["seen_classes"], raw["unseen_classes"]) == (("a", "b"), ("c",))
    assert client.asked[2]["embedding_set_id"] == "es_1"
    assert {row["dataset"] for row in client.asked} == {"ds_birds", FISH}


def test_a_classifier_may_be_measured_on_some_datasets_and_take_words_for_its_dimensions(data: Path) -> None:
    asked = "{method: sc_egg, datasets: [fish], dimension_words: words.txt}"
    spec, client, results = spec_of(data, PLAN.replace("{method: sje}", asked)), FakeClient(), Results(data / "out")
    run(client, spec, data, results)
    assert len(client.asked) == 2 * 2 + 3 * 2 * 2
    of_fish = [row for row in client.asked if row["method"] == "sc_egg"]
    assert {row["dataset"] for row in of_fish} == {FISH}
    assert {row["dimension_knowledge_id"] for row in of_fish} == {f"kn_{FISH.removeprefix('ds_')}/words.txt"}
    text = write_tables(spec, data, results, PAPER)
    assert "| raw, SJE | – | – | 15.0 ± 5.0 |" in text
    before, after = (
        spec_of(data),
        spec_of(data, PLAN.replace("{method: sje}", "{method: sje, datasets: [birds, fish]}")),
    )
    assert [cell_key(before, cell) for cell in cells(before, data)] == [cell_key(after, c) for c in cells(after, data)]


def test_a_dataset_may_be_measured_with_some_embeddings(data: Path) -> None:
    spec = spec_of(data, PLAN.replace("knowledge: [attributes]}", "knowledge: [attributes], embeddings: [raw]}"))
    plain = spec_of(data)
    assert {cell.embedding for cell in cells(spec, data) if cell.dataset == "fish"} == {"raw"}
    left = [cell for cell in cells(plain, data) if cell.dataset == "birds" or cell.embedding == "raw"]
    assert [cell_key(plain, cell) for cell in left] == [cell_key(spec, cell) for cell in cells(spec, data)]


def test_a_classifier_may_be_searched_for_within_a_budget(data: Path) -> None:
    searching = PLAN.replace("{method: sje}", "{method: sje, search: {trials: 3}}")
    spec, client, results = spec_of(data, searching), FakeClient(), Results(data / "out")
    assert run(client, spec, data, results) == 0
    assert {(row["method"], str(row.get("search"))) for row in client.asked} == {
        ("sje", "{'trials': 3}"),
        ("eszsl", "None"),
    }
    plain = spec_of(data)
    changed = [c for c in cells(plain, data) if cell_key(plain, c) != cell_key(spec, c)]
    assert {c.classifier for c in changed} == {"SJE"}


def test_the_best_epoch_on_test_rows_stands_beside_and_is_called_what_it_is(data: Path) -> None:
    spec, client, results = (
        spec_of(data, PLAN + "metrics: [t1, t1_best_on_test]\n"),
        FakeClient(),
        Results(data / "out"),
    )
    assert run(client, spec, data, results) == 0
    assert {(row["method"], row.get("best_on_test")) for row in client.asked} == {("sje", True), ("eszsl", None)}
    tables = bench.markdown(spec, data, results, [])
    assert "T1 of the epoch best on test rows (not a result), %" in tables
    t1, best = (part for part in tables.split("**") if part.startswith("\n\n|"))
    assert "15.0 ± 5.0" in t1
    assert "30.0 ± 10.0" in best


def test_a_cell_is_measured_anew_when_a_default_changes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(data)
    before = [cell_key(spec, cell) for cell in cells(spec, data)]
    assert before == [cell_key(spec, cell) for cell in cells(spec, data)]
    changed = create_model("Changed", __base__=SJEParams, epochs=(int, 7))
    monkeypatch.setattr(bench_plan, "get_method", lambda name, kind: replace(get_method("sje", kind), params=changed))
    assert not set(before) & {cell_key(spec, cell) for cell in cells(spec, data) if cell.classifier == "SJE"}


def test_a_second_run_measures_only_what_is_missing_or_failed_or_changed(data: Path) -> None:
    spec, client = spec_of(data), FakeClient()
    client.refuses = "eszsl"
    assert run(client, spec, data, Results(data / "out")) == 12
    again = FakeClient()
    assert run(again, spec, data, Results(data / "out")) == 0
    assert {row["method"] for row in again.asked} == {"eszsl"}
    changed = spec_of(data, PLAN.replace("gamma: 1", "gamma: 2"))
    third = FakeClient()
    run(third, changed, data, Results(data / "out"))
    assert [row["params"] for row in third.asked] == [{"gamma": 2}] * 12


def test_tables_show_mean_and_spread_what_failed_and_the_papers_numbers(data: Path) -> None:
    spec, client, results = spec_of(data), FakeClient(), Results(data / "out")
    client.refuses = "eszsl"
    run(client, spec, data, results)
    text = write_tables(spec, data, results, PAPER)
    t1, h = text.split("**H, %**")
    assert "| | birds, attributes | birds, words | fish, attributes |" in t1
    assert "| VGSE, SJE | 15.0 ± 5.0 [61.2] | 15.0 ± 5.0 [61.2] | 15.0 ± 5.0 |" in t1
    assert "| raw, ESZSL | failed | failed | failed |" in t1
    assert "| raw, SJE | 15.0 ± 5.0 [7.0] |" in h
    assert (data / "out" / "table.md").read_text() == text
    with (data / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {row["error"] for row in rows if row["classifier"] == "ESZSL"} == {"No such luck."}
    assert rows[0]["t1"] == "0.1"
    del results.rows[cell_key(spec, next(iter(cells(spec, data))))]
    assert "20.0 (1 of 2 seeds)" in write_tables(spec, data, results, PAPER)


def test_photos_that_an_interrupted_run_left_out_are_sent(data: Path) -> None:
    spec, client = spec_of(data, ONE), FakeClient()
    client.n_images = {"birds": 2}
    assert run(client, spec, data, Results(data / "out")) == 0
    assert client.uploads == [("ds_birds", "birds")]
    run(client, spec, data, Results(data / "another"))
    assert len(client.uploads) == 1


def test_another_folder_is_another_dataset_and_is_measured_anew(data: Path) -> None:
    first, second = ({"path": "birds"}, {"path": "water/fish"})
    client, results = FakeClient(), Results(data / "out")
    for place in (first, second, {**second, "photos": "birds"}, {**second, "photos": "water/fish"}):
        spec = spec_of(data, ONE.replace("birds: ", f"birds: {json.dumps(place)}"))
        assert run(client, spec, data, results) == 0
    assert len(results.rows) == 4
    assert [folder for _, folder in client.uploads] == ["birds", "fish", "birds", "fish"]
    assert len({dataset_id for dataset_id, _ in client.uploads}) == 4
    assert len({row["knowledge_id"] for row in client.asked}) == 2


def test_keys_of_results_from_before_stay_as_they_were(data: Path) -> None:
    spec = spec_of(data, ONE)
    settings = [None, None, None, ["sje", full_params(spec.classifiers["SJE"]), None], False]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    assert [cell_key(spec, cell) for cell in cells(spec, data)] == [f"birds|attributes|raw vectors|SJE|0|{digest}"]


def test_a_cell_without_test_images_of_unseen_classes_failed_and_the_others_go_on(data: Path) -> None:
    class OneSided(FakeClient):
        def create_classifier(self, dataset_id: str, **request: Any) -> dict[str, Any]:
            self.lacks = ("zsl", "gzsl") if dataset_id == "ds_birds" else ("gzsl",)
            return super().create_classifier(dataset_id, **request)

    spec, results = spec_of(data, PLAN.replace("[attributes, words]", "[attributes]")), Results(data / "out")
    assert run(OneSided(), spec, data, results) == 8
    text = write_tables(spec, data, results, [])
    assert "no test images for T1, H" in next(iter(results.rows.values()))["error"]
    t1, h = text.split("**H, %**")
    assert "| failed | 15.0 ± 5.0 |" in t1
    assert "| failed |  |" in h


def test_damaged_or_incomplete_splits_fail_the_cells_of_their_dataset_alone(data: Path) -> None:
    spec = spec_of(data)
    for content, reason in (("{broken", "not valid JSON"), ('{"seen_classes": ["a"]}', "has no unseen_classes")):
        (data / "birds" / "splits.json").write_text(content)
        results = Results(data / reason)
        assert run(FakeClient(), spec, data, results) == 16
        assert sum(reason in row.get("error", "") for row in results.rows.values()) == 16
        assert len(results.rows) == 24


def test_accuracy_among_seen_classes_stands_beside_the_papers(data: Path) -> None:
    plan = ONE + "metrics: [seen_t1]\npaper: {source: Some Table 1}\n"
    spec, client, results = spec_of(data, plan), FakeClient(), Results(data / "out")
    run(client, spec_of(data, ONE), data, results)
    assert run(client, spec, data, results) == 0
    row = {"source": "Some Table 1", "method": "SJE", "dataset": "birds", "metric": "Top-1 (seen test)", "value": 90.9}
    assert "| birds, attributes | 10.0 [90.9] |" in write_tables(spec, data, results, [row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: A small one", ""), "title: Field required"),
        (("seeds: [0, 1]", "seeds: []"), "seeds"),
        (("{method: sje}", "{methode: sje}"), "classifiers/SJE/method"),
        (("datasets:", "datasets: ["), "no readable YAML"),
        (("{method: sje}", "{method: sje, datasets: [whales]}"), "'SJE' names dataset 'whales'"),
        (("  birds:", "  birds: {embeddings: [oracle]}"), "'birds' names embedding 'oracle'"),
        (("seeds:", "metrics: [t1, top1]\nseeds:"), "no metric 'top1'; there are t1, u"),
    ],
)
def test_a_file_that_is_wrong_says_where(data: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UnseenError, match=message):
        spec_of(data, PLAN.replace(*change))


def test_missing_folders_and_knowledge_are_named(data: Path) -> None:
    with pytest.raises(UnseenError, match=r"no folder .*whales"):
        list(cells(spec_of(data, PLAN.replace("  birds:", "  whales:")), data))
    with pytest.raises(UnseenError, match=r"'fish' has no knowledge 'sounds'; there is attributes"):
        list(cells(spec_of(data, PLAN.replace("[attributes]}", "[sounds]}")), data))


def test_features_without_their_archive_say_what_to_fetch(data: Path) -> None:
    (data / "AWA2").mkdir()
    (data / "AWA2" / "att_splits.mat").write_bytes(b"")
    spec = spec_of(data, "title: t\ndatasets: {AWA2: }\nclassifiers: {SJE: {method: sje}}\nseeds: [0]")
    results = Results(data / "out")
    assert [cell.knowledge for cell in cells(spec, data)] == ["att"]
    assert run(FakeClient(), spec, data, results) == 1
    assert "xlsa17.zip" in next(iter(results.rows.values()))["error"]


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_papers_find_their_numbers(path: Path) -> None:
    spec, paper = read_spec(path), json.loads((ROOT / "bench" / "paper" / "tables.json").read_text())
    grid = product(spec.datasets, spec.knowledge or (), spec.embeddings, spec.classifiers)
    found = {
        (cell[0], cell[3], metric): bench.paper_value(spec, bench_plan.Cell(*cell, 0), metric, paper)
        for cell in grid
        for metric in spec.metrics
    }
    for part in range(3):  # a dataset, classifier or metric that never has a number is misspelt
        told = {names[part] for names, value in found.items() if value is not None}
        assert {names[part] for names in found} - told <= {"CMT*"}  # which Table 2 of PSR leaves out


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_this_repository_can_be_read(path: Path) -> None:
    from models.catalog import get_method

    for classifier in read_spec(path).classifiers.values():
        get_method(classifier.method, "classifier").params.model_validate(classifier.params)
