"""A small log of a shop whose clicks follow the ad, its genre and the user's age, hour by hour. For tests of retraining."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import small
from logs import TYPES, revision

from features.state import pack_features

START = 1_763_769_600  # 2025-11-22 00:00 UTC
HOURS, ROWS = 40, 45
"""Of the log, and of each hour."""
QUICK = {
    "epochs": "1",
    "batch": "128",
    "learning_rate": "0.02",
    "embedding_l2": "0.0001",
    "threads": "1",
    "unknown_rate": "0",
    "report": "false",
}
NETWORK = {"embedding": "4", "hidden": "8", "dropout": "0.0"}


def hours_of(folder: Path) -> list[Path]:
    """The files of the log, in order of time."""
    return sorted(folder.glob("day=*/hour=*/*.parquet"))


def rewrite(folder: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Path:
    """Change every file of the log."""
    for path in hours_of(folder):
        change(pl.read_parquet(path)).write_parquet(path)
    return folder


def write(folder: Path, hours: int = HOURS, rows: int = ROWS, ads: int = small.ADS, seed: int = 0, version: int = 1) -> Path:
    """Write the log, the ads `a0` to `a{ads - 1}` shown by `din` of a version."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.toml").write_text(small.SCHEMA)
    features = {f"a{ad}": small.ad_features(ad) for ad in range(ads)}
    revisions = {ad_id: revision(pack_features(each)) for ad_id, each in features.items()}
    kinds = {"ad.genre": pl.String(), "ad.tags": pl.List(pl.String()), "ad.price": pl.Float64()}
    table = [{"ad_id": ad_id, "revision": revisions[ad_id], **{f"ad.{k}": v for k, v in f.items()}} for ad_id, f in features.items()]
    (folder / "ads").mkdir(exist_ok=True)
    pl.DataFrame(table, schema={"ad_id": pl.String(), "revision": pl.UInt64(), **kinds}).write_parquet(folder / "ads" / "0.parquet")
    for hour in range(hours):
        frame = small.rows_of(random, rows, ads).with_columns(
            ts=START + 3600.0 * hour + np.sort(random.random(rows)) * 3600,
            request_id=pl.Series([f"r{hour}-{i // 3}" for i in range(rows)]),
            position=pl.Series([i % 3 + 1 for i in range(rows)], dtype=pl.Int64),
            model=pl.lit("din"),
            version=pl.lit(version, pl.Int64),
            known=pl.lit(True),
        )
        inline = pl.DataFrame([{f"ad.{k}": v for k, v in features[ad_id].items()} for ad_id in frame["ad_id"]], schema=kinds)
        past = pl.Series([[revisions.get(ad, 0) for ad in history] for history in frame["history"]], dtype=pl.List(pl.UInt64))
        whole = frame.hstack(inline).with_columns(history_revisions=past)
        day = folder / f"{datetime.fromtimestamp(START + 3600 * hour, UTC):day=%Y-%m-%d/hour=%H}"
        day.mkdir(parents=True, exist_ok=True)
        whole.with_columns(pl.col(name).cast(TYPES[name]) for name in whole.columns if name in TYPES).write_parquet(day / "0.parquet")
    return folder
