"""Rows of a table by a text id, found by arrays: a hash table with open addressing. Knows nothing about ads.

Ids are known by Python's hash of them, 64 bits under a key that each process draws anew. A slot keeps those that do not say where it
is: that two of a million ids pass for one has a chance of 4 in 100 million, that an unknown id passes for one of them 8 in 10**14.
A dict follows three pointers into cold memory for each id, one after the other, which after a model has run costs more than anything
else that is done to a request.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

SLOTS = 1_024
SPARSE = 8
"""An index is made for as many ids as are expected once there is one in so many: a slot in memory that was never touched costs nothing,
but ids lie in it anywhere."""


class RowIndex:
    """Numbers ids from 1 in the order in which they come."""

    def __init__(self, room: int, spread: int = 4) -> None:
        """Have room for so many ids and no more.

        There are `spread` slots and more for each: 2 take half of the memory of 4, and look-ups up to 60 % longer.
        """
        self._spread, self._count = spread, 0
        self._slots = self._free(room)

    def __len__(self) -> int:
        return self._count

    def rows(self, ids: Sequence[str]) -> Ids:
        """Row `(n,)` of each id, 0 where there is none."""
        return self._find(_hashes(ids))

    def add(self, ids: Sequence[str]) -> Ids:
        """Row `(n,)` of each id, a new one where there was none."""
        hashes = _hashes(ids)
        rows = self._find(hashes)
        (absent,) = (rows == 0).nonzero()
        if len(absent):
            _, first, which = np.unique(hashes.take(absent), return_index=True, return_inverse=True)
            order = first.argsort()
            fresh = np.empty_like(order)
            fresh[order] = np.arange(self._count + 1, self._count + 1 + len(order))
            self._count += len(order)
            self._place(hashes.take(absent.take(first)), fresh)
            rows[absent] = fresh.take(which)
        return rows

    def _find(self, hashes: Ids) -> Ids:
        last = len(self._slots) - 1
        found = self._slots.take(hashes & last)
        rows: Ids = found & last
        (others,) = (((found ^ hashes) & ~last != 0) & (found != 0)).nonzero()
        step = 0
        while len(others):
            step += 1
            wanted = hashes.take(others)
            found = self._slots.take(wanted + step & last)
            rows[others] = found & last
            others = others[((found ^ wanted) & ~last != 0) & (found != 0)]
        return rows

    def _free(self, room: int) -> Ids:
        """A slot has the row in the bits that say where an id's slot is, and above them those of its hash; 0 is a free slot."""
        return np.zeros(max(SLOTS, 1 << (self._spread * room).bit_length()), np.int64)

    def _place(self, hashes: Ids, rows: Ids) -> None:
        """Put distinct ids into free slots; of several that want the same one, the last has it and the others look further."""
        last = len(self._slots) - 1
        at, slots = hashes & last, hashes & ~last | rows
        while len(at):
            free = self._slots[at] == 0
            self._slots[at[free]] = slots[free]
            without = self._slots[at] != slots
            at, slots = at[without] + 1 & last, slots[without]


class AdIds(RowIndex):
    """The same, with the ids themselves, and room for more: what several tables of the same ads number them by."""

    def __init__(self, room: int = 0) -> None:
        """Make room for so many ids: what grows on its way moves all that it has, which takes long when there is much."""
        super().__init__(room)
        self.texts = np.empty(room + 1, np.object_)
        """By row."""
        self.expected = 0
        """Ids that may come: room for all of them is made at once when there are some."""
        self._added: tuple[Sequence[str], Ids] = (), np.zeros(0, np.int64)

    def rows(self, ids: Sequence[str]) -> Ids:
        """See `RowIndex`. What was added last is not looked up: whoever adds ads asks for their rows again and again."""
        return self._added[1].copy() if ids == self._added[0] else super().rows(ids)

    def add(self, ids: Sequence[str]) -> Ids:
        """See `RowIndex`. Two slots of three stay free, so that most ids are found at the first look."""
        if ids == self._added[0]:
            return self._added[1].copy()
        before, together = len(self), len(self) + len(ids)
        if 3 * together > len(self._slots):
            self._slots = self._free(max(together, min(self.expected, SPARSE * together)))
            self._place(_hashes(self.texts[1 : before + 1].tolist()), np.arange(1, before + 1))
        rows = super().add(ids)
        self.texts = grown(self.texts, len(self) + 1)
        fresh = np.flatnonzero(rows > before)
        self.texts[rows[fresh]] = [ids[i] for i in fresh.tolist()]
        self._added = [*ids], rows
        return rows.copy()


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
