"""SJE: score(x, y) = (x W + b) . phi(y), learned by gradient descent.

Akata et al., "Evaluation of Output Embeddings for Fine-Grained Image Classification" (CVPR 2015,
https://arxiv.org/abs/1409.8403), Eq. 1-4, with the losses in use since: the original structured hinge; the
cross-entropy; and, as in the code of VGSE (CVPR 2022), the cross-entropy of probabilities, that is a second softmax.
Letters in trailing comments: B images of a step, C classes, D features, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.base import FloatArray, OnProgress, Progress
from models.params import Params, SJEParams
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.folds import Rows
from models.zero_shot.scaling import Scaling

INITIAL_WEIGHT = 0.02
"""Standard deviation of W's start, as in VGSE's code."""


class SJE(ZeroShotModel):
    """Bilinear compatibility. Scores are `scale` x compatibility; after double_softmax training too."""

    method: ClassVar[str] = "sje"
    params_class: ClassVar[type[Params]] = SJEParams
    params: SJEParams

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
        params = self.params
        generator = torch.Generator().manual_seed(self.seed)
        features = torch.from_numpy(train.features).to(self.device)
        labels = torch.from_numpy(train.labels).to(self.device)
        embeddings = torch.from_numpy(train.embeddings).to(self.device)
        weight = torch.randn(features.shape[1], embeddings.shape[1], generator=generator) * INITIAL_WEIGHT  # (D, E)
        self._weight = weight.to(self.device).requires_grad_()
        self._bias = torch.zeros(embeddings.shape[1], device=self.device, requires_grad=True)
        optimizer = torch.optim.Adam([self._weight, self._bias], lr=params.learning_rate, betas=(0.5, 0.999))
        for epoch in range(1, epochs + 1):
            loss = 0.0
            order = torch.randperm(len(features), generator=generator).to(self.device)
            for rows in torch.split(order, params.batch_size):
                step_loss = self._loss(features[rows], labels[rows], embeddings)
                optimizer.zero_grad()
                step_loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
                optimizer.step()
                loss += step_loss.item() * len(rows) / len(features)
            yield {"epoch": float(epoch), "loss": loss}

    def _loss(self, features: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
        params = self.params
        scores = params.scale * ((features @ self._weight + self._bias) @ embeddings.T)  # (B, C)
        loss = compatibility_loss(scores, labels, params.loss)
        if params.weight_penalty:
            loss = loss + params.weight_penalty * self._weight.norm()
        return loss

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        with torch.no_grad():
            rows = torch.from_numpy(np.ascontiguousarray(features)).to(self.device)
            projected = rows @ self._weight + self._bias  # (N, E)
            scores = self.params.scale * (projected @ torch.from_numpy(embeddings).to(self.device).T)
        result: FloatArray = scores.cpu().numpy()
        return result

    def _state(self) -> dict[str, FloatArray]:
        return {"weight": self._weight.detach().cpu().numpy(), "bias": self._bias.detach().cpu().numpy()}

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._weight = torch.from_numpy(state["weight"]).to(self.device)
        self._bias = torch.from_numpy(state["bias"]).to(self.device)

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


def compatibility_loss(scores: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean loss of `scores` (B, C) for `labels` (B,): 'ce', 'double_softmax' or 'hinge'."""
    if kind == "hinge":
        right = scores.gather(1, labels[:, None])
        margins = scores - right + 1  # (B, C); Delta(y, y') = 1 for every wrong class
        margins = margins.scatter(1, labels[:, None], 0.0)  # Delta(y, y) = 0, so the maximum is never negative
        return margins.amax(dim=1).mean()
    if kind == "double_softmax":
        scores = scores.softmax(dim=1)
    return functional.cross_entropy(scores, labels)
