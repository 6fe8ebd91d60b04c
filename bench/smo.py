"""SMO: milliseconds per unseen class, against a loop of a general QP solver, and how exact the answers are.

python bench/smo.py [--quick] > smo.json        (the Markdown table goes to standard error)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from models.embedding.relations import RIDGE_FLOOR, SimilarityOptimizer, unit_rows

Matrix = NDArray[np.float64]

DIM = 300
RIDGE = 1e-6
SIZES = ((150, 50), (645, 72), (1000, 20_000))
LOOP_CLASSES = 5


def word_vector_like(n: int, centres: Matrix, rng: np.random.Generator) -> Matrix:
    """Unit vectors in overlapping groups, as class names' word vectors are."""
    return unit_rows(centres[rng.integers(0, len(centres), n)] + 0.9 * rng.normal(size=(n, DIM)))


def seconds(work: Callable[[], Any], at_least: float = 0.5) -> float:
    """Least wall time of one call, over as many calls as fill `at_least` seconds (one, if it is slower)."""
    times: list[float] = []
    while not times or sum(times) < at_least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class GeneralSolver:
    """A per-class loop of Clarabel, its data prepared once."""

    def __init__(self, seen: Matrix, alpha: float) -> None:
        n = len(seen)
        self.seen = seen
        self.square = sparse.csc_matrix(np.triu(2 * (seen @ seen.T + max(RIDGE, RIDGE_FLOOR) * np.eye(n))))
        self.constraints = sparse.vstack([sparse.csc_matrix(np.ones((1, n))), sparse.eye(n), -sparse.eye(n)]).tocsc()
        self.bounds = np.concatenate([[1.0], np.ones(n), -alpha * np.ones(n)])
        self.cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(2 * n)]
        self.settings = clarabel.DefaultSettings()
        self.settings.verbose = False

    def solve(self, unseen: Matrix) -> Matrix:
        parts = (self.constraints, self.bounds, self.cones, self.settings)
        rows = [clarabel.DefaultSolver(self.square, -2 * self.seen @ row, *parts).solve().x for row in unseen]
        return np.array(rows)


def measure(n_seen: int, n_unseen: int, alpha: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(n_seen // 12, 3), DIM))
    seen, unseen = word_vector_like(n_seen, centres, rng), word_vector_like(n_unseen, centres, rng)
    optimizer = SimilarityOptimizer(seen, ridge=RIDGE)
    prepare = seconds(lambda: SimilarityOptimizer(seen, ridge=RIDGE).solve(unseen[:1], alpha=alpha))
    one = seconds(lambda: optimizer.solve(unseen[:1], alpha=alpha))
    relations = optimizer.solve(unseen, alpha=alpha)
    batch = seconds(lambda: optimizer.solve(unseen, alpha=alpha)) / n_unseen
    general = GeneralSolver(seen, alpha)
    loop = seconds(lambda: general.solve(unseen[:LOOP_CLASSES])) / LOOP_CLASSES
    sample = unseen[:200]
    report = optimizer.report(sample, relations[:200], alpha=alpha)
    other = optimizer.report(unseen[:LOOP_CLASSES], general.solve(unseen[:LOOP_CLASSES]), alpha=alpha)
    gap = report.objective[:LOOP_CLASSES] - other.objective
    return {
        "n_seen": n_seen,
        "n_unseen": n_unseen,
        "alpha": alpha,
        "ms_per_class": 1e3 * batch,
        "ms_one_class": 1e3 * one,
        "ms_prepare_and_one_class": 1e3 * prepare,
        "ms_per_class_general_solver": 1e3 * loop,
        "ratio": loop / batch,
        "max_violation": float(report.max_violation.max()),
        "kkt_residual": float(report.kkt_residual.max()),
        "objective_gap_to_general_solver": float(gap.max()),
        "mean_support": float((np.abs(relations[:200]) > 1e-12).sum(axis=1).mean()),
    }


def markdown(rows: list[dict[str, float]]) -> str:
    lines = [
        "| seen | unseen | α | ms a class | QP loop, ms a class | ratio | one class alone, ms | first class, ms "
        "| violation | KKT residual | objective − QP's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['n_seen']:.0f} | {r['n_unseen']:.0f} | {r['alpha']:.0f} | {r['ms_per_class']:.3f} "
        f"| {r['ms_per_class_general_solver']:.1f} | {r['ratio']:.0f} | {r['ms_one_class']:.2f} "
        f"| {r['ms_prepare_and_one_class']:.1f} | {r['max_violation']:.0e} | {r['kkt_residual']:.0e} "
        f"| {r['objective_gap_to_general_solver']:+.0e} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out 1000 x 20,000")
    sizes = SIZES[:2] if parser.parse_args().quick else SIZES
    rows = [measure(n_seen, n_unseen, alpha) for n_seen, n_unseen in sizes for alpha in (0.0, -1.0)]
    json.dump({"dim": DIM, "ridge": RIDGE, "rows": rows}, sys.stdout, indent=1)
    print(file=sys.stdout)
    print(markdown(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
