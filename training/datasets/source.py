"""Tables as others publish them, with the line of every row, so that an error can say where. `tables.py` reads them.

Knows nothing about any one data set, nor about the prepared format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features.schema import FLOAT32_MAX
from features.values import SPELLINGS
from features.vocabulary import Ids

from . import times
from .prepared import DataError, is_vector
from .texts import CellError, lists_of, texts_of

BRIEF = 1000
"""Characters of a value, or of a header, that a message repeats."""
FLAGS = {spelling: "1" if flag == "true" else "0" for spelling, flag in (*SPELLINGS.items(), ("true", "true"), ("false", "false"))}
"""True and false as texts have them, as the numbers that Boolean columns are."""


def brief(text: str) -> str:
    """The text, or the beginning of one that is long."""
    return text if len(text) <= BRIEF else f"{text[:BRIEF]}…"


class RowError(DataError):
    """A row is wrong; `line` says which."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Table:
    """Columns of a source and where each row stood. Empty text counts as missing in every accessor."""

    path: Path | str
    """What messages call it."""
    frame: pl.DataFrame
    lines: Ids
    unit: str = "line"
    """What `lines` counts: lines of a text, or rows of a parquet file, from 1."""

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> pl.Series:
        """A column as it was read, empty text as null.

        Raises:
            DataError: there is none of that name.
        """
        if name not in self.frame.columns:
            raise DataError(f"{self.path}: column {name} is missing; it has {', '.join(self.frame.columns)}")
        values = self.frame[name]
        if values.dtype in (pl.Categorical, pl.Enum):
            values = values.cast(pl.String)
        return values.replace("", None) if values.dtype == pl.String else values

    def refuse(self, name: str, wrong: pl.Series, expected: str) -> None:
        """Raise for the first wrong row; null counts as wrong.

        Raises:
            RowError: a row is wrong; the message names file, line, column and value.
        """
        rows = wrong.fill_null(True).arg_true()
        if len(rows):
            line = int(self.lines[rows[0]])
            raise RowError(f"{self.path}, {self.unit} {line}: {name} is {self._told(name, rows[0])}; expected {expected}", line)

    def whole(self, name: str, low: int, high: int) -> pl.Series:
        """A column of whole numbers, as Int64."""
        values = self.column(name).cast(pl.Int64, strict=False)
        is_cut = values.cast(pl.Float64) != self._floats(name)
        self.refuse(name, ~values.is_between(low, high) | is_cut, f"a whole number from {low} to {high}")
        return values

    def labels(self, name: str) -> pl.Series:
        """A column of clicks, as Int8 `label`."""
        values = self._floats(name)
        self.refuse(name, ~values.is_in([0.0, 1.0]), "0 or 1")
        return values.cast(pl.Int8).alias("label")

    def outcomes(self, name: str) -> pl.Series:
        """A column of what else came of the rows, as Int8; empty is null: not known."""
        values = self.numbers(name)
        self.refuse(name, ~values.fill_null(0.0).is_in([0.0, 1.0]), "0, 1 or nothing")
        return values.cast(pl.Int8)

    def numbers(self, name: str) -> pl.Series:
        """A column of numbers, as Float64; empty and NaN are null."""
        values = self._floats(name)
        bad = self.column(name).is_not_null() & (values.is_null() | (values.fill_nan(0).abs() > FLOAT32_MAX))
        self.refuse(name, bad, "a finite number that fits float32, or nothing")
        return values.fill_nan(None)

    def _floats(self, name: str) -> pl.Series:
        values = self.column(name)
        if not (values.dtype.is_numeric() or values.dtype in (pl.String, pl.Boolean, pl.Null)):
            raise DataError(f"{self.path}: column {name} is {values.dtype}; expected numbers")
        return (values.replace(FLAGS) if values.dtype == pl.String else values).cast(pl.Float64, strict=False)

    def text(self, name: str) -> pl.Series:
        """A column as the texts that are looked up (`features/values.py`).

        Raises:
            DataError: there is none of that name, or a cell has no one text.
        """
        values = self.column(name)
        if values.dtype.is_nested() or values.dtype == pl.Binary:
            raise DataError(f"{self.path}: column {name} is {values.dtype}; a category needs text or whole numbers")
        return self._cells(name, texts_of, values)

    def _cells(self, name: str, texts: Callable[[pl.Series], pl.Series], values: pl.Series) -> pl.Series:
        try:
            return texts(values)
        except CellError as error:
            line, told = int(self.lines[error.row]), self._told(name, error.row)
            raise RowError(f"{self.path}, {self.unit} {line}: {name} is {told}; expected {error.expected}", line) from error

    def _told(self, name: str, row: int) -> str:
        cell = self.frame[name][row]
        return brief(repr(cell.to_list() if isinstance(cell, pl.Series) else cell))

    def required(self, name: str) -> pl.Series:
        """As `text`, of which every row must have some."""
        values = self.text(name)
        self.refuse(name, values.is_null(), "some text")
        return values

    def lists(self, name: str, separator: str) -> pl.Series:
        """A column of lists, as List(String); text is split at the separator, empty elements are dropped."""
        values = self.column(name)
        if values.dtype in (pl.String, pl.Null):  # a column without any value has no type of its own
            values = values.cast(pl.String).str.split(separator)
        elif isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        inner = getattr(values.dtype, "inner", None)
        if not isinstance(values.dtype, pl.List) or not isinstance(inner, pl.DataType) or inner.is_nested() or inner == pl.Binary:
            raise DataError(f"{self.path}: column {name} is {values.dtype}; a list needs lists, or text with a separator")
        return self._cells(name, lists_of, values)

    def vectors(self, name: str, length: int, separator: str) -> pl.Series:
        """A column of vectors, as List(Float64): lists of numbers, or text with a separator; a cell may have none.

        Raises:
            RowError: a cell has another number of numbers, or one that is not finite.
        """
        values = self.column(name)
        if values.dtype == pl.String:
            values = values.replace("", None).str.split(separator).list.eval(pl.element().str.strip_chars())
        elif isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        if values.dtype == pl.Null:
            return values.cast(pl.List(pl.Float64))
        if not isinstance(values.dtype, pl.List):
            raise DataError(f"{self.path}: column {name} is {values.dtype}; a vector needs lists of numbers, or text with a separator")
        vectors = values.cast(pl.List(pl.Float64), strict=False)
        self.refuse(name, ~is_vector(vectors, length), f"a vector of {length} finite numbers that fit float32")
        return vectors

    def instants(self, name: str, unit: str = "s", formats: Sequence[str] = ()) -> pl.Series:
        """A column of times, as microseconds since 1970: text in one of the formats, where there are any; else numbers in `unit`,
        ISO 8601 text (UTC where it names no zone), or times.

        Raises:
            RowError: a row has no time, or all numbers look like times that are written otherwise.
        """
        values = self.column(name)
        self.refuse(name, times.cut(values), f"a time in full: {times.CUT}")
        if isinstance(values.dtype, pl.Datetime | pl.Date):
            instants = values.cast(pl.Datetime("us")).dt.epoch("us")
            wanted = "a time from 1970 to 9999"
        elif formats:
            instants = times.from_formats(self.text(name), formats)
            wanted = f"a time from 1970 to 9999 written as {' or '.join(formats)}"
        else:
            numbers = self._floats(name)
            instants = times.from_numbers(values, unit)
            if values.dtype == pl.String:
                instants = pl.select(pl.coalesce(instants, times.from_iso(values.set(numbers.is_not_null(), None)))).to_series()
            hint = times.looks_like(values.zip_with(numbers.is_not_null(), pl.Series([None], dtype=values.dtype)), unit)
            wanted = f"a time from 1970 to 9999: a number in {unit} since 1970, or ISO 8601 text"
            wanted += f"; {hint}" if hint else "; ts_format says how other text is written"
            if hint:
                self.refuse(name, instants.is_not_null(), f"a time of our days, not {times.span(instants)}; {hint}")
        self.refuse(name, ~instants.is_between(0, times.LATEST * times.SECOND), wanted)
        return instants
