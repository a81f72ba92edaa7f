"""The live figures of a log: attribution of what has just closed, told each time it is measured."""

import fcntl
import logging
import os
from collections import Counter
from math import inf
from typing import IO

import polars as pl

from ..datasets.prepared import DataError
from .attribution import (
    DEFERRED,
    EVENTS,
    IMPRESSIONS,
    JOINED,
    KEY,
    NO_IMPRESSION,
    ONCE,
    UNKNOWN,
    Attribution,
    RawLog,
    conversions,
    labelled,
    settle,
)
from .log import OWN, LogFolder, NoRoomError, room, write_file
from .raw import HOUR
from .summary import JoinSummary

HOURS = 3
"""The most that one measurement looks at: of what closed while no sink was at work, the newest."""

log = logging.getLogger(__name__)


class Live:
    """Measures what has closed since it was last measured, by any sink: of several, one does, as long as it lives."""

    def __init__(self, into: LogFolder, settings: Attribution, report: JoinSummary) -> None:
        self._log, self._settings, self._summary = into, settings, report
        self._lock: IO[bytes] | None = None

    def measure(self) -> bool:
        """Tell of the impressions whose windows are over by now, and of the events that were received until then, each once.

        Whether that was for this sink to do.
        """
        try:
            with room(self._log.folder):
                if not self._is_mine():
                    return False
                self._measure()
        except (DataError, NoRoomError, OSError, pl.exceptions.PolarsError) as error:
            log.warning("live figures cannot be told: %s", error)
        return True

    def close(self) -> None:
        """Let another sink measure."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _is_mine(self) -> bool:
        lock = self._lock or os.fdopen(os.open(self._log.folder / OWN / "live.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._lock = lock
        return True

    def _measure(self) -> None:
        raw, path = RawLog(self._log.folder, self._log.schema), self._log.folder / OWN / "live"
        after, closed = float(path.read_text("ascii")) if path.exists() else -inf, raw.watermark - self._settings.closes
        newest = -inf
        for hour in (each for each in list(raw.hours[IMPRESSIONS])[-HOURS:] if (each + 1) * HOUR > after and each * HOUR <= closed):
            newest = max(newest, self._rankings(raw, hour, after, closed))
        for hour in (each for each in list(raw.hours[EVENTS])[-HOURS:] if (each + 1) * HOUR > after and each * HOUR <= closed):
            newest = max(newest, self._events(raw, hour, after, closed))
        for hour in self._settled(raw, after, closed):
            self._converted(raw, hour, after, closed)
        if newest > after or after < closed < inf:
            write_file(path, str(closed if closed < inf else newest).encode())

    def _rankings(self, raw: RawLog, hour: int, after: float, closed: float) -> float:
        """Tell of the rankings of an hour that have closed; when the window of the newest began."""
        settings, begin = self._settings, float(hour * HOUR)
        rows = labelled(raw, hour, settings, closed, conversions(raw, [hour], settings), after)
        listed = raw.rankings(begin, begin, settings).filter(pl.col("since") > after, pl.col("since") <= closed).unique(ONCE).collect()
        said = pl.when(pl.col("counted") == pl.col("shown")).then(pl.lit("said")).otherwise(pl.lit("assumed"))
        how = pl.when(pl.col("counted") == 0).then(pl.lit("reported")).otherwise(said)
        made = pl.col("request_id").is_in(rows["request_id"].unique().implode() if len(rows) else [])
        self._summary.closed(rows, Counter(listed.select(pl.when(made).then(how).otherwise(pl.lit("unknown"))).to_series()))
        return float(listed["since"].max() or -inf)  # type: ignore[arg-type]  # of floats

    @property
    def _ago(self) -> float:
        """How much earlier than those whose clicks are known were rankings made whose conversions are all known."""
        return max(0.0, self._settings.windows["conversion"] + self._settings.lateness - self._settings.closes)

    def _settled(self, raw: RawLog, after: float, closed: float) -> list[int]:
        """The hours, the newest, whose conversions came to be known since it was measured."""
        if not -inf < after < closed < inf:
            return []
        begin, end = after - self._ago, closed - self._ago
        return [hour for hour in raw.hours[IMPRESSIONS] if (hour + 1) * HOUR > begin and hour * HOUR <= end][-HOURS:]

    def _converted(self, raw: RawLog, hour: int, after: float, closed: float) -> None:
        """Tell what p(conversion) and the conversions of an hour's rankings came to."""
        bought = conversions(raw, [hour], self._settings)
        rows = labelled(raw, hour, self._settings, closed - self._ago, bought, after - self._ago)
        if len(rows):
            self._summary.converted(rows.filter(pl.col("p_conversion").is_not_null()))

    def _events(self, raw: RawLog, hour: int, after: float, closed: float) -> float:
        """Tell what became of the events that were received in an hour; when the newest was."""
        settings, begin, end = self._settings, hour * HOUR, (hour + 1) * HOUR
        near = raw.rankings(begin - settings.closes - HOUR, end, settings)
        settled = settle(raw.events(begin - settings.closes, end + settings.closes), near, settings)
        seen = settled.filter(pl.col("type") == "impression", pl.col("outcome") == JOINED).select(*KEY, seen=pl.lit(True)).unique()
        unseen = (pl.col("outcome") == JOINED) & (pl.col("type") != "impression") & ~pl.col("counted") & pl.col("seen").is_null()
        older = (pl.col("outcome") == UNKNOWN) & (pl.col("type") == "conversion")
        outcome = pl.when(unseen).then(pl.lit(NO_IMPRESSION)).when(older).then(pl.lit(DEFERRED)).otherwise("outcome")
        mine = pl.col("received").is_between(max(begin, after), end, closed="none" if after >= begin else "left")
        found = settled.join(seen, on=list(KEY), how="left").filter(mine, pl.col("received") <= closed)
        counts = found.group_by("type", outcome.alias("outcome")).agg(pl.len(), pl.col("received").max()).collect()
        for type_, what, count, _ in counts.rows():
            self._summary.event(type_, what, count)
        return float(counts["received"].max() or -inf)  # type: ignore[arg-type]  # of floats
