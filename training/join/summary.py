"""What is told of a sink's work: to whoever watches it, and to people in a line of its log."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import polars as pl

from .quality import PLACES, Quality, Windows
from .raw import RawBatch


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

    def converted(self, model: str, count: int, conversions: int, p_conversion: float) -> None:
        """The conversions of so many rows are all known, with p(conversion) that sum to so much."""

    def quality(self, model: str, calibration: float, by_position: Mapping[str, float], entropy: float) -> None:
        """What a model's newest rows come to."""

    def drift(self, model: str, by_field: Mapping[str, float]) -> None:
        """How far the fields of a model's newest rows have drifted."""

    def stream(self, stream: str, backlog: int, lag: float) -> None:
        """So many entries stand in a stream, the oldest of them for so many seconds."""


class JoinSummary:
    """Passes on what happens, and adds it up."""

    def __init__(self, watch: JoinWatch, models: Path) -> None:
        self.watch = watch
        self._windows = Windows(models)
        self._counts: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()
        self.since = round(time.time())
        """Since when `counts` count, in seconds since 1970."""
        self.counts: dict[str, Counter[str]] = {"shown": self._shown, "incidents": Counter()}
        """Beside what was shown and what should not happen, what became of events: by type and outcome, `event click`."""
        self.quality: dict[str, Quality] = {}
        """Of each model, the one that was measured last at the end."""

    def event(self, type_: str, outcome: str, count: int = 1) -> None:
        """Events ended so."""
        self.watch.events(type_, outcome, count)
        self._counts[f"{type_} {outcome}"] += count
        self.counts.setdefault(f"event {type_}", Counter())[outcome] += count

    def incident(self, kind: str, count: int = 1) -> None:
        """Something happened that should not."""
        self.watch.incident(kind, count)
        self._counts[kind] += count
        self.counts["incidents"][kind] += count

    def stream(self, stream: str, backlog: int, lag: float) -> None:
        """So many entries stand in a stream, the oldest of them for so many seconds."""
        self.watch.stream(stream, backlog, lag)
        self.counts[f"stream {stream}"] = Counter(backlog=backlog, lag=round(lag))

    def written(self, batch: RawBatch) -> None:
        """A batch of entries was written."""
        for kind, count in batch.troubles.items():
            self.incident(kind, count)
        for why, count in Counter(why for _, _, why, _ in batch.aside).items():
            self.event(why, why, count)
        for name, count in batch.models.items():
            self.watch.rankings(self._windows.name(name), count)
        self._counts["rankings"] += batch.models.total()
        self._counts["events"] += batch.events

    def closed(self, rows: pl.DataFrame, shown: Mapping[str, int]) -> None:
        """The windows of these rows are over; of so many rankings it is known so what was shown."""
        for how, count in shown.items():
            self.watch.shown(how, count)
        self._shown.update(shown)
        self._counts["impressions"] += len(rows)
        for name, (sums, quality) in self._windows.add(rows).items() if len(rows) else ():
            for place, count, clicks, p_click in zip(PLACES, sums.rows, sums.clicks, sums.p_click, strict=True):
                if count:
                    self.watch.rows(name, place, int(count), int(clicks), float(p_click))
            self.quality.pop(name, None)
            self.quality[name] = quality
            self.watch.quality(name, quality.calibration, quality.by_place, quality.normalised_entropy)
            self.watch.drift(name, quality.drift)

    def converted(self, rows: pl.DataFrame) -> None:
        """The windows of conversions of these rows, which have a p(conversion), are over."""
        for (model,), frame in rows.group_by("model"):
            sums = frame.select(pl.col("conversion").cast(pl.Int64).sum(), pl.col("p_conversion").sum()).row(0)
            self.watch.converted(self._windows.name(str(model)), len(frame), *sums)

    def summary(self) -> str:
        """What has happened since the start, in a line."""
        counts = +self._counts
        if not counts:
            return "nothing yet"
        return "joined: " + ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) + self.untrained()

    def untrained(self) -> str:
        """That rankings are not trained on, and what their callers are to do; empty where all are."""
        count, total = self._shown["unknown"], self._shown.total()
        if not count:
            return ""
        return (
            f"; {count:,} of {total:,} rankings do not train, since nobody said what of them was shown: let callers send options.top_k "
            "or options.shown with POST /rank, or report impressions to POST /v1/events"
        )
