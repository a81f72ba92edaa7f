"""Open Bandit: impressions of a fashion shop whose ads a known policy chose, as ZOZO publishes them.

The source is a folder of all.csv, one row an impression, and item_context.csv, one row an item. Rows are sorted by time; the first
80 % train, the next 10 % validate, the last 10 % test. A split may well hold no click: the log is for off-policy estimators, so
every split keeps `propensity` (Float64), the probability with which the policy showed this ad at this position.

There are no user ids. Rows with the same four hashed user features share a `user_id`, the hash of the four: a group of people, not
a person, so it is no feature and there is no history. The 80 user-item affinities are left out: one in 1,600 is not zero here,
and as columns they say nothing about the ad of the row.
"""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import polars as pl

from features.schema import parse_schema

from .prepared import Progress, by_order, silent, write_splits, write_tables, writing
from .source import Table
from .tables import read_csv

USER = tuple(f"user_feature_{i}" for i in range(4))
NUMBER, *CATEGORIES = (f"item_feature_{i}" for i in range(4))
SCHEMA = parse_schema(
    'name = "open-bandit"\n'
    + "".join(f'[user.{name}]\nkind = "category"\n' for name in USER)
    + '[context.position]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n'
    + f'[ad.{NUMBER}]\nkind = "number"\n'
    + "".join(f'[ad.{name}]\nkind = "category"\n' for name in CATEGORIES)
)


def prepare(source: Path, out: Path, progress: Progress = silent) -> dict[str, int]:
    """Prepare the folder `source` as the data set `out`; rows by split.

    Raises:
        DataError: a file is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder:
        ads = _ads(source / "item_context.csv")
        log, users = _log(source / "all.csv")
        write_tables(folder, SCHEMA, ads, users)
        return write_splits(folder, by_order(len(log)), lambda rows: log[rows.start : rows.stop], progress)


def _ads(path: Path) -> pl.DataFrame:
    table = read_csv(path, keep=("item_id", NUMBER, *CATEGORIES))
    ids = table.required("item_id")
    table.refuse("item_id", ~ids.is_first_distinct(), "an id that no earlier line has")
    categories = {f"ad.{name}": table.text(name) for name in CATEGORIES}
    return pl.DataFrame({"ad_id": ids, f"ad.{NUMBER}": table.numbers(NUMBER), **categories})


def _log(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The impressions in order of time, and the table of the groups of users."""
    table = read_csv(path, keep=("timestamp", "item_id", "position", "click", "propensity_score", *USER))
    instants = table.instants("timestamp")
    propensity = table.numbers("propensity_score")
    table.refuse("propensity_score", ~((propensity > 0) & (propensity <= 1)), "a probability above 0")
    users = _users(table)
    log = pl.DataFrame(
        {
            "label": table.labels("click"),
            "user_id": users["user_id"],
            "ad_id": table.required("item_id"),
            "ts": instants // 1_000_000,
            "context.position": table.text("position"),
            "propensity": propensity,
        }
    )
    return log[np.argsort(instants.to_numpy(), kind="stable")], users.unique("user_id", maintain_order=True)


def _users(table: Table) -> pl.DataFrame:
    """Each row's user features, and the id that is their hash."""
    features = pl.DataFrame({f"user.{name}": table.text(name) for name in USER})
    groups = features.unique(maintain_order=True)
    ids = [blake2b(repr(group).encode(), digest_size=8).hexdigest() for group in groups.rows()]
    return features.join(
        groups.with_columns(user_id=pl.Series(ids)), on=features.columns, how="left", nulls_equal=True, maintain_order="left"
    )
