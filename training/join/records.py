"""What stands in the streams, checked: a record that passes can be stored, joined and written without another look.

Knows nothing about where entries come from or go to.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from math import isfinite

from features.events import JOINED, Event, unpack_event
from features.served import ServedRecord, unpack_served
from features.state import StateError
from features.streams import Entry, Stream

from .state import NewEvent, NewRanking

LATEST = 253_402_300_799
"""The last second of the year 9999."""
LAST_POSITION = 2**31 - 1
DAMAGED, FOREIGN = "damaged", "foreign"
"""Outcomes of entries that are no records, and of events that are not for the joiner."""


def read_served(value: bytes) -> ServedRecord:
    """The ranking in an entry's value.

    Raises:
        StateError: it is none, or holds something that a file of the log cannot.
    """
    served = unpack_served(value)
    positions = served.positions
    fits = (
        _are(str, served.ad_ids, served.history, served.candidates, served.unknown, served.ads, served.sent, served.tensors)
        and _are(bytes, served.ads.values(), served.tensors.values())
        and _are(dict, served.sent.values())
        and _are_shares(served.p_click)
        and _are_shares(served.propensity)
        and _are(int, positions)
        and len(positions) in (0, len(served.ad_ids))
        and (not positions or 0 < min(positions) <= max(positions) <= LAST_POSITION)
        and set(map(type, served.history_ts)) <= {int, float}
        and 0 <= served.version < 2**63
        and 0 <= served.ts <= LATEST
    )
    if not fits:
        raise StateError("a served ranking is damaged: a value is of the wrong type or out of bounds")
    return served


def read_event(value: bytes) -> Event:
    """The event in an entry's value.

    Raises:
        StateError: it is none, or holds something that a file of the log cannot.
    """
    event = unpack_event(value)
    if not 0 <= event.ts <= LATEST or not isfinite(event.value or 0) or not 0 < (1 if event.position is None else event.position) <= 2**31:
        raise StateError("an event is damaged: a number is out of bounds")
    return event


def _are(kind: type, *values: Iterable[object]) -> bool:
    return all(set(map(type, each)) <= {kind} for each in values)


def _are_shares(values: Sequence[object]) -> bool:
    return set(map(type, values)) <= {int, float} and all(0 <= value <= 1 for value in values)  # type: ignore[operator]


def new_ranking(entry: Entry, now: float) -> NewRanking:
    """A ranking to be kept. Its window begins when it was ranked, or now if its clock was ahead of ours.

    Raises:
        StateError: as `read_served` does.
    """
    served = read_served(entry.value or b"")
    since = float(min(served.ts, now))
    ahead = float(served.ts - since)
    return NewRanking(entry.id, served.request_id, since, ahead, int(served.ts // 3600), len(served.ad_ids), entry.value or b"")


def new_event(stream: Stream, entry: Entry) -> tuple[str, NewEvent]:
    """An event to be kept, after its type. Repetitions have the same key: that of what it is about, its type and its id.

    Raises:
        StateError: as `read_event` does.
    """
    event = read_event(entry.value or b"")
    key = "\0".join((event.type, event.subject, event.event_id))
    outcome = None if event.type in JOINED else FOREIGN
    return event.type, NewEvent(_digest(key.encode()), stream, entry.id, event.request_id, entry.value or b"", outcome)


def damaged(stream: Stream, entry: Entry) -> NewEvent:
    """An entry that is no record, kept as it is."""
    value = entry.value or b""
    return NewEvent(_digest(f"{stream}\0{entry.id}\0".encode() + value), stream, entry.id, "", value, DAMAGED)


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=16).digest()


def revision(packed: bytes) -> int:
    """Which features these are: a hash of 64 bits, never 0."""
    return int.from_bytes(revision_key(packed), "big") or 1


def revision_key(packed: bytes) -> bytes:
    """The same as bytes."""
    return blake2b(packed, digest_size=8).digest()
