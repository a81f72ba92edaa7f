"""Rows of a table by a text id, found by arrays: a hash table with open addressing. Knows nothing about ads.

Ids are known by Python's hash of them, 64 bits under a key that each process draws anew: that two of a million ids share one has
a chance of 3 in 100 million, that an unknown id passes for one of them 5 in 10**14. A dict follows three pointers into cold
memory for each id, one after the other, which after a model has run costs more than anything else that is done to a request.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

SLOTS = 1_024


class RowIndex:
    """Numbers ids from 1 in the order in which they come."""

    def __init__(self, room: int = 0, spread: int = 4) -> None:
        """Make room for so many ids: what grows on its way moves all that it has, which takes long when there is much.

        There are `spread` slots and more for each id when it grows: 2 take half of the memory of 4, and look-ups up to 60 % longer.
        """
        self._spread, self._count = spread, 0
        self._slots = self._free(max(SLOTS, self._slots_for(room)))

    def __len__(self) -> int:
        return self._count

    def rows(self, ids: Sequence[str]) -> Ids:
        """Row `(n,)` of each id, 0 where there is none."""
        return self._find(_hashes(ids))

    def add(self, ids: Sequence[str]) -> Ids:
        """Row `(n,)` of each id, a new one where there was none."""
        hashes = _hashes(ids)
        absent = hashes[self._find(hashes) == 0]
        if len(absent):
            fresh = absent[np.sort(np.unique(absent, return_index=True)[1])]
            rows = np.arange(self._count + 1, self._count + 1 + len(fresh))
            self._count += len(fresh)
            self._grow()
            self._place(fresh, rows)
        return self._find(hashes)

    def _find(self, hashes: Ids) -> Ids:
        last = len(self._slots) - 1
        found = self._slots.take(hashes & last, 0)
        rows: Ids = found[:, 1].copy()
        (others,) = ((found[:, 0] != hashes) & (rows != 0)).nonzero()
        step = 0
        while len(others):
            step += 1
            found = self._slots.take(hashes.take(others) + step & last, 0)
            rows[others] = found[:, 1]
            others = others[(found[:, 0] != hashes.take(others)) & (found[:, 1] != 0)]
        return rows

    def _grow(self) -> None:
        """Keep two slots of three free where there are 4 for each id, so that most ids are found at the first look."""
        if 3 * self._spread * self._count > 4 * len(self._slots):
            taken = self._slots[self._slots[:, 1] != 0]
            self._slots = self._free(self._slots_for(self._count))
            self._place(taken[:, 0], taken[:, 1])

    def _slots_for(self, ids: int) -> int:
        return 1 << (self._spread * ids).bit_length()

    @staticmethod
    def _free(slots: int) -> Ids:
        return np.zeros((slots, 2), np.int64)  # hash, row: side by side, for one look into memory; row 0 is a free slot

    def _place(self, hashes: Ids, rows: Ids) -> None:
        """Put distinct ids into free slots; of several that want the same one, the last has it and the others look further."""
        at = hashes & (len(self._slots) - 1)
        while len(at):
            free = self._slots[at, 1] == 0
            self._slots[at[free]] = np.stack([hashes[free], rows[free]], 1)
            without = self._slots[at, 0] != hashes
            at, hashes, rows = at[without] + 1 & (len(self._slots) - 1), hashes[without], rows[without]


class AdIds(RowIndex):
    """The same, with the ids themselves: what several tables of the same ads number them by."""

    def __init__(self, room: int = 0) -> None:
        super().__init__(room)
        self.texts = np.empty(room + 1, np.object_)
        """By row."""

    def add(self, ids: Sequence[str]) -> Ids:
        """See `RowIndex`."""
        before, rows = len(self), super().add(ids)
        self.texts = grown(self.texts, len(self) + 1)
        fresh = np.flatnonzero(rows > before)
        self.texts[rows[fresh]] = [ids[i] for i in fresh.tolist()]
        return rows


def grown(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The array if it has so many rows, else a larger one with zeros behind its own: nothing touches those, so they take no memory yet."""
    have = len(array)
    if rows <= have:
        return array
    zeros = np.empty if array.dtype.hasobject else np.zeros  # objects are none yet, either way
    larger = zeros((max(rows, 2 * have), *array.shape[1:]), array.dtype)
    larger[:have] = array
    return larger


def _hashes(ids: Sequence[str]) -> Ids:
    return np.fromiter(map(hash, ids), np.int64, len(ids))
