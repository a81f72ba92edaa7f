"""Counters made from a log's own past, as the service would have had them just before each row: an impression, and perhaps its click."""

from dataclasses import replace

import numpy as np
import polars as pl

from features.counters import PRIOR, Array, Tally, counts_before, tallies_of
from features.schema import Field, Schema
from features.vocabulary import Ids

MICROSECONDS = 1e6
LEAST_SHARE = 0.001


def count(log: pl.DataFrame, instants: Ids | None, schema: Schema) -> dict[str, pl.Series]:
    """The columns of a schema's counters, by path, for all rows of a log in order of time (`instants`, in microseconds)."""
    if instants is None or not schema.counters:
        return {}
    seconds = instants / MICROSECONDS
    tallies = list(tallies_of(list(schema.counters.values())))
    counts = {tally: counts_before(_groups(log, tally), seconds, _happened(log, tally), tally.window) for tally in tallies}
    return {
        field.path: pl.Series(field.counter.of_counts([counts[tally] for tally in field.counter.tallies]), dtype=pl.Float64)
        for field in schema.fields
        if field.counter
    }


def with_priors(schema: Schema, train: pl.DataFrame) -> Schema:
    """The schema whose rates without a prior begin at what they come to in all of these rows, with the weight of `PRIOR`.

    A rate that begins elsewhere says how many events it is made of as much as what came of them, and how many there are changes with time.
    """

    def begun(field: Field) -> Field:
        counter = field.counter
        if counter is None or not counter.is_rate or counter.prior or train.is_empty():
            return field
        top, bottom = (float(_happened(train, tally).sum()) for tally in counter.tallies)
        share = min(max(top / max(bottom, 1.0), LEAST_SHARE), 1 - LEAST_SHARE)
        counter = replace(counter, prior=(round(share * PRIOR[1], 3), PRIOR[1]))
        return replace(field, counter=counter, missing=counter.least)

    return replace(schema, fields=tuple(map(begun, schema.fields)))


def _happened(log: pl.DataFrame, tally: Tally) -> Array:
    happened = np.ones(len(log)) if tally.event == "impression" else log["label"].to_numpy()
    return happened.astype(np.float64)


def _groups(log: pl.DataFrame, tally: Tally) -> Ids:
    """Whose count each row has part in; -1: nobody's."""
    whose = [pl.col(f"{tally.by}_id").replace("", None)]
    if tally.value == "ad_id":
        whose.append(pl.col("ad_id").replace("", None))
    elif tally.value:
        column = pl.col(f"ad.{tally.value}")
        whose.append(column.list.first() if log[f"ad.{tally.value}"].dtype == pl.List else column)
    groups = log.select(pl.concat_str(whose, separator="\x1f").rank("dense").cast(pl.Int64).fill_null(-1)).to_series()
    return groups.to_numpy()
