"""PSR's tuples: which classes are similar, and the hardest of a few random images of similar and dissimilar ones.

Everything is computed for a whole batch at once: an image of a similar class is found by drawing a number below how
many such images there are, and looking it up in running totals a class. Letters in trailing comments: B images of a
step, C classes, D features, N training images, P candidates, U anchors of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**25
"""Numbers gathered at a time, 128 MiB: a large batch of wide features must not fill the memory."""
ROWS_READ = 100
"""Rows that a matrix product goes through in the time that one is read from anywhere in memory, about."""

Cosines = Callable[[Tensor], Tensor]
"""Row numbers of candidates (B, P) -> their cosines with the anchors, (B, P)."""


@dataclass(frozen=True)
class Relations:
    """delta (C, C), the cosine of class vectors; similar, dissimilar (C, C) bool: never a class and itself."""

    delta: Tensor
    similar: Tensor
    dissimilar: Tensor

    @classmethod
    def of(cls, vectors: Tensor, tau: float | None) -> Relations:
        """Of class vectors (C, E); `tau` None: every other class is dissimilar."""
        unit = functional.normalize(vectors, dim=1)
        delta = unit @ unit.T
        other = ~torch.eye(len(delta), dtype=torch.bool, device=delta.device)
        similar = torch.zeros_like(other) if tau is None else (delta >= tau) & other
        return cls(delta, similar, other & ~similar)


@dataclass(frozen=True)
class Mined:
    """One image a batch row: its row number (B,), its class's delta to the anchor's (B,), and 1 where there is one."""

    rows: Tensor
    delta: Tensor
    exists: Tensor


class TupleMiner:
    """Draws candidates from unit `features` (N, D) and keeps the hardest; no gradient runs through the choice."""

    def __init__(
        self, features: Tensor, labels: Tensor, relations: Relations, n_candidates: int, generator: torch.Generator
    ) -> None:
        self.features, self.labels, self.relations = features, labels, relations
        self.n_candidates, self.generator = n_candidates, generator
        self.order = torch.argsort(labels, stable=True)  # rows by class
        self.count = torch.bincount(labels, minlength=len(relations.delta))  # (C,)
        self.first = self.count.cumsum(0) - self.count  # where each class begins in `order`
        self.totals_similar = (relations.similar * self.count).cumsum(dim=1)  # (C, C)
        self.totals_dissimilar = (relations.dissimilar * self.count).cumsum(dim=1)

    @torch.no_grad()
    def cosines(self, anchors: Tensor, position: Tensor) -> Cosines:
        """Cosines of a step's anchors, unit rows (U, D) of which image b has number `position` b, and candidates.

        With few anchors all images are compared with each, once: reading candidates' rows one by one takes longer.
        """
        if len(anchors) * len(self.features) <= ROWS_READ * len(position) * self.n_candidates:
            table = anchors @ self.features.T  # (U, N)
            return lambda candidates: table[position[:, None], candidates]

        def read(candidates: Tensor) -> Tensor:
            size = max(1, CHUNK // (candidates.shape[1] * anchors.shape[1]))
            parts = zip(torch.split(candidates, size), torch.split(position, size), strict=True)
            return torch.cat([(self.features[some] @ anchors[own, :, None])[:, :, 0] for some, own in parts])

        return read

    def hardest_similar(self, cosines: Cosines, labels: Tensor, tau: float) -> Mined:
        """Of the candidates of similar classes, the one with the largest O2 for images of classes `labels` (B,)."""
        return self._hardest(cosines, labels, self.totals_similar, lambda s, delta: similar_term(s, delta, tau))

    def hardest_dissimilar(self, cosines: Cosines, labels: Tensor, tau: float) -> Mined:
        """The same of dissimilar classes, by the second term of O1."""
        return self._hardest(cosines, labels, self.totals_dissimilar, lambda s, delta: dissimilar_term(s, delta, tau))

    @torch.no_grad()
    def _hardest(
        self, cosines: Cosines, labels: Tensor, totals: Tensor, hardness: Callable[[Tensor, Tensor], Tensor]
    ) -> Mined:
        candidates = self.draw(labels, totals)  # (B, P)
        cosine = cosines(candidates)
        delta = self.relations.delta[labels[:, None], self.labels[candidates]]  # (B, P)
        pick = hardness(cosine, delta).argmax(dim=1, keepdim=True)
        exists = (totals[labels, -1] > 0).to(delta.dtype)
        return Mined(candidates.gather(1, pick)[:, 0], delta.gather(1, pick)[:, 0], exists)

    def draw(self, labels: Tensor, totals: Tensor) -> Tensor:
        """Row numbers (B, P), uniform over the images of the classes related to each label, with replacement.

        totals: (C, C) running totals of images over each class's related classes. A label without any gets arbitrary
        rows.
        """
        chance = torch.rand(len(labels), self.n_candidates, generator=self.generator, dtype=torch.float64)
        running = totals[labels]  # (B, C)
        number = (chance.to(labels.device) * running[:, -1:]).long()
        chosen = torch.searchsorted(running, number, right=True).clamp(max=running.shape[1] - 1)  # (B, P) classes
        before = running.gather(1, chosen) - self.count[chosen]
        place = (self.first[chosen] + number - before).clamp(0, len(self.order) - 1)  # in range where there is none too
        return self.order[place]


def similar_term(cosine: Tensor, delta: Tensor, tau: float) -> Tensor:
    """O2: how far `cosine` lies below tau or above `delta`."""
    return (tau - cosine).clamp(min=0) + (cosine - delta).clamp(min=0)


def dissimilar_term(cosine: Tensor, delta: Tensor, tau: float) -> Tensor:
    """The second term of O1: `cosine`, weighing more the less alike the classes."""
    return (tau - delta) * cosine
