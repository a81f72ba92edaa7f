"""What happened after a ranking, as it is kept between the service that took it in and the joiner that reads it.

Knows nothing about the wire format (`service/feedback/ingest.py`) or about what an event leads to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgpack

from .encode import Features
from .state import StateError

EventType = Literal["impression", "click", "conversion", "user", "ad"]
TYPES: tuple[EventType, ...] = get_args(EventType)
JOINED: tuple[EventType, ...] = ("impression", "click", "conversion")
"""The events that the joiner reads; the others end in the store."""
_TYPES_OF: Mapping[str, tuple[type, ...]] = {
    "type": (str,),
    "event_id": (str,),
    "ts": (int, float),
    "user_id": (str,),
    "request_id": (str,),
    "ad_id": (str,),
    "position": (int, type(None)),
    "value": (int, float, type(None)),
    "features": (dict,),
    "active": (bool, type(None)),
}


@dataclass(frozen=True, slots=True)
class Event:
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
    features: Features = field(default_factory=dict)
    """Of a user or an ad: what is told of it; None takes a feature away."""
    active: bool | None = None
    """Of an ad: whether it may be shown, None where that is not told."""

    @property
    def entity_id(self) -> str:
        """What the event is about, by which its repetitions are found: a user, an ad, or a ranking."""
        return {"click": self.user_id, "user": self.user_id, "ad": self.ad_id}.get(self.type, self.request_id)


def pack_event(event: Event) -> bytes:
    """An event as one value of a stream."""
    values = {name: getattr(event, name) for name in Event.__slots__}
    packed: bytes = msgpack.packb({name: value for name, value in values.items() if value not in ("", None, {})})
    return packed


def unpack_event(value: bytes) -> Event:
    """The event in a packed value.

    Raises:
        StateError: the value is not an event.
    """
    try:
        document = msgpack.unpackb(value)
        wrong = [name for name, entry in document.items() if type(entry) not in _TYPES_OF[name]]
        if not wrong and document["type"] in TYPES:
            return Event(**document)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise StateError("the value is not an event")
