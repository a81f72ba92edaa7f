"""Which rankings make up the next file of the log, and which events belong to them. Each event ends with one outcome.

`joined`: it is part of a row. `late`: its type's window was over, or the ranking was written before it came. `deferred`: a conversion
that came after its ranking was written, which who reads the log joins. `unknown_request`: no ranking has its request id. `not_shown`:
its ranking did not answer with the ad. `other_user`: it names another user than its ranking. `before_ranking`: it is older than the
ranking. `no_impression`: its ranking's caller neither said nor reported that it showed the ad.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from features.events import Event
from features.served import ServedRecord, unpack_served

from .records import read_event
from .state import Held, State, StatePart

SKEW_SECONDS = 60.0
"""An event may seem older than its ranking by so much: the clocks of callers differ."""
HOLD_SECONDS = 300.0
JOINED, LATE, DEFERRED, UNKNOWN, NOT_SHOWN, OTHER_USER, BEFORE, NO_IMPRESSION = OUTCOMES = (
    "joined",
    "late",
    "deferred",
    "unknown_request",
    "not_shown",
    "other_user",
    "before_ranking",
    "no_impression",
)
DAY = 24 * 3600.0

Settled = tuple[int, int | None, str]


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """How to join; times in seconds."""

    click_window: float = 1800.0
    """How long after a ranking a click still belongs to it; its rows are written then."""
    impression_window: float | None = None
    """The same of an impression; None: as of a click."""
    conversion_window: float = 7 * DAY
    """The same of a conversion. One that comes after the rows were written is joined by who reads the log."""
    lateness: float = 60.0
    """How long after the window's end an event of the window may still come."""
    shown: str = "told"
    """`told`: an ad of an answer is an impression where the caller said that it shows it, or an impression event came. `reported`: where
    such an event came. `served`: each is, whoever saw it: for callers that show all that is answered.
    """
    rows_per_file: int = 100_000
    bytes_per_file: int = 32 * 2**20
    """Of the records whose rows make up a file: what is in memory at once, several times over."""

    @property
    def closes(self) -> float:
        """How long after a ranking its clicks and impressions are known."""
        return max(self.click_window, self.window("impression"))

    @property
    def hold(self) -> float:
        """How long rows that are due wait for more, so that a quiet log is not made of tiny files."""
        return min(HOLD_SECONDS, self.closes + self.lateness)

    def window(self, event_type: str) -> float:
        """How long after a ranking an event of this type still belongs to it."""
        if event_type == "conversion":
            return self.conversion_window
        impression = self.click_window if self.impression_window is None else self.impression_window
        return impression if event_type == "impression" else self.click_window

    def counted(self, served: ServedRecord) -> Sequence[str]:
        """The ads of a ranking that are impressions whether they are reported or not."""
        return served.ad_ids[: {"served": len(served.ad_ids), "told": served.shown}.get(self.shown, 0)]


@dataclass(frozen=True, slots=True)
class JoinedRanking:
    """A ranking as far as events need it: of its ads those that events name, and which of them are impressions without being reported.

    `mine` if it is of the part that is planned.
    """

    n: int
    since: float
    user_id: str
    ads: frozenset[str]
    counted: frozenset[str]
    mine: bool


def plan(state: State, settings: JoinSettings, until: float, force: bool) -> StatePart | None:
    """Plan rows of rankings whose window began at `until` or before, if they are many or have waited, or by `force`; None if not.

    Raises:
        NoRoomError: the disk is full; nothing is planned.
    """
    for due in state.due(until):
        full = due.ads >= settings.rows_per_file or due.bytes >= settings.bytes_per_file
        if force or full or due.oldest <= until - settings.hold:
            with state.planning(due.hour) as part:
                state.claim(part, until, settings.rows_per_file, settings.bytes_per_file)
                state.settle(part, _settled(state, part, settings))
            return part
    return None


def sweep(state: State, until: float) -> StatePart | None:
    """Plan what came until then and no ranking is held for; None where there is nothing.

    Raises:
        NoRoomError: the disk is full; nothing is planned.
    """
    strays = state.strays(until)
    if not strays:
        return None
    written = {request_id: state.was_written(request_id) for request_id in {stray.request_id for stray in strays}}
    with state.planning(None) as part:
        state.settle(part, [(e.n, None, e.outcome or _alone(read_event(e.packed), written[e.request_id], UNKNOWN)) for e in strays])
    return part


def _alone(event: Event, written: bool, why: str) -> str:
    """The outcome of an event that no ranking which is held takes, and `why`; the one it belongs to may have been written."""
    if not written:
        return why
    return DEFERRED if event.type == "conversion" else LATE


def _settled(state: State, part: StatePart, settings: JoinSettings) -> Iterator[Settled]:
    held = [(each, read_event(each.packed)) for each in state.events_of(part)]
    rankings = _rankings(state, part, held, settings)
    shown: set[tuple[int, str]] = set()
    # Impressions first: whether a click had one must be known by then.
    for each, event in sorted(held, key=lambda pair: pair[1].type != "impression"):
        found = _of(rankings[each.request_id], event, each)
        if isinstance(found, JoinedRanking):
            if not found.mine:
                continue
            outcome = JOINED if min(event.ts, each.taken) <= found.since + settings.window(event.type) else LATE
            if event.type == "impression" and outcome == JOINED:
                shown.add((found.n, event.ad_id))
            elif outcome == JOINED and event.ad_id not in found.counted and (found.n, event.ad_id) not in shown:
                outcome = NO_IMPRESSION
            yield each.n, found.n, outcome
        elif all(ranking.mine for ranking in rankings[each.request_id]):
            yield each.n, None, _alone(event, state.was_written(each.request_id), found)


def _rankings(
    state: State, part: StatePart, held: Sequence[tuple[Held, Event]], settings: JoinSettings
) -> Mapping[str, Sequence[JoinedRanking]]:
    """The rankings that the events name, by request id."""
    named: dict[str, set[str]] = defaultdict(set)
    for each, event in held:
        named[each.request_id].add(event.ad_id)
    rankings: dict[str, list[JoinedRanking]] = defaultdict(list)
    for n, request_id, since, record, mine in state.related(part):
        served, ads = unpack_served(record), named[request_id]
        counted = ads.intersection(settings.counted(served))
        of = JoinedRanking(n, since, served.user_id, frozenset(ads.intersection(served.ad_ids)), frozenset(counted), mine)
        rankings[request_id].append(of)
    return rankings


def _of(rankings: Sequence[JoinedRanking], event: Event, held: Held) -> JoinedRanking | str:
    """The ranking that an event belongs to, or why there is none: the newest before it, or else the first soon after it.

    It has to have answered with the event's ad, and to be of the event's user: what names no user may be anybody's.
    """
    answering = [ranking for ranking in rankings if event.ad_id in ranking.ads]
    if not answering:
        return NOT_SHOWN
    showing = [ranking for ranking in answering if event.user_id in ("", ranking.user_id)]
    if not showing:
        return OTHER_USER
    at = min(event.ts, held.taken)
    before = [ranking for ranking in showing if ranking.since <= at]
    after = [ranking for ranking in showing if at < ranking.since <= at + SKEW_SECONDS]
    return before[-1] if before else after[0] if after else BEFORE
