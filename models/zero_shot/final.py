"""Final classifiers of methods that generate features: real rows of seen classes beside generated ones of unseen.

`lda`, `nearest_mean` and `nearest` score a class by its own rows, so that classes can come and go at no cost; `softmax`
and `svm`, which the papers use, are trained anew for each set of classes that competes. Letters in trailing comments:
B images of a step, C classes, R the representation's width, S seen classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional

from models.base import FloatArray, IntArray
from models.errors import InvalidInput
from models.generative_params import GenerativeParams
from models.zero_shot.layers import linear

CACHED_CLASSES = 100_000
CACHED_SETS = 4
MAX_NEW_CLASSES = 50
"""More classes that rows are yet to be generated for take too long for whoever only wants scores."""
SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9, 0.97)
"""What is tried on validation classes. The more a generator errs about the means of new classes, the more is right."""
SHRINKAGE = 0.3
"""Without validation classes."""
DIVERGED = "Features that the method makes are no numbers any more: its training diverged. Lower its learning rate."


@dataclass(frozen=True)
class RealRows:
    """Training images as the final classifier sees them: rows (N, R), labels (N,) of the S seen classes."""

    rows: Tensor
    labels: Tensor
    n_classes: int


@dataclass(frozen=True)
class Competing:
    """The classes that compete: embeddings (C, E), each one's number among the seen classes or -1, and a generator.

    generate: numbers of classes -> generated rows of each, (n, n_rows, R).
    """

    embeddings: FloatArray
    seen: IntArray
    generate: Callable[[IntArray], Tensor]


class FinalClassifier(ABC):
    """Scores rows for competing classes; `state` holds what `restore` needs."""

    is_joint: ClassVar[bool] = False

    def __init__(self, params: GenerativeParams, seed: int, shrinkage: float | None = None) -> None:
        self.params, self.seed = params, seed
        self.shrinkage = params.shrinkage if params.shrinkage is not None else shrinkage

    @abstractmethod
    def fit(self, real: RealRows) -> None:
        """Take in the seen classes' rows."""

    @abstractmethod
    def scores(self, rows: Tensor, classes: Competing) -> Tensor:
        """(B, C) of rows (B, R)."""

    @abstractmethod
    def is_ready(self, classes: Competing) -> bool:
        """Whether `scores` of these classes has little to do before it can tell."""

    @abstractmethod
    def prepared(self, classes: Competing) -> Self:
        """One that has done it all."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The learned tensors."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""


class _ByClass(FinalClassifier):
    """One summary (K, R) a class, kept for classes that come again."""

    def __init__(self, params: GenerativeParams, seed: int, shrinkage: float | None = None) -> None:
        super().__init__(params, seed, shrinkage)
        self._generated: OrderedDict[bytes, Tensor] = OrderedDict()

    @abstractmethod
    def _summary(self, rows: Tensor) -> Tensor:
        """(..., K, R) of a class's rows (..., n, R)."""

    @abstractmethod
    def _seen_summary(self, number: int) -> Tensor:
        """(K, R) of a seen class's real rows."""

    def is_ready(self, classes: Competing) -> bool:
        return len(self._new(classes)) <= MAX_NEW_CLASSES

    def prepared(self, classes: Competing) -> Self:
        self._summaries(classes)
        return self

    def _new(self, classes: Competing) -> IntArray:
        """Positions of classes without real rows that nothing was generated for yet."""
        unseen = np.flatnonzero(classes.seen < 0)
        return np.array([c for c in unseen if classes.embeddings[c].tobytes() not in self._generated], np.int64)

    def _summaries(self, classes: Competing) -> list[Tensor]:
        keys = [row.tobytes() for row in classes.embeddings]
        new = self._new(classes)
        for part in np.array_split(new, max(1, -(-len(new) * self.params.synthetic_per_class // 2**16))):
            # One at a time: a class's last bits must not depend on which others came with it.
            for c, rows in zip(part, classes.generate(part) if len(part) else (), strict=True):
                self._generated[keys[c]] = self._summary(rows)
        found = [
            self._seen_summary(int(number)) if number >= 0 else self._generated[key]
            for key, number in zip(keys, classes.seen, strict=True)
        ]
        while len(self._generated) > CACHED_CLASSES:
            self._generated.popitem(last=False)
        return found


class LinearDiscriminants(_ByClass):
    """Gaussians with one covariance: x^T P m_c - m_c^T P m_c / 2 about the mean of the seen classes' means.

    m_c: mean of the class's rows; P: inverse of the seen classes' within-class covariance, shrunk to the identity.
    """

    def fit(self, real: RealRows) -> None:
        self.fit_covariance(real)
        shrinkage = self.shrinkage if self.shrinkage is not None else SHRINKAGE
        # Row by row in memory, as it will be when it was saved and loaded: the order decides the last bits.
        self._precision = torch.cholesky_inverse(self._factor(shrinkage)).float().contiguous()
        del self._covariance

    def fit_covariance(self, real: RealRows) -> None:
        """All of `fit` that does not depend on the shrinkage."""
        counts = torch.bincount(real.labels, minlength=real.n_classes)  # (S,)
        sums = torch.zeros(real.n_classes, real.rows.shape[1], device=real.rows.device)
        self._means = sums.index_add_(0, real.labels, real.rows) / counts[:, None]  # (S, R)
        self._origin = self._means.mean(dim=0)
        # Classes weigh the same, as in the measures.
        within = (real.rows - self._means[real.labels]) * counts[real.labels, None].float().rsqrt()
        self._covariance = (within.T @ within / real.n_classes).double()  # (R, R)

    def scores(self, rows: Tensor, classes: Competing) -> Tensor:
        means = self._centred_means(classes)  # (C, R)
        return self._scores_by(means @ self._precision, means, rows)

    def scores_at(self, rows: Tensor, classes: Competing, shrinkage: float) -> Tensor:
        """What `scores` would be with another shrinkage, (B, C), after `fit_covariance` alone."""
        means = self._centred_means(classes)
        weight = torch.cholesky_solve(means.T.double(), self._factor(shrinkage)).T.float()
        return self._scores_by(weight, means, rows)

    def state(self) -> dict[str, Tensor]:
        return {"means": self._means, "origin": self._origin, "precision": self._precision}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._means, self._origin, self._precision = state["means"], state["origin"], state["precision"]

    def _factor(self, shrinkage: float) -> Tensor:
        """Cholesky factor of the shrunk covariance, (R, R)."""
        level = self._covariance.diagonal().mean().clamp(min=1e-12)
        covariance = self._covariance * (1 - shrinkage)
        covariance.diagonal().add_(shrinkage * level)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed or not factor.diagonal().isfinite().all():
            if not covariance.isfinite().all():
                raise InvalidInput(DIVERGED, field="params/learning_rate")
            raise InvalidInput(
                f"With a shrinkage of {shrinkage:g} the covariance of the seen classes' features has no inverse in "
                "float64. Raise it.",
                field="params/shrinkage",
            )
        return torch.as_tensor(factor)

    def _centred_means(self, classes: Competing) -> Tensor:
        return torch.cat(self._summaries(classes)) - self._origin

    def _scores_by(self, weight: Tensor, means: Tensor, rows: Tensor) -> Tensor:
        return (rows - self._origin) @ weight.T - (weight * means).sum(dim=1) / 2

    def _summary(self, rows: Tensor) -> Tensor:
        return rows.mean(dim=-2, keepdim=True)

    def _seen_summary(self, number: int) -> Tensor:
        return self._means[number, None]


class NearestMean(_ByClass):
    """Cosine with the mean of a class's unit rows."""

    def fit(self, real: RealRows) -> None:
        sums = torch.zeros(real.n_classes, real.rows.shape[1], device=real.rows.device)
        sums.index_add_(0, real.labels, functional.normalize(real.rows, dim=1))
        self._means = functional.normalize(sums, dim=1)

    def scores(self, rows: Tensor, classes: Competing) -> Tensor:
        return functional.normalize(rows, dim=1) @ torch.cat(self._summaries(classes)).T

    def state(self) -> dict[str, Tensor]:
        return {"means": self._means}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._means = state["means"]

    def _summary(self, rows: Tensor) -> Tensor:
        return functional.normalize(functional.normalize(rows, dim=-1).mean(dim=-2, keepdim=True), dim=-1)

    def _seen_summary(self, number: int) -> Tensor:
        return self._means[number, None]


class Nearest(_ByClass):
    """Cosine with the nearest row of a class."""

    def fit(self, real: RealRows) -> None:
        self._rows, self._labels = functional.normalize(real.rows, dim=1), real.labels

    def scores(self, rows: Tensor, classes: Competing) -> Tensor:
        unit = functional.normalize(rows, dim=1)
        return torch.stack([(unit @ summary.T).amax(dim=1) for summary in self._summaries(classes)], dim=1)

    def state(self) -> dict[str, Tensor]:
        return {"rows": self._rows, "labels": self._labels}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._rows, self._labels = state["rows"], state["labels"]

    def _summary(self, rows: Tensor) -> Tensor:
        return functional.normalize(rows, dim=-1)

    def _seen_summary(self, number: int) -> Tensor:
        return self._rows[self._labels == number]


class _Joint(FinalClassifier):
    """A linear classifier trained on all competing classes' rows; the last few sets of classes are kept."""

    is_joint: ClassVar[bool] = True

    def __init__(self, params: GenerativeParams, seed: int, shrinkage: float | None = None) -> None:
        super().__init__(params, seed, shrinkage)
        self._trained: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    @abstractmethod
    def _train(self, rows: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
        """Weights (C, R) and bias (C,)."""

    def fit(self, real: RealRows) -> None:
        self._rows, self._labels = real.rows, real.labels

    def scores(self, rows: Tensor, classes: Competing) -> Tensor:
        weight, bias = self._head(classes.embeddings.tobytes(), classes)
        return rows @ weight.T + bias

    def is_ready(self, classes: Competing) -> bool:  # noqa: ARG002 - it is never sure to stay so
        return False

    def prepared(self, classes: Competing) -> Self:
        """A copy that keeps what was trained for these classes, however many others come along."""
        key = classes.embeddings.tobytes()
        prepared = copy(self)
        prepared._trained = OrderedDict({key: self._head(key, classes)})
        return prepared

    def _head(self, key: bytes, classes: Competing) -> tuple[Tensor, Tensor]:
        """Weights (C, R) and bias (C,) for these classes."""
        if key not in self._trained:
            self._trained[key] = self._train(*self._training_rows(classes), len(classes.embeddings))
            while len(self._trained) > CACHED_SETS:
                self._trained.popitem(last=False)
        self._trained.move_to_end(key)
        return self._trained[key]

    def _training_rows(self, classes: Competing) -> tuple[Tensor, Tensor]:
        """Rows (N, R) of all that compete and their labels (N,); InvalidInput where some are no numbers."""
        position = torch.full((int(self._labels.max()) + 1,), -1, device=self._labels.device)
        seen = np.flatnonzero(classes.seen >= 0)
        position[torch.from_numpy(classes.seen[seen]).to(position.device)] = torch.from_numpy(seen).to(position.device)
        labels = position[self._labels]
        rows, labels = self._rows[labels >= 0], labels[labels >= 0]
        unseen = np.flatnonzero(classes.seen < 0)
        if len(unseen):
            generated = classes.generate(unseen)  # (U, n, R)
            numbers = torch.from_numpy(unseen).to(labels.device).repeat_interleave(generated.shape[1])
            rows, labels = torch.cat([rows, generated.flatten(0, 1)]), torch.cat([labels, numbers])
        if not rows.isfinite().all():
            raise InvalidInput(DIVERGED, field="params/learning_rate")
        return rows, labels

    def state(self) -> dict[str, Tensor]:
        found = {"rows": self._rows.half() if _fit_float16(self._rows) else self._rows, "labels": self._labels}
        if self._trained:  # the largest set: as a rule, all classes
            key = max(self._trained, key=lambda key: len(self._trained[key][1]))
            weight, bias = self._trained[key]
            found |= {"weight": weight, "bias": bias, "key": torch.frombuffer(bytearray(key), dtype=torch.float32)}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._rows, self._labels = state["rows"].float(), state["labels"]
        if "key" in state:
            self._trained[state["key"].cpu().numpy().tobytes()] = (state["weight"], state["bias"])


class Softmax(_Joint):
    """Linear softmax by Adam, as the papers train it."""

    def _train(self, rows: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
        return train_softmax(
            rows,
            labels,
            n_classes,
            epochs=self.params.final_epochs,
            learning_rate=self.params.final_learning_rate,
            batch_size=self.params.batch_size,
            seed=self.seed,
        )


class LinearSVM(_Joint):
    """One linear SVM a class against all others (scikit-learn's)."""

    def _train(self, rows: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
        if n_classes == 1:
            return torch.zeros(1, rows.shape[1], device=rows.device), torch.zeros(1, device=rows.device)
        machine = LinearSVC(C=self.params.svm_cost, random_state=self.seed)
        machine.fit(rows.cpu().numpy(), labels.cpu().numpy())
        weight, bias = machine.coef_, machine.intercept_
        if n_classes == 2:  # one machine for both
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return (
            torch.from_numpy(weight.astype(np.float32)).to(rows.device),
            torch.from_numpy(bias.astype(np.float32)).to(rows.device),
        )


def _fit_float16(rows: Tensor) -> bool:
    """Whether each column's largest value lies where float16 has its full precision: what is small beside it may go."""
    largest, halves = rows.abs().amax(dim=0), torch.finfo(torch.float16)
    return bool(((largest == 0) | (largest >= halves.tiny) & (largest <= halves.max)).all())


@torch.enable_grad()
def train_softmax(
    rows: Tensor, labels: Tensor, n_classes: int, *, epochs: int, learning_rate: float, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Weights (C, R) and bias (C,) of a linear softmax on rows (N, R) with labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    layer = linear(rows.shape[1], n_classes, generator).to(rows.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=learning_rate, betas=(0.5, 0.999), fused=True)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(rows), generator=generator).to(rows.device), batch_size):
            loss = functional.cross_entropy(layer(rows[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
    return layer.weight.detach(), layer.bias.detach()


_KINDS: dict[str, type[FinalClassifier]] = {
    "lda": LinearDiscriminants,
    "softmax": Softmax,
    "svm": LinearSVM,
    "nearest_mean": NearestMean,
    "nearest": Nearest,
}


def make_final(params: GenerativeParams, seed: int, shrinkage: float | None = None) -> FinalClassifier:
    """The final classifier that `params` ask for, not yet fitted; `shrinkage` where they leave it open."""
    return _KINDS[params.final](params, seed, shrinkage)
