"""SC-EGG: features compressed from those of attributes, generated for unseen classes under a classifier's guidance.

Hong et al., "Semantic Compression Embedding for Generative Zero-Shot Learning" (IJCAI 2022,
https://doi.org/10.24963/ijcai.2022/134). SCEN (`scen.py`) turns a feature map into g in two stages; in the third,
TF-VAEGAN (`feedback.py`) generates g in place of pooled features, with L_EGS added to the generator's loss:
    L_EGS = lambda_s L_SCE, cross-entropy of the frozen CLS_g on generated features of seen classes       (Eq. 13-14)
The paper adds L_UCE, the same for unseen classes (Eq. 15). `fit` knows none: they may come years later. So it is left
out, and cross-entropies run over seen classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress, ignore_progress
from models.errors import ShapeMismatch
from models.generative_params import SCEGGParams
from models.params import Params
from models.precision import mixed
from models.zero_shot.attention import AttentionMaps, check_pairs, map_channels
from models.zero_shot.base import History, Setting
from models.zero_shot.checkpoints import Checkpoints
from models.zero_shot.checks import EmbeddingsOf
from models.zero_shot.feedback import FeedbackVAEGAN, synthesise, train_with_feedback
from models.zero_shot.folds import Rows
from models.zero_shot.generative import GenerativeModel, noise_dim
from models.zero_shot.gradient import TrainingData
from models.zero_shot.scaling import unit_rows
from models.zero_shot.scen import SCEN, train_scen

PART_NUMBERS = 2**24
"""Numbers of the local features (images x dimensions x channels) that are held at once."""
_SCEN = "scen/"


class SCEGG(GenerativeModel):
    """Compressed features of attributes, from noise and class embedding in two passes with feedback.

    Takes feature maps: `LabelledFeatures.channels` must be set.
    """

    method: ClassVar[str] = "sc_egg"
    params_class: ClassVar[type[Params]] = SCEGGParams
    params: SCEGGParams
    network: FeedbackVAEGAN
    scen: SCEN
    _channels: int
    _vectors: FloatArray | None = None
    _seen_through: tuple[Rows, Rows] | None = None
    """Training rows, and the same with g for features."""

    def fit(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        *,
        dimension_vectors: FloatArray | None = None,
        validation_classes: Sequence[str] = (),
        validation_embeddings: FloatArray | EmbeddingsOf | None = None,
        on_progress: OnProgress = ignore_progress,
        checkpoints: Checkpoints | None = None,
    ) -> Self:
        """As every classifier's. dimension_vectors (embedding_dim, V): where v_n start, as a rule word vectors of what
        the dimensions are called; without them at random vectors, from which they are learned all the same."""
        self._vectors = None if dimension_vectors is None else _checked_vectors(dimension_vectors, class_embeddings)
        try:
            return super().fit(
                features,
                class_embeddings,
                validation_classes=validation_classes,
                validation_embeddings=validation_embeddings,
                on_progress=on_progress,
                checkpoints=checkpoints,
            )
        finally:
            self._seen_through = None

    def assess(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        *,
        dimension_vectors: FloatArray | None = None,
        validation_classes: Sequence[str],
        validation_embeddings: FloatArray | EmbeddingsOf | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> dict[str, Any]:
        """As every classifier's; dimension_vectors as in `fit`."""
        self._vectors = None if dimension_vectors is None else _checked_vectors(dimension_vectors, class_embeddings)
        return super().assess(
            features,
            class_embeddings,
            validation_classes=validation_classes,
            validation_embeddings=validation_embeddings,
            on_progress=on_progress,
        )

    def attention(self, features: FloatArray, embeddings: FloatArray, *, top: int = 8) -> AttentionMaps:
        """Maps of raw features (B, R * D), each image for one class: row of `embeddings` (B, embedding_dim)."""
        self._require_fitted()
        check_pairs(features, embeddings, self._dims)
        with torch.no_grad():
            attention, places = self.scen.look(torch.from_numpy(self._scaling(features)).to(self.device))
            strengths = self.scen.semantic(attention, places).cpu().numpy() * unit_rows(embeddings)  # (B, A): e_n phi_n
        return AttentionMaps.loudest(attention.cpu().numpy(), strengths, top)

    # -- the generator -------------------------------------------------------------------------------------------------

    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:  # noqa: ARG002 - g has the width of a place
        width = noise_dim(self.params, embedding_dim)
        return FeedbackVAEGAN(self._channels, embedding_dim, width, self.params.hidden_dim, generator)

    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        return synthesise(self.network, self.params, embeddings, generator)

    def _represent(self, features: Tensor) -> Tensor:
        return self.network.enhance(features, self.params.hidden_weight) if self.params.enhanced else features

    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:  # noqa: ARG002 - its stages came before
        weight = self.params.guidance_weight

        def guided(generated: Tensor, labels: Tensor) -> Tensor:
            return weight * self.scen.guidance(generated, labels)

        return train_with_feedback(self.network, self.params, data, self.seed, guided if weight else None)

    # -- g in place of maps --------------------------------------------------------------------------------------------

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        return super()._learn(self._compressed(train, on_progress), setting, on_progress)

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if not self.params.early_stopping:
            return []
        seen = self._compressed(train, on_progress)
        held = Rows(self._visual(validation.features), validation.labels, validation.embeddings)
        return super()._try_settings(seen, held, on_progress)

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        return super()._compatibility(self._visual(features), embeddings)

    def _compressed(self, train: Rows, on_progress: OnProgress) -> Rows:
        """The rows with g for features, after stages 1 and 2 on them; the same object if they are the same rows."""
        if self._seen_through is not None and self._seen_through[0] is train:
            return self._seen_through[1]
        weights = torch.Generator().manual_seed(self.seed)
        n_dims = train.embeddings.shape[1]
        vectors = (
            torch.randn(n_dims, self.params.vector_dim, generator=weights)
            if self._vectors is None
            else torch.from_numpy(_centred(self._vectors) if self.params.center_vectors else self._vectors)
        )
        self.scen = SCEN(self._channels, vectors, len(train.embeddings), self.params, weights).to(self.device)
        chance = torch.Generator(self.device).manual_seed(self.seed)
        features, labels, embeddings = (
            torch.from_numpy(array).to(self.device) for array in (train.features, train.labels, train.embeddings)
        )
        with mixed(self.params.precision, self.device):
            train_scen(self.scen, self.params, TrainingData(features, labels, embeddings, chance), on_progress)
        compressed = torch.from_numpy(self._visual(train.features)).to(self.device)
        self.scen.fit_scale(compressed)
        found = Rows(self.scen.scaled(compressed).cpu().numpy(), train.labels, train.embeddings)
        self._seen_through = (train, found)
        return found

    @torch.no_grad()
    def _visual(self, features: FloatArray) -> FloatArray:
        """g (N, D), scaled, of flattened maps (N, R * D)."""
        size = max(1, PART_NUMBERS // self.scen.vectors.shape[0] // self._channels)
        found = np.empty((len(features), self._channels), np.float32)
        for start in range(0, len(features), size):
            part = torch.from_numpy(np.ascontiguousarray(features[start : start + size])).to(self.device)
            compressed = self.scen.compress(*self.scen.look(part))
            found[start : start + size] = self.scen.scaled(compressed).cpu().numpy()
        return found

    def _meet(self, features: LabelledFeatures, embeddings: FloatArray) -> None:
        super()._meet(features, embeddings)
        self._channels = map_channels(features, "SC-EGG", "another method")

    def _identity(self, raw: Rows, folds: Sequence[tuple[IntArray, FloatArray]]) -> str:
        vectors = b"" if self._vectors is None else self._vectors.tobytes()
        start = f"{super()._identity(raw, folds)} {self._channels} ".encode()
        return hashlib.sha256(start + vectors).hexdigest()

    def _trial(
        self, raw: FloatArray, labels: IntArray, embeddings: FloatArray, fold: IntArray, learn_rows: IntArray
    ) -> tuple[Self, Rows, Rows, Rows]:
        trial, rows, train, held = super()._trial(raw, labels, embeddings, fold, learn_rows)
        trial._channels, trial._vectors = self._channels, self._vectors
        return trial, rows, train, held

    # -- saving --------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, FloatArray]:
        scen = {_SCEN + name: tensor.cpu().numpy() for name, tensor in self.scen.state_dict().items()}
        return {**super()._state(), **scen}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        own = {
            name.removeprefix(_SCEN): torch.from_numpy(array) for name, array in state.items() if name.startswith(_SCEN)
        }
        n_classes, self._channels = own["classifier.weight"].shape
        self.scen = SCEN(self._channels, own["vectors"], n_classes, self.params, torch.Generator())
        self.scen.load_state_dict(own)
        self.scen.is_averaged = self.params.code_compat and self.params.compression_epochs > 0
        self.scen.requires_grad_(False).to(self.device)
        super()._restore(state)


def _centred(vectors: FloatArray) -> FloatArray:
    """The vectors without their mean, or as they are where that leaves one of them nothing."""
    found = vectors - vectors.mean(axis=0)
    lengths = np.linalg.norm(found, axis=1)
    return found if lengths.min() > 1e-3 * lengths.max() else vectors


def _checked_vectors(vectors: FloatArray, class_embeddings: FloatArray) -> FloatArray:
    vectors, n_dims = np.asarray(vectors, np.float32), np.shape(class_embeddings)[-1]
    if vectors.ndim != 2 or len(vectors) != n_dims or not np.isfinite(vectors).all():
        raise ShapeMismatch(
            f"dimension_vectors {vectors.shape} must be ({n_dims}, width): a finite row for each dimension of "
            "the class embeddings.",
            field="dimension_vectors",
        )
    return vectors
