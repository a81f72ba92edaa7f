"""The time of day by which windows close."""

import time
from collections.abc import Callable

JUMP_SECONDS = 5.0


class Clock:
    """The time of day that closes windows. It never runs ahead of how long the joiner has seen time pass: windows do not close early."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] | None = None) -> None:
        self._wall = wall
        # A machine that slept has seen time pass.
        self._steady = steady or (lambda: time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)))
        self._anchor = wall() - self._steady()
        self._off = 0.0

    def now(self) -> float:
        """Seconds since 1970: by the wall clock, but no more than have passed since the start."""
        return min(self._wall(), self._anchor + self._steady())

    def jumped(self) -> float:
        """By how many seconds the wall clock has jumped since this was last asked; 0 if it has not."""
        off = self._wall() - self._steady() - self._anchor
        jump, self._off = off - self._off, off
        return jump if abs(jump) > JUMP_SECONDS else 0.0
