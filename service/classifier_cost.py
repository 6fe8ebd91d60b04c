"""What training a classifier would hold in memory, estimated before its job is queued."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from models.backbone_names import NETWORKS
from models.catalog import METHODS
from models.params import BackboneParams
from models.training_memory import numbers_per_image, refusal, training_bytes
from service.core import repositories
from service.core.classifier_inputs import image_size
from service.core.process import memory_bytes
from service.core.settings import Settings
from service.core.tables import Dataset, EmbeddingSet
from service.planning import Plan
from service.schemas import ClassifierCreate


def plan_memory(
    session: Session,
    plan: Plan,
    dataset: Dataset,
    embedding_set: EmbeddingSet | None,
    body: ClassifierCreate,
    params: dict[str, Any],
    network: BackboneParams | None,
    n_validation: int,
    settings: Settings,
) -> dict[str, Any]:
    """n_images, memory_bytes (None where it cannot be told) and its basis; a problem where workers have less memory.

    network: what makes the features of images.
    """
    method = next((row for row in METHODS if row.kind == "classifier" and row.name == body.method), None)
    n_train, n_test = _rows(session, plan, dataset)
    n_test = n_test if body.evaluate else 0
    found: dict[str, Any] = {"n_images": n_train + n_test, "memory_bytes": None, "basis": "unknown features"}
    if method is None or params.get("mode") == "finetune":  # a network's middle layers: known when it is loaded
        return found
    if dataset.kind == "features":
        numbers = int(dataset.summary.get("feature_dim", 0))
    elif network is not None and network.name in NETWORKS:
        size = image_size(body.image_size, embedding_set)
        numbers = numbers_per_image(network.name, size, is_spatial=method.features == "spatial")
    else:
        return found
    n_seen = len(plan.seen_classes)
    needed = training_bytes(params, n_train, n_test, numbers, n_seen=n_seen, n_validation=n_validation)
    have = settings.worker_memory_bytes or memory_bytes()
    if have is not None and needed > have:
        plan.add("/method", refusal(n_train + n_test, numbers, needed, have))
    basis = f"{n_train + n_test:,} images of {numbers:,} numbers in float32, held several times"
    return {**found, "memory_bytes": needed, "basis": basis}


def _rows(session: Session, plan: Plan, dataset: Dataset) -> tuple[int, int]:
    """Rows that training and tests may read; those that the dataset's hash rule will move count for both."""
    if dataset.kind == "features":
        summary = dataset.summary
        return int(summary.get("n_train", 0)), int(summary.get("n_test_seen", 0)) + int(summary.get("n_test_unseen", 0))
    seen, unseen = set(plan.seen_classes), set(plan.unseen_classes)
    counts = repositories.class_counts(session, dataset.id)
    n_held = sum(round(dataset.test_fraction * c.n_images) for c in counts if c.class_name in seen)
    return plan.n_images, n_held + sum(c.n_images for c in counts if c.class_name in unseen)
