"""How good a zero-shot classifier is: T1, and U, S, H. The only place accuracy is computed; numpy only.

All accuracies are fractions, and the mean over classes of the share of right images in each class, so that a class
with many photos weighs no more than one with few (Xian et al., "Zero-Shot Learning - A Comprehensive Evaluation of the
Good, the Bad and the Ugly", https://arxiv.org/abs/1707.00600, section 5.1).
Letters in trailing comments: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from models.base import FloatArray, IntArray, LabelledFeatures
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples, UnknownName

BoolArray = NDArray[np.bool_]
Confusion = tuple[tuple[int, int, int], ...]


class Scorer(Protocol):
    """What `evaluate` needs of a classifier."""

    @property
    def is_joint(self) -> bool:
        """Whether a class's scores depend on which other classes are scored with it."""
        ...

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        """Compatibility (n_images, n_classes) of each image with each class; higher is better."""
        ...


@dataclass(frozen=True)
class ClassTable:
    """The classes an evaluation ranks among: names, embeddings (n_classes, embedding_dim), is_seen (n_classes,)."""

    names: tuple[str, ...]
    embeddings: FloatArray
    is_seen: BoolArray

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.embeddings) == len(self.is_seen):
            raise ShapeMismatch(
                f"{len(self.names)} class names, {len(self.embeddings)} embeddings and {len(self.is_seen)} seen marks "
                "must be equally many."
            )
        if len(set(self.names)) != len(self.names):
            raise InvalidInput("A class name occurs twice in the table of classes; names must differ.")


@dataclass(frozen=True)
class ZSLReport:
    """Unseen images ranked among unseen classes. confusion: (i, j, n): n images of classes[i] were called classes[j].

    Of the confusion only what occurs is there, in ascending order: no more entries than images, however many classes.
    """

    t1: float
    per_class: dict[str, float]
    classes: tuple[str, ...]
    confusion: Confusion
    without_images: tuple[str, ...]
    n_images: int
    ece: float | None = None


@dataclass(frozen=True)
class GZSLReport:
    """All images ranked among all classes, `gamma` taken off the seen ones. u, s: unseen, seen; h: harmonic mean.

    ausuc: area under the curve of s over u as gamma runs (Chao et al. 2016), which no choice of gamma can help.
    ece: expected calibration error of the probabilities; None where no temperature was given.
    confusion: as ZSLReport's, with `gamma`.
    """

    u: float
    s: float
    h: float
    gamma: float
    per_class: dict[str, float]
    without_images: tuple[str, ...]
    n_unseen_images: int
    n_seen_images: int
    ausuc: float
    ece: float | None = None
    classes: tuple[str, ...] = ()
    confusion: Confusion = ()


@dataclass(frozen=True)
class Report:
    """One evaluation; a part is None where the test images it needs are missing.

    seen_t1: T1 of seen test images ranked among seen classes alone, as in recognition without unseen classes.
    """

    zsl: ZSLReport | None
    gzsl: GZSLReport | None
    seen_t1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def per_class_accuracy(predicted: IntArray, labels: IntArray, classes: Sequence[int] | IntArray) -> FloatArray:
    """Share of right images of each of `classes`, (n_classes,); NaN for a class without images."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ShapeMismatch(f"predicted {predicted.shape} and labels {labels.shape} must be equally long rows.")
    accuracy = np.full(len(classes), np.nan)
    for position, label in enumerate(classes):
        rows = labels == label
        if rows.any():
            accuracy[position] = float(np.mean(predicted[rows] == label))
    return accuracy


def mean_per_class_accuracy(predicted: IntArray, labels: IntArray, classes: Sequence[int] | IntArray) -> float:
    """Mean over those of `classes` that have images of the share of right ones; images of other classes are ignored.

    Raises TooFewSamples when none of the classes has an image.
    """
    accuracy = per_class_accuracy(predicted, labels, classes)
    if np.isnan(accuracy).all():
        raise TooFewSamples("None of the classes has a test image, so there is no accuracy. Add test images.")
    return float(np.nanmean(accuracy))


def confused(predicted: IntArray, labels: IntArray, n_classes: int) -> Confusion:
    """(class, called, images) for every pair that occurs, right ones too, in ascending order."""
    pairs, counts = np.unique(np.asarray(labels, np.int64) * n_classes + predicted, return_counts=True)
    return tuple((int(p) // n_classes, int(p) % n_classes, int(n)) for p, n in zip(pairs, counts, strict=True))


def harmonic_mean(u: float, s: float) -> float:
    """2us / (u + s), and 0 where both are 0."""
    return 2 * u * s / (u + s) if u + s > 0 else 0.0


def calibrated_stacking(scores: FloatArray, is_seen: BoolArray, gamma: float) -> FloatArray:
    """`scores` (n_images, n_classes) with `gamma` taken off every seen class (Chao et al. 2016, Eq. 3).

    Training lifts seen classes above unseen ones; gamma, on the scale of the scores, takes that back.
    """
    scores, is_seen = np.asarray(scores), np.asarray(is_seen, dtype=bool)
    if scores.ndim != 2 or is_seen.shape != scores.shape[1:]:
        raise ShapeMismatch(f"scores {scores.shape} need one seen mark a column, not {is_seen.shape}.")
    return scores - np.asarray(gamma, scores.dtype) * is_seen


def top_k(scores: FloatArray, k: int) -> IntArray:
    """Columns of the `k` highest scores of each row, best first, (n_images, min(k, n_classes)); ties: lower first."""
    if k < 1:
        raise InvalidInput(f"top_k must be at least 1, not {k}.", field="top_k")
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k]


def choose_gamma(scores: FloatArray, labels: IntArray, is_seen: BoolArray) -> tuple[float, GZSLReport]:
    """The gamma with the highest H on these images, and U, S, H there (`per_class` empty).

    `labels` index the columns of `scores`; TooFewSamples unless there are images of both sides.
    """
    return choose_common_gamma([(scores, labels, is_seen)])


def choose_common_gamma(rankings: Sequence[tuple[FloatArray, IntArray, BoolArray]]) -> tuple[float, GZSLReport]:
    """One gamma for several (scores, labels, is_seen): the highest H of their mean U and mean S.

    Exact, not a grid: an image changes from its best seen to its best unseen class when gamma passes the difference
    of the two scores, so H only changes at those differences; the answer is the middle of the best interval between
    two neighbours (the widest of equals).
    """
    points, u, s = _curve(rankings)
    h = np.divide(2 * u * s, u + s, out=np.zeros_like(u), where=u + s > 1e-12)
    # Interval i lies between points[i - 1] and points[i]; the two outer ones have no end of their own.
    rounding = 1e-6 * max(float(np.abs(scores).max()) for scores, _, _ in rankings)  # of float32; it may not decide
    margin = max(float(np.ptp(points)) * 0.01, rounding) or 1.0
    edges = np.concatenate([[points[0] - 2 * margin], points, [points[-1] + 2 * margin]])
    h[np.diff(edges) <= rounding] = -1
    best = np.flatnonzero(h >= h.max() - 1e-12)
    pick = int(best[np.argmax(np.diff(edges)[best])])
    gamma = float((edges[pick] + edges[pick + 1]) / 2)
    n_seen = sum(int(np.sum(is_seen[labels])) for _, labels, is_seen in rankings)
    n_unseen = sum(len(labels) for _, labels, _ in rankings) - n_seen
    area = float(np.trapezoid(s, u))
    return gamma, GZSLReport(float(u[pick]), float(s[pick]), float(h[pick]), gamma, {}, (), n_unseen, n_seen, area)


def area_under_curve(scores: FloatArray, labels: IntArray, is_seen: BoolArray) -> float:
    """AUSUC: the area under S over U, from all images called seen to all called unseen (Chao et al. 2016)."""
    _, u, s = _curve([(scores, labels, is_seen)])
    return float(np.trapezoid(s, u))


def calibration_error(scores: FloatArray, labels: IntArray, temperature: float, n_bins: int = 15) -> float:
    """Expected calibration error of softmax(scores / temperature) (Guo et al. 2017, Eq. 3).

    The mean over images of how far the best class's probability lies from the share of right ones in its bin, of
    `n_bins` equal ones.
    """
    confidence = softmax(np.asarray(scores, np.float64) / temperature, axis=1).max(axis=1)
    is_right = np.argmax(scores, axis=1) == labels
    bins = np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(labels))


def zsl_report(
    scores: FloatArray, labels: IntArray, names: Sequence[str], temperature: float | None = None
) -> ZSLReport:
    """T1 from `scores` (n_images, n_classes) over the unseen classes alone; `labels` index the columns."""
    predicted = np.argmax(scores, axis=1)
    accuracy = per_class_accuracy(predicted, labels, range(len(names)))
    return ZSLReport(
        t1=mean_per_class_accuracy(predicted, labels, range(len(names))),
        per_class=_named(names, accuracy),
        classes=tuple(names),
        confusion=confused(predicted, labels, len(names)),
        without_images=tuple(name for name, a in zip(names, accuracy, strict=True) if np.isnan(a)),
        n_images=len(labels),
        ece=None if temperature is None else calibration_error(scores, labels, temperature),
    )


def gzsl_report(
    scores: FloatArray,
    labels: IntArray,
    names: Sequence[str],
    is_seen: BoolArray,
    gamma: float,
    temperature: float | None = None,
) -> GZSLReport:
    """U, S, H from `scores` (n_images, n_classes) over all classes, corrected by `gamma`."""
    stacked = calibrated_stacking(scores, is_seen, gamma)
    predicted = np.argmax(stacked, axis=1)
    accuracy = per_class_accuracy(predicted, labels, range(len(names)))
    u = mean_per_class_accuracy(predicted, labels, np.flatnonzero(~is_seen))
    s = mean_per_class_accuracy(predicted, labels, np.flatnonzero(is_seen))
    n_seen = int(np.sum(is_seen[labels]))
    return GZSLReport(
        u=u,
        s=s,
        h=harmonic_mean(u, s),
        gamma=float(gamma),
        per_class=_named(names, accuracy),
        without_images=tuple(name for name, a in zip(names, accuracy, strict=True) if np.isnan(a)),
        n_unseen_images=len(labels) - n_seen,
        n_seen_images=n_seen,
        ausuc=area_under_curve(scores, labels, is_seen),
        ece=None if temperature is None else calibration_error(stacked, labels, temperature),
        classes=tuple(names),
        confusion=confused(predicted, labels, len(names)),
    )


def evaluate(
    model: Scorer,
    classes: ClassTable,
    *,
    test_unseen: LabelledFeatures | None = None,
    test_seen: LabelledFeatures | None = None,
    gamma: float = 0.0,
    temperature: float | None = None,
) -> Report:
    """T1 where there are unseen test images, T1 among seen classes where there are seen ones; U, S, H where both are.

    None of them may be training rows.

    With `temperature`, softmax(scores / temperature) is held against the truth too (ece).

    The test images carry their own class names; one that `classes` lacks raises UnknownName, and so does an image
    of a seen class in `test_unseen` or the other way round (InvalidInput).
    """
    unseen = np.flatnonzero(~classes.is_seen)
    zsl = gzsl = both = None
    unseen_rows = _rows(test_unseen, classes, seen=False)
    seen_rows = _rows(test_seen, classes, seen=True)
    if unseen_rows is not None:
        features, labels = unseen_rows
        scores = model.scores(features, classes.embeddings[unseen])
        position = np.full(len(classes.names), -1)
        position[unseen] = np.arange(len(unseen))
        zsl = zsl_report(scores, position[labels], [classes.names[i] for i in unseen], temperature)
        if seen_rows is not None:
            both = model.scores(np.concatenate([features, seen_rows[0]]), classes.embeddings)
            all_labels = np.concatenate([labels, seen_rows[1]])
            gzsl = gzsl_report(both, all_labels, classes.names, classes.is_seen, gamma, temperature)
    return Report(zsl, gzsl, None if seen_rows is None else _seen_t1(model, classes, seen_rows, both))


def _seen_t1(model: Scorer, classes: ClassTable, rows: tuple[FloatArray, IntArray], of_all: FloatArray | None) -> float:
    """T1 of seen images among seen classes. `of_all`: scores over all classes, these images last, if they are there."""
    features, labels = rows
    seen = np.flatnonzero(classes.is_seen)
    if of_all is None or model.is_joint:
        scores = model.scores(features, classes.embeddings[seen])
    else:
        scores = of_all[-len(labels) :, seen]
    return mean_per_class_accuracy(seen[np.argmax(scores, axis=1)], labels, seen)


def near_chance(t1: float, chance: float) -> list[str]:
    """A warning where images of held-out seen classes are hardly better recognised than by guessing, else nothing.

    Hardly: by a tenth of what there is to gain, and by less than twice.
    """
    if t1 >= min(chance + 0.1 * (1 - chance), 2 * chance):
        return []
    return [
        f"On held-out seen classes T1 is {100 * t1:.1f} %, and guessing reaches {100 * chance:.1f} %: expect as little "
        "on unseen classes. More seen classes or photos, another network or other knowledge may help."
    ]


def _rows(images: LabelledFeatures | None, classes: ClassTable, *, seen: bool) -> tuple[FloatArray, IntArray] | None:
    """Features and labels into `classes`; None where there are no images."""
    if images is None or len(images.labels) == 0:
        return None
    if len(images.features) != len(images.labels):
        raise ShapeMismatch(f"{len(images.features)} feature rows but {len(images.labels)} labels.")
    index = {name: i for i, name in enumerate(classes.names)}
    used = np.unique(images.labels)
    column = np.full(len(images.class_names), -1)
    for label in used:
        name = images.class_names[label]
        if name not in index:
            raise UnknownName("class of test images", name, classes.names, field="class_names")
        column[label] = index[name]
        if classes.is_seen[index[name]] != seen:
            wrong, right = ("unseen", "seen") if seen else ("seen", "unseen")
            raise InvalidInput(f"Test images of {name!r}, a {wrong} class, were given as images of {right} classes.")
    return images.features, column[images.labels]


def _best(scores: FloatArray, columns: BoolArray) -> tuple[IntArray, FloatArray]:
    """The best of `columns` for each row, and its score."""
    which = np.flatnonzero(columns)
    position = np.argmax(scores[:, which], axis=1)
    return which[position], scores[np.arange(len(scores)), which[position]]


def _curve(rankings: Sequence[tuple[FloatArray, IntArray, BoolArray]]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Gammas at which images change sides, in order (n,), and mean U and S before, between, after (n + 1,)."""
    parts = [_switches(*ranking) for ranking in rankings]
    change, gain_u, loss_s = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(change, kind="stable")
    points, first = np.unique(change[order], return_index=True)
    last = np.append(first[1:], len(order))  # images below the upper end of each interval
    u = np.append(0.0, np.cumsum(gain_u[order])[last - 1]) / len(parts)
    s = (loss_s.sum() - np.append(0.0, np.cumsum(loss_s[order])[last - 1])) / len(parts)
    return points, u, s


def _switches(scores: FloatArray, labels: IntArray, is_seen: BoolArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """For each image: the gamma at which it goes over to the unseen side, what U gains by that and what S loses."""
    scores, labels, is_seen = np.asarray(scores, np.float64), np.asarray(labels), np.asarray(is_seen, dtype=bool)
    of_seen = is_seen[labels]  # (N,)
    if not of_seen.any() or of_seen.all():
        raise TooFewSamples("Choosing gamma needs images of at least one seen and one unseen class.")
    best_seen, seen_score = _best(scores, is_seen)
    best_unseen, unseen_score = _best(scores, ~is_seen)
    weight = _class_weights(labels, of_seen)
    gain_u = weight * (~of_seen & (best_unseen == labels))
    return seen_score - unseen_score, gain_u, weight * (of_seen & (best_seen == labels))


def _class_weights(labels: IntArray, of_seen: BoolArray) -> FloatArray:
    """(n_images,) weights that sum to 1 over each side, equal over the classes of a side."""
    counts = np.bincount(labels).astype(np.float64)
    n_seen, n_unseen = len(np.unique(labels[of_seen])), len(np.unique(labels[~of_seen]))
    return 1 / (counts[labels] * np.where(of_seen, n_seen, n_unseen))


def _named(names: Sequence[str], accuracy: FloatArray) -> dict[str, float]:
    return {name: float(a) for name, a in zip(names, accuracy, strict=True) if not np.isnan(a)}


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
