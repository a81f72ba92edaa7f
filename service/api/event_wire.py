"""The wire format of `POST /v1/events`: from a body to events, each judged alone, and from their outcomes to an answer."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from features.entity_updates import AT_ONCE, Outcome
from features.events import TYPES, Event
from features.values import plain

from ..errors import FieldProblem, InvalidError
from ..feedback.ingest import Malformed
from .requests import ERRORS_LISTED, refusal, short
from .wire import CANDIDATES, ID_LENGTH, FeatureMap, Id, RequestId, Wire

EVENTS = 10_000
"""The most events of a batch, whatever is set."""


class _Happened(Wire):
    """What every event has: an id of its own, the same each time that it is sent, and when it happened, in seconds since 1970."""

    event_id: Id
    """Its own; an event that is sent again with the same one is a duplicate, and done once."""
    ts: float
    """When it happened, in seconds since 1970."""


class Impression(_Happened):
    """An ad was shown; `position` is where, from 1, if not in its place in the answer. A `user_id` has to be that of the ranking."""

    type: Literal["impression"]
    """This one."""
    request_id: RequestId
    """Of the ranking that it was shown from."""
    ad_id: Id
    """The ad that was shown."""
    user_id: Id | None = None
    """To whom; that of the ranking."""
    position: Annotated[int, Field(ge=1, le=CANDIDATES)] | None = None
    """Where, from 1, if not in its place in the answer."""


class Click(_Happened):
    """A user clicked an ad. Without `request_id` it joins the user's history, but no ranking learns from it; nor does one of another
    user.
    """

    type: Literal["click"]
    """This one."""
    user_id: Id
    """Who clicked; the ad joins their history."""
    ad_id: Id
    """The ad that was clicked."""
    request_id: RequestId | None = None
    """Of the ranking that it was shown from."""


class Conversion(_Happened):
    """What an ad led to, and what that was worth. A `user_id` has to be that of the ranking."""

    type: Literal["conversion"]
    """This one."""
    request_id: RequestId
    """Of the ranking that the ad was shown from."""
    ad_id: Id
    """The ad that led to it."""
    user_id: Id | None = None
    """Whose; that of the ranking."""
    value: Annotated[float, Field(ge=-1e12, le=1e12)] | None = None
    """What it was worth."""


class UserUpdate(_Happened):
    """Features of a user from now on; null takes one away."""

    type: Literal["user"]
    """This one."""
    user_id: Id
    """Whose features."""
    features: FeatureMap
    """Those that change, by the schema's names; null takes one away."""


class AdUpdate(_Happened):
    """Features of an ad from now on, null takes one away, and whether it may be shown. An ad that is not there yet is created."""

    type: Literal["ad"]
    """This one."""
    ad_id: Id
    """Which ad; one that is not there yet is created."""
    features: FeatureMap = Field(default={})
    """Those that change, by the schema's names; null takes one away."""
    active: bool | None = None
    """Whether it may be shown."""


OneOf = Annotated[Impression | Click | Conversion | UserUpdate | AdUpdate, Field(discriminator="type")]


class EventBatch(Wire):
    """Events in any order. Each is judged alone: one that is malformed does not hold up the others."""

    events: Annotated[list[OneOf], Field(min_length=1, max_length=EVENTS)]


class EventOutcome(Wire):
    """What became of an event. `event_id` is null where it could not be read; `pointer` says where a malformed one is wrong."""

    event_id: str | None
    status: Literal["accepted", "duplicate", "rejected"]
    reason: str | None = None
    detail: str | None = None
    pointer: str | None = None


class EventsAnswer(Wire):
    """The outcomes, in the order of the events."""

    request_id: str
    events: list[EventOutcome]


class _Envelope(Wire):
    events: Annotated[list[Any], Field(min_length=1)]


_one: TypeAdapter[Any] = TypeAdapter(OneOf)


async def read_batch(body: bytes, most: int) -> list[Event | Malformed]:
    """The events of a body, of which `most` are allowed.

    Raises:
        NotJsonError: it is not JSON.
        InvalidError: it is not a batch; what is wrong within single events is told of those.
    """
    try:
        sent = _Envelope.model_validate_json(body).events
    except ValidationError as error:
        raise refusal(error) from None
    if len(sent) > most:
        detail = f"{len(sent)} events; at most {most} are taken in one request"
        raise InvalidError(detail, [FieldProblem(("events",), detail)])
    read: list[Event | Malformed] = []
    for start in range(0, len(sent), AT_ONCE):
        read += [_read(item, i) for i, item in enumerate(sent[start : start + AT_ONCE], start)]
        await asyncio.sleep(0)
    return read


def _read(item: object, place: int) -> Event | Malformed:
    try:
        values = dict(_one.validate_python(item))
    except ValidationError as error:
        return _malformed(item, place, error)
    given = {name: value for name, value in values.items() if value is not None or name not in ("request_id", "user_id")}
    return Event(**given | {name: plain(given[name]) for name in ("user_id", "ad_id") if name in given})


def _malformed(item: object, place: int, error: ValidationError) -> Malformed:
    sent: dict[Any, Any] = item if isinstance(item, dict) else {}
    event_id = sent.get("event_id")
    readable = event_id if isinstance(event_id, str) and len(event_id) <= ID_LENGTH else ""
    kind = next((known for known in TYPES if known == sent.get("type")), "unknown")
    count, path, detail = error.error_count(), tuple[str | int, ...](), ""
    if count <= ERRORS_LISTED:  # listing them would hold up every other request
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path, detail = first["loc"][1:], first["msg"].removeprefix("Value error, ")
        if first["type"].startswith("union_tag"):
            path, detail = ("type",), f"expected one of {', '.join(TYPES)}"
        elif first["type"] == "extra_forbidden":
            detail = "unknown field"
        elif path[-1:] == ("[key]",):
            path, detail = path[:-1], f"its name: {detail}"
    more = f"; {count} things are wrong with it" if count > 1 else ""
    pointer = FieldProblem(("events", place, *map(short, path)), "").pointer
    return Malformed(readable, kind, f"{detail}{more}".removeprefix("; "), pointer)


def events_answer(request_id: str, sent: Sequence[Event | Malformed], outcomes: Sequence[Outcome]) -> bytes:
    """The JSON of an `EventsAnswer`; what there is nothing to say of is left out."""
    events = []
    for item, outcome in zip(sent, outcomes, strict=True):
        answer = {"event_id": item.event_id or None, "status": outcome.status}
        if outcome.reason:
            answer |= {"reason": outcome.reason, "detail": outcome.detail}
        if isinstance(item, Malformed):
            answer["pointer"] = item.pointer
        events.append(answer)
    return orjson.dumps({"request_id": request_id, "events": events})
