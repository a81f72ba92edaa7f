"""How often something happened lately to an ad, or through a user: counts that decay, as features. The one arithmetic, offline and online.

An event that is `s` seconds old counts exp(-s / window): at a steady rate that comes to as many as happen in a window. So a count is two
numbers, what it was and when, and events may come in any order. Knows nothing about schemas' other fields or where counts are kept.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
COUNTED = ("click", "impression", "conversion")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
ENTRIES = ("of", "by", "window", "prior", "transform")
PRIOR = (1.0, 20.0)


Counts = Mapping[str, Mapping[str, Sequence[float]]]
"""Of a user or an ad: by key of a tally and by value ("" where counts do not differ by one) how much, and when that was."""
TINY = 1e-300
KEYS_KEPT, VALUES_KEPT = 64, 256
"""The most tallies kept of a user or an ad, those that were changed last; and of each the most values, those of the largest counts."""


class CountedPart(NamedTuple):
    """Where an event counts."""

    key: str
    value: str
    window: float


class Tally(NamedTuple):
    """What is counted under one key, whichever counters need it."""

    event: str
    by: str
    value: str
    window: float

    @property
    def key(self) -> str:
        """Under which it is kept with the user or the ad."""
        return f"{self.event}@{self.window:g}" + (f"@{self.value}" if self.value else "")


@dataclass(frozen=True, slots=True)
class Counter:
    """What a number counts: the table `[counter.NAME]` of a schema."""

    of: tuple[str, ...]
    """`click`, `impression` or `conversion`; or the rate of two, such as `click/impression`."""
    by: tuple[str, ...]
    """`ad`; `user`; or a list of `user` and a field of ads, such as `ad_id`: by user and the value that the ad has, of a list the first."""
    window: float
    """Over how long, such as `10m`, `1h` or `7d`; an event of that age counts 1/e."""
    prior: tuple[float, float] | None = None
    """Of a rate: what is added to both counts, which is what a rate begins with and how slowly it leaves that. None: `PRIOR`, which
    preparing a log puts its own rate in place of."""

    @property
    def side(self) -> str:
        """Whose feature it is: also the ad's, where users' counts differ by ad."""
        return "user" if self.by == ("user",) else "ad"

    @property
    def value(self) -> str:
        """The field of ads by whose values a user's counts differ, or ""."""
        return self.by[1] if len(self.by) > 1 else ""

    @property
    def tallies(self) -> list[Tally]:
        """What it is made of."""
        return [Tally(event, self.by[0], self.value, self.window) for event in self.of]

    def of_counts(self, counts: Sequence[Any]) -> Any:
        """The number, from the counts beside `of`: numbers or arrays."""
        above, below = self.smoothing
        return (counts[0] + above) / (counts[1] + below) if self.is_rate else counts[0]

    @property
    def is_rate(self) -> bool:
        """Whether it is one of two counts."""
        return len(self.of) > 1

    @property
    def smoothing(self) -> tuple[float, float]:
        """What is added to the counts of a rate; of a plain count, which is one over nothing, 0 and 1."""
        return (self.prior or PRIOR) if self.is_rate else (0.0, 1.0)

    @property
    def least(self) -> float:
        """The number of what nothing has happened to."""
        return float(self.of_counts([0.0] * len(self.of)))

    def entries(self) -> dict[str, Any]:
        """As `[counter.NAME]` says it."""
        unit = next(unit for unit in reversed(UNITS) if self.window % UNITS[unit] == 0)
        prior = {"prior": list(self.prior)} if self.prior else {}
        by = list(self.by) if self.value else self.by[0]
        return {"of": "/".join(self.of), "by": by, "window": f"{self.window / UNITS[unit]:.0f}{unit}", **prior}


class Together(NamedTuple):
    """Several counters of one row of counts `(n, tallies + 1)`, of which the last is 0: `(counts + above) / (other counts + below)`."""

    tops: np.ndarray[Any, np.dtype[np.int64]]
    bottoms: np.ndarray[Any, np.dtype[np.int64]]
    above: Array
    below: Array

    @classmethod
    def of(cls, counters: Sequence[Counter], tallies: Sequence[Tally]) -> "Together":
        """Of counters, and what stands in the row; a plain count is one over that 0 and 1."""
        made_of = [[tallies.index(tally) for tally in counter.tallies] for counter in counters]
        tops, bottoms = (np.array([(*made, len(tallies))[i] for made in made_of], np.int64) for i in (0, 1))
        return cls(tops, bottoms, *np.array([counter.smoothing for counter in counters]).reshape(-1, 2).T)

    def numbers(self, counts: Array) -> Array:
        """The counters `(n, counters)`."""
        numbers: Array = (counts.take(self.tops, 1) + self.above) / (counts.take(self.bottoms, 1) + self.below)
        return numbers


def counter_of(entries: Mapping[str, Any]) -> tuple[Counter | None, list[str]]:
    """The counter that a table `[counter.NAME]` says, None where it makes none, and its mistakes."""
    of = tuple(entries["of"].split("/")) if isinstance(entries.get("of"), str) else ()
    by = entries.get("by")
    by = (by,) if isinstance(by, str) else tuple(by) if isinstance(by, list) else ()
    window = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", str(entries.get("window")))
    prior = entries.get("prior", list(PRIOR))
    rules = {
        f"unknown settings; known are {', '.join(ENTRIES)}": not set(entries) - set(ENTRIES),
        f"of must be one of {', '.join(COUNTED)}, or two of them as a rate, such as click/impression": (
            0 < len(of) <= 2 and set(of) <= set(COUNTED) and len(set(of)) == len(of)
        ),
        'by must be "ad", "user", or ["user", a field of ads]': by in (("ad",), ("user",)) or (len(by) == 2 and by[0] == "user"),
        'window must be a time such as "10m", "1h" or "7d"': window is not None,
        "prior must be two numbers above 0, of which the second is the larger, and stands with a rate": (
            isinstance(prior, list)
            and len(prior) == 2
            and all(type(each) in (int, float) for each in prior)
            and 0 < prior[0] < prior[1] < 1e9
            and ("prior" not in entries or len(of) == 2)
        ),
    }
    mistakes = [rule for rule, holds in rules.items() if not holds]
    if mistakes or window is None:
        return None, mistakes
    return Counter(of, by, float(window[1]) * UNITS[window[2]], (float(prior[0]), float(prior[1])) if "prior" in entries else None), []


def decayed(counts: Any, seconds: Any, window: Any) -> Any:
    """What counts have become after some seconds, of shapes that broadcast; before their time they are what they are then."""
    return counts * np.exp(-np.maximum(seconds, 0.0) / window)


def decayed_one(count: Sequence[float] | None, ts: float, window: float) -> float:
    """The same of one count (how much, and when) at a time, without what an array costs; None: nothing was counted."""
    return 0.0 if count is None else count[0] * math.exp(-max(ts - count[1], 0.0) / window)


def counted(count: Sequence[float], ts: float, window: float) -> tuple[float, float]:
    """A count (how much, and when) with one more event at `ts`, which may be before its time."""
    much, last = count
    if ts < last:
        return much + decayed_one((1.0, ts), last, window), last
    return decayed_one(count, ts, window) + 1.0, ts


def counts_before(groups: Any, ts: Any, happened: Any, window: float) -> Array:
    """The count of each row's group just before its time: `(n,)` each, groups from 0 on, of which below 0 have none; `ts` in order.

    What happened in rows of the same time does not count: nobody knew it then.
    """
    order = np.argsort(groups, kind="stable")
    group, at = groups[order], ts[order].astype(np.float64)
    begins = np.append(True, group[1:] != group[:-1])[: len(group)]
    gaps = np.diff(at, prepend=at[:1])
    # A prefix sum by doubling, of the recurrence count = count before * kept + happened.
    kept, total = np.where(begins, 0.0, decayed(1.0, gaps, window)), happened[order].astype(np.float64)
    step = 1
    while step < len(kept) and kept[step:].any():
        total[step:] += kept[step:] * total[:-step]
        kept[step:] *= kept[:-step]
        step *= 2
    moved = begins | (gaps != 0)
    first = np.maximum.accumulate(np.where(moved, np.arange(len(group)), 0))  # of the rows of the same group and time
    before = np.where(begins[first], 0.0, decayed(total[first - 1], gaps[first], window))
    counts = np.empty(len(group))
    counts[order] = np.where(group < 0, 0.0, before)
    return counts


def with_event(counts: Counts, parts: Sequence[CountedPart], ts: float) -> Counts:
    """Counts with one more event, at `ts`; they stay bounded."""
    after = dict(counts)
    for key, value, window in parts:
        kept = dict(after.pop(key, {}))
        kept[value] = counted(kept.get(value, (0.0, ts)), ts, window)
        if len(kept) > VALUES_KEPT:
            del kept[min(kept, key=lambda each: _size(kept[each], window))]
        after[key] = kept
    for key in list(after)[: max(0, len(after) - KEYS_KEPT)]:
        del after[key]
    return after


def _size(count: Sequence[float], window: float) -> float:
    """What counts of different times are compared by: the logarithm of what they come to at any one time."""
    return math.log(max(count[0], TINY)) + count[1] / window


def merged_counts(stored: Counts, loaded: Counts) -> Counts:
    """Counts that are stored and those of a data set, whose events may be the same: of each the larger, so that none counts twice."""
    together: dict[str, Mapping[str, Sequence[float]]] = {**loaded, **stored}
    for key, values in loaded.items():
        window, kept = float(key.split("@")[1]), dict(stored.get(key, {}))
        for value, count in values.items():
            if value not in kept or _size(count, window) > _size(kept[value], window):
                kept[value] = count
        largest = sorted(kept.items(), key=lambda each: _size(each[1], window), reverse=True)
        together[key] = dict(largest[:VALUES_KEPT])
    return {key: together[key] for key in list(together)[-KEYS_KEPT:]}


def tallies_of(counters: Sequence[Counter]) -> Iterator[Tally]:
    """What counters are made of, each once."""
    yield from dict.fromkeys(tally for counter in counters for tally in counter.tallies)
