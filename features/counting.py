"""The counters of a request: what was counted with its user and its candidates, as the numbers of fields. Knows nothing about events."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .counters import Array, CountedPart, Counts, Tally, decayed_one
from .encode import AdTable, Features
from .events import Event
from .values import ValueTextError, text_of
from .vocabulary import UNKNOWN, Ids

NOTHING: Mapping[str, Sequence[float]] = {}


def numbers_of(table: AdTable, ad_ids: Sequence[str], rows: Ids, counts: Counts, ts: float) -> tuple[dict[str, float], Array]:
    """The counters of a user, by field, and of ads in these rows `(n, counters)`, at a time; `counts` are the user's."""
    encoder = table.encoder
    columns, together = encoder.by_ad
    of_ads, of_user = np.empty((len(rows), len(encoder.counted))), dict[str, float]()
    if columns:
        of_ads[:, columns] = together.numbers(table.counts(rows, ts))
    for name, counter, keys, least in encoder.by_user:
        top, bottom = counts.get(keys[0], NOTHING), counts.get(keys[1], NOTHING) if counter.is_rate else NOTHING
        ids, wanted = _beside(table, counter.value, ad_ids, rows, {*top, *bottom})
        (above, below), window = counter.smoothing, counter.window
        now = {
            id_: (decayed_one(top.get(value), ts, window) + above) / (decayed_one(bottom.get(value), ts, window) + below)
            for id_, value in wanted.items()
        }
        if counter.value:
            of_ads[:, encoder.counted.index(name)] = [now.get(each, least) for each in ids] if now else least
        else:
            of_user[name] = now.get("", least)
    return of_user, of_ads


def _beside(table: AdTable, name: str, ad_ids: Sequence[str], rows: Ids, values: set[str]) -> tuple[Sequence[Any], dict[Any, str]]:
    """What stands for the values that ads have of a field, and by it those of some values that one of them has.

    Values that the vocabulary does not know are all one to it, and have nothing.
    """
    if not name:
        return (), {"": ""}
    if name == "ad_id":
        return ad_ids, {value: value for value in values.intersection(ad_ids)}
    column, lookup = table.encoder.told_apart[name]
    ids = table.block.ids[:, column].take(rows).tolist()
    known = {lookup.id(value): value for value in values} if values else {}
    return ids, {id_: known[id_] for id_ in known.keys() & set(ids) if id_ > UNKNOWN}


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
