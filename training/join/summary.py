"""What the joiner tells of its work: to whoever watches it, and to people in a line of its log."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

from features.events import Event

from .files import Content
from .plan import JoinSettings
from .quality import PLACES, Windows
from .records import DAMAGED
from .state import Held


def held(rankings: int, events: int, oldest: float | None, settings: JoinSettings) -> str:
    """What is held and until when, in a line; `oldest` is when the window of the oldest ranking began."""
    if oldest is None:
        return f"holds no ranking and {events:,} events, and waits for rankings that the service logs"
    first = oldest + settings.closes + settings.lateness
    return (
        f"holds {rankings:,} rankings and {events:,} events; the first rows are written from {_moment(first)} on, "
        f"by {_moment(first + settings.hold)} at the latest: window {settings.closes:g} s, lateness {settings.lateness:g} s, "
        f"and up to {settings.hold:g} s for more of them"
    )


def _moment(ts: float) -> str:
    return f"{datetime.fromtimestamp(ts, UTC):%Y-%m-%d %H:%M:%S} UTC"


class JoinWatch(Protocol):
    """Who is told what the joiner does."""

    def events(self, type_: str, outcome: str, count: int) -> None:
        """Events ended so."""

    def incident(self, kind: str, count: int) -> None:
        """Something happened that should not: `trimmed`, `disk_full` and the like."""

    def rankings(self, model: str, count: int) -> None:
        """Rankings of a model were written."""

    def shown(self, how: str, count: int) -> None:
        """So many of the rankings that were written are known to be shown so: `said`, `reported`, `assumed`, or `unknown`."""

    def rows(self, model: str, position: str, count: int, clicks: int, p_click: float) -> None:
        """Rows of a position were written, with so many clicks, and p(click) that sum to so much."""

    def quality(self, model: str, calibration: float, by_position: Mapping[str, float], entropy: float) -> None:
        """What a model's newest rows come to."""

    def drift(self, model: str, by_field: Mapping[str, float]) -> None:
        """How far the fields of a model's newest rows have drifted."""

    def stream(self, stream: str, backlog: int, lag: float) -> None:
        """So many entries stand in a stream, the oldest of them for so many seconds."""


class Told:
    """Passes on what happens, and adds it up."""

    def __init__(self, watch: JoinWatch, windows: Windows) -> None:
        self.watch = watch
        self._windows = windows
        self._counts: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()

    def event(self, type_: str, outcome: str, count: int = 1) -> None:
        """Events ended so."""
        self.watch.events(type_, outcome, count)
        self._counts[f"{type_} {outcome}"] += count

    def incident(self, kind: str, count: int = 1) -> None:
        """Something happened that should not."""
        self.watch.incident(kind, count)
        self._counts[kind] += count

    def written(self, content: Content, models: Counter[str], settled: Sequence[tuple[Held, Event | None]]) -> None:
        """A part was written: its frames, how many rankings of each model it has, and its events."""
        for kind, count in content.troubles.items():
            self.incident(kind, count)
        for (type_, outcome), count in Counter((event.type if event else DAMAGED, held.outcome or "") for held, event in settled).items():
            self.event(type_, outcome, count)
        for name, count in models.items():
            self.watch.rankings(self._windows.name(name), count)
        for how, count in content.shown.items():
            self.watch.shown(how, count)
        self._shown += content.shown
        self._counts["rankings"] += models.total()
        self._counts["rows"] += len(content.rows)
        if len(content.rows):
            self._quality(content)

    def _quality(self, content: Content) -> None:
        for name, (sums, quality) in self._windows.add(content.rows).items():
            for place, rows, clicks, p_click in zip(PLACES, sums.rows, sums.clicks, sums.p_click, strict=True):
                if rows:
                    self.watch.rows(name, place, int(rows), int(clicks), float(p_click))
            self.watch.quality(name, quality.calibration, quality.by_place, quality.normalised_entropy)
            self.watch.drift(name, quality.drift)

    def summary(self) -> str:
        """What has happened since the start, in a line."""
        if not self._counts:
            return "nothing yet"
        return "joined: " + ", ".join(f"{count:,} {what}" for what, count in sorted(self._counts.items())) + self.untrained()

    def untrained(self) -> str:
        """That rankings are not trained on, and what their callers are to do; empty where all are."""
        count, total = self._shown["unknown"], self._shown.total()
        if not count:
            return ""
        return (
            f"; {count:,} of {total:,} rankings do not train, since nobody said what of them was shown: let callers send options.top_k "
            "or options.shown with POST /rank, or report impressions to POST /v1/events"
        )
