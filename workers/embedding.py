"""The task that builds an embedding set: patches, features, clusters, seen-class embeddings, relations, unseen ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy.orm import Session

from models.base import FloatArray, LabelledFeatures, PatchTable
from models.embedding.class_embedder import ClassEmbedder
from models.embedding.pipeline import (
    EmbeddingResult,
    fit_patch_embedding,
    load_patch_embedding,
    method_params,
    relate_classes,
    validation_classes,
)
from models.errors import TooFewSamples
from models.evaluation import near_chance
from models.knowledge.base import Resolution, require
from models.params import FINETUNED_COST, BackboneParams, EmbeddingSetParams, PatchParams
from service.core import caches, repositories
from service.core.tables import Dataset, EmbeddingClass, EmbeddingSet, Knowledge
from workers.backbones import BACKBONE_FILE, prepared_backbone
from workers.features import FeatureTable, feature_spec, image_features
from workers.finetuning import trainable_backbone
from workers.imports import put_directory, read_feature_files
from workers.rows import SPLITS_FILE, ImageRow, SplitRows, split_rows, splits_npz
from workers.runner import Publisher, TaskContext
from workers.runtime import choose_device, seed_everything
from workers.sources import describe_backbone, open_backbone, open_knowledge, unpack

if TYPE_CHECKING:
    from models.backbones import Backbone

MAX_REPORTED = 1000
FITTED = "fitted"  # folder of the fitted method in a job's scratch directory
N_CONTRIBUTIONS = 5
FIT_FORMAT = 1  # grows when the same inputs would give another fit
PHASES = [
    ("backbone", 0.02),  # see `phases`
    ("features", 0.62),
    ("image_features", 0.08),
    ("neighbours", 0.04),
    ("clustering", 0.15),
    ("finetuned_features", 0.08),
    ("embeddings", 0.01),
    ("relations", 0.08),
]


@dataclass(frozen=True)
class Inputs:
    """What the request names, read from the database once."""

    row: EmbeddingSet
    dataset: Dataset
    knowledge: Knowledge
    params: EmbeddingSetParams
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    rows: SplitRows


@dataclass(frozen=True)
class Tables:
    """The features that embeddings are learned from, and what is told of how they came about."""

    patches: PatchTable
    images: LabelledFeatures
    report: dict[str, Any]
    files: dict[str, str]
    content: str  # digest of the features' origin: images, network, way of cutting


def build_embedding_set(context: TaskContext) -> Publisher:
    """VGSE (or a baseline) end to end; publishes a vector for every class, the models and a report."""
    inputs = _read_inputs(context)
    seed_everything(inputs.params.seed)
    device = choose_device(context.settings.device)
    context.progress.set_phases(phases(inputs.row.method, inputs.params))
    source = open_knowledge(inputs.knowledge, context.store, context.settings)
    lookup = source.lookup([*inputs.seen, *inputs.unseen])
    vectors = require(lookup, field="unseen_classes")
    knowledge_seen, knowledge_unseen = vectors[: len(inputs.seen)], vectors[len(inputs.seen) :]
    if inputs.dataset.kind == "features":
        tables, backbone = _feature_tables(context, inputs), None
    else:
        tables, backbone = _image_tables(context, inputs, device)
    fitted = _fitted(context, inputs, tables, knowledge_seen, backbone, device)
    if backbone is not None:
        tables = _seen_by_the_trained(context, inputs, tables, device)
    result = relate_classes(
        fitted,
        tables.images,
        knowledge_seen,
        relation=inputs.row.relation,
        params=inputs.params,
        on_progress=context.progress,
    )
    directory = context.scratch_dir / "model"
    result.save(directory)
    files = tables.files | put_directory(context, directory)  # a fine-tuned network replaces the one it began as
    files[SPLITS_FILE] = context.store.put_bytes(splits_npz(inputs.rows, [*inputs.seen, *inputs.unseen]))
    classes = class_rows(inputs.row.id, result.embedder, lookup.resolutions[len(inputs.seen) :], knowledge_unseen)
    choice = result.choice
    doubts = near_chance(choice.t1, choice.chance) if choice is not None and choice.t1 is not None else []
    return _publisher(inputs, tables, result, files, classes, [*lookup.warnings, *doubts])


def _fitted(
    context: TaskContext, inputs: Inputs, tables: Tables, knowledge: FloatArray, backbone: Any, device: str
) -> Any:
    """The fitted embedding method; the same one again where only the relation or the unseen classes differ."""
    method, params = inputs.row.method, inputs.params
    key = _fit_key(inputs, tables, knowledge)
    with context.database.read() as session:
        cached = caches.artifact(session, key)
    directory = context.scratch_dir / FITTED
    files = cached.summary["files"] if cached is not None else {}
    if files and all(map(context.store.exists, files.values())):
        return load_patch_embedding(method, unpack(context.store, files, tuple(files), directory))
    fitted = fit_patch_embedding(
        tables.patches,
        tables.images,
        knowledge,
        method=method,
        params=params,
        backbone=backbone,
        device=device,
        on_progress=context.progress,
    )
    fitted.save(directory)
    files = put_directory(context, directory)
    with context.database.write() as session:
        caches.put_artifact(session, key, next(iter(files.values())), {"files": files})
    return fitted


def _fit_key(inputs: Inputs, tables: Tables, knowledge: FloatArray) -> str:
    """Digest of all that determines the fitted method."""
    params = inputs.params
    asked = [
        FIT_FORMAT,
        inputs.row.method,
        method_params(inputs.row.method, params).model_dump(mode="json"),
        params.seed,
        list(validation_classes(inputs.seen, params)),
        tables.content,
        list(inputs.seen),
    ]
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(np.ascontiguousarray(tables.images.labels).tobytes())
    if inputs.row.method == "vgse":
        digest.update(np.ascontiguousarray(knowledge).tobytes())
    return f"fitted-{digest.hexdigest()}"


def _seen_by_the_trained(context: TaskContext, inputs: Inputs, tables: Tables, device: str) -> Tables:
    """The tables with image features of the fine-tuned network, which classifiers of the set recognise images by."""
    params = inputs.params
    backbone = open_backbone(
        params.backbone, context.settings, device=device, weights=context.scratch_dir / FITTED / BACKBONE_FILE
    )
    cut = whole_image(params.patches.size)
    sha256s = [row.sha256 for row in inputs.rows.train]
    whole = image_features(context, sha256s, backbone, cut, phase="finetuned_features")
    images = LabelledFeatures(np.asarray(whole.features), tables.images.labels, tables.images.class_names)
    report = {**tables.report, "backbone": describe_backbone(params.backbone, backbone)}
    return replace(tables, images=images, report=report)


def phases(method: str, params: EmbeddingSetParams) -> list[tuple[str, float]]:
    """Expected shares of the time; training a network takes longer than everything that is done with it."""
    shares = dict(PHASES)
    if params.backbone.weights == "scratch":
        shares["backbone"] = 1.5
    if method != "vgse" or params.clustering.mode != "finetune":
        return [(name, share) for name, share in shares.items() if name != "finetuned_features"]
    # a step reads a patch and its neighbour, forwards and back; both runs, of which one may stop early
    shares["clustering"] = FINETUNED_COST * 1.5 * params.clustering.epochs * shares["features"]
    return list(shares.items())


def _publisher(
    inputs: Inputs,
    tables: Tables,
    result: EmbeddingResult,
    files: dict[str, str],
    classes: list[EmbeddingClass],
    warnings: list[str],
) -> Publisher:
    summary = {
        **tables.report,
        **result.report(),
        "n_images": len(tables.images.labels),
        "n_patches": len(tables.patches.image_index),
        "warnings": warnings[:MAX_REPORTED],
    }

    def publish(session: Session) -> dict[str, Any]:
        row = repositories.get(session, EmbeddingSet, inputs.row.id)
        row.status, row.dim, row.artifacts, row.summary = "ready", result.embedder.embedding_dim, files, summary
        session.add_all(classes)
        return {
            "kind": "embedding_set",
            "id": row.id,
            "href": f"/v1/embedding-sets/{row.id}",
            "dim": row.dim,
            "n_seen": len(inputs.seen),
            "n_unseen": len(inputs.unseen),
            "relation": summary["relation"]["name"],
            "n_skipped_images": summary["n_skipped_images"],
            "n_warnings": len(warnings),
        }

    return publish


def _read_inputs(context: TaskContext) -> Inputs:
    with context.database.read() as session:
        row = repositories.get(session, EmbeddingSet, context.job.resource_id)
        dataset = repositories.get(session, Dataset, row.dataset_id)
        knowledge = repositories.get(session, Knowledge, row.knowledge_id)
        seen, unseen = tuple(row.request["seen_classes"]), tuple(row.request["unseen_classes"])
        rows = SplitRows((), (), ()) if dataset.kind == "features" else split_rows(session, dataset, seen, unseen)
    return Inputs(row, dataset, knowledge, EmbeddingSetParams.model_validate(row.params), seen, unseen, rows)


def _image_tables(context: TaskContext, inputs: Inputs, device: str) -> tuple[Tables, Any]:
    params = inputs.params
    train = inputs.rows.train
    labels = class_numbers(train, inputs.seen)
    backbone, files = prepared_backbone(
        context,
        params.backbone,
        params.scratch,
        [row.sha256 for row in train],
        labels,
        seed=params.seed,
        device=device,
    )
    sha256s = [row.sha256 for row in train]
    patch_table = image_features(context, sha256s, backbone, params.patches, phase="features")
    whole = image_features(context, sha256s, backbone, whole_image(params.patches.size), phase="image_features")
    usable = np.zeros(len(train), dtype=bool)
    usable[whole.image_index] = True
    patches, images = _tables(inputs.seen, labels, patch_table, whole, usable)
    _require_images(inputs.seen, images, patch_table.failures)
    trainable = None
    if inputs.row.method == "vgse" and params.clustering.mode == "finetune":
        cuts = (patch_table, params.patches), (whole, whole_image(params.patches.size))
        trainable = trainable_backbone(context, backbone, sha256s, *cuts)
    report = _report(train, params.backbone, backbone, patch_table, whole)
    content = hashlib.sha256("".join([feature_spec(backbone, params.patches), *sha256s]).encode()).hexdigest()
    return Tables(patches, images, report, files, content), trainable


def _tables(
    seen: tuple[str, ...], labels: np.ndarray[Any, Any], patches: FeatureTable, whole: FeatureTable, usable: Any
) -> tuple[PatchTable, LabelledFeatures]:
    """Both tables over the images that could be read, numbered from 0 without gaps."""
    position = np.cumsum(usable) - 1
    images = LabelledFeatures(np.asarray(whole.features), labels[usable], seen)
    table = PatchTable(patches.features, position[patches.image_index].astype(np.int32), labels[usable], seen)
    return table, images


def _require_images(seen: tuple[str, ...], images: LabelledFeatures, failures: dict[str, str]) -> None:
    counts = np.bincount(images.labels, minlength=len(seen))
    empty = [name for name, n in zip(seen, counts, strict=True) if n == 0]
    if empty:
        raise TooFewSamples(
            f"No training image of {', '.join(map(repr, empty[:5]))} could be used ({len(failures)} unreadable). "
            "Upload more images of these classes, or leave them out of seen_classes.",
            field="seen_classes",
        )


def _report(
    train: Sequence[ImageRow], params: BackboneParams, backbone: Backbone, patches: FeatureTable, whole: FeatureTable
) -> dict[str, Any]:
    failures = {**patches.failures, **whole.failures}
    names = {row.sha256: f"{row.class_name}/{row.filename}" for row in train}
    seconds, computed = patches.seconds + whole.seconds, patches.n_computed + whole.n_computed
    return {
        "backbone": describe_backbone(params, backbone),
        "n_skipped_images": len(failures),
        "skipped_images": [
            {"filename": names[sha256], "reason": reason} for sha256, reason in list(failures.items())[:MAX_REPORTED]
        ],
        "n_patches_computed": computed,
        "patches_per_s": round(computed / seconds, 2) if computed and seconds > 0 else None,
    }


def _feature_tables(context: TaskContext, inputs: Inputs) -> Tables:
    """A features-only dataset: each row is its image's one patch."""
    dataset = read_feature_files(context, inputs.dataset.artifacts)
    names = dataset.class_names
    number = {name: i for i, name in enumerate(inputs.seen)}
    of_label = np.array([number.get(name, -1) for name in names])
    rows = dataset.train_rows[of_label[dataset.labels[dataset.train_rows]] >= 0]
    labels = of_label[dataset.labels[rows]]
    features = dataset.features[rows]
    patches = PatchTable(features, np.arange(len(rows), dtype=np.int32), labels, inputs.seen)
    report: dict[str, Any] = {
        "backbone": None,
        "n_skipped_images": 0,
        "skipped_images": [],
        "n_patches_computed": 0,
        "patches_per_s": None,
    }
    content = json.dumps(inputs.dataset.artifacts, sort_keys=True)
    return Tables(patches, LabelledFeatures(features, labels, inputs.seen), report, {}, content)


def class_rows(
    set_id: str, embedder: ClassEmbedder, unseen: Sequence[Resolution], knowledge_unseen: FloatArray
) -> list[EmbeddingClass]:
    """A database row for every class: seen ones first, then unseen ones with the seen classes that make them up."""
    rows = [
        EmbeddingClass(
            embedding_set_id=set_id,
            name=name,
            position=i,
            is_seen=True,
            vector=vector_bytes(vector),
            provenance={"source": "images"},
        )
        for i, (name, vector) in enumerate(zip(embedder.class_names, embedder.seen_vectors(), strict=True))
    ]
    if len(unseen):
        vectors, relations = embedder.embed(knowledge_unseen)
        for resolution, vector, relation in zip(unseen, vectors, relations, strict=True):
            rows.append(
                EmbeddingClass(
                    embedding_set_id=set_id,
                    name=resolution.name,
                    position=len(rows),
                    is_seen=False,
                    vector=vector_bytes(vector),
                    provenance=provenance(embedder, relation, resolution),
                )
            )
    return rows


def provenance(embedder: ClassEmbedder, relation: FloatArray, resolution: Resolution) -> dict[str, Any]:
    """How an unseen class's vector came about: what the knowledge source knew of its name, the relation, and the seen
    classes with the largest coefficients."""
    return {
        "source": "relation",
        "knowledge": resolution.how,
        "relation": embedder.relation,
        "form": embedder.params.form,
        "contributions": [
            {"class_name": name, "coefficient": round(float(c), 6)}
            for name, c in embedder.contributions(relation, N_CONTRIBUTIONS)
        ],
    }


def whole_image(size: int) -> PatchParams:
    """The patching that takes the whole image, for image-level features."""
    return PatchParams(method="whole", n_patches=1, size=size)


def class_numbers(rows: Sequence[ImageRow], class_names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each row's index into `class_names`."""
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number[row.class_name] for row in rows], dtype=np.int64)


def vector_bytes(vector: FloatArray) -> bytes:
    """A vector as the database keeps it: little-endian float32."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()
