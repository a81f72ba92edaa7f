"""Rows of ads that one encoder made, as another would make them: a model that is trained again mostly numbers the same values anew.

Knows nothing about where rows are kept.
"""

from collections.abc import Iterator

import numpy as np

from .encode import Block, Encoder, Mask
from .vocabulary import FIRST, UNKNOWN, Ids, Vocabulary

AT_ONCE = 5_000
"""Values looked up before other work gets a turn: about half a millisecond."""


class IdRemap:
    """From the ids of one encoder to those of another. Complete after its `steps`."""

    def __init__(self, old: Encoder, new: Encoder) -> None:
        self._old, self._new = old, new
        self._slots = [slot for slot in new.layouts["ad"].ids if not slot.field.buckets]
        """Columns whose ids are those of a vocabulary. A hash gives the same id to a value for ever."""
        self._ids: dict[str, Ids] = {}
        """By vocabulary the new id of each old one."""

    @property
    def possible(self) -> bool:
        """Whether the fields of ads are the same, and so are the means and deviations that their numbers were scaled with."""
        old, new = self._old, self._new
        scaled = [field.path for field in new.schema.side("ad") if field.transform == "standard"]
        return old.schema.side("ad") == new.schema.side("ad") and all(
            old.vocabularies.moments[path] == new.vocabularies.moments[path] for path in scaled
        )

    def steps(self) -> Iterator[None]:
        """Look up the new ids, some at each step."""
        for name in {slot.field.vocabulary for slot in self._slots}:
            old, new = self._old.vocabularies.categories[name], self._new.vocabularies.categories[name]
            if isinstance(old, Vocabulary):
                ids = self._ids[name] = np.arange(old.size)  # padding and unknown keep theirs
                for start in range(0, len(old.values), AT_ONCE):
                    some = old.values[start : start + AT_ONCE]
                    ids[start + FIRST : start + FIRST + len(some)] = new.encode(some)
                    yield

    def __call__(self, ads: Block) -> tuple[Block, Mask]:
        """The rows `(n, ...)` in the new ids; and which `(n,)` of them must be encoded from their values, since the old encoder did not
        know one.
        """
        ids, unsure = ads.ids.copy(), np.zeros(len(ads), np.bool_)
        for slot in self._slots:
            before = ads.ids[:, slot.columns]
            ids[:, slot.columns] = self._ids[slot.field.vocabulary].take(before)
            unsure |= (before == UNKNOWN).any(1)
        return Block(ids, ads.numbers), unsure
