"""How long it takes to attribute a log, and in how much memory: `python -m benchmarks.attribution [MILLION IMPRESSIONS] [FOLDER]`.

A day of rankings of ten ads, in files of a minute as sinks write them: a fifth says nothing of what it shows, and its impressions are
reported; one entry in a hundred stands twice, as after a kill; clicks of 3 % of what was shown, some of them sent twice; a conversion of
every twentieth. Attribution runs in a process of its own. What it comes to is counted again from what was made.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.schema import parse_schema
from training.join.attributed import attribute
from training.join.attribution import EVENTS, IMPRESSIONS, RAW, WATERMARK, Attribution, hour_name
from training.join.raw import EVENT_TYPES, HOUR, LogColumns
from training.simulation import SCHEMA

ADS, HISTORY, MINUTES = 10, 20, 60
BEGIN = 1_763_769_600
"""Midnight of 22 November 2025, UTC."""
WORDS = pl.Series([f"value{i}" for i in range(200)])


def rankings(columns: LogColumns, first: int, count: int, begin: float, random: np.random.Generator) -> pl.DataFrame:
    """So many rankings within a minute."""
    since = np.sort(begin + 60 * random.random(count))
    numbers = np.arange(first, first + count)
    ads = (random.integers(0, 50_000, (count, 1)) + 4_999 * np.arange(ADS)) % 50_000  # each once in a ranking
    given = {
        "entry": pl.Series([f"{int(ts * 1000)}-{n}" for ts, n in zip(since, numbers, strict=True)]),
        "received": since,
        "since": since,
        "ts": since,
        "request_id": pl.Series([f"request-{n:032}" for n in numbers]),
        "user_id": pl.Series([f"u{n}" for n in numbers % 100_003]),
        "version": np.full(count, 20251122000000),
        "shown": np.where(numbers % 5 == 0, 0, ADS),
        "ad_id": pl.Series("", [f"a{n}" for n in ads.ravel()]).reshape((count, ADS)).arr.to_list(),
        "position": pl.Series("", np.tile(np.arange(1, ADS + 1), count)).reshape((count, ADS)).arr.to_list(),
    }
    return pl.DataFrame([column(name, dtype, given.get(name), count, random) for name, dtype in columns.impressions.items()])


def column(name: str, dtype: pl.DataType, given: Any, count: int, random: np.random.Generator) -> pl.Series:
    """A column of a file: as given, or of values drawn at random."""
    if given is not None:
        return pl.Series(name, given).cast(dtype)
    if name.startswith("tensors.") or name in ("candidates", "candidate_revisions"):
        width = ADS if name.startswith("tensors.ad_") else None
        return pl.Series(name, [None if width is None else [None] * width] * count, dtype)
    inner: Any = dtype
    per = 1
    while isinstance(inner, pl.List):
        per, inner = per * (HISTORY if name.startswith("history") else ADS if per == 1 else 1), inner.inner
    drawn = random.random(count * per)
    flat = WORDS.gather((drawn * len(WORDS)).astype(np.int64)) if inner == pl.String else pl.Series(drawn).cast(inner)
    if not isinstance(dtype, pl.List):
        return flat.alias(name)
    if isinstance(dtype.inner, pl.List):
        flat = flat.reshape((count * per, 1)).arr.to_list()
    return pl.DataFrame({"n": np.repeat(np.arange(count), per), name: flat}).group_by("n", maintain_order=True).agg(name)[name].cast(dtype)


def events(made: pl.DataFrame, random: np.random.Generator) -> tuple[pl.DataFrame, int]:
    """What came of rankings, and how many impressions were clicked."""
    shown = made.select("request_id", "user_id", "since", "shown", "ad_id", "position").explode("ad_id", "position")
    shown = shown.unique(["request_id", "ad_id"], keep="first", maintain_order=True)
    clicked = shown.filter(pl.Series(random.random(len(shown)) < 0.03))
    kinds = {"impression": shown.filter(shown=0), "click": clicked, "conversion": clicked.gather_every(20)}
    frames = []
    for wait, (kind, of) in enumerate(kinds.items(), 1):
        at = (pl.col("since") + 20.0 * wait).alias("at")
        named = pl.concat_str(pl.lit(f"{kind}-"), "request_id", "ad_id").alias("event_id")
        value = pl.lit(1.0 if kind == "conversion" else None, pl.Float64).alias("value")
        place = (pl.col("position") if kind == "impression" else pl.lit(None, pl.Int64)).alias("position")
        frames.append(of.select(at, "user_id", "request_id", "ad_id", named, value, place, type=pl.lit(kind)))
    came = pl.concat([*frames, frames[1].gather_every(50)]).with_columns(ts=pl.col("at"), received=pl.col("at") + 1, entry=pl.lit("0"))
    entries = pl.concat_str((pl.col("received") * 1000).cast(pl.Int64), pl.lit("-"), pl.int_range(pl.len()))
    return came.with_columns(entry=entries).select([pl.col(name).cast(dtype) for name, dtype in EVENT_TYPES.items()]), len(clicked)


def make(folder: Path, impressions: int) -> tuple[int, int]:
    """Make a log; how many impressions it has, and how many clicks."""
    schema, random, clicks = parse_schema(SCHEMA), np.random.default_rng(1), 0
    (folder / "schema.toml").write_text(SCHEMA)
    a_minute = impressions // ADS // (24 * MINUTES)
    for minute in range(24 * MINUTES):
        made = rankings(LogColumns(schema), minute * a_minute, a_minute, BEGIN + minute * 60.0, random)
        came, clicked = events(made, random)
        clicks += clicked
        repeated = made.gather_every(100)
        for kind, frames in ((IMPRESSIONS, (made, repeated)), (EVENTS, (came, came.gather_every(100)))):
            hour = (BEGIN + minute * 60 + (70 if kind == EVENTS else 0)) // HOUR
            path = folder / RAW / kind / hour_name(hour, "date")
            path.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(frames):
                frame.write_parquet(path / f"{minute:05}-{number}.parquet")
    (folder / RAW / WATERMARK).write_text("inf")
    return a_minute * ADS * 24 * MINUTES, clicks


def measure(log: Path, into: Path) -> None:
    """Attribute, and print the seconds and the most memory that this process has taken."""
    began = time.perf_counter()
    attribute(log, into, Attribution())
    seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "gib": usage.ru_maxrss / 2**20, "cpu": usage.ru_utime + usage.ru_stime}))


def main(million: float = 10, folder: str | None = None) -> None:
    """Make a log, attribute it on two processors, and compare what it comes to with what was made."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        log, into = Path(work) / "log", Path(work) / "into"
        log.mkdir()
        impressions, clicks = make(log, int(million * 1e6))
        size = sum(path.stat().st_size for path in log.rglob("*.parquet")) / 2**30
        command = [sys.executable, "-m", "benchmarks.attribution", "--measure", str(log), str(into)]
        found = json.loads(subprocess.run(command, env={**os.environ, "POLARS_MAX_THREADS": "2"}, capture_output=True, check=True).stdout)
        rows = pl.scan_parquet(into / "*/*/*.parquet", hive_partitioning=False)
        totals = rows.select(pl.len(), pl.col("label").cast(pl.Int64).sum(), pl.col("conversion").cast(pl.Int64).sum()).collect().row(0)
        print(
            f"{impressions:,} impressions of {size:.2f} GiB: {found['seconds']:.0f} s, {found['cpu']:.0f} s of CPU, {found['gib']:.2f} GiB"
        )
        print(f"{totals[0]:,} rows, {totals[1]:,} clicked ({clicks:,} were), {totals[2]:,} converted")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*map(Path, sys.argv[2:]))
    else:
        main(*(float(word) if number == 0 else word for number, word in enumerate(sys.argv[1:])))  # type: ignore[arg-type]
