"""The counters of a request: what was counted with its user and its candidates, as the numbers of fields. Knows nothing about events."""

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

from .counters import NONE, Array, CountedPart, Counter, Counts, Tally, decayed_one
from .encode import AdTable, Features
from .events import Event
from .values import ValueTextError, text_of
from .vocabulary import UNKNOWN, HashBuckets, Ids, Vocabulary

Tallied = Mapping[str, Sequence[float]]

FEW = 16
"""Of so many values of a user it is not asked first which of them the ads have."""
SMALL = 10_000
"""Ids of a vocabulary for which a row is made at once."""


def numbers_of(table: AdTable, ad_ids: Sequence[str], rows: Ids, counts: Counts, ts: float) -> tuple[dict[str, float], Array]:
    """The counters of a user, by field, and of ads in these rows `(counters, n)`, at a time; `counts` are the user's."""
    encoder = table.encoder
    of_ads, of_user = np.empty((len(encoder.counted), len(rows))), dict[str, float]()
    if encoder.by_ad[1]:
        for row, numbers in zip(encoder.by_ad[0], table.counters(rows, ts), strict=True):
            of_ads[row] = numbers
    for each in encoder.by_user:
        counter, sides = each.counter, [counts.get(key, NONE) for key in each.keys]
        if not counter.value:
            of_user |= _numbers(counter, sides, {each.name: ""}, ts)
        elif each.lookup is None:
            of_ads[each.row] = _by_text(counter, sides, ad_ids, ts)
        else:
            of_ads[each.row] = _by_id(counter, sides, each.lookup, table.ids_in(rows, each.column), ts)
    return of_user, of_ads


def _by_text(counter: Counter, sides: Sequence[Tallied], values: Sequence[str], ts: float) -> Array | float:
    """The number of each value, from what was counted by value of each tally."""
    found = {*chain.from_iterable(sides)}.intersection(values)
    now = _numbers(counter, sides, {value: value for value in found}, ts)
    return np.fromiter(map(now.get, values, repeat(counter.least)), np.float64, len(values)) if now else counter.least


def _by_id(counter: Counter, sides: Sequence[Tallied], lookup: Vocabulary | HashBuckets, ids: Ids, ts: float) -> Array | float:
    """The same of values that are known by their ids. Those that the vocabulary does not know are all one to it, and have nothing."""
    by_id = {lookup.id(value): value for value in {*chain.from_iterable(sides)}}
    if len(by_id) > FEW:
        by_id = {id_: by_id[id_] for id_ in by_id.keys() & set(ids.tolist())}
    by_id.pop(UNKNOWN, None)
    now = _numbers(counter, sides, by_id, ts)
    if lookup.size > SMALL:
        return np.fromiter(map(now.get, ids.tolist(), repeat(counter.least)), np.float64, len(ids))
    row = np.empty(lookup.size)
    row.fill(counter.least)
    for id_, number in now.items():
        row[id_] = number
    return row.take(ids)


def _numbers(counter: Counter, sides: Sequence[Tallied], values: Mapping[Any, str], ts: float) -> dict[Any, float]:
    window = counter.window
    now = [[decayed_one(side.get(value), ts, window) for value in values.values()] for side in sides]
    return dict(zip(values, map(counter.of_counts, zip(*now, strict=True)), strict=True))


def parts_of(event: Event, tallies: Sequence[Tally], ad: Features) -> tuple[list[CountedPart], list[CountedPart]]:
    """Where an event counts, of its user and of its ad, which has these features."""
    of_user, of_ad = list[CountedPart](), list[CountedPart]()
    for tally in tallies:
        value = _value(tally.value, event.ad_id, ad) if tally.value else ""
        if tally.event == event.type and value is not None:
            (of_user if tally.by == "user" else of_ad).append(CountedPart(tally.key, value, tally.window))
    return of_user, of_ad


def _value(name: str, ad_id: str, ad: Features) -> str | None:
    """The value of an ad's field by which is counted: of a list the first."""
    value = ad_id if name == "ad_id" else ad.get(name)
    try:
        return text_of(value[0] if isinstance(value, list | tuple) and value else value)
    except ValueTextError:
        return None
