"""The behaviours of rows as rows of the table of ads, and how old they were."""

from typing import Any

import numpy as np
import polars as pl

from features.ages import UNKNOWN_TIME, ages_of
from features.encode import AdTable

from .ads import ad_rows
from .prepared import Prepared


def history_of(frame: pl.DataFrame, data: Prepared, table: AdTable) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The behaviours `(N, T)` as rows of the table, oldest first, padded with 0 at the end; an ad that it lacks joins it.

    Raises:
        DataError: see `ad_rows`.
    """
    width = data.schema.history_length
    if not width:
        return np.zeros((len(frame), 1), np.int32)
    whole = frame["history"].fill_null([]).list.drop_nulls()
    if data.padding:
        whole = whole.list.eval(pl.element().filter(~pl.element().is_in(data.padding)))
    kept = whole.list.tail(width)
    lengths = kept.list.len().to_numpy().astype(np.int64)
    padded = np.zeros((len(frame), width), np.int32)
    if lengths.any():
        padded[np.arange(width) < lengths[:, None]] = ad_rows(data.behaviour_keys(frame, kept), data, table)
    return padded


def history_ages(frame: pl.DataFrame, data: Prepared) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The ages `(N, T)` of the behaviours that `history_of` keeps, oldest first, 0 where there is padding."""
    width, padding = data.schema.history_length, list(data.padding)
    unknown = pl.col("history").list.eval(pl.element().is_null().cast(pl.Float64) * UNKNOWN_TIME)
    times = pl.col("history_ts").cast(pl.List(pl.Float64)).fill_null(unknown)
    pairs = frame.select(pl.int_range(pl.len()).alias("row"), "history", times)
    behaviours = pairs.explode("history", "history_ts").filter(pl.col("history").is_not_null(), ~pl.col("history").is_in(padding))
    kept = behaviours.group_by("row", maintain_order=True).agg(pl.col("history_ts").fill_null(UNKNOWN_TIME).tail(width))
    newest = pairs.select("row").join(kept, on="row", how="left", maintain_order="left")["history_ts"].fill_null([])
    behaved = np.arange(width) < newest.list.len().to_numpy().astype(np.int64)[:, None]
    ts = np.full((len(frame), width), UNKNOWN_TIME)
    ts[behaved] = newest.explode().drop_nulls().to_numpy()
    return np.where(behaved, ages_of(frame["ts"].to_numpy()[:, None], ts), np.float32(0))
