"""What training a classifier reads: the rows its request names, class embeddings, and features of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from models.backbone_parts import Trunk, TrunkFeatures
from models.base import FloatArray, LabelledFeatures
from models.data.splits import validation_classes
from models.embedding.class_embedder import ClassEmbedder
from models.errors import InvalidInput
from models.knowledge.base import require
from models.params import BackboneParams, EmbeddingSetParams, ScratchParams
from models.training_memory import refusal, training_bytes
from models.zero_shot.checks import EmbeddingsOf
from service.core import repositories
from service.core.classifier_inputs import earlier_validation, image_size
from service.core.process import memory_bytes
from service.core.tables import Classifier, Dataset, EmbeddingSet, Knowledge
from workers.backbones import BACKBONE_FILE, prepared_backbone
from workers.embedding import class_numbers, whole_image
from workers.features import image_features
from workers.imports import read_feature_files
from workers.rows import SPLITS_FILE, SplitRows, learned_contents, split_rows
from workers.runner import TaskContext
from workers.sources import describe_backbone, feature_network, open_backbone, open_knowledge, unpack

EMBEDDER_FILES = ("class_embedder.json", "class_embedder.safetensors")


@dataclass(frozen=True)
class Inputs:
    """What the request names, read from the database once."""

    row: Classifier
    dataset: Dataset
    embedding_set: EmbeddingSet | None
    knowledge: Knowledge
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    validation: tuple[str, ...]
    stored_vectors: dict[str, bytes]

    @property
    def classes(self) -> tuple[str, ...]:
        """Seen ones first, then unseen."""
        return (*self.seen, *self.unseen)

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return image_size(self.row.request["image_size"], self.embedding_set)


@dataclass(frozen=True)
class ImageTables:
    """Image features of the three kinds of rows, labels into all classes, what made them, warnings about them."""

    train: LabelledFeatures
    test_seen: LabelledFeatures
    test_unseen: LabelledFeatures
    backbone: dict[str, Any] | None
    files: dict[str, str]
    n_skipped: int
    warnings: list[str] = field(default_factory=list)


def read_inputs(context: TaskContext) -> Inputs:
    """The rows of the job's classifier and of what it names."""
    with context.database.read() as session:
        row = repositories.get(session, Classifier, context.job.resource_id)
        embedding_set, vectors = None, {}
        knowledge_id = row.knowledge_id
        if row.embedding_set_id is not None:
            embedding_set = repositories.get(session, EmbeddingSet, row.embedding_set_id)
            knowledge_id = embedding_set.knowledge_id
            wanted = [*row.request["seen_classes"], *row.request["unseen_classes"]]
            stored = repositories.classes_of(session, embedding_set.id, names=wanted)
            vectors = {c.name: c.vector for c in stored}
        dataset, seen = repositories.get(session, Dataset, row.dataset_id), tuple(row.request["seen_classes"])
        asked, earlier = row.request["validation_classes"], earlier_validation(dataset, embedding_set)
        return Inputs(
            row=row,
            dataset=dataset,
            embedding_set=embedding_set,
            knowledge=repositories.get(session, Knowledge, knowledge_id or ""),
            seen=seen,
            unseen=tuple(row.request["unseen_classes"]),
            validation=validation_classes(seen, asked, earlier, seed=row.request["seed"]),
            stored_vectors=vectors,
        )


def class_embeddings(context: TaskContext, inputs: Inputs) -> tuple[FloatArray, list[str]]:
    """(seen + unseen, E): the embedding set's vectors, or the knowledge vectors as they are; warnings about them."""
    names = inputs.classes
    if inputs.embedding_set is not None:
        missing = [name for name in names if name not in inputs.stored_vectors]
        if missing:
            raise InvalidInput(f"The embedding set has no class {missing[0]!r}.", field="unseen_classes")
        return np.stack([np.frombuffer(inputs.stored_vectors[name], dtype="<f4") for name in names]), []
    lookup = open_knowledge(inputs.knowledge, context.store, context.settings).lookup(names)
    return require(lookup, field="unseen_classes"), lookup.warnings


def embeddings_as_unseen(context: TaskContext, inputs: Inputs) -> EmbeddingsOf | None:
    """What seen classes' embeddings would be without their images, each group composed of the other seen classes.

    None where embeddings do not come from images, or too few classes would be left to compose of.
    """
    if inputs.embedding_set is None:
        return None
    directory = unpack(context.store, inputs.embedding_set.artifacts, EMBEDDER_FILES, context.scratch_dir / "embedder")
    embedder = ClassEmbedder.load(directory)
    if not set(inputs.seen) <= set(embedder.class_names) or len(inputs.seen) < 4:
        return None  # classes that were unseen when the set was built, and have images now

    def without_images(names: Sequence[str]) -> FloatArray:
        held = np.isin(embedder.class_names, list(names))
        others = ClassEmbedder(
            tuple(name for name, is_held in zip(embedder.class_names, held, strict=True) if not is_held),
            embedder.seen_embeddings[~held],
            embedder.knowledge_seen[~held],
            embedder.relation,
            embedder.params,
        )
        position = {name: i for i, name in enumerate(embedder.class_names)}
        return others.embed(embedder.knowledge_seen[[position[name] for name in names]])[0]

    return without_images


def image_tables(context: TaskContext, inputs: Inputs, device: str) -> ImageTables:
    """Features of training and test images: as uploaded, or as the network makes them, kept for the next job."""
    names = inputs.classes
    if inputs.dataset.kind == "features":
        return _stored_features(context, inputs, names)
    with context.database.read() as session:
        rows = split_rows(session, inputs.dataset, inputs.seen, inputs.unseen)
    rows, warnings = _untouched(context, inputs.embedding_set, rows)
    params, scratch, seed = _backbone_params(inputs)
    train_labels = class_numbers(rows.train, inputs.seen)
    sha256s = [row.sha256 for row in rows.train]
    if (
        inputs.embedding_set is not None
        and BACKBONE_FILE in inputs.embedding_set.artifacts
        and inputs.row.request["backbone"] is None
    ):
        backbone, files = _trained_backbone(context, inputs.embedding_set, params, device)
    else:
        backbone, files = prepared_backbone(context, params, scratch, sha256s, train_labels, seed=seed, device=device)
    everything = [*rows.train, *rows.test_seen, *rows.test_unseen] if inputs.row.request["evaluate"] else [*rows.train]
    contents = [row.sha256 for row in everything]
    size = inputs.image_size
    network = feature_network(backbone, inputs.row.method, size, inputs.row.params)
    _require_memory(context, inputs, len(rows.train), len(everything) - len(rows.train), network.feature_dim)
    table = image_features(context, contents, network, whole_image(size), phase="image_features")
    channels = getattr(network, "channels", None)
    kind: Callable[..., LabelledFeatures] = LabelledFeatures
    if isinstance(network, Trunk):
        kind = partial(TrunkFeatures, tail=network.tail())
    bounds = np.cumsum([len(rows.train), len(rows.test_seen), len(rows.test_unseen)])
    group = np.searchsorted(bounds, table.image_index, side="right")
    labels = class_numbers([everything[i] for i in table.image_index], names)

    def part(k: int, classes: tuple[str, ...]) -> LabelledFeatures:
        features = np.asarray(table.features[group == k], dtype=np.float32)
        return kind(features, labels[group == k], classes, channels)

    train, test_seen, test_unseen = part(0, inputs.seen), part(1, names), part(2, names)
    about = describe_backbone(params, backbone)
    return ImageTables(train, test_seen, test_unseen, about, files, len(table.failures), warnings)


def _untouched(
    context: TaskContext, embedding_set: EmbeddingSet | None, rows: SplitRows
) -> tuple[SplitRows, list[str]]:
    """No test rows that the embedding set learned from; a warning where there were some.

    A class's first few images are all train rows, and images of more are divided: those that the set was built on
    would be test rows now.
    """
    if embedding_set is None or SPLITS_FILE not in embedding_set.artifacts:
        return rows, []
    kept = rows.not_tested_on(learned_contents(context.store.read_bytes(embedding_set.artifacts[SPLITS_FILE])))
    n_left_out = len(rows.test_seen) + len(rows.test_unseen) - len(kept.test_seen) - len(kept.test_unseen)
    if not n_left_out:
        return rows, []
    return kept, [f"{n_left_out} test images are left out: the embedding set learned from them."]


def _require_memory(context: TaskContext, inputs: Inputs, n_train: int, n_test: int, numbers: int) -> None:
    """InvalidInput where training would hold more than this machine has, before features are computed."""
    n_seen, n_validation = len(inputs.seen), len(inputs.validation)
    needed = training_bytes(inputs.row.params, n_train, n_test, numbers, n_seen=n_seen, n_validation=n_validation)
    have = context.settings.worker_memory_bytes or memory_bytes()
    if have is not None and needed > have:
        raise InvalidInput(refusal(n_train + n_test, numbers, needed, have), field="method")


def _trained_backbone(
    context: TaskContext, embedding_set: EmbeddingSet, params: BackboneParams, device: str
) -> tuple[Any, dict[str, str]]:
    directory = unpack(context.store, embedding_set.artifacts, (BACKBONE_FILE,), context.scratch_dir / "backbone")
    backbone = open_backbone(params, context.settings, device=device, weights=directory / BACKBONE_FILE)
    return backbone, {BACKBONE_FILE: embedding_set.artifacts[BACKBONE_FILE]}


def _backbone_params(inputs: Inputs) -> tuple[BackboneParams, ScratchParams, int]:
    """The request's own network, or the embedding set's."""
    asked = inputs.row.request["backbone"]
    used = EmbeddingSetParams.model_validate(inputs.embedding_set.params) if inputs.embedding_set else None
    if asked is not None or used is None:
        scratch = ScratchParams.model_validate(inputs.row.request.get("scratch") or {})  # older rows lack it
        return BackboneParams.model_validate(asked or {}), scratch, inputs.row.request["seed"]
    return used.backbone, used.scratch, used.seed


def _stored_features(context: TaskContext, inputs: Inputs, names: tuple[str, ...]) -> ImageTables:
    dataset = read_feature_files(context, inputs.dataset.artifacts)
    number = {name: i for i, name in enumerate(names)}
    of_label = np.array([number.get(name, -1) for name in dataset.class_names])

    def part(rows: np.ndarray[Any, Any], keep: range, classes: tuple[str, ...]) -> LabelledFeatures:
        labels = of_label[dataset.labels[rows]]
        chosen = (labels >= keep.start) & (labels < keep.stop)
        return LabelledFeatures(dataset.features[rows[chosen]], labels[chosen], classes)

    n_seen = len(inputs.seen)
    return ImageTables(
        part(dataset.train_rows, range(n_seen), inputs.seen),
        part(dataset.test_seen_rows, range(n_seen), names),
        part(dataset.test_unseen_rows, range(n_seen, len(names)), names),
        None,
        {},
        0,
    )
