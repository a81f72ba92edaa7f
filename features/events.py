"""What happened after a ranking, as it is kept between the service that took it in and the joiner that reads it.

Knows nothing about the wire format (`service/feedback/ingest.py`) or about what an event leads to.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import msgspec

from .packing import pack, unpacker

EventType = Literal["impression", "click", "conversion", "user", "ad"]
TYPES: tuple[EventType, ...] = get_args(EventType)
JOINED: tuple[EventType, ...] = ("impression", "click", "conversion")
"""The events that the joiner reads; the others end in the store."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One event. What a type has no use for is empty; `ts` in seconds since 1970, as the caller's clock had it."""

    type: EventType
    event_id: str
    ts: float
    user_id: str = ""
    """Whose click, impression or conversion, where that is told, or which user's features."""
    request_id: str = ""
    """The ranking that showed the ad; a click without one still joins its user's history."""
    ad_id: str = ""
    position: int | None = None
    """Of an impression: where the ad was really shown, from 1."""
    value: float | None = None
    """Of a conversion, in the advertiser's currency."""
    features: Mapping[str, Any] = {}
    """Of a user or an ad: what is told of it; None takes a feature away."""
    active: bool | None = None
    """Of an ad: whether it may be shown, None where that is not told."""

    @property
    def entity_id(self) -> str:
        """What the event is about, by which its repetitions are found: a user, an ad, or a ranking."""
        return {"click": self.user_id, "user": self.user_id, "ad": self.ad_id}.get(self.type, self.request_id)


_unpack_event: Callable[[bytes], Event] = unpacker(Event, "an event")


def pack_event(event: Event) -> bytes:
    """An event as one value of a stream."""
    return pack(event)


def unpack_event(value: bytes) -> Event:
    """The event in a packed value.

    Raises:
        StateError: the value is not an event.
    """
    return _unpack_event(value)
