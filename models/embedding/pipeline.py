"""From patch features of seen classes to an embedder of any class: the steps of VGSE in their order.

1. learn an embedding of patches and average it per seen class (`clustering`, `baselines`),
2. choose how unseen classes are composed of seen ones, on validation classes only (`selection`), or take it as given,
3. put both into a `ClassEmbedder`, which gives every class, seen or not, its vector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from models.base import FloatArray, LabelledFeatures, OnProgress, PatchTable, Progress, ignore_progress
from models.catalog import get_method
from models.data.splits import choose_validation_classes
from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.selection import RelationChoice, select_relation
from models.params import EmbeddingSetParams, Params

SECTIONS = {"vgse": "clustering", "kmeans": "kmeans"}
MIN_CLASSES_TO_VALIDATE = 4
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class EmbeddingResult:
    """A fitted embedding method, the embedder built on it, and how the relation was chosen (None: as asked for)."""

    method: Any
    embedder: ClassEmbedder
    validation_classes: tuple[str, ...]
    choice: RelationChoice | None

    def report(self) -> dict[str, Any]:
        """What a user should know of it, ready for JSON."""
        clusters = getattr(self.method, "report_", None)
        return {
            "relation": {
                "name": self.embedder.relation,
                "params": self.embedder.params.model_dump(mode="json"),
                "chosen": self.choice.to_json() if self.choice else None,
            },
            "validation_classes": list(self.validation_classes),
            "best_epoch": getattr(self.method, "best_epoch_", None),
            "history": getattr(self.method, "history_", []),
            "clusters": clusters.to_json() if clusters else None,
        }

    def save(self, directory: Path) -> None:
        """The method's files, the embedder's, and the report."""
        directory.mkdir(parents=True, exist_ok=True)
        self.method.save(directory)
        self.embedder.save(directory)
        (directory / REPORT_FILE).write_text(json.dumps(self.report(), ensure_ascii=False, indent=1), encoding="utf-8")


def build_class_embeddings(
    patches: PatchTable,
    images: LabelledFeatures,
    knowledge: FloatArray,
    *,
    method: str,
    relation: str,
    params: EmbeddingSetParams,
    backbone: Any = None,
    device: str = "cpu",
    on_progress: OnProgress = ignore_progress,
) -> EmbeddingResult:
    """Embeds the seen classes of `patches` and says how to embed others.

    images: whole-image features of the same training images, used to score choices on validation classes.
    knowledge: (n_classes, knowledge_dim), a row for each of `patches.class_names`.
    backbone: a TrainableBackbone where params ask for fine-tuning.
    Only training rows of seen classes come in here; validation classes are cut from them.
    """
    names = patches.class_names
    validation = _validation_classes(names, params)
    fitted = _create(method, params, device)
    extra = {"backbone": backbone} if backbone is not None else {}
    fitted.fit(
        patches, knowledge, image_features=images, validation_classes=validation, on_progress=on_progress, **extra
    )
    on_progress(Progress("relations", 0, 1))
    choice = None
    if relation == "auto":
        choice = select_relation(
            fitted.class_embeddings_, knowledge, images, seed=params.seed, defaults=params.relation,
            on_progress=on_progress,
        )  # fmt: skip
        relation, relation_params = choice.relation, choice.params
    else:
        relation_params = params.relation
    embedder = ClassEmbedder(
        tuple(names), fitted.class_embeddings_, knowledge, cast(Relation, relation), relation_params
    )
    on_progress(Progress("relations", 1, 1))
    return EmbeddingResult(fitted, embedder, validation, choice)


def _create(method: str, params: EmbeddingSetParams, device: str) -> Any:
    row = get_method(method, "embedding")
    module, _, attribute = row.path.partition(":")
    own: Params = getattr(params, SECTIONS[method]) if method in SECTIONS else row.params()
    return getattr(import_module(module), attribute)(own, seed=params.seed, device=device)


def _validation_classes(names: Sequence[str], params: EmbeddingSetParams) -> tuple[str, ...]:
    if params.validation_classes is not None:
        return tuple(params.validation_classes)
    if len(names) < MIN_CLASSES_TO_VALIDATE:
        return ()
    return choose_validation_classes(names, seed=params.seed)
