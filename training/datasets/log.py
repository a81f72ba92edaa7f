"""The log of what was served and what came of it (docs/log.md) as a data set: a window of time, split by time.

Its rows are those of a prepared data set and say as well which features each behaviour's ad had then, so that training encodes what
was served. Files are listed once, when the log is opened: the joiner may add more meanwhile.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl

from features.schema import Schema

from .prepared import (
    DTYPES,
    ROWS_PER_FILE,
    SHARES,
    SPLITS,
    DataError,
    Prepared,
    by_order,
    check_columns,
    check_rows,
    columns_of,
    open_prepared,
    read_facts,
    read_parquet,
    read_schema,
    without_nobody,
)
from .texts import plain_values

HOUR = 3600
COLUMNS = ("label", "user_id", "ad_id", "ts", "history", "history_revisions", "known", "position")
REVISIONS = pl.List(pl.UInt64())
SKEW_SECONDS = 60.0
"""A conversion may seem older than its ranking by so much: the clocks of callers differ."""
CONVERTED = ("conversion", "value")
KEYS = ("request_id", "ad_id", "user_id")
CONVERSIONS = {"event_id": pl.String(), "request_id": pl.String(), "ad_id": pl.String(), "user_id": pl.String()} | dict.fromkeys(
    ("ts", "value", "window"), pl.Float64()
)


@dataclass(frozen=True)
class LogPart:
    """A file of the log: how many rows of it lie in the window, from when to when."""

    path: Path
    rows: int
    first: float
    last: float


@dataclass(frozen=True)
class ImpressionLog(Prepared):
    """A window of a log. `edges` are the times at which the window begins, valid begins, test begins, and the window ends."""

    parts: tuple[LogPart, ...]
    ads: tuple[Path, ...]
    edges: tuple[float, float, float, float]
    position_as: str | None = None
    later: tuple[Path, ...] = ()
    """The files of conversions that came after their rows were written."""

    def files(self, split: str) -> list[Path]:
        """See `Prepared`: in order of time, and each perhaps with rows of other splits."""
        begin, end = self._between(split)
        files = self._files(begin, end)
        if not files:
            raise DataError(f"the {split} split of {self.folder} is empty: the window has too few rows, or too many of one moment")
        return files

    def frames(self, split: str, more: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """See `Prepared`; what training has no use for is left out, but for `more`."""
        self.files(split)
        return self.between(*self._between(split), more)

    def table(self, side: str) -> pl.DataFrame | None:
        """The newest version of every ad for "ad"; None for "user", whose features are the rows' own."""
        return self.versions().unique("ad_id", keep="last", maintain_order=True).drop("revision") if side == "ad" else None

    def versions(self) -> pl.DataFrame:
        """Every version of every ad: `ad_id`, `revision` and `ad.…`, those that were written last at the end.

        Raises:
            DataError: a file is damaged.
        """
        fields = [field for field in self.schema.side("ad") if field.name != "ad_id"]
        dtypes = {"ad_id": pl.String(), "revision": pl.UInt64()} | {field.path: DTYPES[field.kind] for field in fields}
        frames = [pl.DataFrame(schema={name: dtypes[name] for name in ("ad_id", "revision")})]
        for path in self.ads:
            present = set(columns_of(path))
            frame = read_parquet(path, [name for name in dtypes if name in present])
            check_columns(frame, {name: dtype for name, dtype in dtypes.items() if not name.startswith("ad.") or name in present}, path)
            frames.append(plain_values(frame))
        return pl.concat(frames, how="diagonal").unique(["ad_id", "revision"], keep="last", maintain_order=True)

    @cached_property
    def converted(self) -> pl.DataFrame:
        """What conversions that came after their rows were written add to the rows of the window, as `attributed` says.

        Raises:
            DataError: a file is damaged.
        """
        frames = [pl.DataFrame(schema=CONVERSIONS)]
        for path in self.later:
            frames.append(read_parquet(path, list(CONVERSIONS)))
            check_columns(frames[-1], CONVERSIONS, path)
        later = pl.concat(frames)
        kept = [pl.DataFrame(schema={"file": pl.String, "row": pl.UInt32, **dict.fromkeys(KEYS, pl.String), "ts": pl.Float64})]
        for path in self._files(*self.edges[:: len(self.edges) - 1]) if len(later) else []:
            keys = read_parquet(path, [*KEYS, "ts"]).with_columns(pl.col("ts").cast(pl.Float64)).with_row_index("row")
            check_columns(keys, dict.fromkeys(KEYS, pl.String()), path)
            kept.append(keys.join(later, on="request_id", how="semi").select(pl.lit(str(path)).alias("file"), "row", *KEYS, "ts"))
        return attributed(pl.concat(kept), later)

    def between(self, begin: float, end: float, more: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """The rows with `begin <= ts < end`, checked, in frames of at most `ROWS_PER_FILE`; `more` names further columns.

        `conversion` and `value` among them are as of all conversions that are known by now.

        Raises:
            DataError: a file cannot be read, lacks a column, or holds a label that is not 0 or 1.
        """
        begin, end = max(begin, self.edges[0]), min(end, self.edges[-1])
        return _pieces(self._read(path, begin, end, more) for path in self._files(begin, end))

    def hours(self, rows: pl.Expr, more: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Those `rows` of each hour of the window in one frame, so that rankings are whole; raises as `between` does."""
        for _, parts in groupby(self.parts, key=lambda part: part.path.parent):
            yield pl.concat([self._read(part.path, self.edges[0], self.edges[-1], more).filter(rows) for part in parts], how="diagonal")

    def _between(self, split: str) -> tuple[float, float]:
        number = SPLITS.index(split)
        return self.edges[number], self.edges[number + 1]

    def _files(self, begin: float, end: float) -> list[Path]:
        return [part.path for part in self.parts if part.last >= begin and part.first < end] if begin < end else []

    def _read(self, path: Path, begin: float, end: float, more: Sequence[str]) -> pl.DataFrame:
        present = set(columns_of(path))
        converted = CONVERTED if any(name in CONVERTED for name in more) else ()
        times = ("history_ts",) if self.schema.history_ages else ()
        wanted = dict.fromkeys((*COLUMNS, *times, *(field.path for field in self.schema.fields), *more, *converted))
        frame = read_parquet(path, [name for name in wanted if name in present])
        check_rows(frame, self.schema, path)
        check_columns(frame, {"known": pl.Boolean(), "history": pl.List(pl.String()), "history_revisions": REVISIONS}, path)
        ids, revisions = (frame[name].fill_null([]).list for name in ("history", "history_revisions"))
        whole = [ids.len(), ids.drop_nulls().list.len(), revisions.drop_nulls().list.len()]
        if any((lengths != revisions.len()).any() for lengths in whole):
            raise DataError(f"{path}: history and history_revisions differ in length, or have gaps")
        if self.position_as is not None:
            check_columns(frame, {"position": pl.Int64()}, path)
            frame = frame.with_columns(pl.col("position").cast(pl.String).alias(self.position_as))
        if converted:
            check_columns(frame, {"conversion": pl.Int8(), "value": pl.Float64()}, path)
            frame = with_later(frame.with_row_index("row"), self.converted.filter(file=str(path))).drop("row")
        return without_nobody(plain_values(frame.filter(pl.col("ts") >= begin, pl.col("ts") < end)), self.schema)


def attributed(rows: pl.DataFrame, later: pl.DataFrame) -> pl.DataFrame:
    """What conversions of `conversions/` add to rows of the log: `file`, `row` and `more`, the sum of their values, a row each.

    `rows` has `file`, `row`, `request_id`, `ad_id`, `user_id` and `ts`. Request, ad and, where the conversion names one, user agree, and
    it is no later than its window after the ranking. Where a request id was used again, it belongs to the newest ranking before it, or
    else to the first one soon after it.
    """
    named = later.filter(pl.col("request_id") != "").unique(["request_id", "event_id"], keep="first", maintain_order=True)
    gap, of = pl.col("ts_later") - pl.col("ts"), pl.col("user_id_later")
    pairs = rows.join(named, on=["request_id", "ad_id"], suffix="_later").filter(
        (of == "") | (of == pl.col("user_id")), gap.is_between(-SKEW_SECONDS, pl.col("window"))
    )
    nearest = pairs.sort(gap < 0, gap.abs(), "file", "row").unique(["request_id", "event_id"], keep="first", maintain_order=True)
    return nearest.group_by("file", "row").agg(pl.col("value").fill_null(0.0).sum().alias("more"))


def with_later(rows: pl.DataFrame, more: pl.DataFrame) -> pl.DataFrame:
    """Rows of one file with `row`, and `conversion` and `value` as of what `attributed` found of it too."""
    found = rows.join(more.select("row", "more"), on="row", how="left", maintain_order="left")
    converted = pl.col("more").is_not_null()
    return found.with_columns(
        pl.when(converted).then(pl.lit(1, pl.Int8)).otherwise(pl.col("conversion")).alias("conversion"),
        pl.when(converted).then(pl.col("value").fill_null(0.0) + pl.col("more")).otherwise(pl.col("value")).alias("value"),
    ).drop("more")


def is_log(folder: Path) -> bool:
    """Whether a folder is a log rather than a prepared data set."""
    return not any((folder / split).is_dir() for split in SPLITS) and any((*folder.glob("day=*"), *folder.glob(".join")))


def open_data(folder: Path) -> Prepared:
    """Open a prepared data set, or the whole of a log as one.

    Raises:
        DataError: the folder is neither, or a log without rows.
    """
    return open_log(folder) if is_log(folder) else open_prepared(folder)


def open_log(
    folder: Path,
    since: int | None = None,
    until: int | None = None,
    shares: Sequence[float] = SHARES,
    position_as: str | None = None,
) -> ImpressionLog:
    """Open the rows of a log with `since <= ts < until`: the first share of them trains, the next validates, the last tests.

    Splits are cut by time, so that rows of one ranking stay together. `position_as` names a context field, such as
    `context.position`, that takes the position where the ad was shown: the one deliberate difference between training and serving.

    Raises:
        DataError: the folder is not a log, a file of it is damaged, or there is no row in the window.
    """
    schema, _ = read_schema(folder)
    sampling = read_facts(folder)
    if not is_log(folder):
        raise DataError(f"{folder} is not a log: it has no folder such as day=2026-11-22; adrank join writes one")
    if position_as is not None:
        _check_position(schema, position_as)
    begin, end = -np.inf if since is None else float(since), np.inf if until is None else float(until)
    paths = _partitions(folder, begin, end)
    ads = tuple(_parquets(folder / "ads"))  # after the rows, whose ads the joiner writes first
    times = [(path, _times(path, begin, end)) for path in paths]
    parts = tuple(LogPart(path, len(ts), float(ts.min()), float(ts.max())) for path, ts in times if len(ts))
    if not parts:
        raise DataError(f"{folder} has no row{_window(since, until)}")
    ordered = np.sort(np.concatenate([ts for _, ts in times]))
    cuts = [float(ordered[rows.start]) if rows.start < len(ordered) else end for rows in by_order(len(ordered), shares).values()]
    if cuts[2] <= cuts[1]:  # a second with many rows, which would leave none to validate on
        after = ordered[np.searchsorted(ordered, cuts[1], "right") :]
        cuts[2] = float(after[0]) if len(after) else end
    later, edges = tuple(_parquets(folder / "conversions")), (begin, cuts[1], cuts[2], end)
    # The joiner keeps everything. What a schema.toml says of sampling was once copied with the model's schema, and is none of this log's.
    share = 1.0 if sampling is None else sampling
    return ImpressionLog(folder, schema, parts, ads, edges, position_as, later, negative_sampling=share)


def _window(since: int | None, until: int | None) -> str:
    told = [f"{word} {datetime.fromtimestamp(ts, UTC):%Y-%m-%d %H:%M:%S} UTC" for word, ts in (("from", since), ("before", until)) if ts]
    return " ".join(["", *told])


def _check_position(schema: Schema, path: str) -> None:
    field = next((field for field in schema.side("context") if field.path == path), None)
    if field is None or field.kind != "category":
        raise DataError(f"{path} cannot take the position: the schema {schema.name!r} has no context category of that name")


def _partitions(folder: Path, begin: float, end: float) -> list[Path]:
    """The files of the hours that meet the window, in order of time."""
    hours = sorted((_hour(path), path) for path in folder.glob("day=*/hour=*"))
    return [file for hour, path in hours if hour + HOUR > begin and hour < end for file in _parquets(path)]


def _hour(path: Path) -> float:
    try:
        return datetime.strptime(f"{path.parent.name} {path.name} +0000", "day=%Y-%m-%d hour=%H %z").timestamp()
    except ValueError as error:
        raise DataError(f"{path} is not an hour of a log, such as day=2026-11-22/hour=17") from error


def _parquets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def _times(path: Path, begin: float, end: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The times of a file's rows that lie in the window."""
    present = columns_of(path)
    if "ts" not in present:
        raise DataError(f"{path}: column ts is missing; it has {', '.join(present)}")
    ts = read_parquet(path, ["ts"])["ts"]
    if not ts.dtype.is_numeric() or ts.has_nulls() or not ts.is_finite().all():
        raise DataError(f"{path}: column ts holds something that is no time")
    times = ts.to_numpy().astype(np.float64)
    return times[(times >= begin) & (times < end)]


def _pieces(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The frames' rows in frames of about `ROWS_PER_FILE`: a joiner that writes often leaves many small files."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        if held and sum(map(len, held)) + len(frame) > ROWS_PER_FILE:
            yield pl.concat(held, how="diagonal")
            held = []
        *whole, rest = frame.iter_slices(ROWS_PER_FILE) if len(frame) else [frame]
        yield from whole
        held.append(rest)
    if held:
        yield pl.concat(held, how="diagonal")
