"""Classifies all images of a dataset: features through the cache, at the speed of jobs; results as lines of JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import orjson
from sqlalchemy.orm import Session

from models.base import FloatArray, Progress
from models.knowledge.names import normalize_class_name
from service.core import repositories
from service.core.tables import OFFSETS_FILE, RESULTS_FILE, Image, PredictionSet
from workers.embedding import whole_image
from workers.features import image_features
from workers.known_classes import Competing
from workers.library import Library
from workers.predictions import Prediction, competing, rank
from workers.runner import Publisher, TaskContext
from workers.runtime import choose_device

if TYPE_CHECKING:
    from models.backbones import FeatureNetwork

BLOCK_IMAGES = 1024
MAX_LABELS = 1000


@dataclass
class _Tally:
    """What is told of all images together; `competed`: normalized names of the classes that could be right."""

    competed: frozenset[str]
    n_images: int = 0
    n_failed: int = 0
    n_abstained: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def add(self, item: dict[str, Any]) -> None:
        """Count one image's."""
        self.n_images += 1
        if item["error"] is not None:
            self.n_failed += 1
            return
        best = item["predictions"][0].label
        self.n_abstained += item["abstained"]
        self.labels[best] += 1
        own = normalize_class_name(item["class_name"])
        if own in self.competed:
            self.right[own].append(normalize_class_name(best) == own)

    def summary(self) -> dict[str, Any]:
        """Counts, and T1 over the images whose class competed, as in evaluations: the mean over classes."""
        per_class = {name: float(np.mean(found)) for name, found in self.right.items()}
        agreement = None
        if per_class:
            n_labelled = sum(map(len, self.right.values()))
            agreement = {
                "t1": float(np.mean([*per_class.values()])),
                "n_images": n_labelled,
                "n_classes": len(per_class),
            }
        return {
            "n_images": self.n_images,
            "n_failed": self.n_failed,
            "n_abstained": self.n_abstained,
            "labels": dict(self.labels.most_common(MAX_LABELS)),
            "agreement": agreement,
        }


def classify_dataset(context: TaskContext) -> Publisher:
    """Predictions for every image of the dataset, by class and content, and how they agree with its classes."""
    with context.database.read() as session:
        row = repositories.get(session, PredictionSet, context.job.resource_id)
        images = repositories.images_of(session, row.dataset_id, row.request["only_classes"])
    context.progress.set_phases([("features", 9.0), ("ranking", 1.0)])
    # torch's network here: the features' cache takes the fastest itself, and knows how many batches run at a time.
    settings = context.settings.model_copy(update={"backend": "torch"})
    library = Library(context.database, context.store, settings, device=choose_device(settings.device))
    among = library.competing(library.state(row.classifier_id), row.request["scope"], row.request["class_names"])
    resident = among.resident
    network = cast("FeatureNetwork", resident.backbone)  # the library's are
    contents = [image.sha256 for image in images]
    table = image_features(context, contents, network, whole_image(resident.size), phase="features")
    row_of = {int(image): position for position, image in enumerate(table.image_index)}
    tally = _Tally(frozenset(map(normalize_class_name, among.names or resident.class_names)))
    offsets = [0]
    path = context.scratch_dir / RESULTS_FILE
    with path.open("wb") as file:
        for start in range(0, len(images), BLOCK_IMAGES):
            numbers = range(start, min(start + BLOCK_IMAGES, len(images)))
            known = [number for number in numbers if number in row_of]
            features = np.asarray(table.features[[row_of[number] for number in known]], np.float32)
            ranked = dict(zip(known, _ranked(among, features, row.request), strict=True))
            for number in numbers:
                item = _item(number, images[number], ranked.get(number), table.failures, row.request["min_score"])
                tally.add(item)
                offsets.append(offsets[-1] + file.write(orjson.dumps(item) + b"\n"))
            context.progress(Progress("ranking", min(start + BLOCK_IMAGES, len(images)), len(images)))
    artifacts = {
        RESULTS_FILE: context.store.put_file(path),
        OFFSETS_FILE: context.store.put_bytes(np.array(offsets, "<i8").tobytes()),
    }
    gamma = resident.gamma if row.request["gamma"] is None else row.request["gamma"]
    speed = table.n_computed / table.seconds if table.n_computed and table.seconds else None
    summary = {**tally.summary(), "gamma": gamma, "n_computed": table.n_computed, "images_per_s": speed}

    def publish(session: Session) -> dict[str, Any]:
        made = repositories.get(session, PredictionSet, row.id)
        made.status, made.artifacts, made.summary = "ready", artifacts, summary
        counts = {name: summary[name] for name in ("n_images", "n_failed", "n_abstained")}
        return {"kind": "predictions", "id": made.id, "href": f"/v1/predictions/{made.id}", **counts}

    return publish


def _ranked(among: Competing, features: FloatArray, request: dict[str, Any]) -> list[list[Prediction]]:
    if len(features) == 0:
        return []
    classes = competing(among.resident, "all", among.names)
    return rank(among.resident, features, classes, k=request["top_k"], gamma=request["gamma"])


def _item(
    number: int, image: Image, found: Sequence[Prediction] | None, failures: dict[str, str], min_score: float | None
) -> dict[str, Any]:
    return {
        "index": number,
        "image_id": image.id,
        "filename": image.filename,
        "class_name": image.class_name,
        "predictions": found or (),
        "error": None if found else failures.get(image.sha256, "The image could not be read."),
        "abstained": bool(found and min_score is not None and found[0].score < min_score),
    }
