"""What classifiers share that learn a compatibility by gradient descent: a method writes its network, loss and scores.

Letters in trailing comments: B images of a step, C classes, D features, E embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray, OnProgress
from models.classifier_params import GradientParams
from models.precision import mixed
from models.zero_shot.checkpoints import Chance, Run, Tape
from models.zero_shot.epochs import EpochModel
from models.zero_shot.folds import Rows


@dataclass(frozen=True)
class TrainingData:
    """Training rows on the device: features (N, D), labels (N,), unit embeddings (C, E); the source of chance."""

    features: Tensor
    labels: Tensor
    embeddings: Tensor
    generator: torch.Generator
    run: Run = field(default_factory=lambda: Tape(None, "").begin())


class GradientModel(EpochModel):
    """Trains a network with Adam on the loss of each step's rows."""

    params: GradientParams

    # -- what a method writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _score(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Scores (B, C) of scaled features (B, D) with unit embeddings (C, E)."""

    @abstractmethod
    def _objective(self, data: TrainingData) -> Callable[[Tensor], Tensor]:
        """The loss as a function of a step's row numbers."""

    def _optimizer(self) -> torch.optim.Optimizer:
        params = self.params
        return torch.optim.Adam(
            self.network.parameters(),
            lr=params.learning_rate,
            betas=(0.5, 0.999),
            weight_decay=params.weight_decay,
            fused=True,
        )

    # -- what all share ------------------------------------------------------------------------------------------------

    def _epochs(
        self,
        train: Rows,
        run: Run,
        epochs: int,
        on_progress: OnProgress,  # noqa: ARG002 - nothing comes first
    ) -> Iterator[dict[str, float]]:
        generator = torch.Generator().manual_seed(self.seed)
        features, labels, embeddings = (
            torch.from_numpy(array).to(self.device) for array in (train.features, train.labels, train.embeddings)
        )
        self.network = self._make_network(features.shape[1], embeddings.shape[1], generator).to(self.device)
        objective = self._objective(TrainingData(features, labels, embeddings, generator, run))
        optimizer = self._optimizer()
        run.resume(network=self.network, optimizer=optimizer, chance=Chance(generator))
        for epoch in range(len(run.history) + 1, epochs + 1):
            losses: list[Tensor] = []
            order = torch.randperm(len(features), generator=generator).to(self.device)
            batches = torch.split(order, self.params.batch_size)
            for rows in batches:
                with mixed(self.params.precision, self.device):
                    step_loss = objective(rows)
                optimizer.zero_grad()
                step_loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
                optimizer.step()
                losses.append(step_loss.detach())
            mean = 0.0
            # Read once, at the end: reading one waits for the device.
            for loss, rows in zip(torch.stack(losses).tolist(), batches, strict=True):
                mean += loss * len(rows) / len(features)
            yield {"epoch": float(epoch), "loss": mean}

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        with torch.no_grad():
            rows = torch.from_numpy(np.ascontiguousarray(features)).to(self.device)
            scores = self._score(rows, torch.from_numpy(np.ascontiguousarray(embeddings)).to(self.device))
        result: FloatArray = scores.cpu().numpy()
        return result


class BatchModel(GradientModel):
    """One whose loss needs no more than the images of the step."""

    @abstractmethod
    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        """Mean loss of a batch: features (B, D), labels (B,), unit embeddings (C, E)."""

    def _objective(self, data: TrainingData) -> Callable[[Tensor], Tensor]:
        return lambda rows: self._loss(data.features[rows], data.labels[rows], data.embeddings)
