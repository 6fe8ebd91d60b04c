"""Accuracy, against plain rewrites of its definitions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from models.base import FloatArray, LabelledFeatures
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples, UnknownName
from models.evaluation import (
    ClassTable,
    area_under_curve,
    calibrated_stacking,
    calibration_error,
    choose_common_gamma,
    choose_gamma,
    confused,
    evaluate,
    gzsl_report,
    harmonic_mean,
    mean_per_class_accuracy,
    near_chance,
    per_class_accuracy,
    top_k,
    zsl_report,
)


def plain_accuracy(predicted: list[int], labels: list[int], classes: list[int]) -> float:
    """The definition, one image after the other."""
    total, right = Counter(labels), Counter(p for p, y in zip(predicted, labels, strict=True) if p == y)
    shares = [right[c] / total[c] for c in classes if total[c]]
    return sum(shares) / len(shares)


def plain_h(scores: FloatArray, labels: list[int], seen: list[bool], gamma: float) -> float:
    predicted = [max(range(len(seen)), key=lambda c: (row[c] - gamma * seen[c], -c)) for row in scores]
    parts = []
    for side in (False, True):
        rows = [i for i, y in enumerate(labels) if seen[y] == side]
        classes = [c for c in range(len(seen)) if seen[c] == side]
        parts.append(plain_accuracy([predicted[i] for i in rows], [labels[i] for i in rows], classes))
    u, s = parts
    return 2 * u * s / (u + s) if u + s else 0.0


@dataclass
class Lookup:
    """A scorer whose features are the scores themselves: column c for the class whose embedding is [c]."""

    is_joint = False

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        return features[:, class_embeddings[:, 0].astype(int)]


@pytest.mark.parametrize("seed", range(5))
def test_mean_per_class_accuracy_equals_plain_rewrite(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 6, 50), rng.integers(0, 6, 50)
    labels[labels == 4] = 3  # a class without images
    expected = plain_accuracy(predicted.tolist(), labels.tolist(), list(range(6)))
    assert mean_per_class_accuracy(predicted, labels, range(6)) == pytest.approx(expected)
    order = rng.permutation(50)
    assert mean_per_class_accuracy(predicted[order], labels[order], range(6)) == pytest.approx(expected)


def test_a_large_class_weighs_no_more_than_a_small_one() -> None:
    labels = np.array([0] * 99 + [1])
    assert mean_per_class_accuracy(np.zeros(100, int), labels, [0, 1]) == 0.5


def test_class_without_images_is_nan_and_all_empty_is_an_error() -> None:
    assert np.isnan(per_class_accuracy(np.array([0]), np.array([0]), [0, 1])).tolist() == [False, True]
    with pytest.raises(TooFewSamples):
        mean_per_class_accuracy(np.array([0]), np.array([0]), [1, 2])
    with pytest.raises(ShapeMismatch, match=r"\(1,\).*\(2,\)"):
        per_class_accuracy(np.array([0]), np.array([0, 1]), [0])


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 0.9) == 0
    assert harmonic_mean(0.0, 0.0) == 0


def test_calibrated_stacking_takes_gamma_off_seen_columns_only() -> None:
    scores = np.array([[1.0, 2.0, 3.0]], np.float32)
    result = calibrated_stacking(scores, np.array([True, False, True]), 0.5)
    assert result.tolist() == [[0.5, 2.0, 2.5]]
    assert result.dtype == np.float32
    with pytest.raises(ShapeMismatch):
        calibrated_stacking(scores, np.array([True, False]), 0.5)


def test_top_k_is_best_first_and_never_more_than_the_classes() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.1]])
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 9).shape == (2, 3)
    with pytest.raises(InvalidInput):
        top_k(scores, 0)


@pytest.mark.parametrize("seed", range(8))
def test_choose_gamma_beats_a_fine_grid_and_h_is_the_real_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = [True, True, False, True, False]
    labels = np.r_[np.arange(5), rng.integers(0, 5, 40)]
    scores = rng.normal(size=(45, 5))
    scores[np.arange(45), labels] += 1
    scores[:, seen] += 2
    if seed % 2:
        scores = scores.round(1)  # many equal margins
    gamma, found = choose_gamma(scores, labels, np.array(seen))
    assert found.h == pytest.approx(plain_h(scores, labels.tolist(), seen, gamma))
    grid = [plain_h(scores, labels.tolist(), seen, g) for g in np.linspace(-6, 8, 1401)]
    assert found.h >= max(grid) - 1e-12
    assert gamma > 0
    assert found.h > plain_h(scores, labels.tolist(), seen, 0.0)


def test_choose_gamma_moves_with_the_scale_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    scores = rng.normal(size=(60, 4))
    seen = np.array([True, True, False, False])
    small, large = choose_gamma(scores, labels, seen), choose_gamma(scores * 100, labels, seen)
    assert large[0] == pytest.approx(100 * small[0])
    assert large[1].h == pytest.approx(small[1].h)


def test_common_gamma_has_the_best_h_of_mean_u_and_mean_s() -> None:
    rng = np.random.default_rng(3)
    seen = np.array([True, True, False, False])
    rankings = []
    for shift in (0.5, 2.0):
        labels = np.r_[np.arange(4), rng.integers(0, 4, 30)]
        scores = rng.normal(size=(34, 4)) + 1.5 * np.eye(4)[labels] + shift * seen
        rankings.append((scores, labels, seen))

    def h_at(gamma: float) -> float:
        reports = [gzsl_report(scores, labels, list("abcd"), seen, gamma) for scores, labels, _ in rankings]
        return harmonic_mean(float(np.mean([r.u for r in reports])), float(np.mean([r.s for r in reports])))

    gamma, found = choose_common_gamma(rankings)
    assert found.h == pytest.approx(h_at(gamma))
    assert found.h >= max(h_at(float(g)) for g in np.linspace(-5, 8, 500)) - 1e-12


def test_choose_gamma_needs_both_sides() -> None:
    with pytest.raises(TooFewSamples):
        choose_gamma(np.zeros((2, 2)), np.array([0, 0]), np.array([True, False]))


def test_zsl_report_counts_confusions_and_names_empty_classes() -> None:
    scores = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    report = zsl_report(scores, np.array([0, 0, 0, 1]), ["a", "b", "c"])
    assert report.confusion == ((0, 0, 2), (0, 1, 1), (1, 1, 1))
    assert report.per_class == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert report.without_images == ("c",)
    assert report.t1 == pytest.approx(5 / 6)


def test_confusion_is_as_long_as_what_occurs() -> None:
    labels, predicted = np.array([70_000, 3, 70_000]), np.array([3, 3, 3])
    assert confused(predicted, labels, 100_000) == ((3, 3, 1), (70_000, 3, 2))
    assert confused(np.empty(0, int), np.empty(0, int), 5) == ()


def test_h_is_zero_when_no_unseen_class_is_right() -> None:
    scores = np.array([[0.0, 1.0], [0.0, 1.0]])
    seen = np.array([False, True])
    report = gzsl_report(scores, np.array([0, 1]), ["u", "s"], seen, 0.0)
    assert (report.u, report.s, report.h) == (0.0, 1.0, 0.0)
    assert gzsl_report(scores - [0, 1.5], np.array([0, 1]), ["u", "s"], seen, 0.0).u == 1.0


def _table() -> ClassTable:
    return ClassTable(("s1", "u1", "s2", "u2"), np.arange(4.0)[:, None], np.array([True, False, True, False]))


def test_evaluate_maps_names_and_equals_plain_rewrite() -> None:
    rng = np.random.default_rng(1)
    unseen_labels, seen_labels = rng.integers(0, 2, 30), rng.integers(0, 2, 20)
    features = rng.normal(size=(50, 4))
    test_unseen = LabelledFeatures(features[:30], unseen_labels, ("u2", "u1"))
    test_seen = LabelledFeatures(features[30:], seen_labels, ("s2", "s1"))
    report = evaluate(Lookup(), _table(), test_unseen=test_unseen, test_seen=test_seen, gamma=0.3)
    truth = [[3, 1][y] for y in unseen_labels] + [[2, 0][y] for y in seen_labels]
    predicted = np.where(features[:30, 1] >= features[:30, 3], 1, 3)
    assert report.zsl is not None
    assert report.zsl.t1 == pytest.approx(plain_accuracy(predicted.tolist(), truth[:30], [1, 3]))
    assert report.zsl.classes == ("u1", "u2")
    assert report.gzsl is not None
    assert report.gzsl.h == pytest.approx(plain_h(features, truth, [True, False, True, False], 0.3))
    assert report.gzsl.h == pytest.approx(harmonic_mean(report.gzsl.u, report.gzsl.s))
    assert report.gzsl.classes == ("s1", "u1", "s2", "u2")
    among_seen = np.where(features[30:, 0] >= features[30:, 2], 0, 2)
    assert report.seen_t1 == pytest.approx(plain_accuracy(among_seen.tolist(), truth[30:], [0, 2]))
    called = np.argmax(features - 0.3 * np.array([1, 0, 1, 0]), axis=1).tolist()
    counts = Counter(zip(truth, called, strict=True))
    assert report.gzsl.confusion == tuple((*pair, counts[pair]) for pair in sorted(counts))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["gzsl"]["gamma"] == 0.3


def test_evaluate_without_seen_or_any_test_images() -> None:
    features = LabelledFeatures(np.eye(4)[[1, 3]], np.array([0, 1]), ("u1", "u2"))
    report = evaluate(Lookup(), _table(), test_unseen=features)
    assert report.zsl is not None
    assert report.zsl.t1 == 1.0
    assert report.gzsl is None
    nothing = LabelledFeatures(np.zeros((0, 4)), np.zeros(0, int), ())
    assert evaluate(Lookup(), _table(), test_unseen=nothing).to_dict() == {"zsl": None, "gzsl": None, "seen_t1": None}
    seen = LabelledFeatures(np.eye(4)[[0, 1]], np.array([0, 1]), ("s1", "s2"))
    assert evaluate(Lookup(), _table(), test_seen=seen).to_dict() == {"zsl": None, "gzsl": None, "seen_t1": 0.5}


def test_seen_classes_are_ranked_by_scores_of_their_own_where_scores_depend_on_the_other_classes() -> None:
    class Joint(Lookup):
        is_joint = True

        def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
            scores = super().scores(features, class_embeddings)
            return scores if len(class_embeddings) == 4 else -scores

    unseen = LabelledFeatures(np.eye(4)[[1, 3]], np.array([0, 1]), ("u1", "u2"))
    seen = LabelledFeatures(np.eye(4)[[0, 2]], np.array([0, 1]), ("s1", "s2"))
    assert evaluate(Lookup(), _table(), test_unseen=unseen, test_seen=seen).seen_t1 == 1
    assert evaluate(Joint(), _table(), test_unseen=unseen, test_seen=seen).seen_t1 == 0


def test_evaluate_refuses_images_of_the_wrong_side_or_of_no_class() -> None:
    with pytest.raises(InvalidInput, match="'s1', a seen class"):
        evaluate(Lookup(), _table(), test_unseen=LabelledFeatures(np.zeros((1, 4)), np.array([0]), ("s1",)))
    with pytest.raises(UnknownName, match="'u1'"):
        evaluate(Lookup(), _table(), test_unseen=LabelledFeatures(np.zeros((1, 4)), np.array([0]), ("u11",)))
    with pytest.raises(ShapeMismatch):
        evaluate(Lookup(), _table(), test_unseen=LabelledFeatures(np.zeros((2, 4)), np.array([0]), ("u1",)))


def test_class_table_refuses_double_names_and_lengths_that_disagree() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        ClassTable(("a", "a"), np.zeros((2, 1)), np.array([True, False]))
    with pytest.raises(ShapeMismatch, match="2 class names, 1 embeddings"):
        ClassTable(("a", "b"), np.zeros((1, 1)), np.array([True, False]))


@pytest.mark.parametrize("seed", range(3))
def test_area_under_the_curve_is_that_of_all_gammas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(40, 6)), np.r_[np.arange(6), rng.integers(0, 6, 34)]
    is_seen = np.array([True, True, False, True, False, False])
    scores[:, is_seen] += 0.5
    gammas = np.unique(np.concatenate([[-50, 50], (scores[:, is_seen, None] - scores[:, None, ~is_seen]).ravel()]))
    between = np.concatenate([gammas[:1], (gammas[1:] + gammas[:-1]) / 2, gammas[-1:]])
    names = [str(i) for i in range(6)]
    found = [gzsl_report(scores, labels, names, is_seen, gamma) for gamma in between]
    plain = sum((b.u - a.u) * (a.s + b.s) / 2 for a, b in pairwise(found))
    assert area_under_curve(scores, labels, is_seen) == pytest.approx(plain)
    assert found[0].ausuc == pytest.approx(plain)
    assert choose_gamma(scores, labels, is_seen)[1].ausuc == pytest.approx(plain)


def test_area_under_the_curve_of_a_perfect_model_is_one() -> None:
    scores, labels = np.eye(4), np.arange(4)
    assert area_under_curve(scores, labels, np.array([True, True, False, False])) == pytest.approx(1)


def test_calibration_error_equals_plain_rewrite() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 5)), rng.integers(0, 5, 200)
    probabilities = np.exp(scores / 0.7) / np.exp(scores / 0.7).sum(axis=1, keepdims=True)
    total = 0.0
    for low in range(15):
        rows = [i for i, p in enumerate(probabilities.max(axis=1)) if low / 15 <= p < (low + 1) / 15]
        if rows:
            right = np.mean([scores[i].argmax() == labels[i] for i in rows])
            total += len(rows) / 200 * abs(right - np.mean([probabilities[i].max() for i in rows]))
    assert calibration_error(scores, labels, 0.7) == pytest.approx(total)
    # All right at full confidence: no error; all wrong: the whole of it.
    assert calibration_error(np.eye(3) * 100, np.arange(3), 1.0) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.eye(3) * 100, np.array([1, 2, 0]), 1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("t1", "chance", "is_doubted"),
    [(0.2, 0.2, True), (0.27, 0.2, True), (0.29, 0.2, False), (0.5, 0.5, True), (0.6, 0.5, False), (0.05, 0.02, False)],
)
def test_little_more_than_chance_is_warned_of(t1: float, chance: float, is_doubted: bool) -> None:
    assert [warning.split(":")[0] for warning in near_chance(t1, chance)] == (
        [f"On held-out seen classes T1 is {100 * t1:.1f} %, and guessing reaches {100 * chance:.1f} %"] * is_doubted
    )
