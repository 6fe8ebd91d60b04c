"""VGSE's two baselines for seen-class embeddings: cosine to k-means centres, and the mean backbone feature."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from models.base import FloatArray, LabelledFeatures, OnProgress, PatchTable, Progress, ignore_progress
from models.embedding.checks import check_classes, patch_classes
from models.embedding.rows import RESIDENT_BYTES, blocks, feature_statistics
from models.errors import InvalidInput, NotFitted, TooFewSamples
from models.params import KMeansParams, Params

TENSORS_FILE = "embedding.safetensors"
MANIFEST_FILE = "embedding.json"


class _PatchEmbedding(ABC):
    """Patches -> (P, E) by `assign`; classes by Eq. 7-8. Learned: class_embeddings_ (C, E) float32, class_names_."""

    method: ClassVar[str]
    params_class: ClassVar[type[Params]]
    class_embeddings_: FloatArray
    class_names_: tuple[str, ...]

    def __init__(self, params: Params, *, seed: int = 0, device: str = "cpu") -> None:
        self.params = params
        self.seed = seed
        self.device = device

    def fit(
        self,
        patches: PatchTable,
        class_knowledge: FloatArray | None = None,
        *,
        image_features: LabelledFeatures | None = None,
        validation_classes: Sequence[str] = (),
        on_progress: OnProgress = ignore_progress,
    ) -> Self:
        """As `PatchClustering.fit`; knowledge and validation are not needed and not used.

        Raises TooFewSamples, ShapeMismatch, InvalidInput (NaN).
        """
        del class_knowledge, image_features, validation_classes
        check_classes(patches)
        feature_statistics(patches.features)  # for its check of every number
        self._learn(patches.features, on_progress)
        self.class_embeddings_ = self._class_means(patches, on_progress)
        self.class_names_ = tuple(patches.class_names)
        return self

    def assign(self, features: FloatArray) -> FloatArray:
        """(P, D) -> (P, E) float32, block by block."""
        return np.concatenate([self._embed(np.asarray(features[block], np.float32)) for block in blocks(len(features))])

    def save(self, directory: Path) -> None:
        """Writes class embeddings and centres (safetensors), parameters and class names (JSON)."""
        if not hasattr(self, "class_embeddings_"):
            raise NotFitted(f"This {type(self).__name__} is not fitted; call fit or load first.")
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"class_embeddings": self.class_embeddings_, **self._state()}, directory / TENSORS_FILE)
        manifest = {
            "method": self.method,
            "params": self.params.model_dump(),
            "seed": self.seed,
            "class_names": list(self.class_names_),
        }
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: str = "cpu") -> Self:
        """What `save` wrote; InvalidInput if it is not there or of another method."""
        path = directory / MANIFEST_FILE
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if manifest.get("method") != cls.method:
            raise InvalidInput(f"{directory.name!r} holds no saved {cls.method!r} embedding.")
        model = cls(cls.params_class(**manifest["params"]), seed=manifest["seed"], device=device)
        tensors = load_file(directory / TENSORS_FILE)
        model.class_embeddings_ = tensors.pop("class_embeddings")
        model.class_names_ = tuple(manifest["class_names"])
        model._restore(tensors)
        return model

    def _class_means(self, patches: PatchTable, on_progress: OnProgress) -> FloatArray:
        """Eq. 7-8: each image the mean of its patches, each class the mean of its images."""
        classes = patch_classes(patches)
        per_image = np.bincount(patches.image_index, minlength=len(patches.labels))
        per_class = np.bincount(patches.labels[per_image > 0], minlength=len(patches.class_names))
        means: FloatArray = np.zeros(())
        for block in blocks(len(classes)):
            weights = np.zeros((len(patches.class_names), block.stop - block.start))
            size = per_image[patches.image_index[block]] * per_class[classes[block]]
            weights[classes[block], np.arange(weights.shape[1])] = 1 / size
            means = means + weights @ self._embed(np.asarray(patches.features[block], np.float32))
            on_progress(Progress("embeddings", block.stop, len(classes)))
        found: FloatArray = np.asarray(means, dtype=np.float32)
        return found

    def _learn(self, features: FloatArray, on_progress: OnProgress) -> None:  # noqa: B027 - nothing to learn is fine
        """Whatever `_embed` needs."""

    @abstractmethod
    def _embed(self, features: FloatArray) -> FloatArray:
        """(B, D) float32 -> (B, E)."""

    def _state(self) -> dict[str, FloatArray]:
        return {}

    def _restore(self, state: dict[str, FloatArray]) -> None:  # noqa: B027 - nothing to restore is fine
        """Takes back what `_state` gave."""


class BackboneEmbedding(_PatchEmbedding):
    """ResNet-SMO of the paper: the mean patch feature of each class."""

    method = "backbone"
    params_class = Params

    def _embed(self, features: FloatArray) -> FloatArray:
        return features


class KMeansEmbedding(_PatchEmbedding):
    """k-means-SMO of the paper: a^k = cosine(feature, centre k). Also learned: centres_ (E, D) float32.

    Tables over `RESIDENT_BYTES` are clustered by random mini-batches, so memory stays flat.
    """

    method = "kmeans"
    params_class = KMeansParams
    params: KMeansParams
    centres_: FloatArray

    def __init__(
        self,
        params: KMeansParams,
        *,
        seed: int = 0,
        device: str = "cpu",
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        super().__init__(params, seed=seed, device=device)
        self.resident_bytes = resident_bytes

    def _learn(self, features: FloatArray, on_progress: OnProgress) -> None:
        if len(features) < self.params.n_clusters:
            raise TooFewSamples(
                f"{len(features)} patches cannot fill {self.params.n_clusters} clusters. "
                "Add images or lower n_clusters.",
                field="n_clusters",
            )
        fits = features.size * 4 <= self.resident_bytes
        # threads would add up partial sums in the order they finish, and the same seed give other centres
        with threadpool_limits(limits=1, user_api="openmp"):
            model = self._whole(features) if fits else self._streamed(features, on_progress)
        self.centres_ = np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
        on_progress(Progress("clustering", 1, 1))

    def _whole(self, features: FloatArray) -> KMeans:
        model = KMeans(self.params.n_clusters, n_init=1, max_iter=self.params.max_iterations, random_state=self.seed)
        return model.fit(np.asarray(features, dtype=np.float32))

    def _streamed(self, features: FloatArray, on_progress: OnProgress) -> MiniBatchKMeans:
        """Passes over random batches, until the centres move by less than 1 % or the passes run out."""
        size = max(self.params.n_clusters, self.resident_bytes // (8 * features.shape[1]))
        n_batches = max(1, len(features) // size)
        model = MiniBatchKMeans(self.params.n_clusters, n_init=3, random_state=self.seed)
        random = np.random.default_rng(self.seed)
        for done in range(1, self.params.max_iterations + 1):
            before = np.array(getattr(model, "cluster_centers_", 0.0))
            # a table is ordered by class: consecutive rows would teach the clusters one class at a time
            for batch in np.array_split(random.permutation(len(features)), n_batches):
                model.partial_fit(np.asarray(features[np.sort(batch)], dtype=np.float32))
            on_progress(Progress("clustering", done, self.params.max_iterations))
            if np.linalg.norm(model.cluster_centers_ - before) < 0.01 * np.linalg.norm(before):
                break
        return model

    def _embed(self, features: FloatArray) -> FloatArray:
        return _unit_rows(features) @ _unit_rows(self.centres_).T

    def _state(self) -> dict[str, FloatArray]:
        return {"centres": self.centres_}

    def _restore(self, state: dict[str, FloatArray]) -> None:
        self.centres_ = state["centres"]


def _unit_rows(vectors: FloatArray) -> FloatArray:
    units: FloatArray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return units
