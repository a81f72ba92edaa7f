"""The rows of texts, each with the line that it begins on: of a CSV, and of lines that are split at a separator.

A quote that is never closed, or much later, swallows the rows between: a line inside a quoted field that is itself a whole row is refused.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .files import SourceFile
from .prepared import DataError

if TYPE_CHECKING:
    import _csv

Rows = Iterator[tuple[int, list[str]]]
csv.field_size_limit(2**31 - 1)
"""A field may be as long as memory allows: a history of ten thousand ads is."""
CURE = 'if quotes are plain text in this table, say quote = "" in [table]'


@dataclass(frozen=True)
class Dialect:
    """How a CSV is written."""

    separator: str = ","
    quote: str = '"'
    """Around fields that hold separators or ends of line; "" where quotes are text like any other."""
    newlines: bool = False
    """Whether quoted fields may hold lines that look like rows."""
    fix: str = ""
    """What to say of quotes that do not fit."""

    def reader(self, lines: Iterable[str], *, strict: bool = True) -> "_csv.Reader":
        """The records of some lines."""
        if not self.quote:
            return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, strict=strict)
        return csv.reader(lines, delimiter=self.separator, quotechar=self.quote, strict=strict)

    def fields(self, line: str) -> list[str]:
        """The fields of one line, whatever its quotes."""
        return next(self.reader([line], strict=False), [])


def csv_rows(file: SourceFile, lines: Iterable[str], dialect: Dialect) -> Rows:
    """Every record that is not empty, the header too, and the line that it begins on.

    Raises:
        DataError: quotes do not fit, or a quoted field holds what looks like a row.
    """
    held: list[str] = []
    width = 0

    def fed() -> Iterator[str]:
        for line in lines:
            if width > 1 and held and not dialect.newlines and len(dialect.fields(line)) == width:
                raise DataError(_swallowed(file, reader.line_num + 1 - len(held), held, header, dialect))
            held.append(line)
            yield line

    reader = dialect.reader(fed())
    header: list[str] = []
    while True:
        first = reader.line_num + 1
        held.clear()
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(_misquoted(file, first, reader.line_num, error, dialect)) from error
        if record is None:
            return
        if not width:
            header, width = record, len(record)
        if record:
            yield first, record


def _swallowed(file: SourceFile, first: int, held: list[str], header: list[str], dialect: Dialect) -> str:
    column = header[min(len(dialect.fields(held[0])), len(header)) - 1]
    sentence = f"{file.name}, line {first}: a quote that opens in column {column} takes line {first + len(held)} into its field"
    fix = f"; {dialect.fix}; if such lines are part of the text, say quoted_newlines = true" if dialect.fix else ""
    return f"{sentence}, which looks like a row of its own and would be lost{fix}"


def _misquoted(file: SourceFile, first: int, last: int, error: csv.Error, dialect: Dialect) -> str:
    where = f"{file.name}, line {first}" + (f" (its quotes reach to line {last})" if last > first else "")
    rule = "a quoted field begins and ends with a quote, and doubles those inside"
    return f"{where}: not a CSV: {error}; {rule}" + (f"; {dialect.fix}" if dialect.fix else "")


def split_rows(lines: Iterable[str], separator: str) -> Rows:
    """Lines without quoting, split at the separator; empty ones are left out."""
    return ((number, line.split(separator)) for number, text in enumerate(lines, 1) if (line := text.rstrip("\r\n")))
