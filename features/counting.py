"""The counters of a request: what was counted with its user and its candidates, as the numbers of fields. Knows nothing about events."""

from collections.abc import Mapping, Sequence

import numpy as np

from .counters import Array, CountedPart, Counts, Tally, decayed_one
from .encode import AdTable, Features
from .events import Event
from .values import ValueTextError, text_of
from .vocabulary import UNKNOWN, Ids

NOTHING: Mapping[str, Sequence[float]] = {}


def numbers_of(table: AdTable, ad_ids: Sequence[str], rows: Ids, counts: Counts, ts: float) -> tuple[dict[str, float], dict[str, Array]]:
    """The counters of a user, and of ads `(n,)` in these rows, by field, at a time; `counts` are the user's."""
    with_ads = table.counts(rows, ts) if table.tallies else np.zeros((0, len(rows)))
    of_ads: dict[str, Array] = {
        name: counter.of_counts([with_ads[row] for row in made_of]) for name, counter, made_of in table.encoder.ad_counters
    }
    of_user = dict[str, float]()
    for name, counter, keys, least in table.encoder.user_counters:
        kept = [counts.get(key, NOTHING) for key in keys]
        touched = {*kept[0], *kept[-1]}
        if counter.value == "ad_id":
            touched.intersection_update(ad_ids)
        now = {value: counter.of_counts([decayed_one(each.get(value), ts, counter.window) for each in kept]) for value in touched}
        if not counter.value:
            of_user[name] = now.get("", least)
        elif not now:
            of_ads[name] = np.full(len(ad_ids), least)
        elif counter.value == "ad_id":
            of_ads[name] = np.array([now.get(ad_id, least) for ad_id in ad_ids])
        else:
            of_ads[name] = _beside(table, counter.value, rows, now, least)
    return of_user, of_ads


def _beside(table: AdTable, name: str, rows: Ids, now: Mapping[str, float], least: float) -> Array:
    """What stands beside ads by the values that they have; those that the vocabulary does not know, all one to it, have nothing."""
    slot = next(slot for slot in table.encoder.layouts["ad"].ids if slot.field.name == name)
    lookup = table.encoder.vocabularies.categories[slot.field.vocabulary]
    by_id = {id_: number for value, number in now.items() if (id_ := lookup.id(value)) > UNKNOWN}
    return np.array([by_id.get(each, least) for each in table.block.ids[:, slot.start].take(rows).tolist()])


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
