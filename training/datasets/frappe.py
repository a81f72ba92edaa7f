"""Frappe: uses of mobile apps in context, in the form that BARS publishes as Frappe_x1, with its given splits.

The source is a folder of train.csv, valid.csv and test.csv. There are no times and no histories. `cost` belongs to the context:
an item occurs with several costs, so it is no property of the ad.
"""

from itertools import accumulate
from pathlib import Path

import polars as pl

from features.schema import parse_schema

from .prepared import SPLITS, Progress, silent, write_splits, write_tables, writing
from .tables import read_csv

CONTEXT = ("daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
SCHEMA = parse_schema(
    'name = "frappe"\n[user.user_id]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n'
    + "".join(f'[context.{name}]\nkind = "category"\n' for name in CONTEXT)
)


def prepare(source: Path, out: Path, progress: Progress = silent) -> dict[str, int]:
    """Prepare the folder `source` as the data set `out`; rows by split.

    Raises:
        DataError: a file is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder:
        parts = [_rows(source / f"{split}.csv") for split in SPLITS]
        log = pl.concat(parts)
        ends = [0, *accumulate(map(len, parts))]
        splits = {split: range(*ends[i : i + 2]) for i, split in enumerate(SPLITS)}
        write_tables(folder, SCHEMA, log.select(pl.col("ad_id").unique(maintain_order=True)))
        return write_splits(folder, splits, lambda rows: log[rows.start : rows.stop], progress)


def _rows(path: Path) -> pl.DataFrame:
    table = read_csv(path, keep=("label", "user", "item", *CONTEXT))
    ids = {f"{side}_id": table.required(name) for side, name in (("user", "user"), ("ad", "item"))}
    return pl.DataFrame({"label": table.labels("label"), **ids, **{f"context.{name}": table.text(name) for name in CONTEXT}})
