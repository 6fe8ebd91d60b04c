"""Class relations against plain rewrites of the paper's formulas and independent solvers."""

from __future__ import annotations

from typing import Any

import clarabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import nnls

from models.embedding.relations import (
    RIDGE_FLOOR,
    SimilarityOptimizer,
    similarity_matrix_optimization,
    unit_rows,
    weighted_average,
)
from models.errors import InvalidInput, ShapeMismatch

Matrix = NDArray[np.float64]


def clarabel_solution(unseen: Matrix, seen: Matrix, alpha: float, ridge: float) -> Matrix:
    """Eq. 11 by a general interior-point solver, one class at a time."""
    n = len(seen)
    scale = np.mean(np.sum(seen**2, axis=1))
    square = sparse.csc_matrix(np.triu(2 * (seen @ seen.T + ridge * scale * np.eye(n))))
    constraints = sparse.vstack([sparse.csc_matrix(np.ones((1, n))), sparse.eye(n), -sparse.eye(n)]).tocsc()
    bounds = np.concatenate([[1.0], np.ones(n), -alpha * np.ones(n)])
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(2 * n)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    rows = [
        clarabel.DefaultSolver(square, -2 * seen @ row, constraints, bounds, cones, settings).solve().x
        for row in unseen
    ]
    return np.array(rows)


def random_problem(kind: str, seed: int) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(seed)
    n_seen, dim = (int(rng.integers(2, 30)), int(rng.integers(2, 30)))
    if kind == "more seen than dimensions":
        n_seen = dim + int(rng.integers(5, 30))
    if kind == "one dimension":
        dim = 1
    seen = rng.normal(size=(n_seen, dim)) * 10 ** rng.uniform(-2, 2)
    unseen = rng.normal(size=(5, dim)) * np.abs(seen).mean() * rng.choice([0.5, 1.0, 5.0])
    if kind == "duplicates":
        seen = np.vstack([seen, seen[:2], seen[:1]])
    if kind == "unseen equals seen":
        unseen[0] = seen[0]
    if kind == "collinear":
        seen = np.outer(rng.normal(size=n_seen), rng.normal(size=dim))
    if kind == "far away":  # drives coefficients into both bounds
        unseen *= 50
    return unseen, seen


KINDS = [
    "ordinary",
    "more seen than dimensions",
    "duplicates",
    "unseen equals seen",
    "collinear",
    "one dimension",
    "far away",
]


class TestSimilarityMatrixOptimization:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("alpha", [-1.0, 0.0, -0.2])
    def test_agrees_with_an_independent_solver(self, kind: str, alpha: float) -> None:
        for seed in range(6):
            unseen, seen = random_problem(kind, seed)
            for ridge in (0.0, 1e-3, 0.3):
                optimizer = SimilarityOptimizer(seen, ridge=ridge)
                relations = optimizer.solve(unseen, alpha=alpha)
                report = optimizer.report(unseen, relations, alpha=alpha)
                other = clarabel_solution(unseen, seen, alpha, max(ridge, RIDGE_FLOOR))
                reached = optimizer.report(unseen, other, alpha=alpha).objective
                scale = np.mean(np.sum(seen**2, axis=1))
                reach = np.sqrt(np.sum(unseen**2, axis=1) / scale) + 1
                assert report.max_violation.max() < 1e-12
                assert (report.kkt_residual < 1e-9 * reach).all()
                assert (report.objective <= reached + 1e-7 * reached + 1e-9 * scale).all()
                if ridge == 0.3:  # well conditioned: the solver's own answer is precise enough to compare
                    np.testing.assert_allclose(relations, other, atol=2e-4)

    def test_agrees_with_nnls_at_alpha_zero(self) -> None:
        rng = np.random.default_rng(0)
        unseen, seen = unit_rows(rng.normal(size=(20, 12))), unit_rows(rng.normal(size=(30, 12)))
        relations = similarity_matrix_optimization(unseen, seen, alpha=0, ridge=0.01)
        weight = 1e4  # the sum as a heavily weighted equation
        rows = np.vstack([seen.T, np.sqrt(0.01) * np.eye(30), np.full((1, 30), weight)])
        for target, relation in zip(unseen, relations, strict=True):
            plain, _ = nnls(rows, np.concatenate([target, np.zeros(30), [weight]]))
            np.testing.assert_allclose(relation, plain, atol=1e-5)

    def test_closed_form_is_the_plain_lagrange_solution(self) -> None:
        rng = np.random.default_rng(1)
        unseen, seen = unit_rows(rng.normal(size=(4, 30))), unit_rows(rng.normal(size=(9, 30)))
        ridge = 0.05
        gram, ones = seen @ seen.T + ridge * np.eye(9), np.ones(9)
        plain = []
        for target in unseen:
            free, unit = np.linalg.solve(gram, seen @ target), np.linalg.solve(gram, ones)
            plain.append(free + (1 - free.sum()) / unit.sum() * unit)
        np.testing.assert_allclose(
            similarity_matrix_optimization(unseen, seen, alpha=-1, ridge=ridge), plain, atol=1e-12
        )

    def test_more_seen_classes_than_dimensions_gives_the_answer_of_least_norm(self) -> None:
        rng = np.random.default_rng(2)
        unseen, seen = unit_rows(rng.normal(size=(3, 6))), unit_rows(rng.normal(size=(40, 6)))
        relations = similarity_matrix_optimization(unseen, seen, alpha=-1, ridge=0)
        system = np.vstack([seen.T, np.ones((1, 40))])
        least = np.linalg.lstsq(system, np.vstack([unseen.T, np.ones((1, 3))]), rcond=None)[0].T
        np.testing.assert_allclose(relations, least, atol=1e-6)

    def test_duplicate_classes_share_equally(self) -> None:
        rng = np.random.default_rng(3)
        seen = unit_rows(rng.normal(size=(5, 8)))
        seen = np.vstack([seen, seen[0]])
        for alpha in (0.0, -1.0):
            relations = similarity_matrix_optimization(seen[:1] + 0.1, seen, alpha=alpha, ridge=1e-6)
            assert relations[0, 0] == pytest.approx(relations[0, 5], abs=1e-6)

    def test_one_seen_class_gets_everything(self) -> None:
        for alpha in (-1.0, 0.0, 1.0):
            relations = similarity_matrix_optimization(np.eye(3), np.array([[1.0, 2.0, 3.0]]), alpha=alpha)
            np.testing.assert_array_equal(relations, np.ones((3, 1)))

    def test_unseen_equal_to_a_seen_class_is_that_class(self) -> None:
        seen = unit_rows(np.random.default_rng(4).normal(size=(6, 20)))
        for alpha in (-1.0, 0.0):
            relations = similarity_matrix_optimization(seen, seen, alpha=alpha, ridge=0)
            np.testing.assert_allclose(relations, np.eye(6), atol=1e-6)

    def test_large_ridge_leads_to_the_mean(self) -> None:
        rng = np.random.default_rng(5)
        relations = similarity_matrix_optimization(
            rng.normal(size=(3, 5)), rng.normal(size=(8, 5)), alpha=-1, ridge=1e3
        )
        np.testing.assert_allclose(relations, 1 / 8, atol=1e-2)

    def test_units_and_order_of_seen_classes_do_not_matter(self) -> None:
        rng = np.random.default_rng(6)
        unseen, seen, order = rng.normal(size=(4, 7)), rng.normal(size=(12, 7)), rng.permutation(12)
        for alpha in (-1.0, 0.0):
            base = similarity_matrix_optimization(unseen, seen, alpha=alpha, ridge=0.1)
            scaled = similarity_matrix_optimization(unseen * 1e3, seen[order] * 1e3, alpha=alpha, ridge=0.1)
            np.testing.assert_allclose(base[:, order], scaled, atol=1e-9)

    def test_blocks_do_not_change_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(7)
        unseen, seen = rng.normal(size=(11, 7)), rng.normal(size=(12, 7))
        whole = similarity_matrix_optimization(unseen, seen, alpha=0)
        monkeypatch.setattr("models.embedding.relations.BLOCK_CELLS", 30)
        np.testing.assert_allclose(similarity_matrix_optimization(unseen, seen, alpha=0), whole, atol=1e-12)

    def test_alpha_too_large_says_what_is_possible(self) -> None:
        with pytest.raises(InvalidInput, match=r"at most 0\.25"):
            similarity_matrix_optimization(np.eye(4), np.eye(4), alpha=0.5)

    @pytest.mark.parametrize("ridge", [-1.0, np.nan, np.inf])
    def test_impossible_ridge(self, ridge: float) -> None:
        with pytest.raises(InvalidInput, match="ridge"):
            similarity_matrix_optimization(np.eye(4), np.eye(4), alpha=0, ridge=ridge)

    def test_report_notices_a_wrong_answer(self) -> None:
        rng = np.random.default_rng(8)
        unseen, seen = rng.normal(size=(3, 6)), rng.normal(size=(5, 6))
        optimizer = SimilarityOptimizer(seen, ridge=0.1)
        report = optimizer.report(unseen, np.full((3, 5), 0.25), alpha=0)
        assert report.max_violation.max() == pytest.approx(0.25)
        assert report.kkt_residual.min() > 1e-3
        with pytest.raises(ShapeMismatch):
            optimizer.report(unseen, np.ones((3, 4)), alpha=0)


class TestWeightedAverage:
    def test_agrees_with_the_plain_formula(self) -> None:
        rng = np.random.default_rng(0)
        unseen, seen = rng.normal(size=(6, 10)), rng.normal(size=(15, 10))
        relations = weighted_average(unseen, seen, n_neighbors=5, eta=5.0)
        plain = np.zeros((6, 15))
        for u in range(6):
            distance = [np.linalg.norm(unseen[u] / np.linalg.norm(unseen[u]) - s / np.linalg.norm(s)) for s in seen]
            for c in sorted(range(15), key=distance.__getitem__)[:5]:
                plain[u, c] = np.exp(-5.0 * distance[c]) / 5
        np.testing.assert_allclose(relations, plain, atol=1e-12)

    def test_lengths_of_vectors_do_not_matter(self) -> None:
        rng = np.random.default_rng(1)
        unseen, seen = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
        np.testing.assert_allclose(weighted_average(unseen, seen), weighted_average(unseen * 7, seen / 9), atol=1e-12)

    def test_fewer_seen_classes_than_neighbours_uses_all(self) -> None:
        relations = weighted_average(np.eye(3), np.eye(3)[:2], n_neighbors=5, eta=0)
        np.testing.assert_allclose(relations, np.full((3, 2), 0.5))

    @pytest.mark.parametrize(("n_neighbors", "eta"), [(0, 5.0), (5, -1.0), (5, np.nan)])
    def test_impossible_parameters(self, n_neighbors: int, eta: float) -> None:
        with pytest.raises(InvalidInput):
            weighted_average(np.eye(3), np.eye(3), n_neighbors=n_neighbors, eta=eta)


@pytest.mark.parametrize("solve", [weighted_average, lambda u, s: similarity_matrix_optimization(u, s, alpha=0)])
class TestBadKnowledge:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("side", [0, 1])
    def test_not_a_number(self, solve: Any, bad: float, side: int) -> None:
        pair = [np.eye(3), np.eye(3)]
        pair[side][1, 2] = bad
        with pytest.raises(InvalidInput, match=r"Row 1 of knowledge_.*NaN or infinity"):
            solve(*pair)

    def test_zero_vector(self, solve: Any) -> None:
        with pytest.raises(InvalidInput, match="Row 2 of knowledge_seen is all zeros"):
            solve(np.eye(3), np.diag([1.0, 1.0, 0.0]))

    def test_widths_that_disagree(self, solve: Any) -> None:
        with pytest.raises(ShapeMismatch, match="3 knowledge dimensions and seen classes 4"):
            solve(np.eye(3), np.eye(4))

    def test_no_seen_class_or_one_axis(self, solve: Any) -> None:
        with pytest.raises(ShapeMismatch, match="knowledge_seen has shape"):
            solve(np.eye(3), np.zeros((0, 3)))
        with pytest.raises(ShapeMismatch, match="knowledge_unseen has shape"):
            solve(np.ones(3), np.eye(3))
