"""The rows of a log, attributed and written: hour by hour, and large hours in parts, so that memory is bounded by a part.

Parts need nothing of each other. So they are made here one after the other, or wherever `run` has them made (`on_ray.py`).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import NamedTuple

import polars as pl

from ..datasets.prepared import FACTS, ROWS_PER_FILE, DataError, read_parquet, read_schema, writing
from .attribution import (
    EVENT,
    EVENTS,
    IMPRESSIONS,
    JOINED,
    ONCE,
    Attribution,
    Conversions,
    RawLog,
    conversions,
    hour_files,
    hour_name,
    labelled,
    settle,
)
from .log import FOLDER_MODE
from .raw import HOUR

RANKINGS = 100_000
"""About so many of an hour are a part."""


class HourPart(NamedTuple):
    """The rankings of an hour since 1970 whose windows began after `after`, at `upto` or before; which of the hour's parts they are."""

    hour: int
    after: float = -inf
    upto: float = inf
    number: int = 0


class Unmade(NamedTuple):
    """What made no rows."""

    open: int = 0
    """Rankings whose windows are not over, or that the log is not whole for."""
    repeated: int = 0
    """Rankings and events that came again in an hour."""


@dataclass(frozen=True)
class Maker:
    """Makes parts of a log, on any machine that sees its folders: those of a `RawLog` as it was when this was made."""

    raw: RawLog
    into: Path
    settings: Attribution
    bought: Conversions

    def __call__(self, part: HourPart) -> Unmade:
        """Write the rows of a part; written again, they are the same files.

        Raises:
            DataError: a file is damaged, or something cannot be written.
        """
        raw, begin, closed = self.raw, float(part.hour * HOUR), self.raw.watermark - self.settings.closes
        try:
            rows = labelled(raw, part.hour, self.settings, min(part.upto, closed), self.bought, part.after)
            _write(rows, self.into / hour_name(part.hour, "day"), part.number)
            rankings = raw.rankings(begin, begin, self.settings)
            still = rankings.filter(pl.col("since") > max(part.after, closed), pl.col("since") <= part.upto).unique(ONCE)
            frames = [still.select(pl.len())]
            if part.number == 0:
                frames += [rankings.select(_again(pl.struct(ONCE))), raw.events(begin, begin).select(_again(EVENT))]
            counts = [int(frame.item()) for frame in pl.collect_all(frames)]
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{raw.folder} cannot be attributed: {error}") from error
        return Unmade(counts[0], sum(counts[1:]))


Run = Callable[[Maker, list[HourPart]], Iterable[Unmade]]
"""Has parts made, and gives what each left as it is done, in any order."""


def _again(key: pl.Expr) -> pl.Expr:
    return pl.len() - key.n_unique()


def here(make: Maker, parts: list[HourPart]) -> Iterator[Unmade]:
    """One part after the other, in this process."""
    return map(make, parts)


def attribute(log: Path, into: Path, settings: Attribution, since: float = -inf, until: float = inf, run: Run = here) -> Unmade:
    """Write the rows of a log from `since` on and before `until`, in whole hours, to `into`/day=/hour=. What made none.

    Rows that a joiner of before wrote are taken as they are, with the conversions that came later.

    Raises:
        DataError: the log is damaged, or something cannot be written.
    """
    try:
        _older(log, into, settings, since, until)
        raw = RawLog(log, read_schema(log))
        hours = {
            kind: [hour for hour, paths in found.items() if paths and (hour + 1) * HOUR > since and hour * HOUR < until]
            for kind, found in raw.hours.items()
        }
        bought = conversions(raw, hours[IMPRESSIONS], settings)
        parts = [part for hour in sorted({*hours[IMPRESSIONS], *hours[EVENTS]}) for part in _parts(raw, hour)]
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{log} cannot be attributed: {error}") from error
    left = list(run(Maker(raw, into, settings, bought), parts))
    return Unmade(sum(each.open for each in left), sum(each.repeated for each in left))


def _parts(raw: RawLog, hour: int) -> list[HourPart]:
    """An hour in parts of as many minutes each."""
    rankings = raw.scan(IMPRESSIONS, hour * HOUR, hour * HOUR, ["since"]).select(pl.len()).collect().item()
    count = max(1, -(-rankings // RANKINGS))
    edges = [-inf, *(hour * HOUR + HOUR * i / count for i in range(1, count)), inf]
    return [HourPart(hour, edges[i], edges[i + 1], i) for i in range(count)]


def _write(rows: pl.DataFrame, folder: Path, part: int) -> None:
    for number, piece in enumerate(rows.iter_slices(ROWS_PER_FILE) if len(rows) else ()):
        folder.mkdir(parents=True, exist_ok=True)
        piece.write_parquet(folder / f"raw-{part:05}-{number:05}.parquet", compression="lz4")


class Totals(NamedTuple):
    """What `write_attributed` has written, and what made no rows."""

    impressions: int
    clicks: int
    conversions: int
    unmade: Unmade


def write_attributed(log: Path, out: Path, settings: Attribution, run: Run = here) -> Totals:
    """Write the rows of a log into a new folder, which is a log itself: whoever reads it has nothing to attribute.

    Raises:
        DataError: the log is damaged, has no rows, or `out` exists or cannot be written; nothing is then.
    """
    with writing(out, FOLDER_MODE) as staging:
        unmade = attribute(log.absolute(), staging.absolute(), settings, run=run)
        for link in [path for path in staging.glob("day=*/hour=*/*") if path.is_symlink()]:
            target = link.resolve()
            link.unlink()
            shutil.copyfile(target, link)
        if not (files := list(staging.glob("day=*/hour=*/*.parquet"))):
            raise DataError(f"{log} has no rows; {unmade.open:,} rankings are open: their windows are not over, or not all is written yet")
        for name in ("schema.toml", FACTS):
            if (log / name).exists():
                shutil.copyfile(log / name, staging / name)
        if (log / "ads").is_dir():  # after the rows, whose ads are written first
            shutil.copytree(log / "ads", staging / "ads", ignore=shutil.ignore_patterns(".*"))
        sums = (pl.col(name).cast(pl.Int64).sum() for name in ("label", "conversion"))
        counted = pl.scan_parquet(files, hive_partitioning=False).select(pl.len(), *sums).collect(engine="streaming")
        impressions, clicks, bought = counted.row(0)
    return Totals(impressions, clicks, bought, unmade)


def _older(log: Path, into: Path, settings: Attribution, since: float, until: float) -> None:
    """Rows of the layout of before, which had its conversions beside them."""
    paths = {h: found for h, found in hour_files(log, "day").items() if (h + 1) * HOUR > since and h * HOUR < until}
    keys = ("request_id", "ad_id", "user_id", "ts")
    later = [read_parquet(path, ["event_id", "value", *keys]) for path in sorted((log / "conversions").glob("[!.]*.parquet"))]
    bought = None
    if later and paths:
        events = pl.concat(later).filter(pl.col("request_id") != "").with_row_index("entry").lazy()
        events = events.with_columns(
            pl.col("entry").cast(pl.String), type=pl.lit("conversion"), at="ts", received="ts", position=pl.lit(None)
        )
        rows = [read_parquet(path, keys).with_columns(_entry(path), since=pl.col("ts")) for found in paths.values() for path in found]
        listed = pl.concat(rows).lazy().with_columns(pl.col("since").cast(pl.Float64), pl.concat_list("ad_id"), counted=1)
        joined = settle(events, listed, settings).filter(outcome=JOINED)
        bought = joined.group_by("entry").agg(more=pl.col("value").fill_null(0.0).sum()).collect()
    for hour, found in paths.items():
        folder = into / hour_name(hour, "day")
        folder.mkdir(parents=True, exist_ok=True)
        for path in found:
            if bought is None:
                (folder / path.name).symlink_to(path.resolve())
                continue
            frame = read_parquet(path).with_columns(_entry(path)).join(bought, on="entry", how="left", maintain_order="left")
            value = pl.when(pl.col("more").is_null()).then("value").otherwise(pl.col("value").fill_null(0.0) + pl.col("more"))
            converted = (pl.col("more").is_not_null() | (pl.col("conversion") == 1)).cast(pl.Int8)
            frame.with_columns(value.alias("value"), converted.alias("conversion")).drop("entry", "more").write_parquet(folder / path.name)


def _entry(path: Path) -> pl.Expr:
    """A name for each row of a file."""
    return pl.concat_str(pl.lit(f"{path}:"), pl.int_range(pl.len())).alias("entry")
