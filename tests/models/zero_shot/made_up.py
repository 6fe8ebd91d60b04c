"""Made-up images whose features depend on their class's embedding, so that unseen classes can be recognised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.base import FloatArray, LabelledFeatures


@dataclass(frozen=True)
class MadeUp:
    train: LabelledFeatures
    seen_embeddings: FloatArray
    unseen: LabelledFeatures
    unseen_embeddings: FloatArray


def made_up(*, n_seen: int = 12, n_unseen: int = 4, images: int = 15, noise: float = 0.5, seed: int = 0) -> MadeUp:
    """feature = embedding @ mixing + noise, of 24 dimensions from 8, plus a common offset like a network's.

    To methods that look at places it is a map of 2 places with 12 channels.
    """
    rng = np.random.default_rng(seed)
    n_classes = n_seen + n_unseen
    embeddings = rng.normal(size=(n_classes, 8)).astype(np.float32)
    mixing = rng.normal(size=(8, 24))
    labels = np.repeat(np.arange(n_classes), images)
    features = embeddings[labels] @ mixing + noise * rng.normal(size=(len(labels), 24)) + 3
    features = np.maximum(features, 0).astype(np.float32)
    names = tuple(f"class {i}" for i in range(n_classes))
    seen = labels < n_seen
    return MadeUp(
        LabelledFeatures(features[seen], labels[seen], names[:n_seen], channels=12),
        embeddings[:n_seen],
        LabelledFeatures(features[~seen], labels[~seen] - n_seen, names[n_seen:], channels=12),
        embeddings[n_seen:],
    )
