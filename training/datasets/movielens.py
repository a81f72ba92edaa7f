"""MovieLens-1M as a click log: ratings.dat, users.dat and movies.dat, as GroupLens ships them.

The protocol: rows sorted by (time, file order); a rating of 4 or more is a click; a row's history is the same user's earlier
clicked movies, at most 50; the first 80 % of the rows train, the next 10 % validate, the last 10 % test. A rating of a movie or
by a user that the tables do not list is a row like any other; the ad or the user then has no features. A rating of 5 is a conversion too,
for networks with that head.
"""

from pathlib import Path

import numpy as np
import polars as pl

from features.schema import parse_schema

from .files import one_file
from .history import Past
from .prepared import Progress, by_order, silent, write_splits, write_table, write_tables, writing
from .source import Table
from .tables import read_lines
from .times import LATEST

SEPARATOR = "::"
CLICK, CONVERSION = 4, 5
LARGEST_ID = 2**53
SCHEMA = parse_schema("""
name = "movielens"
history = { length = 50, fields = ["ad_id", "genres"] }
[user]
user_id = { kind = "category" }
gender = { kind = "category" }
age = { kind = "category" }
occupation = { kind = "category" }
[ad]
ad_id = { kind = "category" }
genres = { kind = "list", length = 6 }
year = { kind = "category" }
""")


def prepare(source: Path, out: Path, progress: Progress = silent) -> dict[str, int]:
    """Prepare the folder `source` as the data set `out`; rows by split.

    Raises:
        DataError: a file is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder:
        users, ads = _users(source / "users.dat"), _ads(source / "movies.dat")
        log = _log(source / "ratings.dat")
        past = Past(log, SCHEMA.history_length)

        def frame(rows: range) -> pl.DataFrame:
            part = slice(rows.start, rows.stop)
            return log[part].with_columns(**past.columns(part))

        write_tables(folder, SCHEMA, ads, users)
        write_table(folder, "histories", past.after())
        return write_splits(folder, by_order(len(log)), frame, progress)


def _log(path: Path) -> pl.DataFrame:
    """The ratings as label, conversion, user_id, ad_id and ts, in order of time."""
    table = read_lines(path, SEPARATOR, ("user_id", "ad_id", "rating", "ts"))
    ratings = table.whole("rating", 1, 5)
    columns = {
        "label": (ratings >= CLICK).cast(pl.Int8),
        "conversion": (ratings >= CONVERSION).cast(pl.Int8),
        "user_id": _ids(table, "user_id"),
        "ad_id": _ids(table, "ad_id"),
        "ts": table.whole("ts", 0, LATEST),
    }
    order = np.argsort(columns["ts"].to_numpy(), kind="stable")
    return pl.DataFrame(columns)[order]


def _users(path: Path) -> pl.DataFrame:
    table = read_lines(path, SEPARATOR, ("user_id", "gender", "age", "occupation", "zip"))
    features = {f"user.{name}": table.text(name) for name in ("gender", "age", "occupation")}
    return pl.DataFrame({"user_id": _keys(table, "user_id"), **features})


def _ads(path: Path) -> pl.DataFrame:
    table = read_lines(path, SEPARATOR, ("ad_id", "title", "genres"), _encoding(path))
    years = table.text("title").str.extract(r"\((\d{4})\)\s*$")
    return pl.DataFrame({"ad_id": _keys(table, "ad_id"), "ad.genres": table.lists("genres", "|"), "ad.year": years})


def _encoding(path: Path) -> str:
    """Latin 1, as GroupLens ships it, or UTF-8, as others pass it on."""
    return "latin-1" if one_file(path).undecodable("utf-8") else "utf-8"


def _ids(table: Table, name: str) -> pl.Series:
    return table.whole(name, 0, LARGEST_ID).cast(pl.String)


def _keys(table: Table, name: str) -> pl.Series:
    ids = _ids(table, name)
    table.refuse(name, ~ids.is_first_distinct(), "an id that no earlier line has")
    return ids
