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
Numbers = NDArray[np.int64]
"""Which targets, or which coefficients."""

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
        fits = _SimplexFits(self._gram, self.vectors, targets / factor)
        fits.grow()
        simplex = np.zeros((len(targets), self.n + 1))  # the last column takes the padding
        np.put_along_axis(simplex, fits.supports, fits.weights, axis=1)
        return np.asarray(lower + factor * simplex[:, : self.n])


def _onto_box(point: Matrix, lower: float) -> Matrix:
    """Nearest point of {lower <= r_i <= 1, sum r = 1}: clip(point - t), t by bisection on the falling sum."""
    low, high = float(point.min()) - 1, float(point.max()) - lower
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(point - middle, lower, 1).sum() > 1 else (low, middle)
    return np.clip(point - (low + high) / 2, lower, 1)


class _SimplexFits:
    """Exact simplex fits of all targets in step: `supports` (T, K) padded with S, and their `weights` (T, K).

    The last row and column of what is padded, all zeros, belong to the padding. `levels` (T,): the gradient that all
    coefficients of a support have once they are at their optimum.
    """

    def __init__(self, gram: Matrix, vectors: Matrix, targets: Matrix) -> None:
        self.n = len(vectors)
        self._gram = np.pad(gram, (0, 1)).ravel()
        self._vectors = np.pad(vectors, ((0, 1), (0, 0)))
        self._linear: Matrix = targets @ self._vectors.T  # (T, S + 1)
        self._single = (self._vectors.astype(np.float32), self._linear.astype(np.float32))
        self.supports = np.argmin(np.diag(gram) / 2 - self._linear[:, : self.n], axis=1)[:, None]
        self.weights, self.levels = np.ones((len(targets), 1)), np.empty(len(targets))

    def grow(self) -> None:
        """Each round admits, for every unfinished target, the coefficients whose growth gains most, then moves to the
        optimum on the support, dropping coefficients that would turn negative on the way. The first rounds admit
        several, which saves rounds; later ones a single one, with which the objective falls strictly until the optimum.
        """
        rows = np.arange(len(self.supports))
        self._settle(rows)
        for number in range(3 * self.n + 10):
            width = min(BULK_WIDTH, self.n) if number < BULK_ROUNDS else 1
            entering, gain = self._best(rows, width, in_single=True)
            improving = (gain > 10 * TOLERANCE).any(axis=1)
            if not improving.all():  # what single precision calls an optimum, double looks at
                entering[~improving], gain[~improving] = self._best(rows[~improving], width, in_single=False)
                improving = (gain > 10 * TOLERANCE).any(axis=1)
            rows = rows[improving]
            if not len(rows):
                break
            self._admit(rows, np.where(gain > 10 * TOLERANCE, entering, self.n)[improving])
            self._settle(rows)

    def _best(self, rows: Numbers, width: int, *, in_single: bool) -> tuple[Numbers, Matrix]:
        """The `width` coefficients outside their supports that gain `rows` most, (R, width), and what they gain, in
        double precision.
        """
        vectors, linear = self._single if in_single else (self._vectors, self._linear)
        chosen, weights = self.supports[rows], self.weights[rows]
        relations = np.zeros((len(rows), self.n + 1), vectors.dtype)
        np.put_along_axis(relations, chosen, weights.astype(vectors.dtype), axis=1)
        gradient = (relations @ vectors) @ vectors.T
        gradient -= linear[rows]
        np.put_along_axis(gradient, chosen, np.inf, axis=1)
        gradient[:, self.n] = np.inf
        entering = np.empty((len(rows), width), np.int64)
        is_there = np.empty((len(rows), width), np.bool_)
        for column in range(width):  # several times as fast as argpartition
            least = np.argmin(gradient, axis=1)[:, None]
            is_there[:, column] = np.take_along_axis(gradient, least, 1)[:, 0] < np.inf
            entering[:, column] = least[:, 0]
            np.put_along_axis(gradient, least, np.inf, axis=1)
        own = np.einsum("rek,rk->re", self._products(entering, chosen), weights)
        gain = self.levels[rows, None] - (own - self._linear[rows[:, None], entering])
        return entering, np.where(is_there, gain, 0.0)

    def _admit(self, rows: Numbers, entering: Numbers) -> None:
        """Put `entering` (R, width) into padded columns, which are added where there are too few."""
        width = entering.shape[1]
        missing = width - int((self.supports == self.n).sum(axis=1).min())
        if missing > 0:
            self.supports = np.pad(self.supports, ((0, 0), (0, missing)), constant_values=self.n)
            self.weights = np.pad(self.weights, ((0, 0), (0, missing)))
        free = np.argsort(self.supports[rows] != self.n, axis=1, kind="stable")[:, :width]
        self.supports[rows[:, None], free] = entering

    def _settle(self, rows: Numbers) -> None:
        """Move the weights of `rows` to the optimum on their supports, dropping what reaches zero."""
        while len(rows):
            optimum, self.levels[rows] = self._optimum(rows)
            current = self.weights[rows]
            blocking = (self.supports[rows] < self.n) & (optimum <= 0)
            blocked = blocking.any(axis=1)
            drop = np.where(blocking, current / np.maximum(current - optimum, 1e-300), np.inf)
            step = np.minimum(drop.min(axis=1), 1.0)
            moved = current + step[:, None] * (optimum - current)
            gone = blocking & (drop <= step[:, None])
            moved[gone] = 0.0
            self.weights[rows] = moved
            self.supports[rows] = np.where(gone, self.n, self.supports[rows])
            rows = rows[blocked]

    def _optimum(self, rows: Numbers) -> tuple[Matrix, Matrix]:
        """Weights on the supports of `rows` that sum to one and are optimal without bounds, (R, K), padding gets 0; and
        the gradient that all of a support then have, (R,).
        """
        chosen = self.supports[rows]
        held = chosen < self.n
        square = self._products(chosen, chosen)
        diagonal = np.arange(chosen.shape[1])
        square[:, diagonal, diagonal] += ~held
        sides = np.stack([np.where(held, self._linear[rows[:, None], chosen], 0.0), held.astype(float)], -1)
        solved = np.linalg.solve(square, sides)
        free, unit = solved[..., 0], solved[..., 1]
        level = (1 - free.sum(axis=1)) / unit.sum(axis=1)
        return np.asarray(free + level[:, None] * unit), np.asarray(level)

    def _products(self, left: Numbers, right: Numbers) -> Matrix:
        """Entries of the Gram matrix between coefficients (R, L) and (R, K): (R, L, K)."""
        return np.take(self._gram, (left * (self.n + 1))[:, :, None] + right[:, None, :])
