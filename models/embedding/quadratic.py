"""Many least-squares fits by bounded coefficients that sum to one, over one shared matrix.

min_r ||t - r V||^2 + ridge ||r||^2  subject to  lower <= r_i <= 1,  sum r = 1;  rows of V sum to zero, ridge > 0.

The problem is strictly convex, so each answer is unique. Three exact methods, each where it is cheap:
- no bound active: closed form from one singular value decomposition (nearly always the case for lower = -1);
- lower >= 0: primal active set, all targets in step (Lawson & Hanson 1974, Wolfe 1976), since supports are small;
- lower < 0 and a bound active: primal active set from the clipped closed form, one target at a time.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

TOLERANCE = 1e-12
"""Slack on bounds and multipliers, for vectors of about unit length."""

BULK_ROUNDS, BULK_WIDTH = 6, 4
"""The first rounds of the active set admit this many coefficients at once."""


class BoxQP:
    """The shared part: `vectors` V (S, D) whose rows sum to zero, and `ridge` > 0."""

    def __init__(self, vectors: Matrix, ridge: float) -> None:
        self.vectors, self.ridge = vectors, ridge
        self.n = len(vectors)

    def solve(self, targets: Matrix, *, lower: float) -> Matrix:
        """The unique optimum of each target: (T, D) -> (T, S). Needs lower * S <= 1."""
        if lower * self.n >= 1 - TOLERANCE:
            return np.full((len(targets), self.n), 1 / self.n)
        if lower >= 0:
            return self._solve_simplex(targets, lower)
        relations = self._solve_unbounded(targets)
        outside = ((relations < lower - TOLERANCE) | (relations > 1 + TOLERANCE)).any(axis=1)
        for row in np.flatnonzero(outside):
            relations[row] = self._solve_box(targets[row], relations[row], lower)
        return relations

    def objective(self, targets: Matrix, relations: Matrix) -> Matrix:
        """||t - r V||^2 + ridge ||r||^2 of each row."""
        misfit = np.sum((targets - relations @ self.vectors) ** 2, axis=1)
        return np.asarray(misfit + self.ridge * np.sum(relations**2, axis=1))

    def kkt_residual(self, targets: Matrix, relations: Matrix, *, lower: float) -> Matrix:
        """Largest g_i - g_j over coefficients i that may fall and j that may rise; 0 at the optimum.

        g is half the objective's gradient. No multiplier is needed: shifting weight from i to j keeps the sum.
        """
        gradient = (relations @ self.vectors - targets) @ self.vectors.T + self.ridge * relations
        slack = 1e-9
        may_fall = np.where(relations > lower + slack, gradient, -np.inf).max(axis=1)
        may_rise = np.where(relations < 1 - slack, gradient, np.inf).min(axis=1)
        gain = np.where(np.isfinite(may_fall) & np.isfinite(may_rise), may_fall - may_rise, 0.0)
        return np.maximum(gain, 0.0)

    # --- no bounds -------------------------------------------------------------------------------------------------

    @cached_property
    def _spectrum(self) -> tuple[Matrix, Matrix, Matrix]:
        """Thin singular value decomposition V = L diag(s) R: (S, K), (K,), (K, D), without the empty directions.

        Not through a Gram matrix: classes that lie nearly on a line would lose half of their digits.
        """
        left, singular, right = np.linalg.svd(self.vectors, full_matrices=False)
        kept = singular > max(self.vectors.shape) * np.finfo(np.float64).eps * singular[0]
        return left[:, kept], singular[kept], right[kept]

    def _solve_unbounded(self, targets: Matrix) -> Matrix:
        """r = 1/S + t V' (V V' + ridge I)^-1."""
        left, singular, right = self._spectrum
        deviations = (targets @ right.T * (singular / (singular**2 + self.ridge))) @ left.T
        deviations -= deviations.mean(axis=1, keepdims=True)  # rounding only: the sum is one to the last digit
        return np.asarray(deviations + 1 / self.n)

    # --- lower < 0, some bound active ------------------------------------------------------------------------------

    def _solve_box(self, target: Matrix, start: Matrix, lower: float) -> Matrix:
        """From the nearest feasible point to `start`, walk to the optimum on the free coefficients; hold what meets a
        bound on the way; then let go of the bound that pulls hardest, until none pulls.
        """
        linear = self.vectors @ target
        relations = _onto_box(start, lower)
        held = np.where(relations <= lower, 1, np.where(relations >= 1, -1, 0))  # +1 at lower, -1 at 1, 0 free
        for _ in range(20 * self.n + 100):
            goal = self._optimum_of_free(held, linear, relations)
            move = np.where(held == 0, goal - relations, 0.0)
            room = np.where(move > 0, 1 - relations, relations - lower)
            limits = np.divide(room, np.abs(move), out=np.full(self.n, np.inf), where=move != 0)
            blocked = int(np.argmin(limits))
            if limits[blocked] < 1:
                relations = relations + limits[blocked] * move
                held[blocked] = 1 if move[blocked] < 0 else -1
                relations[blocked] = lower if move[blocked] < 0 else 1.0
                continue
            relations = goal
            gradient = self._gram @ relations - linear
            falling = np.where(held <= 0, gradient, -np.inf)
            rising = np.where(held >= 0, gradient, np.inf)
            if falling.max() - rising.min() <= TOLERANCE * max(1.0, float(np.abs(linear).max())):
                break
            free = held == 0
            level = float(gradient[free].mean()) if free.any() else (falling.max() + rising.min()) / 2
            pull = held * (level - gradient)
            if pull.max() <= 0:
                break
            held[int(np.argmax(pull))] = 0
        return relations

    def _optimum_of_free(self, held: NDArray[np.int64], linear: Matrix, relations: Matrix) -> Matrix:
        """Optimum over the free coefficients, the sum kept at one, the held ones where they are."""
        free = np.flatnonzero(held == 0)
        goal = relations.copy()
        if len(free) < 2:
            return goal
        fixed = np.where(held == 0, 0.0, relations)
        # Adding a constant to the matrix changes nothing on a fixed sum and keeps the solve well conditioned.
        square = self._gram[np.ix_(free, free)] + 1 / self.n
        sides = np.stack([(linear - self._gram @ fixed)[free], np.ones(len(free))], axis=1)
        solved = np.linalg.solve(square, sides)
        total = 1 - fixed.sum()
        goal[free] = solved[:, 0] + (total - solved[:, 0].sum()) / solved[:, 1].sum() * solved[:, 1]
        return goal

    # --- lower >= 0 ------------------------------------------------------------------------------------------------

    @cached_property
    def _gram(self) -> Matrix:
        return np.asarray(self.vectors @ self.vectors.T + self.ridge * np.eye(self.n))

    def _solve_simplex(self, targets: Matrix, lower: float) -> Matrix:
        """r = lower + c s with s on the simplex (r <= 1 is then implied), as an active set for s."""
        factor = 1 - lower * self.n
        # The shift by `lower` leaves r V unchanged (rows of V sum to zero) and s on the simplex: only targets scale.
        supports, weights = _grow_supports(self._gram, self.vectors, targets / factor, self.ridge)
        simplex = np.zeros((len(targets), self.n + 1))  # the last column takes the padding
        np.put_along_axis(simplex, supports, weights, axis=1)
        return np.asarray(lower + factor * simplex[:, : self.n])


def _onto_box(point: Matrix, lower: float) -> Matrix:
    """Nearest point of {lower <= r_i <= 1, sum r = 1}: clip(point - t), t by bisection on the falling sum."""
    low, high = float(point.min()) - 1, float(point.max()) - lower
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(point - middle, lower, 1).sum() > 1 else (low, middle)
    return np.clip(point - (low + high) / 2, lower, 1)


def _grow_supports(gram: Matrix, vectors: Matrix, targets: Matrix, ridge: float) -> tuple[NDArray[np.int64], Matrix]:
    """Exact simplex fits of all targets in step: supports (T, K) padded with S, and their weights (T, K).

    Each round admits, for every unfinished target, the coefficients whose growth gains most, then moves to the optimum
    on the support, dropping coefficients that would turn negative on the way. The first rounds admit several, which
    saves rounds; later ones a single one, with which the objective falls strictly until the optimum.
    """
    n, n_targets = len(vectors), len(targets)
    padded_gram, padded_vectors = np.pad(gram, (0, 1)), np.pad(vectors, ((0, 1), (0, 0)))
    linear = targets @ padded_vectors.T  # (T, S + 1)
    supports = np.argmin(np.diag(gram) / 2 - linear[:, :n], axis=1)[:, None]
    weights = np.ones((n_targets, 1))
    open_rows = np.arange(n_targets)
    for number in range(3 * n + 10):
        width = min(BULK_WIDTH, n) if number < BULK_ROUNDS else 1
        chosen, amounts = supports[open_rows], weights[open_rows]
        relations = np.zeros((len(open_rows), n + 1))
        np.put_along_axis(relations, chosen, amounts, axis=1)
        gradient = (relations @ padded_vectors) @ padded_vectors.T - linear[open_rows]
        own = np.take_along_axis(gradient, chosen, 1) + ridge * amounts
        level = np.sum(own * amounts, axis=1, keepdims=True)
        np.put_along_axis(gradient, chosen, np.inf, axis=1)
        gradient[:, n] = np.inf
        entering = np.argpartition(gradient, width - 1, axis=1)[:, :width]
        gain = level - np.take_along_axis(gradient, entering, 1)
        improving = (gain > 10 * TOLERANCE).any(axis=1)
        open_rows = open_rows[improving]
        if not len(open_rows):
            break
        entering = np.where(gain > 10 * TOLERANCE, entering, n)[improving]
        supports, weights = _with_free_columns(supports, weights, n, width)
        free = np.argsort(supports[open_rows] != n, axis=1, kind="stable")[:, :width]
        supports[open_rows[:, None], free] = entering
        _settle(supports, weights, open_rows, padded_gram, linear)
    return supports, weights


def _settle(
    supports: NDArray[np.int64], weights: Matrix, rows: NDArray[np.int64], padded_gram: Matrix, linear: Matrix
) -> None:
    """Move `rows` of `weights` to the optimum on their supports, in place, dropping what reaches zero."""
    n = linear.shape[1] - 1
    while len(rows):
        optimum = _optimum_on_support(supports[rows], rows, padded_gram, linear)
        current = weights[rows]
        held = supports[rows] < n
        blocking = held & (optimum <= 0)
        blocked = blocking.any(axis=1)
        drop = np.where(blocking, current / np.maximum(current - optimum, 1e-300), np.inf)
        step = np.minimum(drop.min(axis=1), 1.0)
        moved = current + step[:, None] * (optimum - current)
        gone = blocking & (drop <= step[:, None])
        moved[gone] = 0.0
        weights[rows] = moved
        supports[rows] = np.where(gone, n, supports[rows])
        rows = rows[blocked]


def _optimum_on_support(
    chosen: NDArray[np.int64], rows: NDArray[np.int64], padded_gram: Matrix, linear: Matrix
) -> Matrix:
    """Weights that sum to one and are optimal without bounds on each support (T, K); padding gets 0."""
    n = linear.shape[1] - 1
    held = chosen < n
    square = padded_gram[chosen[:, :, None], chosen[:, None, :]]
    diagonal = np.arange(chosen.shape[1])
    square[:, diagonal, diagonal] += ~held
    sides = np.stack([np.where(held, linear[rows[:, None], chosen], 0.0), held.astype(float)], -1)
    solved = np.linalg.solve(square, sides)
    free, unit = solved[..., 0], solved[..., 1]
    level = (1 - free.sum(axis=1)) / unit.sum(axis=1)
    return np.asarray(free + level[:, None] * unit)


def _with_free_columns(
    supports: NDArray[np.int64], weights: Matrix, padding: int, width: int
) -> tuple[NDArray[np.int64], Matrix]:
    """Widen both until every row has `width` padded columns."""
    missing = width - int((supports == padding).sum(axis=1).min())
    if missing <= 0:
        return supports, weights
    return np.pad(supports, ((0, 0), (0, missing)), constant_values=padding), np.pad(weights, ((0, 0), (0, missing)))
