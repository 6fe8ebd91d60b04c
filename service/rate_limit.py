"""How many requests an API key may make: a token bucket for each, in this process's memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from service.core.errors import RateLimited


class RateLimiter:
    """A key may make `per_minute` requests at once, after which it regains them evenly over a minute. 0: no limit."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key's name -> requests left, and when that was

    def take(self, name: str) -> None:
        """Counts a request of this key; RateLimited says when to come again."""
        if not self._per_minute:
            return
        now, rate = self._clock(), self._per_minute / 60
        left, then = self._buckets.get(name, (self._per_minute, now))
        left = min(self._per_minute, left + (now - then) * rate)
        if left < 1:
            raise RateLimited(
                f"This API key may make {self._per_minute:,} requests a minute. Wait, or send more in each.",
                retry_after_s=math.ceil((1 - left) / rate),
            )
        self._buckets[name] = (left - 1, now)
