"""The choice on a grid of settings."""

from __future__ import annotations

import numpy as np

from models.zero_shot.grid import best_of_plateau, pick_on_grid


def test_plateau_wins_over_a_lucky_peak() -> None:
    t1 = np.zeros((9, 9))
    t1[0, 8] = 0.7
    t1[4:7, 2:5] = 0.6
    assert best_of_plateau(t1) == (5, 3)
    assert best_of_plateau(np.array([0.0, 0.9, 0.0, 0.5, 0.6, 0.5])) == (4,)


def test_first_of_equals_and_a_single_setting() -> None:
    assert best_of_plateau(np.full((3, 4), 0.5)) == (0, 0)
    assert best_of_plateau(np.array([[0.2]])) == (0, 0)


def test_choice_is_by_the_mean_over_folds_in_whatever_order_they_tried() -> None:
    def history(good: float, *, falling: bool) -> list[dict[str, float]]:
        ridges = (3.0, 2.0, 1.0) if falling else (1.0, 2.0, 3.0)
        return [{"ridge": r, "top": t, "validation_t1": 0.9 if r == good else 0.1} for r in ridges for t in (1.0, 5.0)]

    assert pick_on_grid([history(3.0, falling=True)], ["ridge", "top"]) == {"ridge": 3.0, "top": 1.0}
    both = [history(1.0, falling=True), history(1.0, falling=False), history(3.0, falling=True)]
    assert pick_on_grid(both, ["ridge", "top"])["ridge"] == 1.0
