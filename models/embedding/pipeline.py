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
from types import ModuleType
from typing import Any, cast

from models.base import FloatArray, LabelledFeatures, OnProgress, PatchTable, Progress, ignore_progress
from models.catalog import get_method
from models.data import splits
from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.selection import RelationChoice, select_relation
from models.params import EmbeddingSetParams, Params

SECTIONS = {"vgse": "clustering", "kmeans": "kmeans"}
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


def fit_patch_embedding(
    patches: PatchTable,
    images: LabelledFeatures,
    knowledge: FloatArray,
    *,
    method: str,
    params: EmbeddingSetParams,
    backbone: Any = None,
    device: str = "cpu",
    on_progress: OnProgress = ignore_progress,
) -> Any:
    """The embedding method, fitted on training patches of seen classes; validation classes are cut from these.

    images: whole-image features of the same images, used to score choices on validation classes.
    knowledge: (n_classes, knowledge_dim), a row for each of `patches.class_names`.
    backbone: a TrainableBackbone where params ask for fine-tuning.
    """
    module, attribute = _implementation(method)
    fitted = getattr(module, attribute)(method_params(method, params), seed=params.seed, device=device)
    extra = {"backbone": backbone} if backbone is not None else {}
    return fitted.fit(
        patches,
        knowledge,
        image_features=images,
        validation_classes=validation_classes(patches.class_names, params),
        on_progress=on_progress,
        **extra,
    )


def load_patch_embedding(method: str, directory: Path) -> Any:
    """A fitted embedding method that was saved in `directory`."""
    module, attribute = _implementation(method)
    return getattr(module, attribute).load(directory)


def relate_classes(
    fitted: Any,
    images: LabelledFeatures,
    knowledge: FloatArray,
    *,
    relation: str,
    params: EmbeddingSetParams,
    on_progress: OnProgress = ignore_progress,
) -> EmbeddingResult:
    """The embedder of any class: seen ones as fitted, others by the relation asked for, or chosen on seen classes."""
    names = tuple(images.class_names)
    on_progress(Progress("relations", 0, 1))
    choice = None
    chosen, relation_params = relation, params.relation
    if relation == "auto":
        choice = select_relation(
            fitted.class_embeddings_,
            knowledge,
            images,
            seed=params.seed,
            defaults=params.relation,
            on_progress=on_progress,
        )
        chosen, relation_params = choice.relation, choice.params
    embedder = ClassEmbedder(names, fitted.class_embeddings_, knowledge, cast(Relation, chosen), relation_params)
    on_progress(Progress("relations", 1, 1))
    return EmbeddingResult(fitted, embedder, validation_classes(names, params), choice)


def method_params(method: str, params: EmbeddingSetParams) -> Params:
    """The part of the parameters that the embedding method reads."""
    own = getattr(params, SECTIONS[method]) if method in SECTIONS else get_method(method, "embedding").params()
    assert isinstance(own, Params)
    return own


def validation_classes(names: Sequence[str], params: EmbeddingSetParams) -> tuple[str, ...]:
    """As asked for; else a seeded fifth of the seen classes; none where there are too few."""
    return splits.validation_classes(names, params.validation_classes, seed=params.seed)


def _implementation(method: str) -> tuple[ModuleType, str]:
    module, _, attribute = get_method(method, "embedding").path.partition(":")
    return import_module(module), attribute
