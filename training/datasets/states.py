"""What a store is filled with from a prepared data set: every user and every ad as of after the whole log, with what is counted of them.

Knows a store only by its protocol. One file of the data set is held at a time.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from features.encode import Features, FieldError, Value, clean
from features.schema import IDENTITY, Field, Schema, Side
from features.state import Ad, UserState

from .counters import CountsAtEnd, counts_at_end
from .prepared import ROWS_PER_FILE, SPLITS, DataError, Prepared, as_said, column_of, columns_of, read_parquet

Behaviours = tuple[list[str], list[int]]


def ads(prepared: Prepared) -> Iterator[Ad]:
    """Every ad of `ads.parquet`; none where the data set has no such table.

    Raises:
        DataError: the table cannot be read, or a value does not fit its field.
    """
    table = prepared.table("ad")
    if table is not None:
        counted = _counted(prepared, "ad")
        for part in table.iter_slices(ROWS_PER_FILE):
            ad_ids = part["ad_id"].to_list()
            for ad_id, known, counts in zip(ad_ids, _features(prepared.schema, "ad", [part]), counted.of(ad_ids), strict=True):
                yield Ad(ad_id, known, counts=counts)


def user_states(prepared: Prepared) -> Iterator[tuple[str, UserState]]:
    """Every user of the log with features and history as of after its last row, by time where rows have one.

    Features come from `users.parquet`, what is missing there from the user's last row; histories from `histories.parquet`, or else
    from the last row, with its ad if that was clicked.

    Raises:
        DataError: the data set cannot be read, or a value does not fit its field.
    """
    users, histories, counted = prepared.table("user"), prepared.histories(), _counted(prepared, "user")
    is_last = _last_rows(prepared)
    start = 0
    for split in SPLITS:
        for frame in prepared.frames(split):
            rows = frame.filter(is_last[start : start + len(frame)])
            start += len(frame)
            features = _features(prepared.schema, "user", [_beside(rows, users), rows])
            behaviours = _behaviours(prepared.schema, rows, histories)
            user_ids = rows["user_id"].to_list()
            for user_id, known, (ad_ids, ts), counts in zip(user_ids, features, behaviours, counted.of(user_ids), strict=True):
                yield user_id, UserState(known, ad_ids, ts, counts=counts)


def newest_time(prepared: Prepared) -> int | None:
    """The newest time of the log's rows, in seconds since 1970, at most now; None where it has no times.

    Raises:
        DataError: a file cannot be read.
    """
    newest = [_newest(path) for split in SPLITS for path in prepared.files(split) if "ts" in columns_of(path)]
    known = [ts for ts in newest if ts]
    return min(max(known), int(time.time())) if known else None


def _newest(path: Path) -> int | None:
    newest = read_parquet(path, ["ts"])["ts"].max()
    if newest is not None and not isinstance(newest, int | float):
        raise DataError(f"{path}: column ts has no times in seconds")
    return None if newest is None else int(newest)


def _counted(prepared: Prepared, side: Side) -> CountsAtEnd:
    end = newest_time(prepared) if prepared.schema.counters else None
    return counts_at_end(prepared, side, end or 0)


def _last_rows(prepared: Prepared) -> pl.Series:
    """Whether each row of the log is its user's last; a user "" is nobody."""
    paths = [path for split in SPLITS for path in prepared.files(split)]
    keys = pl.concat((as_said(_keys(path), prepared.schema) for path in paths), how="diagonal").with_row_index("row")
    ordered = keys.sort("ts", maintain_order=True) if "ts" in keys.columns else keys
    last = ordered.unique("user_id", keep="last").filter(pl.col("user_id") != "")["row"]
    is_last = np.zeros(len(keys), np.bool_)
    is_last[last.to_numpy()] = True
    return pl.Series(is_last)


def _keys(path: Path) -> pl.DataFrame:
    return read_parquet(path, [name for name in ("user_id", "ts") if name in columns_of(path)])


def _beside(rows: pl.DataFrame, table: pl.DataFrame | None) -> pl.DataFrame:
    """The rows of a table of users that belong to the rows of a log."""
    users = rows.select("user_id")
    return users if table is None else users.join(table, on="user_id", how="left", maintain_order="left")


def _features(schema: Schema, side: Side, frames: Sequence[pl.DataFrame]) -> list[Features]:
    """The features of each row, from the first frame that has them; what is missing is left out."""
    columns: list[tuple[Field, list[Value]]] = []
    for field in schema.told.side(side):
        found = [column for frame in frames if (column := column_of(frame, field)) is not None]
        if not found and field.name not in IDENTITY.values():
            where = "neither users.parquet nor the rows hold" if side == "user" else "ads.parquet does not hold"
            raise DataError(f"{where} {field.path}, which the schema {schema.name!r} has: the service would rank without it")
        if found and field.name not in IDENTITY.values():
            known = pl.DataFrame([column.alias(str(i)) for i, column in enumerate(found)]).select(pl.coalesce(pl.all()).alias("known"))
            columns.append((field, (known["known"].fill_nan(None) if field.kind == "number" else known["known"]).to_list()))
    try:
        return [
            {field.name: clean(field, values[row]) for field, values in columns if values[row] is not None} for row in range(len(frames[0]))
        ]
    except FieldError as error:
        raise DataError(f"a value of the data set does not fit its field: {error}") from error


def _behaviours(schema: Schema, rows: pl.DataFrame, histories: pl.DataFrame | None) -> Iterator[Behaviours]:
    """Each row's behaviours after it, and their times; 0 where the log has no times."""
    length = schema.history_length
    if not length:
        yield from (([], []) for _ in range(len(rows)))
        return
    after = _beside(rows, histories)
    for row, known in zip(_shown(rows), after.iter_rows(named=True), strict=True):
        if (ad_ids := known.get("history")) is None:
            ad_ids, ts = row
        else:
            ts = known.get("history_ts") or [0] * len(ad_ids)
        yield ad_ids[-length:], ts[-length:]


def _shown(rows: pl.DataFrame) -> Iterator[Behaviours]:
    ts = rows["ts"].fill_null(0).to_list() if "ts" in rows.columns else [0] * len(rows)
    for label, ad_id, history, at in zip(rows["label"], rows["ad_id"], rows["history"].to_list(), ts, strict=True):
        ad_ids = [*(history or ()), *([ad_id] if label else ())]
        yield ad_ids, [at] * len(ad_ids)
