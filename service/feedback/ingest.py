"""Events: what is taken of them and what is not, and the store told. Knows nothing about HTTP, their JSON, or Redis."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from features.counting import parts_of
from features.encode import Encoder, Features, FieldError, clean
from features.entity_updates import AT_ONCE, DUPLICATE, REPLACED, Outcome, by_entity
from features.events import Event
from features.schema import IDENTITY, Field, Side
from features.state import Store, StoreError

from ..errors import BacklogError, StoreDownError
from ..public import of_store
from ..telemetry.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something that was sent as an event and is none; `event_id` and `type` where they can be read, else empty and `unknown`."""

    event_id: str
    type: str
    detail: str
    pointer: str
    """Where in the request it is wrong."""


class Ages(NamedTuple):
    """How far before and after our own clock an event's time may be, in seconds."""

    before: float
    after: float


class Intake:
    """Takes batches of events."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        encoders: Callable[[], Iterable[Encoder]],
        ages: Ages,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """The store, the encoders of the models that are loaded at the time, and seconds since 1970."""
        self._store, self._metrics, self._encoders, self._ages, self._clock = store, metrics, encoders, ages, clock
        self.features: Callable[[Sequence[str]], Mapping[str, Features]] = lambda _ads: {}
        """What is known of ads: by their values a user's events are counted."""

    async def take(self, sent: Sequence[Event | Malformed]) -> list[Outcome]:
        """What became of each.

        Raises:
            StoreDownError: the store did not take them all; nothing is lost or done twice if all are sent again.
            BacklogError: the same, since too many wait to be joined already.
        """
        encoders = list(self._encoders())
        nobody = frozenset(user_id for encoder in encoders for user_id in encoder.schema.nobody)
        outcomes = await self._checked(sent, _known(encoders), nobody)
        new: dict[str, Event] = {}
        for item, outcome in zip(sent, outcomes, strict=True):
            if isinstance(item, Event) and outcome is None:
                new.setdefault(item.event_id, item)
        try:
            done = await self._applied(list(new.values()), nobody, encoders)
        except StoreError as error:
            self._count(sent, [outcome or Outcome("rejected", error.reason) for outcome in outcomes])
            kind = BacklogError if error.reason == "backlog" else StoreDownError
            raise kind(str(error) if kind is BacklogError else of_store(error.reason)) from None
        return self._answer(sent, outcomes, done)

    async def _checked(self, sent: Sequence[Event | Malformed], fields: "_Fields", nobody: Collection[str]) -> list[Outcome | None]:
        """What can be said before the store is asked: None where it has to be."""
        outcomes: list[Outcome | None] = []
        for start in range(0, len(sent), AT_ONCE):
            now = self._clock()
            outcomes += [self._check(item, fields, nobody, now) for item in sent[start : start + AT_ONCE]]
            await asyncio.sleep(0)
        return outcomes

    def _check(self, item: Event | Malformed, fields: "_Fields", nobody: Collection[str], now: float) -> Outcome | None:
        if isinstance(item, Malformed):
            return Outcome("rejected", "malformed", item.detail)
        if item.user_id in nobody and not item.request_id:
            return Outcome("rejected", "nobody", "a live model says that this user id means no user, of whom nothing is kept")
        if item.ts > now + self._ages.after:
            ahead = item.ts - now
            hint = "; ts is in seconds, not in milliseconds" if item.ts > 100 * now else ""
            return Outcome("rejected", "in_the_future", f"{ahead:.0f} s ahead of our clock; {self._ages.after:g} s are taken{hint}")
        if item.ts < now - self._ages.before:
            return Outcome("rejected", "too_old", f"{now - item.ts:.0f} s old; {self._ages.before:g} s are taken")
        return _mistyped(item, fields) if item.features else None

    async def _applied(self, events: Sequence[Event], nobody: Collection[str], encoders: Iterable[Encoder]) -> dict[str, Outcome]:
        tallies = list(dict.fromkeys(tally for encoder in encoders for tally in encoder.tallies))
        ads = self.features([event.ad_id for event in events]) if any(tally.value for tally in tallies) else {}
        entities = by_entity(events, nobody, lambda event: parts_of(event, tallies, ads.get(event.ad_id, {})))
        outcomes = await self._store.apply(entities) if entities else []
        pairs = [(entity, pair) for entity, each in zip(entities, outcomes, strict=True) for pair in zip(entity.events, each, strict=True)]
        return {event.event_id: outcome for entity, (event, outcome) in pairs if entity.leads(event)}

    def _answer(self, sent: Sequence[Event | Malformed], checked: Sequence[Outcome | None], done: Mapping[str, Outcome]) -> list[Outcome]:
        """Every event's outcome. Of those with the same id the first was done; the others repeat it, as they would in a later batch."""
        outcomes, before = list[Outcome](), set[str]()
        for item, outcome in zip(sent, checked, strict=True):
            final = outcome or done[item.event_id]
            if outcome is None and item.event_id in before and final.status == "accepted":
                final = DUPLICATE
            elif outcome is None:
                before.add(item.event_id)
            outcomes.append(final)
        if replaced := outcomes.count(REPLACED):
            log.warning("the state of a user or an ad could not be read and was replaced, for %d events", replaced)
            self._metrics.degraded("events", REPLACED.reason, replaced)
        self._count(sent, outcomes)
        return outcomes

    def _count(self, sent: Sequence[Event | Malformed], outcomes: Sequence[Outcome]) -> None:
        results = (outcome.status if outcome.status == "accepted" else outcome.reason or outcome.status for outcome in outcomes)
        self._metrics.events(Counter(zip((item.type for item in sent), results, strict=True)))


_Fields = Mapping[tuple[Side, str], Sequence[Field]]


def _known(encoders: Iterable[Encoder]) -> _Fields:
    """The fields of users and ads that some model has, by side and name: several where models differ."""
    fields: dict[tuple[Side, str], list[Field]] = {}
    for encoder in encoders:
        for field in encoder.schema.fields:
            fields.setdefault((field.side, field.name), []).append(field)
    return fields


def _mistyped(event: Event, fields: _Fields) -> Outcome | None:
    side: Side = "ad" if event.type == "ad" else "user"
    for name, value in event.features.items():
        try:
            for field in fields.get((side, name), ()):
                clean(field, value)
        except FieldError as error:
            return Outcome("rejected", "mistyped", str(error))
        if name in IDENTITY.values():
            return Outcome("rejected", "mistyped", f"{side}.{name}: an id is no feature")
    return None
