"""Reads tables: CSV with a header, JSON lines or parquet, of one file or of the parts of a folder; and texts without a header.

A part is read at a time, and keeps its own types: a column may be of whole numbers in one and of fractions in the next.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import polars as pl

from .files import SourceFile, one_file, source_files
from .json_lines import has, objects, paths, series, value_of, wrong
from .prepared import DataError, columns_of, read_parquet
from .rows import Dialect, Rows, csv_rows, split_rows
from .source import Table, brief

CHUNK = 20_000
"""Rows held as Python texts at a time."""
PLAIN = Dialect()
SEPARATORS = (",", "\t", ";", "|")
"""Of columns, where a person has not said."""
NUMBER = r"[-+]?[0-9.:]+(e[-+]?[0-9]+)?"


def read_tables(source: Path, keep: Sequence[str], dialect: Dialect = PLAIN) -> Iterator[Table]:
    """The columns that are needed of a source, some rows at a time, part by part in the order of their names; `-` is standard input.

    Raises:
        DataError: a file cannot be read or lacks a column, or there is no row in any.
    """
    with source_files(source) as files:
        rows = 0
        for file in files:
            for table in _read(file, keep, dialect, alone=len(files) == 1):
                rows += len(table)
                yield table
        if not rows:
            raise DataError(f"{files[0].name if len(files) == 1 else source} is empty: it has no rows")


def first_rows(source: Path) -> tuple[Table, Dialect]:
    """All columns of the first rows of a source, and how it is written if it is a CSV; quotes are text where they do not fit.

    Raises:
        DataError: as `read_tables` does, or there is no header.
    """
    with source_files(source) as files:
        for file in files:
            dialect = Dialect(max(SEPARATORS, key=file.start().split(b"\n")[0].decode("utf-8", "replace").count))
            columns = _columns(file, dialect)
            if any(re.fullmatch(NUMBER, name) for name in columns) or columns.count("") > 1:
                row = ", ".join(columns[:4])
                raise DataError(f"{file.name}: the first line looks like a row ({row} …); write a header, with a name for each column")
            try:
                table = next(_read(file, [*columns, *file.partitions], dialect, alone=True), None)
            except DataError:
                if file.form != "csv" or columns != _columns(file, plain := replace(dialect, quote="")):
                    raise
                dialect, table = plain, next(_read(file, [*columns, *file.partitions], plain, alone=True), None)
            if table:
                return replace(table, frame=table.frame.head(CHUNK), lines=table.lines[:CHUNK]), dialect
        raise DataError(f"{source} is empty: it has no rows")


def _columns(file: SourceFile, dialect: Dialect) -> list[str]:
    """The names of a part's columns; of JSON lines those of the first objects, `user.age` where `user` is an object."""
    if file.form == "parquet":
        return columns_of(file.path)
    with file.text() as lines:
        if file.form == "csv":
            return next(csv_rows(file, lines, dialect), (1, list[str]()))[1]
        found = dict[str, None]()
        for _, document in islice(objects(file, lines), CHUNK):
            found |= dict.fromkeys(paths(document))
        return list(found)


def read_csv(path: Path, keep: Sequence[str]) -> Table:
    """A CSV with a header, all of it text; `keep` names the columns that are needed. It may be compressed.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a row of another width than its header.
    """
    return _whole(path, _read_csv(one_file(path), keep, PLAIN))


def read_lines(path: Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> Table:
    """A text without header or quoting, whose rows are split at the separator, all of it text. It may be compressed.

    Raises:
        DataError: the file cannot be read, or a line has another number of columns.
    """
    return _whole(path, line_chunks(one_file(path), separator, columns, repeat(CHUNK), encoding))


def line_chunks(file: SourceFile, separator: str, columns: Sequence[str], sizes: Iterable[int], encoding: str = "utf-8") -> Iterator[Table]:
    """As `read_lines`, some rows at a time, as many as `sizes` says, for a text larger than memory."""
    with file.text(encoding) as lines:
        yield from _chunks(file, split_rows(lines, separator), columns, columns, sizes)


def count_lines(file: SourceFile) -> int:
    """How many lines of a text hold anything.

    Raises:
        DataError: the file cannot be read.
    """
    with file.text("utf-8") as lines:
        return sum(1 for line in lines if line.rstrip("\r\n"))


def _read(file: SourceFile, keep: Sequence[str], dialect: Dialect, *, alone: bool) -> Iterator[Table]:
    constants = {name: value for name, value in file.partitions.items() if name in keep}
    twice = [name for name in constants if name in _columns(file, dialect)] if constants else []
    if twice:
        raise DataError(f"{file.name}: {twice[0]} is a column of the file, and the name of its folder says it too: rename one of them")
    wanted = [name for name in keep if name not in constants]
    if file.form == "parquet":
        tables = _read_parquet(file, wanted)
    elif file.form == "json":
        tables = _read_json(file, wanted)
    else:
        tables = _read_csv(file, wanted, dialect, alone=alone)
    for table in tables:
        yield replace(table, frame=table.frame.with_columns(pl.lit(value).alias(name) for name, value in constants.items()))


def _read_parquet(file: SourceFile, keep: Sequence[str]) -> Iterator[Table]:
    _require_columns(file, columns_of(file.path), keep)
    frame = read_parquet(file.path, keep)
    if len(frame):
        yield Table(file.name, frame, np.arange(1, len(frame) + 1), "row")


def _read_csv(file: SourceFile, keep: Sequence[str], dialect: Dialect, *, alone: bool = True) -> Iterator[Table]:
    """A part among others may be empty, without even a header."""
    with file.text() as lines:
        rows = csv_rows(file, lines, dialect)
        _, header = next(rows, (1, []))
        if len(set(header)) != len(header):
            raise DataError(f"{file.name}: the header names a column twice: {brief(', '.join(header))}")
        if header or alone:
            _require_columns(file, header, keep, _other_separator(header, dialect))
        yield from _chunks(file, rows, header, keep, repeat(CHUNK))


def _read_json(file: SourceFile, keep: Sequence[str]) -> Iterator[Table]:
    """A column may be missing in many objects, but not in all."""
    absent, seen, listed = set(keep), dict[str, None](), dict[str, bool]()
    with file.text() as lines:
        found = objects(file, lines)
        while chunk := list(islice(found, CHUNK)):
            numbers, documents = zip(*chunk, strict=True)
            absent -= {name for name in absent if any(has(document, name) for document in documents)}
            if absent:
                seen |= dict.fromkeys(chain.from_iterable(documents))
            columns = {name: [value_of(document, name) for document in documents] for name in keep}
            _refuse_nested(file, numbers, columns, listed)
            frame = pl.DataFrame([series(name, values) for name, values in columns.items()])
            yield Table(file.name, frame, np.fromiter(numbers, np.int64, len(numbers)))
    _require_columns(file, [name for name in dict.fromkeys((*seen, *keep)) if name not in absent], keep)


def _refuse_nested(file: SourceFile, numbers: Sequence[int], columns: dict[str, list[object]], listed: dict[str, bool]) -> None:
    """Refuse what would become one text that nobody means: objects, lists of lists, lists in some rows and not in others.

    `listed` keeps which columns had lists in the rows before.
    """
    for name, values in columns.items():
        for number, value in zip(numbers, values, strict=True):
            if found := wrong(value):
                fix = f"; name a value in it, such as {name}.id" if isinstance(value, dict) else ""
                raise DataError(f"{file.name}, line {number}: {name} is {found}{fix}")
            if value is not None and listed.setdefault(name, isinstance(value, list)) != isinstance(value, list):
                raise DataError(f"{file.name}, line {number}: {name} is a list in some rows and not in others; write it one way in all")


def _require_columns(file: SourceFile, columns: Collection[str], needed: Sequence[str], fix: str = "") -> None:
    absent = [name for name in needed if name not in columns]
    if absent:
        more = f"; so are {', '.join(absent[1:])}" if absent[1:] else ""
        raise DataError(f"{file.name}: column {absent[0]} is missing; it has {brief(', '.join(columns)) or 'none at all'}{more}{fix}")


def _other_separator(header: Sequence[str], dialect: Dialect) -> str:
    """What to say of a header that is one column, with a character in it that separates columns elsewhere."""
    found = next((each for each in ",;\t|" if len(header) == 1 and each in header[0]), None)
    return f"; say separator = {json.dumps(found)} in [table] if that is between its columns" if found and dialect.fix else ""


def _chunks(file: SourceFile, rows: Rows, columns: Sequence[str], keep: Sequence[str], sizes: Iterable[int]) -> Iterator[Table]:
    schema = dict.fromkeys(keep, pl.String())
    for size in sizes:
        if not (chunk := list(islice(rows, size))):
            return
        for line, fields in chunk:
            if len(fields) != len(columns):
                raise DataError(f"{file.name}, line {line}: {len(fields)} columns; expected {len(columns)}: {brief(', '.join(columns))}")
        values = dict(zip(columns, zip(*(fields for _, fields in chunk), strict=True), strict=True))
        frame = pl.DataFrame({name: values[name] for name in keep}, schema=schema)
        yield Table(file.name, frame, np.fromiter((line for line, _ in chunk), np.int64, len(chunk)))


def _whole(path: Path, chunks: Iterator[Table]) -> Table:
    parts = list(chunks)
    if not parts:
        raise DataError(f"{path} is empty: it has no rows")
    return Table(parts[0].path, pl.concat([part.frame for part in parts]), np.concatenate([part.lines for part in parts]))
