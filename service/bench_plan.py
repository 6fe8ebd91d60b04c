"""What `unseen bench` runs: datasets x knowledge x embeddings x classifiers x seeds of a YAML file, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.catalog import get_method
from models.errors import UnknownName
from service.client import UnseenError
from service.client_http import Json

BEST_ON_TEST = {"t1_best_on_test": "t1", "h_best_on_test": "h"}
"""Metric of a plan -> the measure whose best epoch on test rows it is."""

SEEN_T1 = "seen_t1"
"""Metric of a plan: T1 of seen test rows among seen classes alone."""

METRICS = {
    "t1": "T1",
    "u": "U",
    "s": "S",
    "h": "H",
    "ausuc": "AUSUC",
    SEEN_T1: "Top-1 (seen test)",
    **{n: f"{measure.upper()} of the epoch best on test rows (not a result)" for n, measure in BEST_ON_TEST.items()},
}
"""Metric of a plan -> its heading, which is its name in the papers' tables, too."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSpec(_Part):
    """A folder with images/ and splits.json, with features.npz and splits.json, or with xlsa17's two .mat files."""

    path: str | None = Field(None, description="Folder under the data folder; default: the dataset's name.")
    backbone: Json | None = Field(None, description="Network for photos, as in POST /v1/classifiers.")
    image_size: int | None = Field(None, ge=16, le=1024)
    photos: str | None = Field(
        None, description="Where features are given: folder of the same classes' photos, for embeddings made of these."
    )
    knowledge: tuple[str, ...] | None = Field(None, description="Default: the file's `knowledge`.")
    embeddings: tuple[str, ...] | None = Field(
        None, description="Those measured here: features without photos have none of their own. Default: all."
    )


class ClassifierSpec(_Part):
    """A method of the catalog with its parameters."""

    method: str
    params: Json = {}
    datasets: tuple[str, ...] | None = Field(
        None, description="Where it is measured: methods on feature maps need photos. Default: on all datasets."
    )
    search: Json | None = Field(
        None,
        description="Settings not in `params` that matter are chosen on validation classes, as in POST "
        "/v1/classifiers: {} for its usual budget.",
    )
    dimension_words: str | None = Field(
        None, description="File of word vectors under the data folder: one for each dimension's name (sc_egg)."
    )


class PaperSpec(_Part):
    """Which of the papers' numbers stand beside a cell: `method` may name {classifier}, {embedding}, {knowledge}."""

    source: str
    method: str = "{classifier}"
    methods: dict[str, str] = Field({}, description="The same for single embeddings.")


class BenchSpec(_Part):
    """A whole benchmark. Names of datasets, embeddings and classifiers are the tables' headings."""

    title: str
    datasets: dict[str, DatasetSpec | None]
    knowledge: tuple[str, ...] | None = Field(None, description="Files in knowledge/, or att; default: all there.")
    embeddings: dict[str, Json | None] = Field(
        {"raw vectors": None}, description="Requests as in POST /v1/embedding-sets; none: the knowledge as it is."
    )
    classifiers: dict[str, ClassifierSpec]
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    metrics: tuple[str, ...] = ("t1", "h")
    paper: PaperSpec | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement: names of its parts, and the seed."""

    dataset: str
    knowledge: str
    embedding: str
    classifier: str
    seed: int


def read_spec(path: Path) -> BenchSpec:
    """The benchmark in a YAML file; UnseenError says what is wrong, and where."""
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UnseenError(f"{path} is no readable YAML file: {error}") from error
    try:
        spec = BenchSpec.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'/'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:10])
        raise UnseenError(f"{path} does not describe a benchmark: {problems}") from error
    for title, classifier in spec.classifiers.items():
        if unknown := set(classifier.datasets or ()) - set(spec.datasets):
            raise UnseenError(f"{path}: classifier {title!r} names dataset {min(unknown)!r}, which the file lacks.")
    if strange := set(spec.metrics) - set(METRICS):
        raise UnseenError(f"{path}: there is no metric {min(strange)!r}; there are {', '.join(METRICS)}.")
    for name in spec.datasets:
        if unknown := set(dataset_spec(spec, name).embeddings or ()) - set(spec.embeddings):
            raise UnseenError(f"{path}: dataset {name!r} names embedding {min(unknown)!r}, which the file lacks.")
    return spec


def dataset_spec(spec: BenchSpec, name: str) -> DatasetSpec:
    """What the file says of a dataset, defaults where it says nothing."""
    return spec.datasets[name] or DatasetSpec.model_validate({})


def dataset_folder(spec: BenchSpec, name: str, data: Path) -> Path:
    """The dataset's folder; UnseenError where there is none."""
    return _folder(name, data / (dataset_spec(spec, name).path or name))


def photos_folder(spec: BenchSpec, name: str, data: Path) -> Path | None:
    """The folder of photos of a dataset of features, if it has one."""
    photos = dataset_spec(spec, name).photos
    return None if photos is None else _folder(name, data / photos)


def _folder(name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise UnseenError(f"Dataset {name!r}: there is no folder {folder}. Give the folder of all datasets as --data.")
    return folder


def knowledge_files(spec: BenchSpec, name: str, folder: Path) -> dict[str, Path]:
    """Name -> file of the dataset's knowledge sources: knowledge/*.npz and others; `att` is xlsa17's own table."""
    found = {path.stem: path for path in sorted(folder.glob("knowledge/*")) if path.is_file()}
    if (folder / "att_splits.mat").is_file():
        found["att"] = folder / "att_splits.mat"
    own = dataset_spec(spec, name).knowledge
    asked = own or spec.knowledge
    if asked is None:
        return found
    missing = [source for source in asked if source not in found]
    if missing and own:
        raise UnseenError(f"Dataset {name!r} has no knowledge {missing[0]!r}; there is {', '.join(found) or 'none'}.")
    return {source: found[source] for source in asked if source in found}


def cells(spec: BenchSpec, data: Path) -> Iterator[Cell]:
    """All cells: every one once before any is repeated with another seed."""
    sources = {name: knowledge_files(spec, name, dataset_folder(spec, name, data)) for name in spec.datasets}
    for seed in spec.seeds:
        for name in spec.datasets:
            for source in sources[name]:
                for embedding in dataset_spec(spec, name).embeddings or spec.embeddings:
                    for classifier, asked in spec.classifiers.items():
                        if asked.datasets is None or name in asked.datasets:
                            yield Cell(name, source, embedding, classifier, seed)


def full_params(classifier: ClassifierSpec) -> Json:
    """All parameters of the classifier, defaults too; those of the file where the service will refuse them."""
    try:
        schema = get_method(classifier.method, "classifier").params
        return schema.model_validate(classifier.params).model_dump(mode="json")
    except (UnknownName, ValidationError):
        return classifier.params


def cell_key(spec: BenchSpec, cell: Cell) -> str:
    """Names of the cell, and a digest of all settings behind them: changed settings are measured anew.

    Of folders only their names count; what is in them does not.
    """
    dataset, classifier = dataset_spec(spec, cell.dataset), spec.classifiers[cell.classifier]
    settings = [
        dataset.backbone,
        dataset.image_size,
        spec.embeddings[cell.embedding],
        [classifier.method, full_params(classifier), classifier.dimension_words],
        bool(set(BEST_ON_TEST) & set(spec.metrics)),
        # What came later is left out where a plan does not use it, so that the keys of older results stay as they were.
        *([] if classifier.search is None else [classifier.search]),
        *([] if SEEN_T1 not in spec.metrics else [SEEN_T1]),
        *([] if dataset.path is None else [{"path": dataset.path}]),
        *([] if dataset.photos is None else [{"photos": dataset.photos}]),
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return "|".join([cell.dataset, cell.knowledge, cell.embedding, cell.classifier, str(cell.seed), digest])
