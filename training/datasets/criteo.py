"""Criteo's display-ad log: train.txt, tab-separated without a header: label, 13 numbers I1…I13, 26 hashed categories C1…C26.

The log has no times and no ids, and nobody outside Criteo knows which columns describe the user, the page or the ad. All are
put on the ad side: that claims nothing to be shared by the candidates of a request, which no column is known to be. `user_id`
and `ad_id` are "" throughout and no features. The rows keep their order (Criteo published the log in order of time): the first
80 % train, the next 10 % validate, the last 10 % test.

A category seen once in the training split is unknown (`min_count = 2`), which also gives the unknown value rows to learn from.
The text is read piece by piece: the whole log of 45 million rows needs no more memory than the sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from features.schema import parse_schema

from .files import STANDARD_INPUT, SourceFile, is_folder, one_file, source_files
from .prepared import Progress, by_order, pieces, silent, write_splits, write_tables, writing
from .source import Table
from .tables import count_lines, line_chunks

NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
SCHEMA = parse_schema(
    'name = "criteo"\n'
    + "".join(f'[ad.{name}]\nkind = "number"\ntransform = "log"\n' for name in NUMBERS)
    + "".join(f'[ad.{name}]\nkind = "category"\nmin_count = 2\n' for name in CATEGORIES)
)


def prepare(source: Path, out: Path, progress: Progress = silent) -> dict[str, int]:
    """Prepare the file `source`, or the train.txt of the folder `source`, compressed or not, as the data set `out`; rows by split.

    Raises:
        DataError: the file is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder, _file(source) as file:
        splits = by_order(count_lines(file))
        sizes = (len(piece) for rows in splits.values() for piece in pieces(rows))
        tables = line_chunks(file, "\t", ("label", *NUMBERS, *CATEGORIES), sizes)
        write_tables(folder, SCHEMA)
        return write_splits(folder, splits, lambda _: _rows(next(tables)), progress)


@contextmanager
def _file(source: Path) -> Iterator[SourceFile]:
    if source == STANDARD_INPUT:
        with source_files(source) as files:
            yield files[0]
    else:
        yield one_file(source / "train.txt" if is_folder(source) else source)


def _rows(table: Table) -> pl.DataFrame:
    numbers = {f"ad.{name}": table.numbers(name) for name in NUMBERS}
    categories = {f"ad.{name}": table.text(name) for name in CATEGORIES}
    frame = pl.DataFrame({"label": table.labels("label"), **numbers, **categories})
    return frame.with_columns(user_id=pl.lit(""), ad_id=pl.lit(""))
