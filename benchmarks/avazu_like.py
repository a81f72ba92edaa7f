"""A click log such as Avazu's, drawn from a known model: 21 categories, 17 % clicks, ids so heavy-tailed that many are seen once.

python -m benchmarks.avazu_like data/avazu-like --rows 60000
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl

from features.schema import parse_schema
from training.datasets.history import Past
from training.datasets.prepared import by_order, write_splits, write_tables, writing

Array = np.ndarray[Any, np.dtype[Any]]
CLICK_RATE = 0.17
START = 1_413_849_600  # 2014-10-21, UTC
DAYS, DAY = 10, 86_400
USER = {"device_model": 3_000, "device_type": 4, "device_conn_type": 4}
CONTEXT = {"hour": 24, "banner_pos": 7, "site_id": 2_000, "site_domain": 1_500, "site_category": 20}
CONTEXT |= {"app_id": 2_000, "app_domain": 200, "app_category": 25, "C1": 7}
AD = {"C15": 8, "C16": 9, "C17": 400, "C18": 4, "C19": 60, "C20": 160, "C21": 60}
"""Fields and how many values each may have."""
ADS, USERS = 4_000, 60_000
TAIL = 1.1
"""The exponent of Zipf's law that ids are drawn by."""
EFFECT = 0.35
"""Deviation of what a value adds to the log-odds."""
TABLES = {"user": USER, "context": CONTEXT, "ad": AD}
SCHEMA = parse_schema(
    'name = "avazu-like"\nhistory = { length = 20, fields = ["ad_id", "C17"] }\n'
    '[user]\nuser_id = { kind = "category" }\n[ad]\nad_id = { kind = "category" }\n'
    + "".join(f'[{side}.{name}]\nkind = "category"\n' for side, fields in TABLES.items() for name in fields)
)


def write_log(out: Path, rows: int, seed: int = 1) -> dict[str, int]:
    """Draw `rows` impressions and write them as a prepared data set; rows by split.

    Raises:
        DataError: `out` exists already, or a split would be empty.
    """
    random = np.random.default_rng(seed)
    user, ad = _zipf(random, USERS, rows), _zipf(random, ADS, rows)
    # What belongs to a user or an ad is drawn once for each, what belongs to the context for each row.
    values = {f"user.{name}": _zipf(random, size, USERS)[user] for name, size in USER.items()}
    values |= {f"context.{name}": _zipf(random, size, rows) for name, size in CONTEXT.items()}
    values |= {f"ad.{name}": _zipf(random, size, ADS)[ad] for name, size in AD.items()}
    logits = sum((random.normal(0, EFFECT, column.max() + 1)[column] for column in (user, ad, *values.values())), np.zeros(rows))
    click = random.random(rows) < 1 / (1 + np.exp(-(logits + _base(logits))))
    seconds = np.sort(random.integers(0, DAYS * DAY, rows))
    ids = {"user_id": [f"u{i}" for i in user], "ad_id": [f"a{i}" for i in ad]}
    log = pl.DataFrame(
        {"label": click.astype(np.int8), **ids, "ts": seconds + START}
        | {path: pl.Series(column).cast(pl.String) for path, column in values.items()}
    )
    past = Past(log.select("label", "user_id", "ad_id", "ts"), SCHEMA.history_length)
    with writing(out) as folder:
        tables = {side: log.select(f"{side}_id", f"^{side}\\..*$").unique(f"{side}_id", keep="last") for side in ("user", "ad")}
        write_tables(folder, SCHEMA, tables["ad"], tables["user"])
        return write_splits(
            folder,
            by_order(rows),
            lambda part: log[part.start : part.stop].with_columns(history=past.histories(slice(part.start, part.stop))),
        )


def _zipf(random: np.random.Generator, size: int, count: int) -> Array:
    """Values below `size`, the first ones far more often."""
    weights = np.arange(1, size + 1) ** -TAIL
    return random.choice(size, count, p=weights / weights.sum())


def _base(logits: Array) -> float:
    """What to add to log-odds for the click rate that is wanted, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-(logits + middle)))).mean() < CLICK_RATE else (low, middle)
    return low


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--rows", type=click.IntRange(min=100), default=60_000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def main(out: Path, rows: int, seed: int) -> None:
    """Write such a log as a prepared data set."""
    print(f"{out}: " + ", ".join(f"{split} {count:,}" for split, count in write_log(out, rows, seed).items()) + " rows")


if __name__ == "__main__":
    main()
