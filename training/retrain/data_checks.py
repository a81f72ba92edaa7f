"""Whether a window of the log is fit to train on: what is in it, beside the window before it and the live version's training.

Knows nothing about networks. Every reason against a window comes with its numbers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import sqrt
from statistics import median
from typing import Any

import numpy as np
import polars as pl

from features.schema import Schema

from ..datasets.prepared import SPLITS, Prepared, column_of
from ..datasets.vocabularies import joined
from ..train_settings import TrainError

HOUR = 3600
SAME_HOURS = 3
"""Days from which on an hour is compared with the same hour of other days, since nights are quiet."""
NOISE = 4.0
"""Standard deviations (of a Poisson count) by which an hour has to fall short before that is called a gap."""
SHOWN = 3
KEY = ("request_id", "position")
RANKING = ("request_id", "model", "version")


@dataclass(frozen=True)
class Enough:
    """What there has to be to learn from, and to be judged by."""

    least_rows: int = 200
    """Of what there is to learn from."""
    least_clicks: int = 10
    """Of the same, and as many rows without a click."""

    def __post_init__(self) -> None:
        _refuse(self._rules())

    def _rules(self) -> list[tuple[str, object, bool, str]]:
        return [
            ("least_rows", self.least_rows, self.least_rows >= 3, "at least 3"),
            ("least_clicks", self.least_clicks, self.least_clicks >= 1, "at least 1"),
        ]


def _refuse(rules: Iterable[tuple[str, object, bool, str]]) -> None:
    wrong = [f"{name} is {value!r}; it must be {rule}" for name, value, fits, rule in rules if not fits]
    if wrong:
        raise TrainError(", and ".join(wrong))


@dataclass(frozen=True)
class Limits(Enough):
    """What a window has to keep to: no person looks at what it comes to, so there has to be more of it."""

    least_rows: int = 1000
    """Of the window."""
    least_clicks: int = 50
    """Of the window, and as many rows without a click."""
    click_rate_factor: float = 3.0
    """The click rate may be at most so many times the live version's, and at least that fraction of it."""
    rows_share: float = 0.5
    """Of the rows of the window before, and of the rows that an hour should have."""
    most_gaps: float = 0.02
    """The share of hours that may be gaps: half an hour a day."""
    most_duplicates: float = 0.001
    """The share of rows that may repeat another's request and position."""
    constant: str = ""
    """Fields that may be constant or missing, separated by commas."""

    def _rules(self) -> list[tuple[str, object, bool, str]]:
        shares = {name: getattr(self, name) for name in ("rows_share", "most_gaps", "most_duplicates")}
        return [
            *Enough._rules(self),
            ("click_rate_factor", self.click_rate_factor, self.click_rate_factor >= 1, "at least 1"),
            *((name, share, 0 <= share <= 1, "from 0 to 1") for name, share in shares.items()),
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a field holds: the share of rows that have a value, one of the values, and whether there is another."""

    known: float
    value: str | None
    varied: bool


@dataclass(frozen=True)
class Profile:
    """What is in a window."""

    rows: dict[str, int]
    clicks: dict[str, int]
    """By split."""
    first: float | None
    last: float | None
    """Times of the first and of the last row, in seconds since 1970; None where rows have no times."""
    duplicates: int
    fields: dict[str, Seen]
    hours: dict[int, int] = field(default_factory=dict)
    """Rows by hour since 1970."""
    negative_sampling: float = 1.0
    """The share of non-clicks that is in the window."""

    @property
    def total(self) -> int:
        """Rows of all splits."""
        return sum(self.rows.values())

    @property
    def click_rate(self) -> float:
        """Clicks over impressions, of which those without a click may be here in part only."""
        return click_rate(sum(self.clicks.values()), self.total, self.negative_sampling)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the hours."""
        return {name: value for name, value in asdict(self).items() if name != "hours"} | {"click_rate": self.click_rate}


@dataclass(frozen=True)
class PastLog:
    """What is known of before: the rows of a window as long just before this one, and what the live version was trained on."""

    rows: int | None = None
    click_rate: float | None = None
    varied: Mapping[str, bool] = field(default_factory=dict)
    """Whether a field had more than one value; fields of which that is not known are left out."""


def click_rate(clicks: int, rows: int, negative_sampling: float) -> float:
    """Clicks over the impressions of which these rows are what was kept: all clicks, and a share of the others."""
    return clicks / max(clicks + (rows - clicks) / negative_sampling, 1)


def slices(data: Prepared, splits: Iterable[str] = SPLITS) -> dict[str, Iterator[pl.DataFrame]]:
    """The rows of some splits; those of a log with the columns that say which ranking they come from."""
    return {split: data.slice(split, RANKING) for split in splits}


def profile(data: Prepared, frames: Mapping[str, Iterable[pl.DataFrame]]) -> Profile:
    """Read the slices of a window once, file by file.

    Raises:
        DataError: they cannot be read.
    """
    rows, clicks, hours = Counter(dict.fromkeys(frames, 0)), Counter(dict.fromkeys(frames, 0)), Counter[int]()
    fields, keys, ends = _Fields(data.schema), [], []
    tables = data.lookups("user", "ad")
    for name, frame in ((name, frame) for name, each in frames.items() for frame in each):
        rows[name] += len(frame)
        clicks[name] += int(frame["label"].sum())
        fields.add(joined(frame, data.schema, tables))
        if set(KEY) <= set(frame.columns):
            keys.append(frame.select(pl.struct(*KEY).hash()).to_series().to_numpy())
        if "ts" in frame.columns and len(ts := frame["ts"].drop_nulls().to_numpy()):
            ends += [float(ts.min()), float(ts.max())]
            found, counts = np.unique(ts // HOUR, return_counts=True)
            hours.update(dict(zip(found.astype(int).tolist(), counts.tolist(), strict=True)))
    repeated = sum(map(len, keys)) - len(np.unique(np.concatenate(keys))) if keys else 0
    first, last = (min(ends), max(ends)) if ends else (None, None)
    seen = fields.seen(sum(rows.values()))
    return Profile(dict(rows), dict(clicks), first, last, repeated, seen, dict(hours), data.negative_sampling)


class _Fields:
    """Counts, of each field, the rows with a value, and remembers two of the values."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        paths = [each.path for each in schema.fields] + (["history"] if schema.history else [])
        self.known = dict.fromkeys(paths, 0)
        self.values: dict[str, list[str]] = {path: [] for path in paths}

    def add(self, frame: pl.DataFrame) -> None:
        for each in self.schema.fields:
            column = column_of(frame, each)
            if column is not None:
                self._count(each.path, column)
        if self.schema.history:
            self._count("history", frame["history"])

    def _count(self, path: str, column: pl.Series) -> None:
        if column.dtype == pl.List:
            kept = column.list.drop_nulls()
            values = kept.explode().drop_nulls()
            self.known[path] += int((kept.list.len() > 0).sum())
        else:
            values = column.drop_nans().drop_nulls() if column.dtype.is_float() else column.drop_nulls()
            self.known[path] += len(values)
        if len(self.values[path]) < 2:
            found = [*self.values[path], *map(str, values.unique().sort().head(2).to_list())]
            self.values[path] = list(dict.fromkeys(found))[:2]

    def seen(self, rows: int) -> dict[str, Seen]:
        return {
            path: Seen(known / max(rows, 1), next(iter(self.values[path]), None), len(self.values[path]) > 1)
            for path, known in self.known.items()
        }


def violations(window: Profile, past: PastLog, limits: Limits) -> list[str]:
    """Why a window should not be trained on, a sentence each; none where it may be."""
    return [
        *too_little(window.rows, window.clicks, limits, "window"),
        *_click_rate(window, past, limits),
        *_rows(window, past, limits),
        *_gone(window, past, limits),
    ]


def too_little(rows_of: Mapping[str, int], clicks_of: Mapping[str, int], enough: Enough, what: str) -> Iterable[str]:
    """Why the rows of splits, with their clicks, are too little to train on and to judge by, a sentence each; `what` they are."""
    if not rows_of:
        return
    rows, clicks = sum(rows_of.values()), sum(clicks_of.values())
    if rows < enough.least_rows:
        yield f"the {what} has {rows:,} rows, too few to judge by: least_rows is {enough.least_rows:,}"
    if clicks in (0, rows):
        yield f"all {rows:,} labels of the {what} are {int(clicks > 0)}"
        return
    if min(clicks, rows - clicks) < enough.least_clicks:
        yield f"the {what} has {clicks:,} clicks in {rows:,} rows, too few of one kind to judge by: least_clicks is {enough.least_clicks:,}"
    names = ("part to train on", "slice for early stopping", "newest slice, which is held out,")
    for split, name in zip(SPLITS, names, strict=True):
        if not rows_of[split]:
            yield f"there are no rows for the {name}".rstrip(",")
        elif clicks_of[split] in (0, rows_of[split]):
            yield f"all {rows_of[split]:,} labels of the {name} are {int(clicks_of[split] > 0)}"


def _click_rate(window: Profile, past: PastLog, limits: Limits) -> Iterable[str]:
    if not past.click_rate or not 0 < window.click_rate < 1:
        return
    times = window.click_rate / past.click_rate
    if not 1 / limits.click_rate_factor <= times <= limits.click_rate_factor:
        rates = (
            f"the click rate is {window.click_rate:.2%}, {times:.2f} times the {past.click_rate:.2%} that the live version was trained on"
        )
        yield f"{rates}; click_rate_factor allows {1 / limits.click_rate_factor:.2f} to {limits.click_rate_factor:.2f}"


def _rows(window: Profile, past: PastLog, limits: Limits) -> Iterable[str]:
    if past.rows and window.total < limits.rows_share * past.rows:
        share = window.total / past.rows
        asked = f"rows_share asks for {limits.rows_share:.0%}"
        yield f"{window.total:,} rows, {share:.0%} of the {past.rows:,} in the window of the same length before it; {asked}"
    found, whole = gaps(window.hours, limits.rows_share)
    if len(found) > limits.most_gaps * whole:
        some = ", ".join(f"{_hour(hour)} with {rows:,} rows instead of about {expected:,.0f}" for hour, rows, expected in found[:SHOWN])
        rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        allowed = f"rows_share is {limits.rows_share:.0%}, most_gaps {limits.most_gaps:.1%} of the hours"
        yield f"{len(found)} of {whole} hours have gaps: {some}{rest}; {allowed}"
    if window.duplicates > limits.most_duplicates * window.total:
        share = window.duplicates / window.total
        allowed = f"most_duplicates is {limits.most_duplicates:.2%}"
        yield f"{window.duplicates:,} rows ({share:.2%}) repeat the request and position of another; {allowed}"


def gaps(hours: Mapping[int, int], share: float) -> tuple[list[tuple[int, int, float]], int]:
    """The hours with less than that share of the rows expected, as (hour, rows, expected); and how many hours were judged.

    The first and the last hour may be cut, so they are not judged. What is expected is the median of the window's hours, or, from
    `SAME_HOURS` days on, of the same hour of its days.
    """
    whole = range(min(hours) + 1, max(hours)) if hours else range(0)
    of_day: dict[int, list[int]] = {}
    for hour in whole:
        if rows := hours.get(hour, 0):
            of_day.setdefault(hour % 24, []).append(rows)
    usual = median(rows for each in of_day.values() for rows in each) if of_day else 0.0
    found = []
    for hour in whole:
        same, rows = of_day.get(hour % 24, []), hours.get(hour, 0)
        expected = float(median(same)) if len(same) >= SAME_HOURS else float(usual)
        if rows < share * expected and expected - rows > NOISE * sqrt(expected):
            found.append((hour, rows, expected))
    return found, len(whole)


def _hour(hour: int) -> str:
    return f"{datetime.fromtimestamp(hour * HOUR, UTC):%Y-%m-%d %H:00}"


def _gone(window: Profile, past: PastLog, limits: Limits) -> Iterable[str]:
    allowed = {name.strip() for name in limits.constant.split(",")}
    for path, seen in window.fields.items():
        if not past.varied.get(path) or seen.varied or path in allowed:
            continue
        now = f"{seen.value!r} in all {seen.known:.0%} of the rows that have it" if seen.value is not None else "missing in all rows"
        yield f"{path} is {now}, and it had several values before; if that is meant, allow it with --set constant={path}"
