"""What classifiers that learn in epochs share: validation after each, choosing the epoch over folds, refitting.

A method trains its network and yields after each epoch; `EpochModel` does the rest. While settings are chosen, each
fold's trial watches T1 on classes that it does not learn from; the epoch that is best over the folds is then trained
on all seen classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from models.base import FloatArray, LabelledFeatures, OnProgress, Progress, ignore_progress
from models.classifier_params import EpochParams
from models.errors import Diverged, ShapeMismatch
from models.zero_shot.base import History, Setting, ZeroShotModel
from models.zero_shot.checkpoints import Run, Tape
from models.zero_shot.checks import checked
from models.zero_shot.folds import Rows
from models.zero_shot.scaling import Scaling

Weights = dict[str, Tensor]
REACH = 2
"""An epoch's T1 is averaged with this many neighbours a side."""


class EpochModel(ZeroShotModel):
    """Trains a network epoch by epoch and chooses their number on validation classes."""

    params: EpochParams
    network: nn.Module
    _kept: _Snapshots | None = None
    _watcher: Callable[[float], None] | None = None
    """Told the number of each epoch when all is learned that can be after it."""

    @abstractmethod
    def _make_network(self, feature_dim: int, embedding_dim: int, generator: torch.Generator) -> nn.Module:
        """A network with fresh weights, drawn from `generator` alone."""

    @abstractmethod
    def _epochs(self, train: Rows, run: Run, epochs: int, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        """Make `self.network` and train it; after each epoch its number and losses, the first of them `loss`.

        It begins after the epochs that `run` has seen, with all parts in the state that `run.resume` puts them in.
        `on_progress` is for what comes before the first epoch.
        """

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        epochs = int(setting["epoch"]) if setting is not None else self.params.epochs
        history: History = []
        if self._kept is None or not self._kept.restore(self.network, train, epochs):
            run = self._tape.begin()

            def told(entry: dict[str, float]) -> bool:
                on_progress(Progress("training", int(entry["epoch"]), epochs, _metrics(entry)))
                if self._watcher is not None:
                    self._settle(train, setting)
                    self._watcher(entry["epoch"])
                return True

            self._follow(train, run, epochs, on_progress, told)
            history = run.history
        self._settle(train, setting)
        return {"epoch": float(epochs)}, history

    def _settle(self, train: Rows, setting: Setting | None) -> None:
        """What a method learns when the epochs are over, from the network as it is."""

    def watch_epochs(
        self,
        features: LabelledFeatures,
        class_embeddings: FloatArray,
        look: Callable[[ZeroShotModel], Mapping[str, float]],
        *,
        on_progress: OnProgress = ignore_progress,
    ) -> History:
        """What `look` sees after each of all `epochs` of this fitted model's training, which a copy goes through again.

        For reports only: the model stays as it is. Inputs are those of `fit`. Lets `Cancelled` pass.
        """
        self._require_fitted()
        again, seen = copy(self), list[dict[str, float]]()
        again._tape, again._kept = Tape(None, ""), None
        again._watcher = lambda epoch: seen.append({"epoch": epoch, **look(again)})
        raw, embeddings = checked(features, class_embeddings)
        train = Rows(self._scaling(raw), features.labels.astype(np.int64), embeddings)
        setting = {**self.validation_["setting"], "epoch": float(self.params.epochs)}

        def told(progress: Progress) -> None:
            on_progress(Progress("watching", progress.completed, progress.total, progress.metrics))

        again._learn(train, setting, told)
        return seen

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if not self.params.early_stopping:
            return []
        run, epochs = self._tape.begin(), self.params.epochs
        self._kept = kept = _Snapshots(train, run.kept)
        curve = [entry["validation_t1"] for entry in run.history]

        def may_get_better(entry: dict[str, float]) -> bool:
            entry.update(self._validate(validation))
            curve.append(entry["validation_t1"])
            kept.take(self.network, curve)
            on_progress(Progress("choosing", len(curve), epochs, _metrics(entry)))
            return len(curve) < self._first_stop() or len(curve) - best_epoch(curve) < self.params.patience

        self._follow(train, run, epochs, on_progress, may_get_better)
        return run.history

    def _follow(
        self, train: Rows, run: Run, epochs: int, on_progress: OnProgress, after: Callable[[dict[str, float]], bool]
    ) -> None:
        """Train to the last epoch, or until `after` one says False; a run that ended before is taken as it is."""
        self._begin(train)
        if run.is_done:
            self.network = self._make_network(train.features.shape[1], train.embeddings.shape[1], torch.Generator())
            self.network.load_state_dict(run.network)
            self.network.to(self.device)
            return
        for entry in self._epochs(train, run, epochs, on_progress):
            refuse_divergence(entry, int(entry["epoch"]), self.network)
            if not after(entry) or len(run.history) + 1 == epochs:
                run.history.append(entry)
                break
            run.record(entry)
        run.end({name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()})

    def _first_stop(self) -> int:
        """Epochs before which training does not stop early: while losses are still being brought in."""
        return 0

    def _begin(self, train: Rows) -> None:
        """Take in what a method needs of its training rows beside the network."""

    def _validate(self, validation: Rows) -> dict[str, float]:
        """`validation_t1` of the present state, and what else an epoch's entry is to tell."""
        return {"validation_t1": self._validation_t1(validation)}

    def _pick(self, tried: list[History]) -> Setting:
        return {"epoch": float(choose_epoch([[entry["validation_t1"] for entry in history] for history in tried]))}

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


def refuse_divergence(losses: Mapping[str, float], epoch: int, network: nn.Module, rate: str = "learning_rate") -> None:
    """Raises Diverged where an epoch's `losses` or the `network` after it are not finite; `rate`: what to lower.

    The losses are those before each step, and do not know of the last one's.
    """
    is_finite = all(map(math.isfinite, losses.values()))
    if not is_finite or not all(bool(weight.isfinite().all()) for weight in network.parameters()):
        raise Diverged(epoch, rate)


class _Snapshots:
    """Weights after the epochs that can still turn out to be the best: those need no second training."""

    def __init__(self, train: Rows, weights: dict[int, Weights]) -> None:
        self._train = train
        self._weights = weights

    def take(self, network: nn.Module, curve: Sequence[float]) -> None:
        """Keep what `network` is after epoch len(curve), and let go of what cannot be the best any more."""
        self._weights[len(curve)] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        settled = len(curve) - REACH  # what comes later changes the smoothed T1 of later epochs only
        keep = {best_epoch(curve, settled) if settled > 0 else 1, *range(settled + 1, len(curve) + 1)}
        for epoch in set(self._weights) - keep:
            del self._weights[epoch]

    def restore(self, network: nn.Module, train: Rows, epoch: int) -> bool:
        """Put `network` back to where it was after `epoch` on the same rows; False where that is not kept."""
        if train is not self._train or epoch not in self._weights:
            return False
        network.load_state_dict(self._weights[epoch])
        return True


def _metrics(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "epoch"}


def smoothed(t1: Sequence[float]) -> list[float]:
    """Each epoch's `t1` averaged with its neighbours: one lucky epoch cannot win."""
    return [float(np.mean(t1[max(0, i - REACH) : i + REACH + 1])) for i in range(len(t1))]


def best_epoch(t1: Sequence[float], last: int | None = None) -> int:
    """The epoch, from 1 (to `last`), with the highest smoothed `t1`; ties: the earliest."""
    return int(np.argmax(np.round(smoothed(t1)[:last], 9))) + 1


def choose_epoch(folds: Sequence[Sequence[float]]) -> int:
    """The epoch, from 1, with the highest smoothed T1 on average over the folds; ties: the earliest.

    A fold that stopped early stays where it was. Earlier epochs within one standard error are not preferred: five
    folds of a few classes have so large an error that training would end after its first steps.
    """
    longest = max(len(t1) for t1 in folds)
    curves = [np.pad(smoothed(t1), (0, longest - len(t1)), mode="edge") for t1 in folds]
    return int(np.argmax(np.round(np.mean(curves, axis=0), 9))) + 1
