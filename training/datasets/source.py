"""Tables as others publish them: text or parquet, with the line of every row, so that an error can say where.

Knows nothing about any one data set, nor about the prepared format.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TextIO

import numpy as np
import polars as pl

from features.schema import FLOAT32_MAX
from features.vocabulary import Ids

from .prepared import DataError, columns_of, read_parquet
from .texts import CellError, lists_of, texts_of

CHUNK = 20_000
"""Rows held as Python texts at a time."""
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
LATEST = 253_402_300_799
"""The last second of the year 9999: a later time is one in another unit."""
ISO_FORMATS = ("%+", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d")

Rows = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class Table:
    """Columns of a source and where each row stood. Empty text counts as missing in every accessor."""

    path: Path
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

    def take(self, order: Ids) -> "Table":
        """The rows, in that order."""
        return Table(self.path, self.frame[order], self.lines[order], self.unit)

    def refuse(self, name: str, wrong: pl.Series, expected: str) -> None:
        """Raise for the first wrong row; null counts as wrong.

        Raises:
            DataError: a row is wrong; the message names file, line, column and value.
        """
        rows = wrong.fill_null(True).arg_true()
        if len(rows):
            row = rows[0]
            raise DataError(f"{self.path}, {self.unit} {self.lines[row]}: {name} is {self.frame[name][row]!r}; expected {expected}")

    def whole(self, name: str, low: int, high: int) -> pl.Series:
        """A column of whole numbers, as Int64."""
        values = self.column(name).cast(pl.Int64, strict=False)
        self.refuse(name, ~values.is_between(low, high), f"a whole number from {low} to {high}")
        return values

    def labels(self, name: str) -> pl.Series:
        """A column of clicks, as Int8 `label`."""
        values = self._floats(name)
        self.refuse(name, ~values.is_in([0.0, 1.0]), "0 or 1")
        return values.cast(pl.Int8).alias("label")

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
        return values.cast(pl.Float64, strict=False)

    def text(self, name: str) -> pl.Series:
        """A column as the texts that are looked up (`features/values.py`).

        Raises:
            DataError: there is none of that name, or a cell has no one text.
        """
        values = self.column(name)
        if values.dtype.is_nested() or values.dtype == pl.Binary:
            raise DataError(f"{self.path}: column {name} is {values.dtype}; a category needs text or whole numbers")
        return self._told(name, texts_of, values)

    def _told(self, name: str, texts: Callable[[pl.Series], pl.Series], values: pl.Series) -> pl.Series:
        try:
            return texts(values)
        except CellError as error:
            cell = self.frame[name][error.row]
            told = cell.to_list() if isinstance(cell, pl.Series) else cell
            where = f"{self.path}, {self.unit} {self.lines[error.row]}"
            raise DataError(f"{where}: {name} is {told!r}; expected {error.expected}") from error

    def required(self, name: str) -> pl.Series:
        """As `text`, of which every row must have some."""
        values = self.text(name)
        self.refuse(name, values.is_null(), "some text")
        return values

    def lists(self, name: str, separator: str) -> pl.Series:
        """A column of lists, as List(String); text is split at the separator, empty elements are dropped."""
        values = self.column(name)
        if values.dtype == pl.String:
            values = values.str.split(separator)
        elif isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        inner = getattr(values.dtype, "inner", None)
        if not isinstance(values.dtype, pl.List) or not isinstance(inner, pl.DataType) or inner.is_nested() or inner == pl.Binary:
            raise DataError(f"{self.path}: column {name} is {values.dtype}; a list needs lists, or text with a separator")
        return self._told(name, lists_of, values)

    def instants(self, name: str, unit: str = "s") -> pl.Series:
        """A column of times, as microseconds since 1970: numbers in `unit`, ISO 8601 text (UTC where it names no zone), or times."""
        values = self.column(name)
        if isinstance(values.dtype, pl.Datetime | pl.Date):
            instants = values.cast(pl.Datetime("us")).dt.epoch("us")
        else:
            numbers = self._floats(name)
            is_iso = values.dtype == pl.String and bool((numbers.is_null() & values.is_not_null()).any())
            instants = _iso(values) if is_iso else _scaled(numbers, MICROSECONDS[unit])
        wanted = f"a time from 1970 to 9999: a number in {unit} since 1970, or ISO 8601 text"
        self.refuse(name, ~instants.is_between(0, LATEST * MICROSECONDS["s"]), wanted)
        return instants


def _scaled(numbers: pl.Series, factor: int) -> pl.Series:
    return (numbers * factor).round().cast(pl.Int64, strict=False)


def _iso(texts: pl.Series) -> pl.Series:
    values = pl.col("t").str.replace(" ", "T", literal=True)
    parsed = [values.str.to_datetime(f, time_unit="us", time_zone="UTC", strict=False) for f in ISO_FORMATS]
    return texts.alias("t").to_frame().select(pl.coalesce(parsed))["t"].dt.epoch("us")


def read_parquet_table(path: Path, keep: Sequence[str]) -> Table:
    """The columns that are needed of a parquet file.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    _require_columns(path, columns_of(path), keep)
    frame = read_parquet(path, keep)
    return Table(path, frame, np.arange(1, len(frame) + 1), "row")


def read_csv(path: Path, separator: str = ",", keep: Sequence[str] | None = None) -> Table:
    """A CSV with a header, all of it text; `keep` names the columns that are needed.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row of another width than its header.
    """
    with _opened(path, "utf-8-sig") as file:
        rows = _csv_rows(file, separator)
        _, header = next(rows, (1, []))
        if len(set(header)) != len(header):
            raise DataError(f"{path}: the header names a column twice: {', '.join(header)}")
        _require_columns(path, header, keep or ())
        return _whole(path, _chunks(path, rows, header, header if keep is None else keep, repeat(CHUNK)))


def read_lines(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> Table:
    """A text without header or quoting, whose rows are split at the separator, all of it text.

    Raises:
        DataError: the file cannot be read, or a line has another number of columns.
    """
    return _whole(path, line_chunks(path, separator, columns, repeat(CHUNK), encoding))


def within(source: Path, name: str) -> Path:
    """The file of that name in the folder `source`, or `source` itself where it is no folder."""
    try:
        return source / name if source.is_dir() else source
    except OSError:
        return source  # reading it says what is wrong


def count_lines(path: Path) -> int:
    """How many lines of a text hold anything.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened(path, "utf-8") as file:
        return sum(1 for line in file if line.rstrip("\r\n"))


def line_chunks(path: Path, separator: str, columns: Sequence[str], sizes: Iterable[int], encoding: str = "utf-8") -> Iterator[Table]:
    """As `read_lines`, some rows at a time, as many as `sizes` says, for a text larger than memory."""
    with _opened(path, encoding) as file:
        rows = ((number, line.split(separator)) for number, text in enumerate(file, 1) if (line := text.rstrip("\r\n")))
        yield from _chunks(path, rows, columns, columns, sizes)


def _require_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    for name in needed:
        if name not in columns:
            raise DataError(f"{path}: column {name} is missing; it has {', '.join(columns) or 'none at all'}")


def _csv_rows(file: TextIO, separator: str) -> Rows:
    reader = csv.reader(file, delimiter=separator, strict=True)
    line = 1
    for fields in reader:
        if fields:
            yield line, fields
        line = reader.line_num + 1


def _chunks(path: Path, rows: Rows, columns: Sequence[str], keep: Sequence[str], sizes: Iterable[int]) -> Iterator[Table]:
    schema = dict.fromkeys(keep, pl.String())
    for size in sizes:
        if not (chunk := list(islice(rows, size))):
            return
        for line, fields in chunk:
            if len(fields) != len(columns):
                raise DataError(f"{path}, line {line}: {len(fields)} columns; expected {len(columns)}: {', '.join(columns)}")
        values = dict(zip(columns, zip(*(fields for _, fields in chunk), strict=True), strict=True))
        frame = pl.DataFrame({name: values[name] for name in keep}, schema=schema)
        yield Table(path, frame, np.fromiter((line for line, _ in chunk), np.int64, len(chunk)))


def _whole(path: Path, chunks: Iterator[Table]) -> Table:
    parts = list(chunks)
    if not parts:
        raise DataError(f"{path} is empty: it has no rows")
    return Table(path, pl.concat([part.frame for part in parts]), np.concatenate([part.lines for part in parts]))


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {_undecodable(path, encoding)}: not text in {encoding.removesuffix('-sig')}") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV: {error}") from error


def _undecodable(path: Path, encoding: str) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0
