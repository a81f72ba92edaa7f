"""What the live version and its challenger did in the last ten minutes, over all workers of a service, in slots of ten seconds.

Each worker writes an array of its own, a file in the folder that they share, and reads those of the others: no worker waits for another,
and one that died leaves what it saw. Slots are numbered by the system's clock since its start, which all processes of a machine share.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features import files

SLOTS, SLOT_SECONDS = 60, 10.0
FASTEST, STEP, BINS = 1e-5, 1.05, 340
"""Times are counted in bins that are 5 % wide, from 10 µs to 2.5 min."""
LIVE, CHALLENGING = 0, 1
REQUESTS, ERRORS, LATE, CLICKS, SQUARES = range(5)
COUNTS = 5
WIDTH = 1 + 2 * (COUNTS + BINS)
"""Of a slot: its number and one, then the counts of both versions, then their times."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Period:
    """What the live version (row 0) and the challenger (row 1) did in a period: `sums` `(2, 5)`, `times` `(2, BINS)`."""

    sums: Array
    times: Array

    def count(self, side: int, what: int) -> float:
        """Requests that began to be scored, or those that failed, or were late."""
        return float(self.sums[side, what])

    def scored(self, side: int) -> float:
        """Requests that were scored in time."""
        return float(self.sums[side, REQUESTS] - self.sums[side, ERRORS] - self.sums[side, LATE])

    def p99(self, side: int) -> float:
        """Seconds, to 5 %; 0 where nothing was scored."""
        below = np.cumsum(self.times[side])
        return 0.0 if not below[-1] else FASTEST * STEP ** int(np.searchsorted(below, 0.99 * below[-1]))

    def slower(self, side: int, seconds: float) -> float:
        """Requests that took longer."""
        return float(self.times[side, bin_of(seconds) + 1 :].sum())

    def mean(self, side: int) -> float:
        """p(click) of a request, the mean of its candidates; 0 where nothing was scored."""
        return float(self.sums[side, CLICKS]) / max(1.0, self.scored(side))

    def error(self, side: int) -> float:
        """The standard error of `mean`."""
        count = max(1.0, self.scored(side))
        return math.sqrt(max(0.0, float(self.sums[side, SQUARES]) / count - self.mean(side) ** 2) / count)


def bin_of(seconds: float) -> int:
    """The bin of a time."""
    return min(BINS - 1, max(0, math.ceil(math.log(max(seconds, FASTEST) / FASTEST, STEP))))


class EvidenceWindow:
    """The last ten minutes of one challenger."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, folder: Path | None = None, key: str = "") -> None:
        """Its own, or that of all processes that name the same folder and key."""
        self._clock, self._folder, self._key = clock, folder, key
        self._file = folder / f"{key}.{os.getpid()}.{id(self)}.evidence" if folder else None
        self._own: Array = _mapped(self._file) if self._file else np.zeros((SLOTS, WIDTH))
        self._others: dict[Path, Array] = {}

    def scored(self, side: int, seconds: float, p_click: float) -> None:
        """A request was scored in that time, with that mean p(click)."""
        slot = self._slot()
        slot[1 + side * COUNTS : 1 + (side + 1) * COUNTS] += (1, 0, 0, p_click, p_click * p_click)
        slot[1 + 2 * COUNTS + side * BINS + bin_of(seconds)] += 1

    def failed(self, what: int = ERRORS) -> None:
        """The challenger failed, or was late."""
        slot = self._slot()
        slot[1 + COUNTS + REQUESTS] += 1
        slot[1 + COUNTS + what] += 1

    def all(self) -> Period:
        """All of it, of all processes."""
        return self.periods()[-1]

    def newest(self, requests: int) -> Period:
        """The newest slots that hold so many requests of either version."""
        return self.periods(requests)[0]

    def periods(self, *requests: int) -> list[Period]:
        """The newest slots that hold so many requests of either version, for each number; and all, last."""
        together = self._together()[(self._now() - np.arange(SLOTS)) % SLOTS]
        counts = together[:, [REQUESTS, COUNTS + REQUESTS]].cumsum(0).min(1)
        ends = [int(np.searchsorted(counts, each)) + 1 for each in requests]
        return [_period(together[:end].sum(0)) for end in (*ends, SLOTS)]

    def close(self) -> None:
        """Count no more; what others have read stays with them."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _together(self) -> Array:
        """The counts `(SLOTS, ...)` of all processes, those of slots that are over left out."""
        now, at = self._now(), np.arange(SLOTS)
        number = now - (now - at) % SLOTS + 1
        total = np.zeros((SLOTS, WIDTH - 1))
        for array in (self._own, *self._read()):
            total += array[:, 1:] * (array[:, :1] == number[:, None])
        return total

    def _read(self) -> list[Array]:
        if self._folder is None:
            return []
        for path in self._folder.glob(f"{self._key}.*.evidence"):
            if path != self._file and path not in self._others and (array := _of_another(path)) is not None:
                self._others[path] = array
        return list(self._others.values())

    def _now(self) -> int:
        return int(self._clock() // SLOT_SECONDS)

    def _slot(self) -> Array:
        now = self._now()
        slot: Array = self._own[now % SLOTS]
        if slot[0] != now + 1:
            slot[:] = 0
            slot[0] = now + 1
        return slot


def _period(counts: Array) -> Period:
    return Period(counts[: 2 * COUNTS].reshape(2, COUNTS), counts[2 * COUNTS :].reshape(2, BINS))


def _mapped(path: Path) -> Array:
    try:
        files.allocate(path, SLOTS * WIDTH * 8)
        return np.memmap(path, np.float64, "r+", shape=(SLOTS, WIDTH))
    except OSError:  # the folder is gone or full: each judges for itself
        return np.zeros((SLOTS, WIDTH))


def _of_another(path: Path) -> Array | None:
    try:
        return np.memmap(path, np.float64, "r", shape=(SLOTS, WIDTH)) if path.stat().st_size == SLOTS * WIDTH * 8 else None
    except (OSError, ValueError):  # it is just being made, or has gone
        return None
