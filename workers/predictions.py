"""A classifier ready to answer, and the step from image features to ranked, calibrated predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from models.base import FloatArray, IntArray
from models.errors import InvalidInput, UnknownName
from models.evaluation import Scorer, calibrated_stacking, top_k
from models.zero_shot.attention import Attentive

Scope = Literal["unseen", "seen", "all"]


class FeatureExtractor(Protocol):
    """What the engine needs of a backbone."""

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) -> float32 (B, feature_dim)."""
        ...


@dataclass(frozen=True, eq=False)
class Resident:
    """A loaded classifier with the classes that compete: names, embeddings (n_classes, embedding_dim), seen marks.

    size: side in pixels to which images are resized, as in training. gamma is on the scale of the classifier's scores;
    softmax(scores / temperature) is the probability.
    """

    classifier: Scorer
    backbone: FeatureExtractor
    size: int
    class_names: tuple[str, ...]
    embeddings: FloatArray
    is_seen: NDArray[np.bool_]
    gamma: float
    temperature: float


@dataclass(frozen=True)
class Prediction:
    """One class for one image; `score` is its probability among the classes that competed."""

    label: str
    score: float
    seen: bool


@dataclass(frozen=True)
class Relatives:
    """What an image of a class that nobody has described is like: `score` is the cosine, the strongest first."""

    similar: tuple[Prediction, ...]
    dissimilar: tuple[Prediction, ...]


@dataclass(frozen=True)
class Look:
    """Where a classifier looks in one image for the class of `prediction`, loudest dimensions first.

    whole, local: (side, side) maps that sum to 1, over all dimensions and of each of `dimensions`; strengths: what
    these add to the class's score.
    """

    prediction: Prediction
    dimensions: tuple[int, ...]
    strengths: tuple[float, ...]
    local: FloatArray
    whole: FloatArray


@dataclass(frozen=True)
class ImageError:
    """An image that could not be classified; the others of its request were."""

    reason: str


def competing(resident: Resident, scope: Scope, class_names: Sequence[str] | None) -> IntArray:
    """Positions of the classes of `scope`, or of those of `class_names` in it; InvalidInput where none remain."""
    in_scope = {"all": np.ones_like(resident.is_seen), "seen": resident.is_seen, "unseen": ~resident.is_seen}[scope]
    if class_names is None:
        chosen = np.flatnonzero(in_scope)
    else:
        position = {name: i for i, name in enumerate(resident.class_names)}
        unknown = [name for name in class_names if name not in position]
        if unknown:
            raise UnknownName("class", unknown[0], resident.class_names, field="class_names")
        wanted = np.array([position[name] for name in dict.fromkeys(class_names)], np.int64)
        chosen = wanted[in_scope[wanted]]
    if len(chosen) == 0:
        raise InvalidInput(f"No class competes: none of those asked for is in scope {scope!r}.", field="scope")
    return chosen


def rank(
    resident: Resident, features: FloatArray, classes: IntArray, *, k: int, gamma: float | None = None
) -> list[list[Prediction]]:
    """The `k` likeliest of `classes` for each row of `features` (n_images, feature_dim), best first.

    gamma (None: the resident's own) handicaps seen classes; it changes nothing where only one side competes.
    """
    is_seen = resident.is_seen[classes]
    if resident.classifier.is_joint:  # trained for all classes once, not again for every choice of them
        scores = resident.classifier.scores(features, resident.embeddings)[:, classes]
    else:
        scores = resident.classifier.scores(features, resident.embeddings[classes])
    if is_seen.any() and not is_seen.all():
        scores = calibrated_stacking(scores, is_seen, resident.gamma if gamma is None else gamma)
    probabilities = softmax(scores.astype(np.float64) / resident.temperature, axis=1)
    return [
        [Prediction(resident.class_names[classes[c]], float(row[c]), bool(is_seen[c])) for c in best]
        for row, best in zip(probabilities, top_k(scores, k), strict=True)
    ]


def relate(resident: Resident, features: FloatArray, classes: IntArray, *, tau: float, k: int) -> list[Relatives]:
    """The `k` most similar and dissimilar of `classes` for each row: cosine from `tau` up, and below (PSR, 4.5)."""
    scores = resident.classifier.scores(features, resident.embeddings[classes])

    def told(row: FloatArray, chosen: IntArray) -> tuple[Prediction, ...]:
        return tuple(
            Prediction(resident.class_names[classes[c]], float(row[c]), bool(resident.is_seen[classes[c]]))
            for c in chosen[:k]
        )

    found = []
    for row, order in zip(scores, np.argsort(-scores, axis=1, kind="stable"), strict=True):
        n_similar = int((row >= tau).sum())
        found.append(Relatives(told(row, order[:n_similar]), told(row, order[n_similar:][::-1])))
    return found


def look(resident: Resident, features: FloatArray, classes: IntArray, *, k: int) -> list[Look]:
    """Attention of the `k` loudest dimensions in each row of `features`, for the likeliest of `classes`."""
    if not isinstance(resident.classifier, Attentive):
        raise InvalidInput(
            "This classifier does not look at places of an image, so it has no attention maps. Methods that do say so "
            "in GET /v1/methods: features 'spatial'."
        )
    position = {name: i for i, name in enumerate(resident.class_names)}
    best = [found[0] for found in rank(resident, features, classes, k=1)]
    embeddings = resident.embeddings[[position[found.label] for found in best]]
    maps = resident.classifier.attention(features, embeddings, top=k)
    return [
        Look(found, tuple(map(int, dimensions)), tuple(map(float, strengths)), local, whole)
        for found, dimensions, strengths, local, whole in zip(
            best, maps.dimensions, maps.strengths, maps.local, maps.whole, strict=True
        )
    ]
