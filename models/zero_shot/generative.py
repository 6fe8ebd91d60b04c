"""What classifiers share that generate features of classes from their embeddings: epochs, synthesis, final classifier.

A method trains its networks and writes how it generates and how it represents a feature; this file turns both into
scores. Generated rows of a class come from its embedding and the seed alone, so that classes added later, or left out,
change nothing for the others. While epochs are chosen, the closed-form final classifier stands in for the others.
Letters in trailing comments: B images of a step, C classes, D features, E embedding, R representation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress
from models.evaluation import zsl_report
from models.generative_params import GANParams, GenerativeParams
from models.params import Params
from models.precision import mixed
from models.zero_shot.base import History, Setting
from models.zero_shot.checkpoints import Chance, Run
from models.zero_shot.checks import match_seen, unit_embeddings
from models.zero_shot.epochs import REACH, EpochModel
from models.zero_shot.final import (
    SHRINKAGES,
    Competing,
    FinalClassifier,
    LinearDiscriminants,
    RealRows,
    make_final,
)
from models.zero_shot.folds import Rows
from models.zero_shot.gradient import TrainingData
from models.zero_shot.scaling import Scaling

PART_ROWS = 8192
_FINAL, _SEEN, _SHIFT, _SIGNED = "final/", "seen_embeddings", "shift", "is_signed"


class GenerativeModel(EpochModel):
    """Generates features of classes without images, and learns a final classifier on these and real ones."""

    params: GenerativeParams
    signed_scaling: ClassVar[Scaling] = "minmax"
    """What `normalize: auto`, where a method takes it, is if features can be negative; else it is minmax."""
    _is_signed: bool = False
    """Whether any training feature is negative."""

    # -- what a method writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _training(self, data: TrainingData, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        """Train `self.network`, endlessly; after each epoch its losses.

        What comes before the first epoch, a stage of its own, reports to `on_progress`; then `data.run.resume` takes
        all that the epochs change beside the network and the source of chance.
        """

    @abstractmethod
    def _generate(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """Features (B, D) of unit embeddings (B, E), with chance from `generator`."""

    def _represent(self, features: Tensor) -> Tensor:
        """What the final classifier sees, (B, R), of scaled features (B, D); the features themselves if not written."""
        return features

    def _rows_of_classes(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """What it sees in place of images, (B, R), of unit embeddings (B, E): generated features, if not written."""
        return self._represent(self._generate(embeddings, generator))

    # -- what all share ------------------------------------------------------------------------------------------------

    def __init__(self, params: Params | None = None, *, seed: int = 0, device: str = "cpu") -> None:
        super().__init__(params, seed=seed, device=device)
        self.is_joint = make_final(self.params, seed).is_joint

    def _meet(self, features: LabelledFeatures, embeddings: FloatArray) -> None:
        super()._meet(features, embeddings)
        self._is_signed = bool(np.min(features.features) < 0)
        if self.params.normalize == "auto":
            # What ends in a ReLU is 0 where a feature says nothing, and minmax keeps that. Other features have no such
            # end: squeezed into [0, 1] all rows lie about the middle, and what tells classes apart is lost in noise.
            scaling = self.signed_scaling if self._is_signed else "minmax"
            self.params = self.params.model_copy(update={"normalize": scaling})

    def _trial(
        self, raw: FloatArray, labels: IntArray, embeddings: FloatArray, fold: IntArray, learn_rows: IntArray
    ) -> tuple[Self, Rows, Rows, Rows]:
        trial, rows, train, held = super()._trial(raw, labels, embeddings, fold, learn_rows)
        trial._is_signed = self._is_signed
        return trial, rows, train, held

    def _epochs(self, train: Rows, run: Run, epochs: int, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        weights = torch.Generator().manual_seed(self.seed)
        chance = torch.Generator(self.device).manual_seed(self.seed)
        features, labels = (torch.from_numpy(array).to(self.device) for array in (train.features, train.labels))
        embeddings = self._conditions(train.embeddings)
        self.network = self._make_network(features.shape[1], embeddings.shape[1], weights).to(self.device)
        run.add(network=self.network, chance=Chance(chance))
        data = TrainingData(features, labels, embeddings, chance, run)
        training = self._training(data, on_progress)
        for epoch in range(len(run.history) + 1, epochs + 1):
            with mixed(self.params.precision, self.device):  # left before validation has its turn
                losses = next(training)
            yield {"epoch": float(epoch), **losses}

    def _begin(self, train: Rows) -> None:
        self._train, self._seen = train, train.embeddings

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        used, history = super()._learn(train, setting, on_progress)
        return {**(setting or {}), **used}, history

    def _settle(self, train: Rows, setting: Setting | None) -> None:
        self._final = make_final(self.params, self.seed, (setting or {}).get("shrinkage"))
        real = self._real(train)
        self._final.fit(real)
        self._shift = self._shift_to(real)

    def _validate(self, validation: Rows) -> dict[str, float]:
        """T1 by linear discriminants; their shrinkage is the best for this epoch, unless it is given."""
        final = LinearDiscriminants(self.params, self.seed)
        real = self._real(self._train)
        final.fit_covariance(real)
        self._shift = self._shift_to(real)
        rows, classes = self._represented(validation.features), self._competing(validation.embeddings)
        names = [str(i) for i in range(len(validation.embeddings))]
        tried = {
            shrinkage: zsl_report(final.scores_at(rows, classes, shrinkage).cpu().numpy(), validation.labels, names).t1
            for shrinkage in ([self.params.shrinkage] if self.params.shrinkage is not None else SHRINKAGES)
        }
        best = max(tried, key=lambda shrinkage: tried[shrinkage])
        return {"validation_t1": tried[best], "shrinkage": best}

    def _pick(self, tried: list[History]) -> Setting:
        """The epoch, and the middle of what was the best shrinkage at it and its neighbours in each fold."""
        setting = super()._pick(tried)
        last = [min(int(setting["epoch"]), len(history)) for history in tried]
        near = [
            entry["shrinkage"]
            for epoch, history in zip(last, tried, strict=True)
            for entry in history[max(0, epoch - 1 - REACH) : epoch + REACH]
        ]
        return {**setting, "shrinkage": sorted(near)[len(near) // 2]}

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        return self._scores(self._final, features, embeddings)

    def is_ready(self, class_embeddings: FloatArray) -> bool:
        """Whether `scores` of these classes, (n_classes, embedding_dim), has little to do before it can tell."""
        self._require_fitted()
        return self._final.is_ready(self._competing(unit_embeddings(class_embeddings)))

    @torch.no_grad()
    def prepared(self, class_embeddings: FloatArray) -> Self:
        """One that has done it all: generated rows of these classes, and trained for them where it is joint."""
        self._require_fitted()
        prepared = copy(self)
        prepared._final = self._final.prepared(self._competing(unit_embeddings(class_embeddings)))
        return prepared

    @torch.no_grad()
    def _scores(self, final: FinalClassifier, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        classes = self._competing(embeddings)
        found = np.empty((len(features), len(embeddings)), np.float32)
        for start in range(0, len(features), PART_ROWS):
            part = slice(start, start + PART_ROWS)
            found[part] = final.scores(self._represented(features[part]), classes).cpu().numpy()
        return found

    def _conditions(self, embeddings: FloatArray) -> Tensor:
        """Unit embeddings (C, E) as the networks see them.

        Unit vectors of classes are mostly their common mean; what is left beside it is small beside the noise, and
        networks learn it last.
        """
        if self.params.center_embeddings:
            mean = self._seen.mean(axis=0)
            length = float(np.sqrt(np.mean(np.sum((self._seen - mean) ** 2, axis=1))))
            embeddings = (embeddings - mean) / np.float32(length if length > 1e-6 else 1)
        return torch.from_numpy(np.ascontiguousarray(embeddings)).to(self.device)

    def _competing(self, embeddings: FloatArray) -> Competing:
        """The classes of unit `embeddings` (C, E) as the final classifier wants them."""
        generated = _Generated(self, self._conditions(embeddings), self._shift)
        return Competing(embeddings, match_seen(embeddings, self._seen), generated)

    @torch.no_grad()
    def _represented(self, features: FloatArray) -> Tensor:
        """(B, R) of scaled features (B, D)."""
        parts = torch.split(torch.from_numpy(np.ascontiguousarray(features)), PART_ROWS)
        return torch.cat([self._represent(part.to(self.device)) for part in parts])

    def _real(self, train: Rows) -> RealRows:
        labels = torch.from_numpy(train.labels).to(self.device)
        return RealRows(self._represented(train.features), labels, len(train.embeddings))

    @torch.no_grad()
    def _shift_to(self, real: RealRows) -> Tensor:
        """(R,): how far generated rows of the seen classes lie off their `real` ones, in the mean over classes."""
        shift = torch.zeros(real.rows.shape[1], device=real.rows.device)
        if not self.params.shift_generated:
            return shift
        generated = _Generated(self, self._conditions(self._seen), shift)
        for number in range(real.n_classes):
            shift += real.rows[real.labels == number].mean(dim=0) - generated.of(number).mean(dim=0)
        return shift / real.n_classes

    def _state(self) -> dict[str, FloatArray]:
        final = {_FINAL + name: tensor.detach().cpu().numpy() for name, tensor in self._final.state().items()}
        told = {_SEEN: self._seen, _SHIFT: self._shift.cpu().numpy(), _SIGNED: np.array([self._is_signed], np.int64)}
        return {**super()._state(), **final, **told}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._is_signed = bool(state.get(_SIGNED, np.zeros(1))[0])  # not in older files
        super()._restore(state)
        self._seen = state[_SEEN]
        self._shift = torch.from_numpy(state[_SHIFT]).to(self.device)
        self._final = make_final(self.params, self.seed)
        self._final.restore(
            {
                name.removeprefix(_FINAL): torch.from_numpy(array).clone().to(self.device)  # aligned as torch does
                for name, array in state.items()
                if name.startswith(_FINAL)
            }
        )


class _Generated:
    """Generated rows of classes by number, as the final classifier sees them: moved by `shift` (R,)."""

    def __init__(self, model: GenerativeModel, embeddings: Tensor, shift: Tensor) -> None:
        self._model, self._embeddings, self._shift = model, embeddings, shift

    def __call__(self, classes: IntArray) -> Tensor:
        """(n_classes, synthetic_per_class, R)."""
        return torch.stack([self.of(int(number)) for number in classes]) + self._shift

    @torch.no_grad()
    def of(self, number: int) -> Tensor:
        """(synthetic_per_class, R) of one class, not moved. Every class gets the same draws: the seed's."""
        chance = torch.Generator(self._embeddings.device).manual_seed(self._model.seed)
        embeddings = self._embeddings[number].expand(self._model.params.synthetic_per_class, -1)
        return self._model._rows_of_classes(embeddings, chance)


class Batches:
    """Row numbers of steps, endlessly: pass after pass over all rows, each in a new random order."""

    def __init__(self, n_rows: int, size: int, generator: torch.Generator) -> None:
        self._n_rows, self._size, self._generator = n_rows, size, generator
        self._order = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if len(self._order) == 0:
            self._order = torch.randperm(self._n_rows, generator=self._generator, device=self._generator.device)
        rows, self._order = self._order[: self._size], self._order[self._size :]
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What is left of the pass."""
        return {"order": self._order.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._order = state_dict["order"].to(self._generator.device)


class Averages:
    """Means of the losses of an epoch's steps. Tensors are read once, at the end: reading one waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, **losses: Tensor) -> None:
        """Take one step's losses in."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Each loss's mean."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}


def noise_dim(params: GANParams, embedding_dim: int) -> int:
    """Width of z."""
    return params.noise_dim if params.noise_dim is not None else embedding_dim


def draw(n_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Standard normal (n_rows, width)."""
    return torch.randn(n_rows, width, generator=generator, device=generator.device)
