"""What a data set knows of users and ads, put together with what the store knows, so that nothing newer is lost.

The type of a time tells where it comes from, here and in what is stored: whole seconds come with a data set, a time with a fraction
(a float, even where the fraction is 0) with an event. Loading a data set again changes nothing. Knows nothing about Redis or files.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from .counters import merged_counts
from .encode import Features
from .entity_updates import FEATURES_BYTES
from .packing import StateError
from .state import ACTIVE, HISTORY_LIMIT, STATE_BYTES, Ad, UserState, pack_ad, pack_features, pack_user, unpack_ad, unpack_user

TWIN_SECONDS = (-60.0, 1_800.0)
"""How much later than a behaviour of a data set, which may have the time of its ranking, an event of the same ad may be to be the same."""

Behaviour = tuple[str, float]


class Rewrite(Protocol):
    """What becomes of one user or ad of a store."""

    @property
    def id(self) -> str:
        """Of the user or ad."""

    def of(self, stored: bytes) -> bytes | None:
        """The packed state in place of what is stored (empty: nothing is); empty to delete it, None to leave it as it is.

        Called again where somebody else wrote meanwhile.
        """


@dataclass(slots=True)
class News:
    """What the store knew from after the data set, or from events that the data set does not have."""

    behaviours: int = 0
    features: int = 0
    activity: int = 0
    """Whether an event's word on an ad's being active stands against the data set."""

    def __bool__(self) -> bool:
        return bool(self.behaviours or self.features or self.activity)


@dataclass(slots=True)
class MergeUser:
    """A user as a data set has it, put together with what is stored. `until` is the data set's newest time, None where it has none."""

    id: str
    loaded: UserState
    until: float | None
    fields: Collection[str] | None = None
    """The features that the data set speaks of, None: all. Others are another data set's, and stay."""
    news: News = field(default_factory=News)

    def of(self, stored: bytes) -> bytes:
        """See `Rewrite`. What cannot be read gives way."""
        self.news = News()
        try:
            known = unpack_user(self.id, stored) if stored else UserState()
        except StateError:
            known = UserState()
        if not set(map(type, known.ts)) <= {int, float}:
            known = UserState()
        state, self.news = merged_user(known, self.loaded, self.until, self.fields)
        return bounded(self.id, state.features, pack_user(self.id, state))


@dataclass(slots=True)
class MergeAd:
    """An ad, in the same way. With `whole` the data set is the whole catalogue, so it says which ads are active, but for newer events."""

    loaded: Ad
    until: float | None
    whole: bool = False
    fields: Collection[str] | None = None
    news: News = field(default_factory=News)

    @property
    def id(self) -> str:
        """See `Rewrite`."""
        return self.loaded.ad_id

    def of(self, stored: bytes) -> bytes:
        """See `Rewrite`. What cannot be read gives way."""
        self.news = News()
        try:
            known = unpack_ad(self.id, stored) if stored else None
        except StateError:
            known = None
        ad = self.loaded
        if known is not None:
            ad, self.news = merged_ad(known, self.loaded, self.until, self.whole, self.fields)
        return bounded(self.id, ad.features, pack_ad(ad))


@dataclass(slots=True)
class RetireAd:
    """An ad that is not in the whole catalogue: it leaves, unless an event that is newer than that tells of it."""

    id: str
    until: float | None
    now: int
    stays: bool = False

    def of(self, stored: bytes) -> bytes | None:
        """See `Rewrite`."""
        self.stays = False
        try:
            ad = unpack_ad(self.id, stored)
        except StateError:
            return None
        self.stays = any(type(ts) is float and _is_newer(ts, self.until) for ts in ad.changed.values())
        if self.stays or not ad.active:
            return None
        return pack_ad(msgspec.structs.replace(ad, active=False, changed={**ad.changed, ACTIVE: self.now}))


@dataclass(slots=True)
class ForgetAd:
    """An ad that left before a time is deleted."""

    id: str
    before: float
    done: bool = False

    def of(self, stored: bytes) -> bytes | None:
        """See `Rewrite`."""
        try:
            self.done = left_before(unpack_ad(self.id, stored), self.before)
        except StateError:
            self.done = False
        return b"" if self.done else None


def left_before(ad: Ad, time: float) -> bool:
    """Whether it left before a time; never where it is not known when."""
    return not ad.active and ad.changed.get(ACTIVE, time) < time


def merged_user(stored: UserState, loaded: UserState, until: float | None, fields: Collection[str] | None = None) -> tuple[UserState, News]:
    """The two together.

    Features: of each the newer word. Counts: of each the larger. Behaviours: what is stored from events, or from after `until`, and what
    else the data set has; an earlier data set's give way, unless this one has none.
    """
    features, changed, kept = _features(stored.features, stored.changed, loaded.features, until, fields)
    own, rest, extra = _behaviours(stored, loaded, until)
    together = sorted([*rest, *own], key=lambda behaviour: behaviour[1])[-HISTORY_LIMIT:]  # sorted keeps the order of the same time
    counts = merged_counts(stored.counts, loaded.counts)
    state = UserState(features, [ad_id for ad_id, _ in together], [ts for _, ts in together], changed, counts)
    return state, News(behaviours=extra, features=kept)


def merged_ad(stored: Ad, loaded: Ad, until: float | None, whole: bool, fields: Collection[str] | None = None) -> tuple[Ad, News]:
    """The two together, features and counts as in `merged_user`.

    That an event took an ad out of the catalogue stands against a data set that has it, which may be a log of what was shown before;
    that it was missing in a whole catalogue does not.
    """
    features, changed, kept = _features(stored.features, stored.changed, loaded.features, until, fields)
    counts, active = merged_counts(stored.counts, loaded.counts), stored.changed.get(ACTIVE)
    if type(active) is float and not (whole and not _is_newer(active, until)):
        return Ad(loaded.ad_id, features, stored.active, changed, counts), News(features=kept, activity=int(stored.active != loaded.active))
    changed = {name: ts for name, ts in changed.items() if name != ACTIVE}
    return Ad(loaded.ad_id, features, loaded.active, changed, counts), News(features=kept)


def _is_newer(ts: float, until: float | None) -> bool:
    return until is None or ts > until


def _features(
    stored: Features, changed: Mapping[str, float], loaded: Features, until: float | None, fields: Collection[str] | None
) -> tuple[Features, Mapping[str, float], int]:
    """Features, when events told them, and how many stand against the data set or beside it."""
    newer = {name for name, ts in changed.items() if name != ACTIVE and _is_newer(ts, until)}
    others = set() if fields is None else stored.keys() - set(fields)
    kept = {name: value for name, value in stored.items() if name in newer or name in others or (name in changed and name not in loaded)}
    fresh = {name: value for name, value in loaded.items() if name not in newer}
    # A late event must not undo what the data set knows from after it.
    times = {name: until if until is not None and name in fresh and name != ACTIVE else ts for name, ts in changed.items()}
    differing = sum(name in changed and (name not in loaded or loaded[name] != value) for name, value in kept.items())
    taken_away = len((newer & loaded.keys()) - stored.keys())
    return {**fresh, **kept}, times, differing + taken_away


def _behaviours(stored: UserState, loaded: UserState, until: float | None) -> tuple[list[Behaviour], list[Behaviour], int]:
    """What is stored and stays, what the data set has beside it, and how many of the first it does not have.

    Each behaviour of a data set is the same as at most one that stays. One without a time of its own (all have that of the user's
    last row, or 0) takes its place before those of the data set that follow it.
    """
    own = [
        (ad_id, ts)
        for ad_id, ts in zip(stored.ad_ids, stored.ts, strict=True)
        if type(ts) is float or not loaded.ad_ids or (until is not None and type(ts) is int and ts > until)
    ]
    if not loaded.ad_ids:
        return own, [], sum(type(ts) is float for _, ts in own)
    times = [int(ts if until is None else min(ts, until)) for ts in loaded.ts]  # none is from after its data set
    if not own:  # of most users
        return own, list(zip(loaded.ad_ids, times, strict=True)), 0
    untimed = len(set(times)) == 1 and (len(times) > 1 or times[0] == 0)
    waiting: dict[str, list[float]] = defaultdict(list)
    for ad_id, ts in own:
        waiting[ad_id].append(ts)
    rest, matched, latest = list[Behaviour](), 0, float("inf")
    for ad_id, ts in zip(reversed(loaded.ad_ids), reversed(times), strict=True):
        twin = _twin(waiting[ad_id], ts, until, untimed) if ad_id in waiting else None
        if twin is not None:
            waiting[ad_id].remove(twin)
            matched += 1
            latest = min(latest, twin)
        else:
            rest.append((ad_id, int(min(ts, latest)) if untimed else ts))
    return own, rest[::-1], len(own) - matched


def _twin(times: Sequence[float], ts: float, until: float | None, untimed: bool) -> float | None:
    """The newest of the times that may be of the same behaviour."""
    before, after = TWIN_SECONDS
    if untimed:
        return max((each for each in times if until is None or each <= until + after), default=None)
    return max((each for each in times if before <= each - ts <= after), default=None)


def bounded(name: str, features: Features, packed: bytes) -> bytes:
    """What is to be stored, which leaves room for what events tell.

    Raises:
        StateError: it is larger than what is read, or its features than what events may make them.
    """
    if len(packed) > STATE_BYTES // 2 and (len(packed) > STATE_BYTES or len(pack_features(features)) > FEATURES_BYTES):
        limits = f"{STATE_BYTES:,} bytes are read of a user or an ad, of which features may take {FEATURES_BYTES:,}"
        raise StateError(f"{name!r} would take {len(packed):,} bytes in the store; {limits}")
    return packed
