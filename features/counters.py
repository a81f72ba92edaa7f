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

from .index import grown

Array = np.ndarray[Any, np.dtype[np.float64]]
COUNTED = ("click", "impression", "conversion")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
ENTRIES = ("of", "by", "window", "prior", "transform")
PRIOR = (1.0, 20.0)


Counts = Mapping[str, Mapping[str, Sequence[float]]]
"""Of a user or an ad: by key of a tally and by value ("" where counts do not differ by one) how much, and when that was."""
TINY = 1e-300
NOTHING: Sequence[float] = (0.0, 0.0)
NONE: Mapping[str, Sequence[float]] = {}
LONG, FARTHEST = 300.0, 700.0
"""In windows: how far a count may be from the time that its column shares, and the most whose exponential is a number."""
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
        return smoothed(counts[0], counts[1], self.smoothing) if self.is_rate else counts[0]

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


def smoothed(count: Any, other: Any, smoothing: tuple[Any, Any]) -> Any:
    """The number of a counter, of what it counts and of what that is the rate; numbers or arrays."""
    return (count + smoothing[0]) / (other + smoothing[1])


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
    return counts * np.exp(np.maximum(seconds, 0.0) / -window)


def decayed_one(count: Sequence[float] | None, ts: float, window: float) -> float:
    """The same of one count (how much, and when) at a time, without what an array costs; None: nothing was counted."""
    if count is None:
        return 0.0
    much, when = count
    return much * math.exp((when - ts) / window) if ts > when else much


def counted(count: Sequence[float], ts: float, window: float) -> tuple[float, float]:
    """A count (how much, and when) with one more event at `ts`, which may be before its time."""
    much, last = count
    if ts < last:
        return much + decayed_one((1.0, ts), last, window), last
    return decayed_one(count, ts, window) + 1.0, ts


class CountTable:
    """What some counters of many rows are made of: of each the counts of what it is of, and after those of what it is the rate.

    A count is kept as what it comes to at a time that all rows of its column share, so that what it has become by another is one product,
    without an exponential of its own; and beside that as what it was in the end, which is the most that it is. A clock that goes back by
    more than `LONG` windows finds nothing of what was counted before.
    """

    def __init__(self, counters: Sequence[Counter], rows: int) -> None:
        tallies = [(*counter.tallies, None)[i] for i in (0, 1) for counter in counters]
        self._keys = [tally.key if tally else "" for tally in tallies]  # a plain count is over nothing
        self._windows = np.array([tally.window if tally else math.inf for tally in tallies])
        above, below = np.array([counter.smoothing for counter in counters]).T.reshape(2, -1, 1)
        self._smoothing = above, below
        self._since = np.zeros(len(tallies))
        self._until = 0.0
        """Until when times are near to all of `_since`."""
        self._counts = np.zeros((rows, 2 * len(tallies)))

    def put(self, rows: Any, counts: Sequence[Counts]) -> None:
        """Have other counts in rows `(n,)`."""
        if self._keys and len(rows):
            pairs = np.array([[each.get(key, NONE).get("", NOTHING) for key in self._keys] for each in counts])
            much, when = pairs[..., 0], pairs[..., 1]
            self._bring(when.max())
            self._counts[rows] = np.hstack([much * np.exp((when - self._since) / self._windows), much])

    def numbers(self, rows: Any, ts: float) -> Array:
        """The counters `(counters, n)` of rows `(n,)` at a time."""
        self._bring(ts)
        columns = len(self._keys)
        counts = self._counts.take(rows, 0).T.copy()  # each column in one piece
        kept = np.exp(np.minimum((self._since - ts) / self._windows, FARTHEST))
        now = np.minimum(counts[:columns] * kept[:, None], counts[columns:])
        numbers: Array = smoothed(now[: columns // 2], now[columns // 2 :], self._smoothing)
        return numbers

    def _bring(self, ts: float) -> None:
        """Bring what is kept of columns to a time that is long after that which they share: an exponential of more is no number."""
        if ts > self._until:
            far = np.flatnonzero(ts - self._since > LONG * self._windows)
            self._counts[:, far] *= np.exp((self._since[far] - ts) / self._windows[far])
            self._since[far] = ts
            self._until = (self._since + LONG * self._windows).min()

    def grow(self, rows: int) -> None:
        """Have room for so many rows."""
        self._counts = grown(self._counts, rows)


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
