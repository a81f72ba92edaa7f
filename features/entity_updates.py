"""What events lead to: those about one user, ad or ranking, and what they make of what is kept about it.

Knows nothing about where that is kept. A store reads, asks `EntityUpdates.change`, and writes if nobody else has written meanwhile.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .counters import CountedPart
from .events import Event, EventType
from .packing import StateError
from .state import NEVER, Ad, UserState, pack_ad, pack_features, pack_user, unpack_ad, unpack_user

Kind = Literal["user", "ad", "request", "ad_counts"]
"""`ad_counts`: an ad as events are counted with it, whose ids are remembered apart from those of the ad's own updates."""
KINDS: Mapping[EventType, Kind] = {"click": "user", "user": "user", "ad": "ad", "impression": "request", "conversion": "request"}
Counting = Callable[[Event], tuple[Sequence[CountedPart], Sequence[CountedPart]]]
"""Where an event counts: of its user and of its ad."""
AT_ONCE = 50
"""Events that are looked at before other work gets a turn: a millisecond or two."""
FEATURES_BYTES = 2**18
"""The most bytes that the features of a user or an ad take, packed."""


class Outcome(NamedTuple):
    """What became of an event. One that was accepted has a reason only where something had to be given up for it."""

    status: Literal["accepted", "duplicate", "rejected"]
    reason: str = ""
    detail: str = ""


ACCEPTED, DUPLICATE = Outcome("accepted"), Outcome("duplicate")
REPLACED = Outcome("accepted", "state_replaced", "what was stored could not be read and gave way to what this event tells")
FORGOTTEN = Outcome("rejected", "too_old", "it is older than the events that are remembered, so it may have been taken before")


class Change(NamedTuple):
    """What is to be stored (nothing for a ranking), the events that are to be remembered, and what becomes of each event."""

    packed: bytes
    fresh: Sequence[Event]
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class EntityUpdates:
    """A user, an ad or a ranking (`request`) and events about it, their ids all different; at most `AT_ONCE`."""

    kind: Kind
    id: str
    events: Sequence[Event]
    parts: Mapping[str, Sequence[CountedPart]] = field(default_factory=dict)
    """By event id where it counts here."""

    def leads(self, event: Event) -> bool:
        """Whether this is what an event is about, which decides what becomes of it, and not only where it is counted too."""
        return self.kind in (KINDS[event.type], "request")

    def change(self, packed: bytes | None, seen: Iterable[object], floor: float = NEVER) -> Change:
        """What the events lead to, given what is stored, which of them were seen before, and up to which time ids were forgotten."""
        known = list(seen)
        if all(known):
            return Change(b"", [], [DUPLICATE] * len(known))
        state, readable = self._unpacked(packed)
        if self.kind == "ad_counts" and not (packed and readable):  # made-up ids are not to fill the store
            return Change(b"", [], [ACCEPTED] * len(known))
        fresh, outcomes = list[Event](), list[Outcome]()
        for event, before in zip(self.events, known, strict=True):
            if before:
                outcomes.append(DUPLICATE)
            elif event.ts <= floor:
                outcomes.append(FORGOTTEN)
            else:
                try:
                    state = _after(state, event, self.parts.get(event.event_id, ()))
                except StateError as error:
                    outcomes.append(Outcome("rejected", "too_many_features", str(error)))
                    continue
                fresh.append(event)
                outcomes.append(ACCEPTED if readable else REPLACED)
        return Change(self._packed(state), fresh, outcomes)

    def _unpacked(self, packed: bytes | None) -> tuple[UserState | Ad | None, bool]:
        """What is stored, as it may be changed, and whether it could be read. What cannot be read is of no use to anyone."""
        if self.kind == "request":
            return None, True
        empty = UserState() if self.kind == "user" else Ad(self.id, {})
        try:
            return empty if not packed else unpack_user(self.id, packed) if self.kind == "user" else unpack_ad(self.id, packed), True
        except StateError:
            return empty, False

    def _packed(self, state: UserState | Ad | None) -> bytes:
        if state is None:
            return b""
        return pack_ad(state) if isinstance(state, Ad) else pack_user(self.id, state)


def _after(state: UserState | Ad | None, event: Event, parts: Sequence[CountedPart]) -> UserState | Ad | None:
    if state is None:
        return None
    state = state.counted(parts, event.ts)
    if event.type in ("impression", "conversion") or (isinstance(state, Ad) and event.type == "click"):
        return state
    if isinstance(state, UserState) and event.type == "click":
        return state.clicked(event.ad_id, event.ts)
    after = state.updated(event.features, event.active, event.ts) if isinstance(state, Ad) else state.updated(event.features, event.ts)
    if len(pack_features(after.features)) > FEATURES_BYTES:
        raise StateError(f"its features would take more than {FEATURES_BYTES} bytes; take some away first, by sending null for them")
    return after


def nowhere(_event: Event) -> tuple[Sequence[CountedPart], Sequence[CountedPart]]:
    """Where events count while no model has counters."""
    return (), ()


def by_entity(events: Iterable[Event], nobody: Collection[str] = (), counting: Counting = nowhere) -> list[EntityUpdates]:
    """The events by what they are about, in their order, and by whom and what they are counted with too; an entity of very many comes
    several times.

    A click of one who is `nobody` is about its ranking alone: nothing is kept of such a user.
    """
    groups: dict[tuple[Kind, str], list[tuple[Event, Sequence[CountedPart]]]] = {}
    for event in events:
        whom: tuple[Kind, str] = ("request", event.request_id) if event.user_id in nobody else (KINDS[event.type], event.entity_id)
        of_user, of_ad = counting(event)
        counted: dict[tuple[Kind, str], Sequence[CountedPart]] = {whom: ()}
        if of_user and event.user_id and event.user_id not in nobody:
            counted["user", event.user_id] = of_user
        if of_ad:
            counted["ad_counts", event.ad_id] = of_ad
        for where, parts in counted.items():
            groups.setdefault(where, []).append((event, parts))
    return [
        EntityUpdates(*whom, [event for event, _ in some], {event.event_id: parts for event, parts in some if parts})
        for whom, about in groups.items()
        for some in (about[start : start + AT_ONCE] for start in range(0, len(about), AT_ONCE))
    ]


def together(entities: Iterable[EntityUpdates]) -> Iterator[list[EntityUpdates]]:
    """The entities, as many at a time as have `AT_ONCE` events."""
    some, count = list[EntityUpdates](), 0
    for entity in entities:
        if count + len(entity.events) > AT_ONCE:
            yield some
            some, count = [], 0
        some.append(entity)
        count += len(entity.events)
    if some:
        yield some
