"""What a prepared data set holds, field by field, so that a column that was read otherwise than meant is seen before it is trained on."""

from dataclasses import dataclass

import polars as pl

from features.schema import Field

from .prepared import Prepared, column_of

RULE = "Ids and categories are looked up as text by one rule, in training and in serving: 25.0 is 25, True is true, all else as it stands."


@dataclass(frozen=True)
class Column:
    """A field in the train split: the share of rows that miss it, its distinct values, and the most frequent one or the mean."""

    field: Field
    missing: float
    distinct: int
    usual: str


def profile(data: Prepared) -> list[Column]:
    """Every field that the train split has a column for, in the schema's order.

    Raises:
        DataError: the split cannot be read.
    """
    parts: dict[str, list[pl.Series]] = {}
    for frame in data.frames("train"):
        for field in data.schema.fields:
            if (part := column_of(frame, field)) is not None:
                parts.setdefault(field.path, []).append(part)
    return [_column(field, pl.concat(parts[field.path])) for field in data.schema.fields if field.path in parts]


def _column(field: Field, column: pl.Series) -> Column:
    empty = column.is_null() if column.dtype != pl.List else column.list.len().fill_null(0) == 0
    values = column.explode().drop_nulls() if column.dtype == pl.List else column.drop_nulls()
    if values.is_empty():
        return Column(field, 1.0, 0, "")
    if field.dense:
        return Column(field, int(empty.sum()) / len(column), values.n_unique(), f"{values.to_numpy().mean():g}")
    return Column(field, int(empty.sum()) / len(column), values.n_unique(), str(values.mode().sort()[0]))
