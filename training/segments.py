"""The rows of a split told apart by the values of a field."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from features.schema import Field, Schema

from .datasets.prepared import DataError, Prepared, column_of
from .datasets.vocabularies import joined

Array = np.ndarray[Any, np.dtype[Any]]
SEGMENTS = 8
"""Values of a field that are told apart; all others are one segment."""


def segment_field(schema: Schema, path: str) -> Field:
    """The field of that path.

    Raises:
        DataError: the schema has none, or one of lists or vectors.
    """
    fields = {each.path: each for each in schema.fields if each.kind in ("category", "number")}
    if path not in fields:
        raise DataError(f"{path} is no field that rows can be told apart by; the data set has {', '.join(fields)}")
    return fields[path]


def segments(data: Prepared, split: str, path: str) -> list[tuple[str, Array]]:
    """The rows `(N,)` of a split by the values of a field, the most frequent first: each value's name, and which rows have it.

    A number is cut into quarters, the lowest first; what is beyond `SEGMENTS` values is one segment, and so is what is missing.

    Raises:
        DataError: the data set has no such field, or one of lists or vectors.
    """
    field = segment_field(data.schema, path)
    tables = data.lookups(str(field.side))
    columns = [column_of(joined(frame, data.schema, tables), field) for frame in data.frames(split)]
    if any(column is None for column in columns):
        raise DataError(f"{data.folder}: no column holds {path}")
    whole = pl.concat([column for column in columns if column is not None])
    told_apart = _quarters(whole.fill_nan(None)) if field.kind == "number" else _values(whole)
    return [(name, rows) for name, rows in [*told_apart, ("no value", whole.is_null().to_numpy())] if rows.any()]


def _quarters(numbers: pl.Series) -> Iterator[tuple[str, Array]]:
    edges = np.unique(np.quantile(numbers.drop_nulls().to_numpy(), (0.25, 0.5, 0.75))) if numbers.drop_nulls().len() else np.zeros(0)
    for low, high in pairwise([-np.inf, *edges.tolist(), np.inf]):
        name = f"up to {high:g}" if low == -np.inf else f"above {low:g}" if high == np.inf else f"{low:g} to {high:g}"
        yield name, ((numbers > low) & (numbers <= high)).fill_null(value=False).to_numpy()


def _values(values: pl.Series) -> Iterator[tuple[str, Array]]:
    counts = values.drop_nulls().rename("value").value_counts(name="count").sort("count", "value", descending=[True, False])
    kept = counts["value"].head(SEGMENTS)
    for value in kept:
        yield value, (values == value).fill_null(value=False).to_numpy()
    yield f"{len(counts) - len(kept):,} other values", (~values.is_in(kept.implode())).fill_null(value=False).to_numpy()
