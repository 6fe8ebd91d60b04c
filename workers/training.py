"""The task that trains a zero-shot classifier and measures it on test rows that training never sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors
from sqlalchemy.orm import Session

from models.base import FloatArray, LabelledFeatures, OnProgress
from models.catalog import get_method
from models.data.splits import fold_count
from models.evaluation import ClassTable, Report, evaluate, near_chance
from models.knowledge.tables import attribute_groups
from models.params import Params, SearchParams
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.checkpoints import CheckpointParts, Checkpoints, digest
from models.zero_shot.epochs import EpochModel
from models.zero_shot.search import SearchResult, search_params
from service.core import repositories
from service.core.tables import Classifier
from workers.checkpoints import JobCheckpoints
from workers.dimensions import read_dimensions
from workers.embedding import MAX_REPORTED
from workers.imports import put_directory
from workers.runner import Publisher, TaskContext
from workers.runtime import choose_device, seed_everything
from workers.training_inputs import (
    ImageTables,
    Inputs,
    class_embeddings,
    embeddings_as_unseen,
    image_tables,
    read_inputs,
)

CLASSES_FILE = "classes.safetensors"
DIMENSIONS_FILE = "dimensions.json"
TRAINING_SHARE = 0.3  # of the expected time, see `phases`


@dataclass(frozen=True)
class Lesson:
    """What a classifier learns from; `chosen_on`: what `fit` and `assess` are told for choosing settings."""

    row: Classifier
    device: str
    features: LabelledFeatures
    embeddings: FloatArray
    chosen_on: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return int(self.row.request["seed"])

    def model(self, params: Params) -> ZeroShotModel:
        """A classifier of the method asked for, not yet fitted."""
        return create_classifier(self.row.method, params, seed=self.seed, device=self.device)

    def assess(self, params: Params, on_progress: OnProgress) -> dict[str, Any]:
        """What such a classifier reaches on validation classes."""
        return self.model(params).assess(self.features, self.embeddings, **self.chosen_on, on_progress=on_progress)

    def learned(self, params: Params, on_progress: OnProgress, checkpoints: Checkpoints) -> ZeroShotModel:
        """Such a classifier, fitted."""
        return self.model(params).fit(
            self.features, self.embeddings, **self.chosen_on, on_progress=on_progress, checkpoints=checkpoints
        )


def train_classifier(context: TaskContext) -> Publisher:
    """Fits the method on the seen classes' training rows; evaluates T1, U, S, H; publishes model and metrics."""
    inputs = read_inputs(context)
    request = inputs.row.request
    seed_everything(request["seed"])
    device = choose_device(context.settings.device)
    context.progress.set_phases(phases(inputs))
    embeddings, warnings = class_embeddings(context, inputs)
    tables = image_tables(context, inputs, device)
    dimensions = read_dimensions(context, inputs, embeddings.shape[1])
    chosen_on: dict[str, Any] = {
        "validation_classes": inputs.validation,
        "validation_embeddings": embeddings_as_unseen(context, inputs),
    }
    if dimensions.vectors is not None:
        chosen_on["dimension_vectors"] = dimensions.vectors
    lesson = Lesson(inputs.row, device, tables.train, embeddings[: len(inputs.seen)], chosen_on)
    given = get_method(inputs.row.method, "classifier").params.model_validate(inputs.row.params)
    params = _with_groups(given, dimensions.names)
    checkpoints = CheckpointParts(JobCheckpoints(context))
    metrics: dict[str, Any] = {}
    if request.get("search"):
        found = _search(lesson, params, context.progress, checkpoints.part("search"))
        params, metrics["search"] = found.params, {"trials": found.trials, "reason": found.reason}
    model = lesson.learned(params, context.progress, checkpoints.part("fit"))
    metrics |= _metrics(model, inputs, tables, [*warnings, *tables.warnings, *dimensions.warnings])
    if request["evaluate"]:
        metrics |= _evaluation(model, inputs, tables, embeddings).to_dict()
    if request.get("best_on_test") and isinstance(model, EpochModel):
        metrics["best_on_test"] = _best_on_test(model, inputs, tables, embeddings, context.progress)
    files = tables.files | _files(context, model, embeddings, dimensions.names)
    return _publisher(inputs, files, metrics, model.params)


def phases(inputs: Inputs) -> list[tuple[str, float]]:
    """Expected shares of the time; each group of validation classes costs a training, and a part of one after."""
    request, n_first = inputs.row.request, len(inputs.validation)
    n_folds = fold_count(int(inputs.row.params.get("folds", 1)), len(inputs.seen), n_first) if n_first else 0
    shares = {
        "backbone": 0.05 if inputs.dataset.kind == "images" else 0.0,
        "image_features": 0.6 if inputs.dataset.kind == "images" else 0.0,
        "search": 2.0 if request.get("search") else 0.0,
        "choosing": TRAINING_SHARE * n_folds,
        "calibrating": TRAINING_SHARE * n_folds / 2,
        "training": TRAINING_SHARE,
        "evaluation": 0.05,
        "watching": TRAINING_SHARE if request.get("best_on_test") else 0.0,  # older rows lack it
    }
    return [(name, share) for name, share in shares.items() if share]


def _search(lesson: Lesson, params: Params, on_progress: OnProgress, checkpoints: Checkpoints) -> SearchResult:
    request = lesson.row.request
    return search_params(
        params,
        set(request["search_fixed"]),
        lesson.assess,
        SearchParams.model_validate(request["search"]),
        seed=lesson.seed,
        on_progress=on_progress,
        checkpoints=checkpoints,
        inputs=digest("", lesson.features.features, lesson.features.labels, lesson.embeddings),
    )


def _metrics(model: ZeroShotModel, inputs: Inputs, tables: ImageTables, warnings: list[str]) -> dict[str, Any]:
    """How the classifier came about."""
    warnings += [told] if (told := model.validation_.get("out_of_memory")) else []
    warnings += _unmeasured(inputs, tables)
    if (t1 := model.validation_.get("t1")) is not None:
        sizes = [len(held) for held in model.validation_["folds"] if len(held) > 1]
        warnings += near_chance(t1, float(np.mean([1 / size for size in sizes])))
    return {
        "validation": model.validation_,
        "history": model.history_,
        "best_epoch": model.best_epoch_,
        "gamma": model.gamma_,
        "n_train": len(tables.train.labels),
        "n_test_seen": len(tables.test_seen.labels),
        "n_test_unseen": len(tables.test_unseen.labels),
        "n_skipped_images": tables.n_skipped,
        "backbone": tables.backbone,
        "image_size": inputs.image_size,
        "warnings": warnings[:MAX_REPORTED],
    }


def _unmeasured(inputs: Inputs, tables: ImageTables) -> list[str]:
    """What an evaluation was asked for and has no images for."""
    if not inputs.row.request["evaluate"] or not inputs.unseen:
        return []
    if not len(tables.test_unseen.labels):
        return ["No test images of unseen classes: T1, U and H cannot be measured. Add some with split=test."]
    if not len(tables.test_seen.labels):
        return ["No test images of seen classes: U, S and H cannot be measured. Add some with split=test."]
    return []


def _evaluation(model: ZeroShotModel, inputs: Inputs, tables: ImageTables, embeddings: FloatArray) -> Report:
    """What it reaches on test rows."""
    is_seen = np.arange(len(inputs.classes)) < len(inputs.seen)
    return evaluate(
        model,
        ClassTable(inputs.classes, embeddings, is_seen),
        test_unseen=tables.test_unseen,
        test_seen=tables.test_seen,
        gamma=model.gamma_,
        temperature=model.temperature_,
    )


def _best_on_test(
    model: EpochModel, inputs: Inputs, tables: ImageTables, embeddings: FloatArray, on_progress: OnProgress
) -> dict[str, Any]:
    """The best of all epochs on test rows: what several papers' code reports. Nothing is chosen by it."""

    def look(at: ZeroShotModel) -> dict[str, float]:
        report = _evaluation(at, inputs, tables, embeddings)
        zsl, gzsl = report.zsl, report.gzsl
        return ({"t1": zsl.t1} if zsl else {}) | ({"h": gzsl.h} if gzsl else {})

    learned_from = (tables.train, embeddings[: len(inputs.seen)])
    curve = model.watch_epochs(*learned_from, look, on_progress=on_progress)
    best = {name: max(curve, key=lambda entry: entry[name]) for name in ("t1", "h") if name in curve[0]}
    return {
        "note": "The best epoch on test images, each measure its own: an upper bound, not a result.",
        **{name: {"value": entry[name], "epoch": int(entry["epoch"])} for name, entry in best.items()},
        "curve": curve,
    }


def _files(
    context: TaskContext, model: ZeroShotModel, embeddings: FloatArray, dimensions: Sequence[str] | None
) -> dict[str, str]:
    """Artifacts: the saved model, all classes' embeddings, and what their dimensions are called."""
    directory = context.scratch_dir / "model"
    model.save(directory)
    files = put_directory(context, directory)
    files[CLASSES_FILE] = context.store.put_bytes(save_safetensors({"embeddings": embeddings}))
    if dimensions is not None:
        files[DIMENSIONS_FILE] = context.store.put_bytes(json.dumps(dimensions).encode())
    return files


def _publisher(inputs: Inputs, files: dict[str, str], metrics: dict[str, Any], params: Params) -> Publisher:
    def publish(session: Session) -> dict[str, Any]:
        row = repositories.get(session, Classifier, inputs.row.id)
        row.status, row.artifacts, row.metrics = "ready", files, metrics
        row.params = params.model_dump(mode="json")
        href = f"/v1/classifiers/{row.id}"
        shown = {name: {k: part[k] for k in keys} for name, keys in _HEADLINES if (part := metrics.get(name))}
        return {"kind": "classifier", "id": row.id, "href": href, **shown}

    return publish


_HEADLINES = (("zsl", ("t1",)), ("gzsl", ("u", "s", "h")))


def _with_groups(params: Params, names: Sequence[str] | None) -> Params:
    """Groups of attributes as the dimensions' names tell them, where the method takes groups and none are given."""
    if getattr(params, "attribute_groups", ()) is not None or names is None:
        return params
    return params.model_copy(update={"attribute_groups": attribute_groups(names)})
