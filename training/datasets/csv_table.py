"""Any table as a click log: CSV with a header, JSON lines or parquet, a file or a folder of parts, read as a schema file says.

The schema file is a `schema.toml` (`features/schema.py`) with one more section, all of whose entries may be left out:

    [table]
    label = "label"                  column of clicks, 0 or 1
    user_id = "user_id"              column of user ids; "" where the table has none
    ad_id = "ad_id"                  column of ad ids; "" where the table has none
    ts = "timestamp"                 column of times; left out, the rows are in order already and have no times
    ts_unit = "s"                    what numbers in it count since 1970: s, ms, us or ns; ISO 8601 text needs none
    ts_format = "%y%m%d%H"           how they are written, by Python's strptime; or a list of formats
    split = [0.8, 0.1, 0.1]          shares by order of time; or the column that says train, valid or test
    history = "clicked"              column of the ads clicked before, oldest first; left out, built from the rows themselves
    padding = "0"                    what fills such a history up and is no ad; or a list
    missing = ["NULL", "-1"]         values that mean that there is none, in any column
    nobody = ["0000-0000"]           user ids that mean no user
    separator = ","                  between the columns of a CSV
    quote = '"'                      around fields of a CSV that hold separators; "" where quotes are text like any other
    quoted_newlines = false          whether quoted fields may hold lines that look like rows
    list_separator = "|"             between the elements of a list that is a text
    outcomes = { conversion = "bought" }  columns of what else came of a row, 0, 1 or empty, for networks with that head
    weight = "w"                     column of what a row weighs in training, at least 0
    propensity = "pscore"            column of the probability with which the ad was shown: such a log can be replayed
    position = "slot"                column of the place where the ad was shown, from 1; beside propensity
    candidates = "offered"           column of the ads that could have been shown there; left out, any ad of the table
    columns = { "ad.genres" = "g" }  columns that are not called as their fields are
    negative_sampling = 1.0          the share of the non-clicks that the table kept; `data.toml` remembers it

A history built from the rows holds the ads that the same user clicked at an earlier time: not at the same time, for the ads of one
request share it and their clicks were not known when they were ranked. Rows without a user id have no history. Counters of the schema
(`[counter.NAME]`) are made from the rows in the same way.
"""

from pathlib import Path

import numpy as np
import polars as pl

from features.schema import IDENTITY, Schema, Side
from features.vocabulary import Ids

from .counters import count, with_priors
from .history import Past
from .plausible import Doubts, look_through, silent_doubts
from .prepared import SPLITS, Progress, by_order, silent, write_splits, write_table, write_tables, writing
from .table_log import INSTANT, SPLIT, read_log
from .table_settings import TableSettings, read_schema


def prepare(source: Path, out: Path, schema_file: Path, progress: Progress = silent, doubts: Doubts = silent_doubts) -> dict[str, int]:
    """Prepare the table `source` as the data set `out`, as `schema_file` says; rows by split.

    `doubts` is told, a sentence each, what the data look like that nobody has said of them.

    Raises:
        DataError: the schema file or the table is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder:
        schema, settings = read_schema(schema_file)
        log, instants = _in_order(read_log(source, schema.told, settings, lambda rows: progress(rows, 0)))
        for doubt in look_through(log, instants, schema, settings):
            doubts(doubt)
        order, splits = _splits(log, settings)
        log = log.drop(SPLIT, strict=False)
        past = _past(log, instants, schema, settings)
        ads, users = _last(log, "ad"), _last(log, "user")
        sampling = settings.negative_sampling or 1.0
        schema = with_priors(schema, log[order[splits["train"].start : splits["train"].stop]], sampling) if schema.counters else schema
        log = log.with_columns(**count(log, instants, schema, sampling))

        def frame(rows: range) -> pl.DataFrame:
            part = order[rows.start : rows.stop]
            return log[part].with_columns(**past.columns(part)) if past else log[part]

        write_tables(folder, schema, ads, users, sampling)
        if past:
            write_table(folder, "histories", past.after())
        return write_splits(folder, splits, frame, progress)


def _in_order(log: pl.DataFrame) -> tuple[pl.DataFrame, Ids | None]:
    """The rows in order of time, and their times in microseconds."""
    if INSTANT not in log.columns:
        return log, None
    instants = log[INSTANT].to_numpy()
    order = np.argsort(instants, kind="stable")
    return log.drop(INSTANT)[order], instants[order]


def _past(log: pl.DataFrame, instants: Ids | None, schema: Schema, settings: TableSettings) -> Past | None:
    if not schema.history_length or settings.history:
        return None
    before = None if instants is None else np.searchsorted(instants, instants)
    return Past(log, schema.history_length, before)


def _splits(log: pl.DataFrame, settings: TableSettings) -> tuple[Ids, dict[str, range]]:
    """The rows in the order in which they are written, and which of those belong to each split."""
    if not isinstance(settings.split, str):
        return np.arange(len(log)), by_order(len(log), settings.split)
    numbers = log[SPLIT].to_numpy()
    ends = np.searchsorted(np.sort(numbers), range(len(SPLITS) + 1)).tolist()
    return np.argsort(numbers, kind="stable"), {split: range(*ends[i : i + 2]) for i, split in enumerate(SPLITS)}


def _last(log: pl.DataFrame, side: Side) -> pl.DataFrame | None:
    """The features of each user or ad at its last row, or None where there is nothing to tell."""
    key = IDENTITY[side]
    features = [name for name in log.columns if name.startswith(f"{side}.")]
    known = log.select(key, *features).filter(pl.col(key) != "")
    if known.is_empty() or (side == "user" and not features):
        return None
    return known.unique(key, keep="last", maintain_order=True)
