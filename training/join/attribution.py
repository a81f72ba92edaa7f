"""Attribution: raw rankings and events (docs/log.md) as rows of labelled impressions, a query that may be run again with other windows.

An event belongs to the newest ranking of its request id that was made before it, answered with its ad, and was of its user. A ranking is
open until its window is over and all that came within it has been written: it makes no rows before, since nobody knows that it was not
clicked. One hour of rankings is in memory at a time, beside the conversions of all of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import polars as pl
import tomli_w

from features.files import read_toml
from features.schema import Schema

from ..datasets.prepared import DataError, columns_of
from .delay import Delay, fit_delay
from .raw import AD_TYPES, EVENT_TYPES, HOUR, LATER, LogColumns

RAW, IMPRESSIONS, EVENTS, ASIDE = "raw", "impressions", "events", "aside"
WATERMARK, SETTINGS = "watermark", "attribution.toml"
SKEW_SECONDS = 60.0
"""An event may seem older than its ranking by so much: the clocks of callers differ."""
DAY = 24 * 3600.0
JOINED, DUPLICATE, LATE, DEFERRED, UNKNOWN, NOT_SHOWN, OTHER_USER, BEFORE, NO_IMPRESSION = (
    "joined",
    "duplicate",
    "late",
    "deferred",
    "unknown_request",
    "not_shown",
    "other_user",
    "before_ranking",
    "no_impression",
)
MONEY = ("bid", "bid_type", "price", "p_conversion")
"""Columns of ads, which files of before do not have."""
OFFERED = ("candidates", "candidate_revisions", "candidate_bids", "candidate_bid_types")
MATURITY = "conversion_maturity"
KEY = ("request_id", "entry", "ad_id")
"""Of an ad of a ranking: a request id may be used again, and an entry may be read again."""
ONCE = ["request_id", "entry"]
EVENT = pl.struct("type", pl.when(pl.col("type") == "click").then("user_id").otherwise("request_id").alias("entity"), "event_id")
"""What an event is known by when it comes again."""
NARROW = ("request_id", "entry", "user_id", "since", "shown", "ad_id")


@dataclass(frozen=True, slots=True)
class Attribution:
    """What belongs to an impression, and what an impression is; times in seconds."""

    click_window: float = 1800.0
    """How long after a ranking a click still belongs to it."""
    impression_window: float | None = None
    """The same of an impression; None: as of a click."""
    conversion_window: float = 7 * DAY
    """The same of a conversion. Rows do not wait for it: they have those that came so far."""
    lateness: float = 60.0
    """How long after the end of its window a click or an impression of the window may still come."""
    shown: str = "told"
    """`told`: an ad of an answer is an impression where the caller said that it shows it, or an impression event came. `reported`: where
    such an event came. `served`: each is, whoever saw it: for callers that show all that is answered.
    """

    @property
    def closes(self) -> float:
        """How long after a ranking its clicks and impressions are known."""
        return max(self.click_window, self.windows["impression"]) + self.lateness

    @property
    def windows(self) -> Mapping[str, float]:
        """How long after a ranking an event still belongs to it, by type."""
        impression = self.click_window if self.impression_window is None else self.impression_window
        windows = {"click": self.click_window, "impression": impression, "conversion": self.conversion_window}
        return {type_: float(window) for type_, window in windows.items()}

    @property
    def counted(self) -> pl.Expr:
        """How many ads of a ranking, from the first, are impressions whether they are reported or not."""
        return {"served": pl.col("ad_id").list.len(), "told": pl.col("shown")}.get(self.shown, pl.lit(0)).cast(pl.Int64).alias("counted")


def settings_of(log: Path, **given: float | str | None) -> Attribution:
    """Those that the log was written with, but for what is given and not None.

    Raises:
        DataError: the log's file of them is damaged.
    """
    path, known = log / SETTINGS, {each.name for each in fields(Attribution)}
    kept = read_toml(path, DataError) if path.exists() else {}
    if wrong := sorted(name for name, value in kept.items() if name not in known or isinstance(value, str) != (name == "shown")):
        raise DataError(f"{path}: {', '.join(wrong)} cannot be read; adrank join writes it")
    return Attribution(**kept | {name: value for name, value in given.items() if value is not None})


def settings_text(settings: Attribution) -> bytes:
    """The settings as a log keeps them."""
    return tomli_w.dumps({name: value for name, value in asdict(settings).items() if value is not None}).encode()


class RawLog:
    """The raw files of a log as they were when this was made, and up to when all events that were received are in them.

    Raises:
        DataError: a folder is no hour, or the watermark no time.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.columns = folder, LogColumns(schema)
        self._types = {IMPRESSIONS: self.columns.impressions, EVENTS: dict(EVENT_TYPES)}
        self._lacks = dict[Path, set[str]]()
        # In this order: asked for after the files were listed, the watermark might promise events that are in none of them.
        self.watermark = _watermark(folder / RAW / WATERMARK)
        self.hours = {kind: hour_files(folder / RAW / kind, "date") for kind in (IMPRESSIONS, EVENTS)}

    @property
    def known(self) -> float:
        """The watermark; of a log that was drained, when the newest that is in it was received."""
        if self.watermark < inf:
            return self.watermark
        newest = (self.scan(kind, hour * HOUR, inf, ["received"]) for kind, hours in self.hours.items() for hour in list(hours)[-1:])
        return max((each.select(pl.max("received")).collect().item() or -inf for each in newest), default=-inf)

    def scan(self, kind: str, begin: float, end: float, names: Collection[str]) -> pl.LazyFrame:
        """Columns of the files of the hours that meet `begin <= t <= end`.

        Raises:
            DataError: a file is not parquet, or lacks a column that it always had.
        """
        types = {name: self._types[kind][name] for name in names}
        paths = [path for hour, found in self.hours[kind].items() if (hour + 1) * HOUR > begin and hour * HOUR <= end for path in found]
        if not paths:
            return pl.LazyFrame(schema=types)
        for path in paths:
            if lacks := sorted(self._lacking(kind, path).intersection(names)):
                raise DataError(f"{self.folder} cannot be attributed: {path} has no column {lacks[0]}")
        found = pl.scan_parquet(paths, glob=False, schema=self._types[kind], missing_columns="insert", extra_columns="ignore")
        return found.select(names)

    def _lacking(self, kind: str, path: Path) -> set[str]:
        """The columns that a file should have and has not: looked up once, since hours are read again for each hour of a window."""
        if path not in self._lacks:
            try:
                self._lacks[path] = set(self._types[kind]).difference(columns_of(path), LATER)
            except DataError as error:
                raise DataError(f"{self.folder} cannot be attributed: {error}") from error
        return self._lacks[path]

    def rankings(self, begin: float, end: float, settings: Attribution, names: Collection[str] = NARROW) -> pl.LazyFrame:
        """The rankings of these hours, some perhaps twice, with how many of their ads count."""
        return self.scan(IMPRESSIONS, begin, end, names).with_columns(settings.counted)

    def events(self, begin: float, end: float) -> pl.LazyFrame:
        """The events that were received in these hours."""
        return self.scan(EVENTS, begin, end, list(EVENT_TYPES))


def _watermark(path: Path) -> float:
    try:
        return float(path.read_text("ascii")) if path.exists() else -inf
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no time: {error}; adrank join writes it") from error


def settle(events: pl.LazyFrame, rankings: pl.LazyFrame, settings: Attribution) -> pl.LazyFrame:
    """Each event with its outcome and, where it has one, the ranking that it belongs to: `entry`, `since`, and whether the ad is `counted`.

    A record that was written twice is one event. `rankings` has `NARROW` and `counted`.
    """
    events_once = events.rename({"entry": "record"}).unique(["record", "event_id"], keep="any").sort("received", "record")
    events_once = events_once.with_columns(first=EVENT.is_first_distinct()).with_row_index("event")
    events_once = events_once.collect().lazy()  # once: it is needed thrice
    named = rankings.join(events_once.select("request_id").unique(), on="request_id", how="semi").unique(ONCE, keep="any").collect().lazy()
    ads = named.with_columns(index=pl.int_ranges(pl.col("ad_id").list.len()), ranked_user=pl.col("user_id")).explode("ad_id", "index")
    ads = ads.select("request_id", "ad_id", "entry", "since", "ranked_user", counted=pl.col("index") < pl.col("counted"))
    gap, owner = pl.col("at") - pl.col("since"), (pl.col("user_id") == "") | (pl.col("user_id") == pl.col("ranked_user"))
    pairs = events_once.filter("first").join(ads, on=["request_id", "ad_id"]).with_columns(owned=owner).collect().lazy()
    answered = pairs.group_by("event").agg(pl.lit(True).alias("answered"), pl.col("owned").any())
    distance = pl.when(gap >= 0).then(gap).otherwise(DAY - gap).alias("distance")
    fitting = pairs.filter(pl.col("owned"), gap >= -SKEW_SECONDS).select("event", "entry", "since", "counted", distance)
    best = fitting.sort("distance", "entry", descending=[False, True]).unique("event", keep="first", maintain_order=True).drop("distance")
    found = answered.join(best, on="event", how="left")
    requested = named.select("request_id", requested=pl.lit(True)).unique()
    whole = events_once.join(found, on="event", how="left").join(requested, on="request_id", how="left")
    window = pl.col("type").replace_strict(settings.windows, default=0.0, return_dtype=pl.Float64)
    came_late = (pl.col("type") != "conversion") & (pl.col("received") > pl.col("since") + window + settings.lateness)
    outcome = (
        pl.when(~pl.col("first"))
        .then(pl.lit(DUPLICATE))
        .when(pl.col("requested").is_null())
        .then(pl.lit(UNKNOWN))
        .when(pl.col("answered").is_null())
        .then(pl.lit(NOT_SHOWN))
        .when(~pl.col("owned"))
        .then(pl.lit(OTHER_USER))
        .when(pl.col("entry").is_null())
        .then(pl.lit(BEFORE))
        .when((gap > window) | came_late)
        .then(pl.lit(LATE))
        .otherwise(pl.lit(JOINED))
    )
    return whole.with_columns(outcome=outcome)


def labelled(raw: RawLog, hour: int, settings: Attribution, closed: float, bought: "Conversions", after: float = -inf) -> pl.DataFrame:
    """The impressions of the rankings of an hour whose window began after `after`, at `closed` or before, as rows of the log.

    `bought` is what `conversions` found. Rows are in the order of rankings, and of ads in them.
    """
    begin, end, columns = float(hour * HOUR), float((hour + 1) * HOUR), raw.columns
    served = raw.rankings(begin, begin, settings, list(columns.impressions)).unique(ONCE, keep="any")
    served = served.filter(pl.col("since") > after, pl.col("since") <= closed)
    ((first, last),) = served.select(pl.col("since").min(), pl.col("since").max().alias("last")).collect().rows()
    if first is None:
        return pl.DataFrame()
    first, last = min(first, begin), max(last, end)
    near = raw.rankings(first - settings.closes, last + settings.closes, settings)
    events = raw.events(first - SKEW_SECONDS, last + settings.closes).filter(pl.col("type") != "conversion")
    joined = settle(events, near, settings).filter(outcome=JOINED).select(*KEY, "type", "ts", "event_id", "position").collect().lazy()
    clicks = joined.filter(type="click").group_by(KEY).agg(click_ts=pl.col("ts").min())
    of_first = pl.col("position").sort_by("ts", "event_id").first().alias("reported_at")
    reports = joined.filter(type="impression").group_by(KEY).agg(of_first, pl.lit(True).alias("reported"))
    count = pl.col("ad_id").list.len()
    whole = (pl.coalesce(name, pl.lit(None, AD_TYPES[name]).repeat_by(count)).alias(name) for name in MONEY)
    ads = served.with_columns(*whole, index=pl.int_ranges(count)).explode(*columns.of_ads, "index")
    for found in (clicks, reports, bought.rows.lazy()):
        ads = ads.join(found, on=list(KEY), how="left")
    shown = ads.filter((pl.col("index") < pl.col("counted")) | pl.col("reported"))
    shown = shown.with_columns(bought.delay.share(bought.known - pl.col("since")).alias(MATURITY))
    return _rows(shown.sort("since", "entry", "index").collect(engine="streaming"), columns)


def _rows(shown: pl.DataFrame, columns: LogColumns) -> pl.DataFrame:
    """What was shown, with the columns that docs/log.md tells."""
    first = pl.struct("request_id", "entry").is_first_distinct()
    once = [pl.when(first).then(pl.col(name)).alias(name) for name in OFFERED]
    label, converted = (pl.col(name).is_not_null().cast(pl.Int8) for name in ("click_ts", "value"))
    position, ts = pl.coalesce("reported_at", "position").alias("position"), pl.col("ts").floor().cast(pl.Int64)
    own = [
        "ad_id",
        "p_click",
        "propensity",
        "known",
        "revision",
        "value",
        "click_ts",
        "request_id",
        "model",
        "version",
        "user_id",
        "policy",
        "objective",
        "experiment",
        *MONEY,
    ]
    own += [name for name in ("history", "history_revisions", "history_ts") if name in columns.rankings]
    own += [name for name in columns.impressions if name.startswith(("user.", "context.", "ad.", "tensors."))]
    return shown.select(label.alias("label"), position, converted.alias("conversion"), MATURITY, ts, *once, *own)


@dataclass(frozen=True)
class Conversions:
    """What rankings came to: `rows` of `KEY` and `value`, the sum of an ad's conversions; and how long those took."""

    rows: pl.DataFrame
    delay: Delay
    known: float
    """Up to when all that had come is in the log."""


def conversions(raw: RawLog, hours: Sequence[int], settings: Attribution) -> Conversions:
    """What rankings of these hours came to."""
    window, known = settings.windows["conversion"], raw.known
    if not hours:
        return Conversions(pl.DataFrame(schema={**dict.fromkeys(KEY, pl.String()), "value": pl.Float64()}), Delay(window), known)
    begin, end = hours[0] * HOUR - SKEW_SECONDS, (hours[-1] + 1) * HOUR
    events = raw.events(begin, inf).filter(pl.col("type") == "conversion")
    joined = settle(events, raw.rankings(begin - HOUR, end + settings.closes, settings), settings).filter(outcome=JOINED)
    took = (pl.col("at") - pl.col("since")).min().alias("took")
    found = joined.group_by(KEY).agg(pl.col("value").fill_null(0.0).sum(), took, pl.col("since").first()).collect(engine="streaming")
    delay = fit_delay(found["took"].to_numpy(), known - found["since"].to_numpy(), window)
    return Conversions(found.drop("took", "since"), delay, known)


def hour_name(hour: int, day: str) -> str:
    """The folders of an hour since 1970, UTC."""
    return f"{datetime.fromtimestamp(hour * HOUR, UTC):{day}=%Y-%m-%d/hour=%H}"


def hour_files(folder: Path, day: str) -> dict[int, list[Path]]:
    """By hour since 1970, in order, the files in its folder.

    Raises:
        DataError: a folder is no hour.
    """
    found = {}
    for path in folder.glob(f"{day}=*/hour=*"):
        try:
            hour = datetime.strptime(f"{path.parent.name} {path.name} +0000", f"{day}=%Y-%m-%d hour=%H %z")
        except ValueError as error:
            raise DataError(f"{path} is not an hour of a log, such as {day}=2026-11-22/hour=17") from error
        files = sorted(path.glob("[!.]*.parquet"))
        found[int(hour.timestamp()) // HOUR] = [each.resolve() if each.is_symlink() else each for each in files]
    return dict(sorted(found.items()))
