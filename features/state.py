"""What is kept about users and ads between requests: packed user state, the store protocol, and a store in memory.

Knows nothing about Redis (`service/store/redis.py`) or about tensors (`encode.py`).
"""

import asyncio
import contextlib
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from .counters import CountedPart, Counts, with_event
from .encode import Features
from .errors import AdrankError
from .packing import StateError, pack, unpacker

if TYPE_CHECKING:  # it is made of what stands here
    from .entity_updates import EntityUpdates, Outcome
    from .merging import Rewrite

FORMAT, WITH_COUNTS = 2, 3
"""Formats of what is stored without counts and with them; a service of before cannot read the second."""
HISTORY_LIMIT = 1_000
"""The most behaviours kept a user, whatever a schema asks for."""
FEATURES_LIMIT = 256
"""The most features kept of a user or an ad."""
STATE_BYTES = 2 * 2**20
"""The most bytes that are read of a user or an ad. No state that adrank writes is as large; one that is counts as damaged."""
SERVED_KEPT = 1_000
"""The most rankings that a store in memory logs."""
OF_ADS = ("ad", "ad_counts")
"""What events are about that is kept with an ad."""
ACTIVE = ""
"""The name under which `Ad.changed` keeps when the ad's being active was last told; no feature has it."""
NEVER = float("-inf")
SEEN_SECONDS = 8 * 24 * 3600.0
"""How long after its time an event is remembered, unless a store is told otherwise."""
SEEN_LIMIT = 10_000
"""The most events remembered of a user, an ad or a ranking; the oldest by their own time are forgotten first."""


class StoreError(AdrankError, RuntimeError):
    """The store did not answer; `reason` is a metric label, such as `store_timeout`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class StoreRoom(NamedTuple):
    """What a stream takes of the store's memory, and how much of that is used: in bytes, None where the store does not say.

    `most` is 0 where the store has no bound of its own.
    """

    stream: int | None = None
    used: int | None = None
    most: int = 0


class ChangesLostError(RuntimeError):
    """The change stream no longer reaches back to a cursor: the catalogue has to be read whole."""


class UserState(msgspec.Struct, frozen=True, gc=False):
    """A user's features and behaviours, oldest first; `ts` in seconds since 1970, beside `ad_ids`: floats where an event told them.

    `changed` says when features were last told by an event, so that one that comes late does not undo a newer one.
    """

    features: Features = {}
    ad_ids: Sequence[str] = ()
    ts: Sequence[float] = ()
    changed: Mapping[str, float] = {}
    counts: Counts = {}

    def clicked(self, ad_id: str, ts: float) -> "UserState":
        """The state with one more behaviour, in its place by time: after those of the same time, and gone if too old for the limit."""
        at = bisect_right(self.ts, ts)
        # A float: what comes with a data set has whole seconds, see `merging.py`.
        ad_ids, times = [*self.ad_ids[:at], ad_id, *self.ad_ids[at:]], [*self.ts[:at], float(ts), *self.ts[at:]]
        return msgspec.structs.replace(self, ad_ids=ad_ids[-HISTORY_LIMIT:], ts=times[-HISTORY_LIMIT:])

    def counted(self, parts: Sequence[CountedPart], ts: float) -> "UserState":
        """The state with one more event counted."""
        return msgspec.structs.replace(self, counts=with_event(self.counts, parts, ts)) if parts else self

    def updated(self, features: Features, ts: float) -> "UserState":
        """The state with features as they were told at a time; None takes one away, and what was told later stays.

        Raises:
            StateError: there would be too many features.
        """
        known, changed = _updated(self.features, self.changed, features, ts)
        return msgspec.structs.replace(self, features=known, changed=changed)


class Ad(msgspec.Struct, frozen=True, gc=False):
    """An ad's features. One that is no longer `active` has left the catalogue but still stands in histories.

    `changed` is as in `UserState`, with when `active` was told under `ACTIVE`.
    """

    ad_id: str
    features: Features
    active: bool = True
    changed: Mapping[str, float] = {}
    counts: Counts = {}

    def counted(self, parts: Sequence[CountedPart], ts: float) -> "Ad":
        """The ad with one more event counted."""
        return msgspec.structs.replace(self, counts=with_event(self.counts, parts, ts)) if parts else self

    def updated(self, features: Features, active: bool | None, ts: float) -> "Ad":
        """The ad with features, and whether it is active where that is not None, as they were told at a time.

        Raises:
            StateError: there would be too many features.
        """
        known, changed = _updated(self.features, self.changed, features, ts)
        if active is None or ts < changed.get(ACTIVE, NEVER):
            return msgspec.structs.replace(self, features=known, changed=changed)
        return msgspec.structs.replace(self, features=known, changed={**changed, ACTIVE: float(ts)}, active=active)


def _updated(known: Features, changed: Mapping[str, float], news: Features, ts: float) -> tuple[Features, Mapping[str, float]]:
    fresh = {name: value for name, value in news.items() if ts >= changed.get(name, NEVER)}
    together = {name: value for name, value in {**known, **fresh}.items() if name not in fresh or value is not None}
    if len(together) > FEATURES_LIMIT:
        raise StateError(f"it would have more than {FEATURES_LIMIT} features; take some away first, by sending null for them")
    times = {**changed, **dict.fromkeys(fresh, float(ts))}
    # When a feature was taken away is remembered as long as there is room, since names could be made up without end.
    taken_away = sorted(times.keys() - together.keys() - {ACTIVE}, key=times.__getitem__)
    for name in taken_away[: max(0, len(times) - FEATURES_LIMIT)]:
        del times[name]
    return together, times


_Times = dict[str, int | float]
_Counts = dict[str, dict[str, tuple[float, float]]]


class _StoredUser(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=FORMAT):
    """A user without counts; the first of its array is the format."""

    owner: str
    features: dict[str, Any]
    ad_ids: list[str]
    ts: list[int | float]
    changed: _Times


class _CountedUser(_StoredUser, frozen=True, tag=WITH_COUNTS):
    counts: _Counts


class _StoredAd(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=FORMAT):
    """An ad without counts."""

    active: bool
    features: dict[str, Any]
    changed: _Times


class _CountedAd(_StoredAd, frozen=True, tag=WITH_COUNTS):
    counts: _Counts


_unpack_user: Callable[[bytes], _StoredUser] = unpacker(_StoredUser | _CountedUser, "a user state", STATE_BYTES)
_unpack_ad: Callable[[bytes], _StoredAd] = unpacker(_StoredAd | _CountedAd, "an ad", STATE_BYTES)
_unpack_features: Callable[[bytes], Features] = unpacker(dict[str, Any], "packed features", STATE_BYTES)


def pack_user(user_id: str, state: UserState) -> bytes:
    """A user's state as one value of the store; the newest `HISTORY_LIMIT` behaviours are kept."""
    behaviours = list(state.ad_ids[-HISTORY_LIMIT:]), list(state.ts[-HISTORY_LIMIT:])
    parts = [user_id, dict(state.features), *behaviours, dict(state.changed)]
    return pack([WITH_COUNTS, *parts, state.counts] if state.counts else [FORMAT, *parts])


def unpack_user(user_id: str, value: bytes) -> UserState:
    """The state in a packed value.

    Raises:
        StateError: the value is not a packed state, or is that of another user, which must never be ranked with.
    """
    try:
        stored = _unpack_user(value)
    except StateError as error:
        raise StateError(f"stored for user {user_id!r}: {error}") from error
    if stored.owner != user_id:
        raise StateError("the value stored for a user names another user")
    if len(stored.ad_ids) != len(stored.ts):
        raise StateError(f"the history stored for user {user_id!r} is damaged")
    return UserState(*msgspec.structs.astuple(stored)[1:])


def pack_ad(ad: Ad) -> bytes:
    """An ad as one value of the store."""
    parts = [ad.active, dict(ad.features), dict(ad.changed)]
    return pack([WITH_COUNTS, *parts, ad.counts] if ad.counts else [FORMAT, *parts])


def unpack_ad(ad_id: str, value: bytes) -> Ad:
    """The ad in a packed value.

    Raises:
        StateError: the value is not a packed ad.
    """
    try:
        active, features, *rest = msgspec.structs.astuple(_unpack_ad(value))
    except StateError as error:
        raise StateError(f"stored for ad {ad_id!r}: {error}") from error
    return Ad(ad_id, features, active, *rest)


def pack_features(features: Features) -> bytes:
    """An ad's features alone: how the catalogue keeps them and how a served ranking is logged with them."""
    return pack(dict(features))


def unpack_features(value: bytes) -> Features:
    """The features in a packed value.

    Raises:
        StateError: the value is not packed features.
    """
    return _unpack_features(value)


class Store(Protocol):
    """Where users and ads are kept. Every method but `close` raises StoreError where the store does not answer."""

    async def get_user(self, user_id: str) -> UserState | None:
        """A user's state, None where the store has none. One round trip."""

    async def put_users(self, users: Iterable[tuple[str, UserState]]) -> None:
        """Write users' states over what was there, and forget which events they have had: those may be done again."""

    async def put_ads(self, ads: Iterable[Ad]) -> None:
        """Write ads over what was there, forget which events they have had, and announce them to every ranker."""

    async def rewrite(self, kind: Literal["user", "ad"], rewrites: "Sequence[Rewrite]") -> None:
        """Put what the rewrites make of what is stored in its place, none over what somebody else wrote meanwhile. Ads are announced.

        Raises:
            StateError: a rewrite cannot be.
        """

    async def apply(self, entities: Sequence["EntityUpdates"]) -> "list[Sequence[Outcome]]":
        """Do what events lead to, and say what became of each, beside the entities.

        An event is done once, however often and by however many it is brought, and is remembered until it would be refused as too
        old. Where this raises, some may have been done; all may be brought again.
        """

    def all_ads(self) -> AsyncIterator[list[Ad]]:
        """The whole catalogue, those that have left included, in batches."""

    async def cursor(self) -> str:
        """The present end of the change stream, to be taken before `all_ads` is read."""

    async def changed_ads(self, cursor: str, wait: float) -> tuple[list[Ad], str]:
        """Ads that changed after the cursor, as they are now, and the next cursor; waits up to `wait` seconds for one.

        Raises:
            ChangesLostError: changes after the cursor have been trimmed, or the store was emptied.
        """

    async def append_served(self, records: Sequence[bytes]) -> int:
        """Append packed rankings (`served.pack_served`) to the log of what was served; how many it holds then.

        Where it fails, some or all may have been appended, and are not to be appended again.
        """

    async def served_room(self) -> StoreRoom:
        """What the log of what was served takes of the store's memory."""

    async def figures(self) -> bytes:
        """What the joiner told last (`training/join/figures.py`); nothing where none did."""

    async def ping(self) -> None:
        """Return if the store answers."""

    async def close(self) -> None:
        """Let go of connections."""


class MemoryStore:
    """A store in this process's memory, packed as Redis holds it. For tests and for a service without Redis."""

    def __init__(self, seen_seconds: float = SEEN_SECONDS, clock: Callable[[], float] = time.time) -> None:
        self._seen_seconds, self._clock = seen_seconds, clock
        self._users: dict[str, bytes] = {}
        self._ads: dict[str, bytes] = {}
        self._seen: dict[tuple[str, str], dict[str, float]] = {}
        self._changes: list[str] = []
        self.served: deque[bytes] = deque(maxlen=SERVED_KEPT)
        """The newest packed rankings: nobody takes them from here."""
        self._news = asyncio.Event()

    async def get_user(self, user_id: str) -> UserState | None:
        """See `Store`."""
        value = self._users.get(user_id)
        return None if value is None else unpack_user(user_id, value)

    async def put_users(self, users: Iterable[tuple[str, UserState]]) -> None:
        """See `Store`."""
        packed = {user_id: pack_user(user_id, state) for user_id, state in users}
        self._users.update(packed)
        for user_id in packed:
            self._seen.pop(("user", user_id), None)

    async def put_ads(self, ads: Iterable[Ad]) -> None:
        """See `Store`."""
        packed: Mapping[str, bytes] = {ad.ad_id: pack_ad(ad) for ad in ads}
        self._ads.update(packed)
        for ad_id in packed:
            self._seen.pop(("ad", ad_id), None)
        self._changes.extend(packed)
        self._news.set()

    async def rewrite(self, kind: Literal["user", "ad"], rewrites: "Sequence[Rewrite]") -> None:
        """See `Store`."""
        kept = self._users if kind == "user" else self._ads
        for each in rewrites:
            packed = each.of(kept.get(each.id, b""))
            if packed:
                kept[each.id] = packed
            elif packed is not None:
                kept.pop(each.id, None)
            if kind == "ad" and packed is not None:
                self._changes.append(each.id)
                self._news.set()

    async def apply(self, entities: Sequence["EntityUpdates"]) -> "list[Sequence[Outcome]]":
        """See `Store`. Nobody joins what a store in memory has taken, so impressions and conversions are remembered only."""
        floor = self._clock() - self._seen_seconds
        while self._seen and max(next(iter(self._seen.values())).values()) <= floor:
            del self._seen[next(iter(self._seen))]
        outcomes = [self._applied(entity, floor) for entity in entities]
        if changed := [entity.id for entity in entities if entity.kind in OF_ADS and entity.id in self._ads]:
            self._changes.extend(changed)
            self._news.set()
        return outcomes

    def _applied(self, entity: "EntityUpdates", floor: float) -> "Sequence[Outcome]":
        seen = {event_id: ts for event_id, ts in self._seen.pop((entity.kind, entity.id), {}).items() if ts > floor}
        if len(seen) >= SEEN_LIMIT:
            floor = max(floor, min(seen.values()))
        kept = self._users if entity.kind == "user" else self._ads if entity.kind in OF_ADS else {}
        change = entity.change(kept.get(entity.id), [event.event_id in seen for event in entity.events], floor)
        seen |= {event.event_id: event.ts for event in change.fresh}
        if change.fresh:
            kept[entity.id] = change.packed
        if seen:  # the newest last, so that those to be forgotten stand first
            newest = sorted(seen, key=seen.__getitem__)[-SEEN_LIMIT:]
            self._seen[entity.kind, entity.id] = {event_id: seen[event_id] for event_id in newest}
        return change.outcomes

    async def all_ads(self) -> AsyncIterator[list[Ad]]:
        """See `Store`."""
        yield [unpack_ad(ad_id, value) for ad_id, value in self._ads.items()]

    async def cursor(self) -> str:
        """See `Store`."""
        return str(len(self._changes))

    async def changed_ads(self, cursor: str, wait: float) -> tuple[list[Ad], str]:
        """See `Store`."""
        if int(cursor) == len(self._changes):
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):  # before Python 3.12 `wait_for` forgets that it was cancelled when news comes then
                    await self._news.wait()
        changed = dict.fromkeys(self._changes[int(cursor) :])
        ads = [unpack_ad(ad_id, self._ads[ad_id]) if ad_id in self._ads else Ad(ad_id, {}, active=False) for ad_id in changed]
        return ads, str(len(self._changes))

    async def append_served(self, records: Sequence[bytes]) -> int:
        """See `Store`."""
        self.served.extend(records)
        return len(self.served)

    async def served_room(self) -> StoreRoom:
        """See `Store`."""
        return StoreRoom(sum(map(len, self.served)))

    async def figures(self) -> bytes:
        """See `Store`: a joiner has no memory of this process."""
        return b""

    async def ping(self) -> None:
        """See `Store`."""

    async def close(self) -> None:
        """See `Store`."""
