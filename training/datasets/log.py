"""The log of what was served and what came of it (docs/log.md) as a data set: a window of time, split by time.

Its rows are those of a prepared data set and say as well which features each behaviour's ad had then, so that training encodes what
was served. Raw files are attributed once, when the log is opened, into a folder of their own: sinks may add more meanwhile.
"""

import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from features.schema import Schema

from ..join.attributed import attribute
from ..join.attribution import IMPRESSIONS, RAW, Attribution, hour_files, settings_of
from .prepared import (
    DTYPES,
    ROWS_PER_FILE,
    SHARES,
    SPLITS,
    DataError,
    Prepared,
    as_said,
    by_order,
    check_columns,
    check_rows,
    columns_of,
    open_prepared,
    read_facts,
    read_parquet,
    read_schema,
    values_as_said,
)

HOUR = 3600
SEPARATOR = "\x1f"
"""Between an ad's id and its revision."""
COLUMNS = ("label", "user_id", "ad_id", "ts", "history", "history_revisions", "known", "position")
REVISIONS = pl.List(pl.UInt64())
CONVERTED: dict[str, pl.DataType] = {"conversion": pl.Int8(), "value": pl.Float64()}


class Attributed:
    """A folder for the rows that are attributed for a reading: it is there as long as somebody holds this."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="adrank-attributed-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


Edges = tuple[float, float, float, float]


def versions_of(ad_ids: pl.Series, revisions: pl.Series) -> pl.Series:
    """The keys of ads as they were: id and revision, 0 being that of an ad that the catalogue did not have."""
    return ad_ids + SEPARATOR + revisions.cast(pl.String)


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
    edges: Edges
    position_as: str | None = None
    made: "Attributed | None" = field(default=None, compare=False)
    looked_up: ClassVar[tuple[str, ...]] = ()  # rows are whole

    def cut(self, since: int | None, until: int | None, shares: Sequence[float] = SHARES) -> "ImpressionLog":
        """A window within this one, split anew.

        Raises:
            DataError: a file is damaged, or there is no row in the window.
        """
        begin, end = -np.inf if since is None else float(since), np.inf if until is None else float(until)
        parts, edges = _cut(self.folder, [part.path for part in self.parts], begin, end, shares)
        return replace(self, parts=parts, edges=edges)

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

    def slice(self, split: str, more: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `Prepared`."""
        return self.between(*self._between(split), more)

    def sources(self, split: str) -> list[Path]:
        """See `Prepared`."""
        return [*self.files(split), *self.ads]

    @property
    def window(self) -> tuple[object, ...]:
        """See `Prepared`."""
        return (self.edges, self.position_as)

    @property
    def span(self) -> tuple[float, float]:
        """See `Prepared`."""
        return self.edges[0], self.edges[-1]

    @property
    def held_out_from(self) -> float | None:
        """See `Prepared`."""
        return self.edges[2]

    @property
    def padding(self) -> tuple[str, ...]:
        """See `Prepared`: what stands in a log was encoded."""
        return ()

    def table(self, side: str) -> pl.DataFrame | None:
        """The newest version of every ad for "ad"; None for "user", whose features are the rows' own."""
        return self.versions().unique("ad_id", keep="last", maintain_order=True).drop("key", "revision") if side == "ad" else None

    def row_columns(self, path: Path) -> set[str]:
        """See `Prepared`."""
        return {*columns_of(path), *([self.position_as] if self.position_as else [])}

    def table_columns(self, side: str) -> Collection[str]:
        """See `Prepared`."""
        return {name for path in self.ads for name in columns_of(path)} if side == "ad" else ()

    def behaviour_keys(self, frame: pl.DataFrame, kept: pl.Series) -> pl.Series:
        """See `Prepared`: behaviours as they were when the row was served."""
        revisions = frame["history_revisions"].list.tail(self.schema.history_length)
        return versions_of(kept.explode().drop_nulls(), revisions.explode().drop_nulls())

    def ids_of(self, keys: list[str]) -> list[str]:
        """See `Prepared`: of ads that the catalogue did not have."""
        parts = [key.rpartition(SEPARATOR) for key in keys]
        lost = [(ad_id, revision) for ad_id, _, revision in parts if revision != "0"]
        if lost:
            ad_id, revision = lost[0]
            raise DataError(f"{self.folder / 'ads'} lacks {len(lost)} versions of ads that rows name, the first is {revision} of {ad_id}")
        return [ad_id for ad_id, _, _ in parts]

    def known(self, frame: pl.DataFrame) -> pl.Series | None:
        """See `Prepared`."""
        return frame["known"]

    def versions(self) -> pl.DataFrame:
        """Every version of every ad: `key`, `ad_id`, `revision` and `ad.…`, those that were written last at the end.

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
            frames.append(values_as_said(frame, self.schema))
        whole = pl.concat(frames, how="diagonal").unique(["ad_id", "revision"], keep="last", maintain_order=True)
        return whole.with_columns(versions_of(whole["ad_id"], whole["revision"]).alias("key"))

    def between(self, begin: float, end: float, more: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """The rows with `begin <= ts < end`, checked, in frames of at most `ROWS_PER_FILE`; `more` names further columns.

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
        times = ("history_ts",) if self.schema.history_ages else ()
        wanted = dict.fromkeys((*COLUMNS, *times, *(field.path for field in self.schema.fields), *more))
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
        check_columns(frame, {name: dtype for name, dtype in CONVERTED.items() if name in more}, path)
        return as_said(frame.filter(pl.col("ts") >= begin, pl.col("ts") < end), self.schema)


def is_log(folder: Path) -> bool:
    """Whether a folder is a log rather than a prepared data set."""
    return not any((folder / split).is_dir() for split in SPLITS) and any((*folder.glob("day=*"), *folder.glob(RAW), *folder.glob(".join")))


def open_data(folder: Path, settings: Attribution | None = None) -> Prepared:
    """Open a prepared data set, or the whole of a log as one, attributed by these settings or its own.

    Raises:
        DataError: the folder is neither, or a log without rows.
    """
    return open_log(folder, settings=settings) if is_log(folder) else open_prepared(folder)


def open_log(
    folder: Path,
    since: int | None = None,
    until: int | None = None,
    shares: Sequence[float] = SHARES,
    position_as: str | None = None,
    settings: Attribution | None = None,
) -> ImpressionLog:
    """Open the rows of a log with `since <= ts < until`: the first share of them trains, the next validates, the last tests.

    Splits are cut by time, so that rows of one ranking stay together. `position_as` names a context field, such as
    `context.position`, that takes the position where the ad was shown: the one deliberate difference between training and serving.
    Raw files are attributed by these `settings`, or those that the log was written with.

    Raises:
        DataError: the folder is not a log, a file of it is damaged, or there is no row in the window.
    """
    schema, sampling = read_schema(folder), read_facts(folder)
    if not is_log(folder):
        raise DataError(f"{folder} is not a log: it has no folder such as day=2026-11-22; adrank join writes one")
    if position_as is not None:
        _check_position(schema, position_as)
    begin, end = -np.inf if since is None else float(since), np.inf if until is None else float(until)
    made, still_open = None, 0
    if any((folder / name).is_dir() for name in (RAW, "conversions")):
        made = Attributed()
        still_open = attribute(folder, made.path, settings or settings_of(folder), begin, end).open
    hours = hour_files(made.path if made else folder, "day")
    paths = [path for hour, files in hours.items() if (hour + 1) * HOUR > begin and hour * HOUR < end for path in files]
    try:
        parts, edges = _cut(folder, paths, begin, end, shares)
    except DataError as error:
        if not still_open:
            raise
        raise DataError(
            f"{error}; {still_open:,} rankings are open: their windows are not over, or adrank join has not written so far"
        ) from error
    ads = tuple(sorted((folder / "ads").glob("[!.]*.parquet")))  # after the rows, whose ads are written first
    # A log has everything. What a schema.toml says of sampling was once copied with the model's schema, and is none of this log's.
    return ImpressionLog(folder, schema, parts, ads, edges, position_as, made, negative_sampling=1.0 if sampling is None else sampling)


def _cut(folder: Path, paths: Sequence[Path], begin: float, end: float, shares: Sequence[float]) -> tuple[tuple[LogPart, ...], Edges]:
    """The files with rows in a window, and the times at which its splits begin."""
    times = [(path, _times(path, begin, end)) for path in paths]
    parts = tuple(LogPart(path, len(ts), float(ts.min()), float(ts.max())) for path, ts in times if len(ts))
    if not parts:
        raise DataError(f"{folder} has no row{_window(begin, end)}")
    ordered = np.sort(np.concatenate([ts for _, ts in times]))
    cuts = [float(ordered[rows.start]) if rows.start < len(ordered) else end for rows in by_order(len(ordered), shares).values()]
    if cuts[2] <= cuts[1]:  # a second with many rows, which would leave none to validate on
        after = ordered[np.searchsorted(ordered, cuts[1], "right") :]
        cuts[2] = float(after[0]) if len(after) else end
    return parts, (begin, cuts[1], cuts[2], end)


def end_of(folder: Path) -> int:
    """The end of the newest hour of a log, in seconds since 1970.

    Raises:
        DataError: a folder is no hour, or there is none.
    """
    hours = [*hour_files(folder, "day"), *hour_files(folder / RAW / IMPRESSIONS, "date")]
    if not hours:
        raise DataError(f"{folder} has no row")
    return (max(hours) + 1) * HOUR


def _window(begin: float, end: float) -> str:
    bounds = (("from", begin), ("before", end))
    bounds_text = [f"{word} {datetime.fromtimestamp(ts, UTC):%Y-%m-%d %H:%M:%S} UTC" for word, ts in bounds if np.isfinite(ts)]
    return " ".join(["", *bounds_text])


def _check_position(schema: Schema, path: str) -> None:
    field = next((field for field in schema.side("context") if field.path == path), None)
    if field is None or field.kind != "category":
        raise DataError(f"{path} cannot take the position: the schema {schema.name!r} has no context category of that name")


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
