"""What a prepared data set holds, field by field, so that a column that was read otherwise than meant is seen before it is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import polars as pl

from .prepared import SPLITS, Prepared, column_of

RULE = "Ids and categories are looked up as text by one rule, in training and in serving: 25.0 is 25, True is true, all else as it stands."
TOP = 3
MANY, FEW = 0.6, 10
"""The share of the histories from which on a value in them is told, and how many may be alike by chance."""
LONG = "^[1-9][0-9]{16,18}$"
"""Whole numbers that a float holds one in many of."""


@dataclass(frozen=True)
class Column:
    """A field in the train split, or the histories: the share of rows that miss it, its distinct values, and the most frequent ones."""

    name: str
    kind: str
    missing: float
    distinct: int
    usual: dict[str, float]
    """With their share of the rows; of numbers and vectors `mean`."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataProfile:
    """Rows and click rate by split, and every field that the train split has a column for, in the schema's order."""

    rows: dict[str, int]
    click_rate: dict[str, float]
    columns: list[Column]


def profile(data: Prepared) -> DataProfile:
    """Look through a data set.

    Raises:
        DataError: a split cannot be read.
    """
    parts: dict[tuple[str, str], list[pl.Series]] = {}
    rows, clicks = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for frame in data.frames(split):
            rows[split] += len(frame)
            clicks[split] += int(frame["label"].sum())
            for field in data.schema.fields if split == "train" else ():
                if (part := column_of(frame, field)) is not None:
                    parts.setdefault((field.path, field.kind), []).append(part)
            if split == "train" and data.schema.history_length:
                parts.setdefault(("history", "list"), []).append(frame["history"])
    return DataProfile(
        rows,
        {split: clicks[split] / rows[split] if rows[split] else float("nan") for split in SPLITS},
        [_column(name, kind, pl.concat(series)) for (name, kind), series in parts.items()],
    )


def _column(name: str, kind: str, column: pl.Series) -> Column:
    rows = len(column)
    empty = column.is_null() if column.dtype != pl.List else column.list.len().fill_null(0) == 0
    values = column.list.unique().explode().drop_nulls() if column.dtype == pl.List else column.drop_nulls()
    if values.is_empty():
        return Column(name, kind, 1.0, 0, {}, (f"{name} is missing in every row",))
    missing, distinct = int(empty.sum()) / rows, values.n_unique()
    if kind in ("number", "vector"):
        every = column.explode().drop_nulls() if kind == "vector" else values
        usual = {"mean": float(every.to_numpy().mean())}
    else:
        usual = {str(value): count / rows for value, count in _counts(values).head(TOP).rows()}
    warnings = tuple(_warnings(name, values, int(rows - empty.sum()), rows))
    return Column(name, kind, missing, distinct, usual, warnings)


def _counts(values: pl.Series) -> pl.DataFrame:
    return values.alias("value").value_counts().sort("count", "value", descending=[True, False])


def _warnings(name: str, values: pl.Series, known: int, rows: int) -> Iterator[str]:
    counts = _counts(values)
    value, count = counts.row(0)
    if name == "history":
        if known >= FEW and count >= MANY * known:
            yield f"{value!r} is in {count / known:.0%} of the histories: if it fills them up, or is a robot's, they tell little else"
    elif len(counts) == 1 and known == rows:
        yield f"{name} is {value!r} in every row: nothing is learned of it"
    if values.dtype == pl.String:
        long = counts["value"].filter(counts["value"].str.contains(LONG)).head(1_000)
        if len(long) >= FEW and all(map(_of_a_float, long)):
            found = f"all values of {name} of 17 digits and more, such as {long[0]}, are numbers that a float can hold, as one in many is"
            yield f"{found}: ids may have lost their last digits on their way, and some be one id now"


def _of_a_float(text: str) -> bool:
    """Whether a whole number is what remains of one that was a float, written out or in its shortest form."""
    rounded = float(text)
    return text in (str(int(rounded)), f"{Decimal(repr(rounded)):f}")
