"""The cells of a column as the texts that are looked up, by the rule of `features/values.py`: vectorised where a cell is text already."""

from collections.abc import Callable, Iterator

import polars as pl

from features.schema import Field
from features.values import SPELLINGS, WHOLE, ValueTextError, text_of

AT_ONCE = 100_000
IDS = ("user_id", "ad_id", "history", "candidates")
BESIDE = {"history_ts", "history_revisions"}
"""Columns with an element for each behaviour."""
TEXTS = (pl.String(), pl.List(pl.String()))
ODD = f"^(?:{WHOLE}|{'|'.join(SPELLINGS)})$"
"""A text that is looked up as another."""
LOST = r"^[+-]?[0-9](\.[0-9]+)?[eE]\+[0-9]+$"
"""A whole number as spreadsheets, R and pandas write large ones: the digits that were left out are gone."""
LOST_TOLD = "an id or a category in full: a number with an exponent has lost digits, or is another text than the number in full"


class CellError(ValueError):
    """A cell has no one text. Carries its row, from 0, and what was expected."""

    def __init__(self, row: int, expected: str) -> None:
        super().__init__(f"row {row}: {expected}")
        self.row, self.expected = row, expected


def plain_values(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame of a data set, whoever wrote it, with its ids and the values of its fields as the texts that are looked up."""
    changed = []
    for name, dtype in frame.schema.items():
        if dtype in TEXTS and (name in IDS or "." in name):
            column = plain_column(frame[name])
            kept = name in ("user_id", "ad_id") or (name == "history" and not BESIDE.isdisjoint(frame.columns))
            changed.append(column.fill_null("") if name == "user_id" else column if kept else _without_gaps(column))
    return frame.with_columns(changed)


def unless_missing(column: pl.Series, field: Field) -> pl.Series:
    """A column of a field, with nothing where the field says that a value means that; numbers as they are encoded, in 32 bits."""
    if not field.missing_values:
        return column
    if field.kind == "number":
        told = pl.Series(field.missing_values).cast(pl.Float64).cast(pl.Float32)
        return column.set(column.cast(pl.Float32).is_in(told.implode()), None)
    return (without_elements if field.kind == "list" else without)(column, field.missing_values)


def without(texts: pl.Series, tokens: tuple[str, ...]) -> pl.Series:
    """Texts of which some mean that there is none."""
    return texts.set(texts.is_in(tokens), None) if tokens else texts


def without_elements(lists: pl.Series, tokens: tuple[str, ...]) -> pl.Series:
    """Lists without those elements that mean that there is none."""
    return lists.list.eval(pl.element().filter(~pl.element().is_in(tokens))) if tokens else lists


def plain_column(column: pl.Series) -> pl.Series:
    """Each text of a column, or of its lists, as `features.values.plain` gives it."""
    flat = column.explode() if column.dtype == pl.List else column
    if not flat.str.contains(ODD).any():
        return column
    return column.list.eval(_plain(pl.element())) if column.dtype == pl.List else _selected(column, _plain)


def _plain(texts: pl.Expr) -> pl.Expr:
    whole = texts.str.replace(r"\.0+$", "").replace("-0", "0")
    return pl.when(texts.str.contains(f"^{WHOLE}$")).then(whole).otherwise(texts.replace(SPELLINGS))


def _without_gaps(column: pl.Series) -> pl.Series:
    """Empty text is missing, and what is missing is no element of a list."""
    if column.dtype == pl.List:
        flat, empty = column.explode(), (column.list.len().fill_null(0) == 0).sum()  # which explode to null
        gaps = (flat == "").any() or flat.null_count() > empty
        return column.list.eval(pl.element().filter(pl.element() != "")) if gaps else column
    return column.replace("", None)


def _selected(column: pl.Series, change: Callable[[pl.Expr], pl.Expr]) -> pl.Series:
    return column.to_frame("value").select(value=change(pl.col("value")))["value"].alias(column.name)


def texts_of(column: pl.Series) -> pl.Series:
    """The text of each cell, null where it is missing.

    Raises:
        CellError: a cell has none, or not one only.
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Categorical | pl.Enum | pl.Null):
        column = column.cast(pl.String)
    if column.dtype == pl.String:
        lost = column.str.contains(LOST).arg_true()
        if len(lost):
            raise CellError(int(lost[0]), LOST_TOLD)
        return _without_gaps(plain_column(column))
    if dtype.is_integer():
        return column.cast(pl.String)
    if isinstance(dtype, pl.Datetime | pl.Time):
        _check_finest(column)
    return pl.Series(column.name, list(_one_by_one(column)), pl.String)


def lists_of(column: pl.Series) -> pl.Series:
    """The texts of each list's elements, those that are missing left out.

    Raises:
        CellError: as `texts_of` does, with the list's row.
    """
    given = column.to_frame("value").with_row_index("row")
    cells = given.filter(pl.col("value").list.len() > 0).explode("value")
    try:
        texts = texts_of(cells["value"])
    except CellError as error:
        raise CellError(int(cells["row"][error.row]), error.expected) from error
    kept = cells.select("row", text=texts).drop_nulls().group_by("row", maintain_order=True).agg("text")
    whole = given.join(kept, on="row", how="left", maintain_order="left")
    lists = whole.select(text=pl.when(pl.col("value").is_not_null()).then(pl.col("text").fill_null([])))
    return lists["text"].alias(column.name)


def _one_by_one(column: pl.Series) -> Iterator[str | None]:
    for start in range(0, len(column), AT_ONCE):
        part = column.slice(start, AT_ONCE)
        # numpy keeps how many bits a float has, which Python's own does not say
        for row, value in enumerate(part.to_numpy() if part.dtype.is_float() else part.to_list(), start):
            try:
                yield text_of(value)
            except ValueTextError as error:
                raise CellError(row, str(error).removeprefix("expected ")) from error


def _check_finest(column: pl.Series) -> None:
    finest = (column.dt.nanosecond() % 1000 != 0).fill_null(value=False).arg_true()
    if len(finest):
        raise CellError(int(finest[0]), "a time of whole microseconds; write it as text")
