"""What a classifier's request leaves open, taken from the dataset and the embedding set that it names."""

from __future__ import annotations

from collections.abc import Sequence

from models.params import EmbeddingSetParams
from service.core.tables import Dataset, EmbeddingSet

DEFAULT_IMAGE_SIZE = 224


def image_size(asked: int | None, embedding_set: EmbeddingSet | None) -> int:
    """Side in pixels: as `asked` for, else that of the set's patches."""
    if asked:
        return asked
    if embedding_set is not None:
        return EmbeddingSetParams.model_validate(embedding_set.params).patches.size
    return DEFAULT_IMAGE_SIZE


def earlier_validation(dataset: Dataset, embedding_set: EmbeddingSet | None) -> list[Sequence[str]]:
    """Validation classes as the set was made with, then as the dataset's files name them."""
    summaries = [] if embedding_set is None else [embedding_set.summary]
    if dataset.kind == "features":
        summaries.append(dataset.summary)
    return [summary.get("validation_classes", ()) for summary in summaries]
