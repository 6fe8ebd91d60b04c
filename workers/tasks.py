"""Every kind of job and the function that does it."""

from __future__ import annotations

from workers.dataset_predictions import classify_dataset
from workers.embedding import build_embedding_set
from workers.imports import import_archive, import_features, index_knowledge
from workers.runner import TaskFunction
from workers.training import train_classifier

TASKS: dict[str, TaskFunction] = {
    "import_archive": import_archive,
    "import_features": import_features,
    "index_knowledge": index_knowledge,
    "build_embedding_set": build_embedding_set,
    "train_classifier": train_classifier,
    "classify_dataset": classify_dataset,
}
