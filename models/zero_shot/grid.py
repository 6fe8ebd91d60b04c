"""Choosing among settings on a grid by their T1 on validation folds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from models.base import FloatArray
from models.zero_shot.base import History, Setting


def pick_on_grid(tried: Sequence[History], axes: Sequence[str]) -> Setting:
    """The setting best on average over the folds, where every fold tried the full grid of `axes` in the same order."""
    values = [sorted({entry[axis] for entry in tried[0]}) for axis in axes]
    position = {setting: index for index, setting in enumerate(product(*values))}
    t1 = np.zeros(len(position))
    for history in tried:
        for entry in history:
            t1[position[tuple(entry[axis] for axis in axes)]] += entry["validation_t1"] / len(tried)
    best = best_of_plateau(t1.reshape([len(axis) for axis in values]))
    return {axis: values[i][best[i]] for i, axis in enumerate(axes)}


def best_of_plateau(t1: FloatArray) -> tuple[int, ...]:
    """Where `t1`, averaged over its neighbourhood of 3 along each axis (edges repeated), is highest.

    Neighbouring settings give nearly the same model, so the mean is the same measurement with less noise.
    """
    padded = np.pad(t1, 1, mode="edge")
    shifts = product(range(3), repeat=t1.ndim)
    smooth = sum(padded[tuple(slice(i, i + n) for i, n in zip(shift, t1.shape, strict=True))] for shift in shifts)
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(smooth)), t1.shape))
