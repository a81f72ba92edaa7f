"""Which rankings make up the next file of the log, and which events belong to them. Each event ends with one outcome.

`joined`: it is part of a row. `late`: its ranking's window was over, or the ranking was written before it came. `unknown_request`:
no ranking has its request id. `not_shown`: its ranking did not show the ad. `before_ranking`: it is older than the ranking.
`no_impression`: where only what was reported as shown counts, and this was not.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from features.events import Event
from features.served import unpack_served

from .join_records import read_event
from .join_state import Held, Part, State

SKEW_SECONDS = 60.0
"""An event may seem older than its ranking by so much: the clocks of callers differ."""
HOLD_SECONDS = 300.0
JOINED, LATE, UNKNOWN, NOT_SHOWN, BEFORE, NO_IMPRESSION = OUTCOMES = (
    "joined",
    "late",
    "unknown_request",
    "not_shown",
    "before_ranking",
    "no_impression",
)

Settled = tuple[int, int | None, str]


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """How to join; times in seconds."""

    window: float = 1800.0
    """How long after a ranking an event still belongs to it."""
    lateness: float = 60.0
    """How long after the window's end an event of the window may still come."""
    shown: str = "served"
    """`served`: each ad of an answer counts as an impression. `reported`: only those for which an impression event came."""
    rows_per_file: int = 100_000

    @property
    def hold(self) -> float:
        """How long rows that are due wait for more, so that a quiet log is not made of tiny files."""
        return min(HOLD_SECONDS, self.window + self.lateness)


@dataclass(frozen=True, slots=True)
class Ranking:
    """A ranking as far as events need it; `mine` if it is of the part that is planned."""

    n: int
    since: float
    ads: frozenset[str]
    mine: bool


def plan(state: State, settings: JoinSettings, until: float, force: bool) -> Part | None:
    """Plan rows of rankings whose window began at `until` or before, if they are many or have waited, or by `force`; None if not.

    Raises:
        NoRoomError: the disk is full; nothing is planned.
    """
    for due in state.due(until):
        if force or due.ads >= settings.rows_per_file or due.oldest <= until - settings.hold:
            with state.planning(due.hour) as part:
                state.claim(part, until, settings.rows_per_file)
                state.settle(part, _settled(state, part, settings))
            return part
    return None


def sweep(state: State, until: float) -> Part | None:
    """Plan what came until then and no ranking is held for; None where there is nothing.

    Raises:
        NoRoomError: the disk is full; nothing is planned.
    """
    strays = state.strays(until)
    if not strays:
        return None
    written = {request_id: state.was_written(request_id) for request_id in {stray.request_id for stray in strays}}
    with state.planning(None) as part:
        state.settle(part, [(e.n, None, e.outcome or (LATE if written[e.request_id] else UNKNOWN)) for e in strays])
    return part


def _settled(state: State, part: Part, settings: JoinSettings) -> Iterator[Settled]:
    rankings: dict[str, list[Ranking]] = defaultdict(list)
    for n, request_id, since, record, mine in state.related(part):
        rankings[request_id].append(Ranking(n, since, frozenset(unpack_served(record).ad_ids), mine))
    held = [(each, read_event(each.packed)) for each in state.events_of(part)]
    shown: set[tuple[int, str]] = set()
    # Impressions first: whether a click had one must be known by then.
    for each, event in sorted(held, key=lambda pair: pair[1].type != "impression"):
        found = _of(rankings[each.request_id], event, each)
        if isinstance(found, Ranking):
            if not found.mine:
                continue
            outcome = JOINED if min(event.ts, each.taken) <= found.since + settings.window else LATE
            if event.type == "impression" and outcome == JOINED:
                shown.add((found.n, event.ad_id))
            elif settings.shown == "reported" and outcome == JOINED and (found.n, event.ad_id) not in shown:
                outcome = NO_IMPRESSION
            yield each.n, found.n, outcome
        elif all(ranking.mine for ranking in rankings[each.request_id]):
            yield each.n, None, LATE if state.was_written(each.request_id) else found


def _of(rankings: Sequence[Ranking], event: Event, held: Held) -> Ranking | str:
    """The ranking that an event belongs to, or why there is none: the newest before it, or else the first soon after it."""
    showing = [ranking for ranking in rankings if event.ad_id in ranking.ads]
    if not showing:
        return NOT_SHOWN
    at = min(event.ts, held.taken)
    before = [ranking for ranking in showing if ranking.since <= at]
    after = [ranking for ranking in showing if at < ranking.since <= at + SKEW_SECONDS]
    return before[-1] if before else after[0] if after else BEFORE
