"""Counters made from a log's own rows, each an impression and perhaps its click: just before each row, and at the end of the log."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from features.counters import PRIOR, Array, Counts, Tally, counts_before, merged_counts, tallies_of
from features.schema import Field, Schema, Side
from features.vocabulary import Ids

from .prepared import SPLITS, DataError, Prepared

MICROSECONDS = 1e6
LEAST_SHARE = 0.001
LEAST_COUNT = 1e-12
"""What has decayed to less is not kept."""


def count(log: pl.DataFrame, instants: Ids | None, schema: Schema, sampling: float = 1.0) -> dict[str, pl.Series]:
    """The columns of a schema's counters, by path, for all rows of a log in order of time (`instants`, in microseconds).

    `sampling` is the share of the non-clicks that the log kept: the service counts all of them, so each that is there is so many.
    """
    if instants is None or not schema.counters:
        return {}
    seconds = instants / MICROSECONDS
    tallies = list(tallies_of(list(schema.counters.values())))
    counts = {tally: counts_before(_groups(log, tally), seconds, _happened(log, tally, sampling), tally.window) for tally in tallies}
    return {
        field.path: pl.Series(field.counter.of_counts([counts[tally] for tally in field.counter.tallies]), dtype=pl.Float64)
        for field in schema.fields
        if field.counter
    }


def with_priors(schema: Schema, train: pl.DataFrame, sampling: float = 1.0) -> Schema:
    """The schema whose rates without a prior begin at what they come to in all of these rows, with the weight of `PRIOR`.

    A rate that begins elsewhere says how many events it is made of as much as what came of them, and how many there are changes with time.
    """

    def begun(field: Field) -> Field:
        counter = field.counter
        if counter is None or not counter.is_rate or counter.prior or train.is_empty():
            return field
        top, bottom = (float(_happened(train, tally, sampling).sum()) for tally in counter.tallies)
        share = min(max(top / max(bottom, 1.0), LEAST_SHARE), 1 - LEAST_SHARE)
        counter = replace(counter, prior=(round(share * PRIOR[1], 3), PRIOR[1]))
        return replace(field, counter=counter, missing=counter.least)

    return replace(schema, fields=tuple(map(begun, schema.fields)))


def _happened(log: pl.DataFrame, tally: Tally, sampling: float) -> Array:
    clicked = log["label"].to_numpy() == 1
    return np.where(clicked, 1.0, 1 / sampling if tally.event == "impression" else 0.0)


def _groups(log: pl.DataFrame, tally: Tally) -> Ids:
    """Whose count each row has part in; -1: nobody's."""
    whose = pl.concat_str(_whose(log, tally), separator="\x1f")
    return log.select(whose.rank("dense").cast(pl.Int64).fill_null(-1)).to_series().to_numpy()


def _whose(log: pl.DataFrame, tally: Tally) -> list[pl.Expr]:
    """Of whom a row counts, and by which value of its ad, where counts differ by one; null: of nobody."""
    whose = [pl.col(f"{tally.by}_id").replace("", None)]
    if tally.value == "ad_id":
        whose.append(pl.col("ad_id").replace("", None))
    elif tally.value:
        column = pl.col(f"ad.{tally.value}")
        whose.append(column.list.first() if log[f"ad.{tally.value}"].dtype == pl.List else column)
    return whose


@dataclass(frozen=True)
class CountsAtEnd:
    """What the rows of a log have counted of users or of ads by its end: by tally a table of `id`, `value` and `much`."""

    end: int
    tables: dict[Tally, pl.DataFrame]

    def of(self, ids: Sequence[str]) -> list[Counts]:
        """The counts of users or ads, as they are stored."""
        found: dict[str, dict[str, dict[str, Sequence[float]]]] = {id_: {} for id_ in ids}
        for tally, table in self.tables.items():
            for id_, value, much in table.filter(pl.col("id").is_in(ids)).iter_rows():
                found[id_].setdefault(tally.key, {})[value] = (much, self.end)
        return [merged_counts({}, found[id_]) for id_ in ids]


def counts_at_end(prepared: Prepared, side: Side, end: int) -> CountsAtEnd:
    """What the rows of all splits have counted by `end`, in seconds since 1970: read file by file.

    Raises:
        DataError: the rows cannot be read, or lack what the schema's counters need.
    """
    tallies = [tally for tally in tallies_of(list(prepared.schema.counters.values())) if tally.by == side and tally.event != "conversion"]
    needed = {"ts", *(f"ad.{tally.value}" for tally in tallies if tally.value not in {"", "ad_id"})}
    tables = dict[Tally, pl.DataFrame]()
    for frame in (frame for split in SPLITS if tallies for frame in prepared.frames(split)):
        if lacking := needed - set(frame.columns):
            raise DataError(f"rows lack {', '.join(sorted(lacking))}, by which counters of the schema count; prepare the data set again")
        for tally in tallies:
            parts = [_by_end(frame, tally, end, prepared.negative_sampling), *([tables[tally]] if tally in tables else ())]
            tables[tally] = pl.concat(parts).group_by("id", "value").sum().filter(pl.col("much") > LEAST_COUNT)
    return CountsAtEnd(end, tables)


def _by_end(frame: pl.DataFrame, tally: Tally, end: int, sampling: float) -> pl.DataFrame:
    id_, *value = _whose(frame, tally)
    age = (end - pl.col("ts")).clip(lower_bound=0)
    much = pl.Series(_happened(frame, tally, sampling)) * (-age / tally.window).exp()
    return frame.select(id=id_, value=value[0] if value else pl.lit(""), much=much).drop_nulls()
