"""Which class relation, chosen on seen classes that play unseen; never on test rows.

No relation is best everywhere: where SMO with alpha = -1 wins on one set, it overfits on another, on which an average
of neighbours is ahead. Groups of seen classes are held out in turn, each candidate composes them of the remaining ones,
and a closed-form compatibility (ESZSL's) on image features tells how well their images are then recognised. The unit of
the statistics is the class: a candidate has to beat the preferred ones by more than chance would over classes, since a
lucky draw of three classes moves T1 by tens of percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress, Progress, ignore_progress
from models.embedding.class_embedder import ClassEmbedder, Relation
from models.embedding.relations import Matrix, check_rows
from models.embedding.rows import blocks
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples
from models.params import ALL_NEIGHBORS, RelationParams

HELD_OUT = 0.15
"""Share of classes held out at a time: few, since relations grow better with every seen class that is left."""

N_FOLDS = 40
MIN_CLASSES = 4

CONFIDENCE = 1.64
"""Standard errors by which a candidate must lead to displace a preferred one: a one-sided test at 5 %."""

WAVG_SETTINGS = ((ALL_NEIGHBORS, 10.0), (ALL_NEIGHBORS, 5.0), (10, 5.0), (10, 10.0), (5, 5.0))
"""(n_neighbors, eta) of the WAvg candidates, in order of preference."""

SMO_SETTINGS = ((0, 1.0), (0, 0.3), (0, 0.1), (0, 1e-6), (-1, 0.3), (-1, 0.1), (-1, 0.03), (-1, 1e-6))
"""(alpha, ridge) of the SMO candidates, in order of preference."""

MANY_CLASSES = 50
"""With so many seen classes an average over all of them carries over better than SMO; with a few it does not."""

FEATURE_RIDGES = (1.0, 10.0)
EMBEDDING_RIDGES = (0.1, 1.0)
"""Ridges of the scorer, relative to the mean eigenvalue; scores are averaged over all pairs of them."""


@dataclass(frozen=True)
class Candidate:
    """One relation with its parameters."""

    relation: Relation
    params: RelationParams

    @property
    def label(self) -> str:
        """Short and readable: 'smo alpha=0 ridge=0.03 fused'."""
        params = self.params
        if self.relation == "smo":
            return f"smo alpha={params.alpha} ridge={params.ridge:g} {params.form}"
        neighbors = "all" if params.n_neighbors == ALL_NEIGHBORS else params.n_neighbors
        return f"wavg k={neighbors} eta={params.eta:g} {params.form}"


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's result: t1 is the mean over held-out classes; deficit to the best, with its standard error."""

    candidate: Candidate
    t1: float
    deficit: float
    deficit_error: float


@dataclass(frozen=True)
class RelationChoice:
    """The chosen relation and why; `table` in order of preference (empty if nothing could be compared).

    t1: of the chosen one on held-out classes; chance: what guessing reaches there.
    """

    relation: Relation
    params: RelationParams
    reason: str
    table: tuple[CandidateScore, ...]
    n_folds: int
    t1: float | None = None
    chance: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For reports: the choice, its reason in a sentence, and every candidate, best first."""
        return {
            "relation": self.relation,
            "params": self.params.model_dump(mode="json"),
            "reason": self.reason,
            "n_folds": self.n_folds,
            "candidates": [
                {
                    "name": score.candidate.label,
                    "t1": round(score.t1, 4),
                    "deficit": round(score.deficit, 4),
                    "deficit_error": round(score.deficit_error, 4),
                }
                for score in sorted(self.table, key=lambda score: -score.t1)
            ],
        }


def default_candidates(n_classes: int) -> tuple[Candidate, ...]:
    """WAvg and SMO in all forms, in order of preference for `n_classes` seen classes.

    The order is what counts between candidates that validation cannot tell apart, and is that of nested validation on
    seen classes of several sets (docs/decisions.md): the form that keeps the knowledge beside the composed vector
    first, the plain one, whose common mean makes some classes the nearest of everything, last; WAvg first where there
    are many classes to average, else SMO; a strong ridge first.
    """
    wavg: list[tuple[Relation, dict[str, Any]]] = [("wavg", {"n_neighbors": k, "eta": eta}) for k, eta in WAVG_SETTINGS]
    smo: list[tuple[Relation, dict[str, Any]]] = [
        ("smo", {"alpha": alpha, "ridge": ridge}) for alpha, ridge in SMO_SETTINGS
    ]
    return tuple(
        Candidate(name, RelationParams.model_validate({**own, "form": form}))
        for form in ("fused", "centred", "plain")
        for name, own in ([*wavg, *smo] if n_classes >= MANY_CLASSES else [*smo, *wavg])
    )


def select_relation(
    class_embeddings: FloatArray,
    knowledge: FloatArray,
    images: LabelledFeatures,
    *,
    seed: int = 0,
    defaults: RelationParams | None = None,
    candidates: Sequence[Candidate] | None = None,
    on_progress: OnProgress = ignore_progress,
) -> RelationChoice:
    """The first candidate that the best one does not clearly beat on held-out seen classes.

    class_embeddings (C, E) and knowledge (C, Dw): rows for each of `images.class_names`, all seen. images: training
    rows only. With fewer than 4 classes nothing can be compared: `defaults` with SMO, and the reason says so.
    Raises ShapeMismatch, InvalidInput (NaN), TooFewSamples (a class without images).
    """
    embeddings, vectors = _checked(class_embeddings, knowledge, images)
    n_classes = len(embeddings)
    if n_classes < MIN_CLASSES:
        reason = f"{n_classes} seen classes are too few to hold some out (at least {MIN_CLASSES}); took the defaults."
        return RelationChoice("smo", defaults or RelationParams(), reason, (), 0)
    options = tuple(candidates) if candidates is not None else default_candidates(n_classes)
    folds = draw_folds(n_classes, seed=seed)
    evidence = _Evidence(images, n_classes)
    hits = np.zeros((len(options), n_classes))
    for number, held_out in enumerate(folds):
        on_progress(Progress("relations", number, len(folds)))
        kept = np.setdiff1d(np.arange(n_classes), held_out)
        score = evidence.scorer(kept, held_out)
        for row, (known, asked) in enumerate(_vectors(options, embeddings, vectors, kept, held_out)):
            hits[row, held_out] += score(known, asked)
    times = np.bincount(np.concatenate(folds), minlength=n_classes)
    return replace(_choose(options, hits / times, len(folds)), chance=len(folds) / int(times.sum()))


def _vectors(
    options: Sequence[Candidate], embeddings: Matrix, knowledge: Matrix, kept: IntArray, held_out: IntArray
) -> Iterator[tuple[Matrix, Matrix]]:
    """Of each option: vectors of the kept classes, and of the held-out ones as if they were unseen."""
    names = tuple(str(i) for i in kept)
    solved: dict[tuple[Relation, RelationParams], Matrix] = {}  # the three forms of one relation share its solution
    for option in options:
        embedder = ClassEmbedder(names, embeddings[kept], knowledge[kept], option.relation, option.params)
        key = (option.relation, option.params.model_copy(update={"form": "plain"}))
        if key not in solved:
            solved[key] = embedder.relations(knowledge[held_out])
        yield embedder.seen_vectors(), embedder.compose(solved[key], knowledge[held_out])


def draw_folds(n_classes: int, *, seed: int = 0) -> list[IntArray]:
    """Groups of classes to hold out, about N_FOLDS: whole partitions, so that each class is held out equally often."""
    size = min(max(2, round(HELD_OUT * n_classes)), n_classes - 2)
    per_round = n_classes // size
    rng = np.random.default_rng(seed)
    folds: list[IntArray] = []
    for _ in range(max(2, round(N_FOLDS / per_round))):
        folds += [np.sort(group) for group in np.array_split(rng.permutation(n_classes), per_round)]
    return folds


def _choose(options: Sequence[Candidate], per_class: Matrix, n_folds: int) -> RelationChoice:
    """The first of `options` within CONFIDENCE standard errors of the best, by per-class accuracies (n_options, C)."""
    t1 = per_class.mean(axis=1)
    best = int(np.argmax(t1))
    deficits = per_class[best] - per_class
    errors = deficits.std(axis=1, ddof=1) / np.sqrt(per_class.shape[1])
    table = tuple(
        CandidateScore(option, float(mean), float(deficit), float(error))
        for option, mean, deficit, error in zip(options, t1, deficits.mean(axis=1), errors, strict=True)
    )
    # 1e-9: equal candidates may differ by rounding
    chosen = next(score for score in table if score.deficit <= CONFIDENCE * score.deficit_error + 1e-9)
    what = f"T1 {100 * chosen.t1:.1f} % on held-out seen classes"
    if chosen is table[best]:
        reason = f"{what}, the best of {len(table)} candidates over {n_folds} folds."
    else:
        reason = (
            f"{what}; {table[best].candidate.label} reached {100 * table[best].t1:.1f} %, but that is no more than "
            f"chance over classes explains (standard error {100 * chosen.deficit_error:.1f} %), so this one stays "
            "preferred."
        )
    return RelationChoice(chosen.candidate.relation, chosen.candidate.params, reason, table, n_folds, chosen.t1)


PART_ROWS = 2048

Score = Callable[[Matrix, Matrix], NDArray[np.float64]]


class _Evidence:
    """Image features of all seen classes; each fold's half of the closed form that no candidate changes."""

    def __init__(self, images: LabelledFeatures, n_classes: int) -> None:
        self.features = images.features
        every = np.arange(len(self.features))
        self.lengths = np.empty(len(every))
        for part in blocks(len(every), PART_ROWS):
            self.lengths[part] = _lengths(self.features[part])
        self.rows = [np.flatnonzero(images.labels == label) for label in range(n_classes)]
        self.means = np.stack([self._sum(rows) / len(rows) for rows in self.rows])
        # Each class weighs the same: (D, D) sum over classes of the class's mean outer product.
        self.counts = np.bincount(images.labels, minlength=n_classes)
        self.square = self._moment(every, self.counts[images.labels])

    def _units(self, rows: IntArray) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """These images' features at unit length, a part at a time: all of them may not fit into memory."""
        for part in blocks(len(rows), PART_ROWS):
            yield part, (self.features[rows[part]] / self.lengths[rows[part], None]).astype(np.float32)

    def _sum(self, rows: IntArray) -> Matrix:
        return np.asarray(sum(units.sum(axis=0, dtype=np.float64) for _, units in self._units(rows)))

    def _moment(self, rows: IntArray, counts: IntArray) -> Matrix:
        found = np.zeros((self.features.shape[1], self.features.shape[1]))
        for part, units in self._units(rows):
            units /= np.sqrt(counts[part]).astype(np.float32)[:, None]
            found += units.T @ units
        return found

    def scorer(self, kept: IntArray, held_out: IntArray) -> Score:
        """A function (kept vectors (S, E'), held-out vectors (V, E')) -> accuracy of each held-out class (V,)."""
        rows = np.concatenate([self.rows[c] for c in held_out])
        labels = np.repeat(np.arange(len(held_out)), self.counts[held_out])
        centre = self.means[kept].mean(axis=0)
        square = self.square - self._moment(rows, self.counts[held_out][labels]) - len(kept) * np.outer(centre, centre)
        responses = self._responses(square, (self.means[kept] - centre).T, rows, centre)

        def score(kept_vectors: Matrix, held_vectors: Matrix) -> NDArray[np.float64]:
            hits = np.zeros(len(held_out))
            for ridge in EMBEDDING_RIDGES:
                weights = _embedding_part(kept_vectors, held_vectors, ridge)
                for response in responses:
                    right = (response @ weights).argmax(axis=1) == labels
                    hits += np.bincount(labels, weights=right.astype(np.float64), minlength=len(held_out))
            return np.asarray(hits / self.counts[held_out] / (len(EMBEDDING_RIDGES) * len(responses)))

        return score

    def _responses(self, square: Matrix, targets: Matrix, rows: IntArray, centre: Matrix) -> list[Matrix]:
        """x^T (X^T X + ridge I)^-1 X^T Y of held-out images to the kept classes: one (N, S) for each ridge."""
        scale = np.trace(square) / len(square)
        eye = np.eye(len(square))
        solved = np.hstack([np.linalg.solve(square + ridge * scale * eye, targets) for ridge in FEATURE_RIDGES])
        found = np.empty((len(rows), solved.shape[1]))
        for part, units in self._units(rows):
            found[part] = (units - centre) @ solved
        return np.split(found, len(FEATURE_RIDGES), axis=1)


def _lengths(features: FloatArray) -> Matrix:
    """(N,) Euclidean lengths; 1 for rows of (nearly) no length."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    return np.where(lengths > 1e-12, lengths, 1.0)


def _embedding_part(kept: Matrix, held_out: Matrix, ridge: float) -> Matrix:
    """A (A^T A + ridge I)^-1 phi(u) = (A A^T + ridge I)^-1 A phi(u): (S, V), on the smaller side."""
    n_classes, dim = kept.shape
    if n_classes <= dim:
        gram = kept @ kept.T
        shift = max(ridge * np.trace(gram) / n_classes, 1e-9)
        return np.asarray(np.linalg.solve(gram + shift * np.eye(n_classes), kept @ held_out.T))
    gram = kept.T @ kept
    shift = max(ridge * np.trace(gram) / n_classes, 1e-9)
    return np.asarray(kept @ np.linalg.solve(gram + shift * np.eye(dim), held_out.T))


def _checked(class_embeddings: FloatArray, knowledge: FloatArray, images: LabelledFeatures) -> tuple[Matrix, Matrix]:
    embeddings, vectors = check_rows(class_embeddings, "class_embeddings"), check_rows(knowledge, "knowledge")
    names = images.class_names
    for name, rows in (("class_embeddings", embeddings), ("knowledge", vectors)):
        if len(rows) != len(names):
            raise ShapeMismatch(f"{name} has {len(rows)} rows for {len(names)} seen classes.", field=name)
    if len(images.features) != len(images.labels) or images.features.ndim != 2:
        raise ShapeMismatch(f"images has features {images.features.shape} and {len(images.labels)} labels.")
    if not all(np.isfinite(images.features[part]).all() for part in blocks(len(images.features), PART_ROWS)):
        raise InvalidInput("Image features hold NaN or infinity; leave such images out.", field="images")
    if len(images.labels) and not (images.labels.min() >= 0 and images.labels.max() < len(names)):
        raise InvalidInput(f"Image labels run past the {len(names)} class names.", field="images")
    empty = np.flatnonzero(np.bincount(images.labels, minlength=len(names)) == 0)
    if len(empty):
        raise TooFewSamples(
            f"Class {names[empty[0]]!r} has no image to choose a relation with; add some or leave it out.",
            field="images",
        )
    return embeddings, vectors
