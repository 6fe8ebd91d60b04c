"""Benchmarks; what several of them share."""

from __future__ import annotations

import math
from pathlib import Path

CREATURES = Path(__file__).resolve().parents[1] / "examples" / "creatures"
"""The demo's pictures, for benchmarks that are given no others."""


def exponent(time: float, size: float, time_before: float, size_before: float) -> float:
    """How the time grows with the size: 1 in proportion, 2 with its square."""
    return math.log(time / time_before) / math.log(size / size_before)
