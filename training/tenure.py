"""How long the values of vocabularies stay: the row of one that no window has had for long is given to a value that is new.

Embedding tables would otherwise grow with every retraining (expiry of features in Monolith, Liu et al. 2022, section 2.2). A value that
stays keeps its id, and a row is taken away only when it is needed: until then an idle value scores as it did.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from features.vocabulary import FIRST, Vocabularies, Vocabulary

IDLE = "idle.json"


@dataclass
class Tenure:
    """What a training takes over of idle values, and what it leaves to the next."""

    evict_after: int = 0
    """Windows in a row without a value after which its row may be taken; 0: it stays."""
    idle: dict[str, dict[str, int]] = field(default_factory=dict)
    """By vocabulary and value: for how many windows in a row it has not been seen; values of this window are not in it."""
    counts: dict[str, str] = field(default_factory=dict)
    """By vocabulary: how many values there are, how many of them are new, and how many rows those took."""

    def place(self, vocabulary: str, before: Sequence[str], seen: Collection[str], new: Sequence[str], most: int = 0) -> list[str]:
        """The values of a vocabulary in the order of their ids, where it was `before` and a window has `seen` some and brings `new` ones.

        The first new values take the rows of those that have been idle longest, the others come after all, until there are `most`.
        """
        known = self.idle.get(vocabulary, {})
        idle = {value: known.get(value, 0) + 1 for value in before if value not in seen}
        leaving = [value for value, windows in idle.items() if windows >= self.evict_after > 0]
        new = new[: len(leaving) + max(0, most - len(before))] if most else new
        taken = dict(zip(sorted(leaving, key=lambda value: -idle[value]), new, strict=False))
        self.idle[vocabulary] = {value: windows for value, windows in idle.items() if value not in taken}
        values = [*(taken.get(value, value) for value in before), *new[len(taken) :]]
        if before:
            self.counts[vocabulary] = f"{len(values):,} values, {len(new):,} new, {len(taken):,} of them in rows of idle ones"
        return values

    def to_json(self) -> bytes:
        """As the bundle's `idle.json`."""
        return json.dumps({name: values for name, values in self.idle.items() if values}, ensure_ascii=False).encode()


def parse_idle(text: bytes) -> dict[str, dict[str, int]]:
    """Read an `idle.json`.

    Raises:
        ValueError: it is not one.
    """
    document = json.loads(text)
    try:
        return {name: {value: int(windows) for value, windows in values.items()} for name, values in document.items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"it does not say for how many windows values were idle: {error}") from error


def renewed(before: Vocabularies, after: Vocabularies) -> Mapping[str, list[int]]:
    """By vocabulary, the ids that stood for another value before."""
    ids = {}
    for name, vocabulary in after.categories.items():
        known = before.categories.get(name)
        if isinstance(known, Vocabulary) and isinstance(vocabulary, Vocabulary):
            pairs = zip(known.values, vocabulary.values, strict=False)
            ids[name] = [i for i, (old, new) in enumerate(pairs, FIRST) if old != new]
    return ids
