"""The counters of a request: what was counted with its user and its candidates, as the numbers of fields. Knows nothing about events."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .counters import Array, Counts, Part, Tally, decayed
from .encode import AdTable, Features
from .events import Event
from .values import ValueTextError, text_of
from .vocabulary import UNKNOWN, Ids


def numbers_of(table: AdTable, ad_ids: Sequence[str], counts: Counts, ts: float) -> tuple[dict[str, float], dict[str, Array]]:
    """The counters of a user, and of ads `(n,)`, by field, at a time; `counts` are the user's."""
    encoder, rows = table.encoder, table.rows(ad_ids)
    now: dict[Tally, Any] = table.counts(rows, ts) if table.tallies else {}
    for tally in encoder.tallies:
        if tally.by == "user":
            kept = counts.get(tally.key, {})
            much, last = np.array(list(kept.values()), np.float64).reshape(-1, 2).T
            now[tally] = _beside(table, tally, ad_ids, rows, list(kept), decayed(much, ts - last, tally.window).tolist())
    numbers = {name: counter.of_counts([now[tally] for tally in counter.tallies]) for name, counter in encoder.schema.counters.items()}
    of_user = {name: float(number) for name, number in numbers.items() if np.ndim(number) == 0}
    return of_user, {name: number for name, number in numbers.items() if name not in of_user}


def _beside(table: AdTable, tally: Tally, ad_ids: Sequence[str], rows: Ids, values: list[str], much: list[float]) -> Any:
    """What a user's counts come to beside ads. Values that the vocabulary does not know cannot be told from each other: none counts."""
    if not tally.value:
        return much[0] if much else 0.0
    if tally.value == "ad_id":
        by_id = dict(zip(values, much, strict=True))
        return np.array([by_id.get(ad_id, 0.0) for ad_id in ad_ids])
    slot = next(slot for slot in table.encoder.layouts["ad"].ids if slot.field.name == tally.value)
    ids = table.encoder.vocabularies.categories[slot.field.vocabulary].encode(values).tolist()
    found = dict(zip(ids, much, strict=True))
    own = table.block.ids[rows, slot.start].tolist()
    return np.array([found.get(each, 0.0) if each > UNKNOWN else 0.0 for each in own])


def parts_of(event: Event, tallies: Sequence[Tally], ad: Features) -> tuple[list[Part], list[Part]]:
    """Where an event counts, of its user and of its ad, which has these features."""
    of_user, of_ad = list[Part](), list[Part]()
    for tally in tallies:
        value = _value(tally.value, event.ad_id, ad) if tally.value else ""
        if tally.event == event.type and value is not None:
            (of_user if tally.by == "user" else of_ad).append(Part(tally.key, value, tally.window))
    return of_user, of_ad


def _value(name: str, ad_id: str, ad: Features) -> str | None:
    """The value of an ad's field by which is counted: of a list the first."""
    value = ad_id if name == "ad_id" else ad.get(name)
    try:
        return text_of(value[0] if isinstance(value, list | tuple) and value else value)
    except ValueTextError:
        return None
