"""The behaviours of rows as rows of the table of ads, and how old they were. In a log an ad is keyed by its id and its revision then."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from features.ages import UNKNOWN_TIME, ages_of
from features.encode import AdTable
from features.vocabulary import Ids

from .log import ImpressionLog
from .prepared import DataError, Prepared

SEPARATOR = "\x1f"
"""Between an ad's id and its revision."""


def versions_of(ad_ids: pl.Series, revisions: pl.Series) -> pl.Series:
    """The keys of ads as they were: id and revision, 0 being that of an ad that the catalogue did not have."""
    return ad_ids + SEPARATOR + revisions.cast(pl.String)


def history_of(frame: pl.DataFrame, data: Prepared, table: AdTable) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The behaviours `(N, T)` as rows of the table, oldest first, padded with 0 at the end; an ad that it lacks joins it.

    Raises:
        DataError: see `ad_rows`.
    """
    width = data.schema.history_length
    if not width:
        return np.zeros((len(frame), 1), np.int32)
    whole = frame["history"].fill_null([]).list.drop_nulls()
    if data.schema.history_padding and not isinstance(data, ImpressionLog):  # in a log stands what was encoded
        whole = whole.list.eval(pl.element().filter(~pl.element().is_in(data.schema.history_padding)))
    kept = whole.list.tail(width)
    lengths = kept.list.len().to_numpy().astype(np.int64)
    padded = np.zeros((len(frame), width), np.int32)
    if lengths.any():
        keys = kept.explode().drop_nulls()
        if isinstance(data, ImpressionLog):
            keys = versions_of(keys, frame["history_revisions"].list.tail(width).explode().drop_nulls())
        padded[np.arange(width) < lengths[:, None]] = ad_rows(keys, data, table)
    return padded


def history_ages(frame: pl.DataFrame, data: Prepared) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The ages `(N, T)` of the behaviours that `history_of` keeps, oldest first, 0 where there is padding."""
    width, padding = data.schema.history_length, () if isinstance(data, ImpressionLog) else data.schema.history_padding
    unknown = pl.col("history").list.eval(pl.element().is_null().cast(pl.Float64) * UNKNOWN_TIME)
    times = pl.col("history_ts").cast(pl.List(pl.Float64)).fill_null(unknown)
    pairs = frame.select(pl.int_range(pl.len()).alias("row"), "history", times)
    behaviours = pairs.explode("history", "history_ts").filter(pl.col("history").is_not_null(), ~pl.col("history").is_in(list(padding)))
    kept = behaviours.group_by("row", maintain_order=True).agg(pl.col("history_ts").fill_null(UNKNOWN_TIME).tail(width))
    newest = pairs.select("row").join(kept, on="row", how="left", maintain_order="left")["history_ts"].fill_null([])
    behaved = np.arange(width) < newest.list.len().to_numpy().astype(np.int64)[:, None]
    ts = np.full((len(frame), width), UNKNOWN_TIME)
    ts[behaved] = newest.explode().drop_nulls().to_numpy()
    return np.where(behaved, ages_of(frame["ts"].to_numpy()[:, None], ts), np.float32(0))


def ad_rows(keys: pl.Series, data: Prepared, table: AdTable) -> Ids:
    """Row of each ad in `ad_table`; one that the table lacks joins it as the service would encode it, by its id alone.

    Raises:
        DataError: the ad is a version that its log should have.
    """
    unique = keys.unique()
    values = unique.to_list()
    missing = [value for value, row in zip(values, table.rows(values), strict=True) if not row]
    if missing:
        ad_ids = _without_revision(missing, data) if isinstance(data, ImpressionLog) else missing
        table.put(missing, table.encoder.unknown_ads(ad_ids), active=False)
    rows = keys.replace_strict(unique, table.rows(values), return_dtype=pl.Int64).to_numpy()
    return rows.astype(np.int64, copy=False)  # polars gives an empty column no type


def _without_revision(keys: Sequence[str], data: ImpressionLog) -> list[str]:
    parts = [key.rpartition(SEPARATOR) for key in keys]
    lost = [(ad_id, revision) for ad_id, _, revision in parts if revision != "0"]
    if lost:
        ad_id, revision = lost[0]
        raise DataError(f"{data.folder / 'ads'} lacks {len(lost)} versions of ads that rows name, the first is {revision} of {ad_id}")
    return [ad_id for ad_id, _, _ in parts]
