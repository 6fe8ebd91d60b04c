"""What classifiers that learn by gradient descent share: epochs, validation, choosing the epoch over folds, refitting.

A method writes its network, the loss of a batch and the scores; `EpochModel` does the rest. While settings are chosen,
each fold's trial watches T1 on classes that it does not learn from; the epoch that is best over the folds is then
trained on all seen classes. Letters in trailing comments: B images of a step, C classes, D features, E embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.base import FloatArray, OnProgress, Progress
from models.classifier_params import GradientParams
from models.errors import ShapeMismatch
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.scaling import Scaling


@dataclass(frozen=True)
class TrainingData:
    """Training rows on the device: features (N, D), labels (N,), unit embeddings (C, E); and the source of chance."""

    features: Tensor
    labels: Tensor
    embeddings: Tensor
    generator: torch.Generator


class EpochModel(ZeroShotModel):
    """Trains a network with Adam and chooses the number of epochs on validation classes."""

    params: GradientParams
    network: nn.Module

    # -- what a method writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        """A network with fresh weights, drawn from `generator` alone."""

    @abstractmethod
    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Scores (B, C) of scaled features (B, D) with unit embeddings (C, E)."""

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Mean loss of a batch: features (B, D), labels (B,), unit embeddings (C, E)."""
        raise NotImplementedError(f"{type(self).__name__} needs _loss or _objective")

    def _objective(self, data: TrainingData) -> Callable[[Tensor], Tensor]:
        """The loss as a function of a step's row numbers; a method that needs more than its batch writes this."""
        return lambda rows: self._loss(data.features[rows], data.labels[rows], data.embeddings)

    def _optimizer(self) -> torch.optim.Optimizer:
        params = self.params
        return torch.optim.Adam(
            self.network.parameters(), lr=params.learning_rate, betas=(0.5, 0.999), weight_decay=params.weight_decay
        )

    # -- what all share ------------------------------------------------------------------------------------------------

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        epochs = int(setting["epoch"]) if setting is not None else self.params.epochs
        history: History = []
        for entry in self._epochs(train, epochs):
            on_progress(Progress("training", len(history) + 1, epochs, {"loss": entry["loss"]}))
            history.append(entry)
        return {"epoch": float(epochs)}, history

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if not self.params.early_stopping:
            return []
        history: History = []
        for entry in self._epochs(train, self.params.epochs):
            entry["validation_t1"] = self._validation_t1(validation)
            history.append(entry)
            metrics = {"loss": entry["loss"], "validation_t1": entry["validation_t1"]}
            on_progress(Progress("choosing", len(history), self.params.epochs, metrics))
            if len(history) - best_epoch([entry["validation_t1"] for entry in history]) >= self.params.patience:
                break
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return {"epoch": float(choose_epoch([[entry["validation_t1"] for entry in history] for history in tried]))}

    def _epochs(self, train: Rows, epochs: int) -> Iterator[dict[str, float]]:
        """Train; after each epoch its number and loss."""
        generator = torch.Generator().manual_seed(self.seed)
        features, labels, embeddings = (
            torch.from_numpy(array).to(self.device) for array in (train.features, train.labels, train.embeddings)
        )
        self.network = self._make_network(features.shape[1], embeddings.shape[1], generator).to(self.device)
        objective = self._objective(TrainingData(features, labels, embeddings, generator))
        optimizer = self._optimizer()
        for epoch in range(1, epochs + 1):
            loss = 0.0
            order = torch.randperm(len(features), generator=generator).to(self.device)
            for rows in torch.split(order, self.params.batch_size):
                step_loss = objective(rows)
                optimizer.zero_grad()
                step_loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
                optimizer.step()
                loss += step_loss.item() * len(rows) / len(features)
            yield {"epoch": float(epoch), "loss": loss}

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        with torch.no_grad():
            rows = torch.from_numpy(np.ascontiguousarray(features)).to(self.device)
            scores = self._score(rows, torch.from_numpy(np.ascontiguousarray(embeddings)).to(self.device))
        result: FloatArray = scores.cpu().numpy()
        return result

    def _state(self) -> dict[str, FloatArray]:
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        network = self._make_network(*self._dims, torch.Generator())
        for name, own in network.state_dict().items():
            if state[name].shape != tuple(own.shape):
                raise ShapeMismatch(f"The saved {name} is {state[name].shape}, not {tuple(own.shape)}. Save it again.")
        network.load_state_dict({name: torch.from_numpy(state[name]) for name in network.state_dict()})
        self.network = network.to(self.device)

    def _scaling_kind(self) -> Scaling:
        return self.params.normalize


def smoothed(t1: Sequence[float]) -> list[float]:
    """Each epoch's `t1` averaged with its two neighbours a side: one lucky epoch cannot win."""
    return [float(np.mean(t1[max(0, i - 2) : i + 3])) for i in range(len(t1))]


def best_epoch(t1: Sequence[float]) -> int:
    """The epoch, from 1, with the highest smoothed `t1`; ties: the earliest."""
    return int(np.argmax(np.round(smoothed(t1), 9))) + 1


def choose_epoch(folds: Sequence[Sequence[float]]) -> int:
    """The epoch, from 1, with the highest smoothed T1 on average over the folds; ties: the earliest.

    A fold that stopped early stays where it was. Earlier epochs within one standard error are not preferred: five
    folds of a few classes have so large an error that training would end after its first steps.
    """
    longest = max(len(t1) for t1 in folds)
    curves = [np.pad(smoothed(t1), (0, longest - len(t1)), mode="edge") for t1 in folds]
    return int(np.argmax(np.round(np.mean(curves, axis=0), 9))) + 1
