"""Packed features of all ads by row, one behind the other in a buffer: as objects of their own they take three times as much.

Knows nothing about ids of ads. What is read is a copy, which later changes leave as it is.
"""

from collections.abc import Sequence

import numpy as np

from features.index import grown
from features.vocabulary import Ids

HOLES = 0.25
"""The share of a buffer that nobody needs any more at which it is copied without that."""
SMALL = 2**16
"""Bytes that are not worth it."""
AT_ONCE = 1_000
"""Rows that are copied at each change until all are: about half a millisecond."""
LENGTH_BITS = 24
LENGTHS = (1 << LENGTH_BITS) - 1


class _Buffer:
    """What changes is appended, and leaves a hole where it was."""

    def __init__(self, rows: int) -> None:
        self._bytes, self._used = bytearray(), 0
        self.places = np.zeros(rows, np.int64)
        """By row where it starts, and in the last `LENGTH_BITS` how long it is; length 0: there is nothing."""

    @property
    def wasteful(self) -> bool:
        return len(self._bytes) - self._used > max(SMALL, HOLES * len(self._bytes))

    def get(self, rows: Ids) -> list[bytes | None]:
        places = self.places.take(np.where(rows < len(self.places), rows, 0))
        starts, view = places >> LENGTH_BITS, memoryview(self._bytes)
        ends = starts + (places & LENGTHS)
        return [view[start:end].tobytes() or None for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def put(self, rows: Ids, packed: Sequence[bytes | None]) -> None:
        parts = [each or b"" for each in packed]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        starts = len(self._bytes) + np.cumsum(lengths) - lengths
        self.places = grown(self.places, int(rows.max(initial=0)) + 1)
        self._used += int(np.sum(lengths - (self.places[rows] & LENGTHS)))
        self.places[rows] = starts << LENGTH_BITS | lengths
        self._bytes += b"".join(parts)


class PackedFeatures:
    """They are copied into a buffer without holes some rows at a time, at changes, which until that is done are put into both."""

    def __init__(self) -> None:
        self._buffer, self._next, self._copied = _Buffer(1), _Buffer(0), 0

    def get(self, rows: Ids) -> list[bytes | None]:
        """Those of each row, None where there are none."""
        return self._buffer.get(rows)

    def put(self, rows: Ids, packed: Sequence[bytes | None]) -> None:
        """Those of distinct rows, in place of what they had."""
        self._buffer.put(rows, packed)
        if self._copied:
            self._next.put(rows, packed)
            self._copy()
        elif self._buffer.wasteful:
            self._next = _Buffer(len(self._buffer.places))
            self._copy()

    def _copy(self) -> None:
        end = min(self._copied + AT_ONCE, len(self._buffer.places))
        rows = np.arange(self._copied, end)
        self._next.put(rows, self._buffer.get(rows))
        self._copied = end
        if end == len(self._buffer.places):
            self._buffer, self._next, self._copied = self._next, _Buffer(0), 0
