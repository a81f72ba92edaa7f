"""A prepared data set on disk: `schema.toml`, `{train,valid,test}/*.parquet`, and the tables `ads.parquet` and `users.parquet`.

`data.toml` says how its rows were sampled: `negative_sampling` is the share of the non-clicks that were kept, 1 where it says nothing.

Columns of a split, values raw (encoding happens in `features/` when a model is trained):

    label     Int8          0 or 1
    user_id   String        ad_id String
    ts        Int64         seconds since 1970; optional
    history   List(String)  ad ids of the behaviours before the row, oldest first; where the schema has a history
    history_ts List(Int64)  when these behaviours were, in seconds since 1970, null where that is not known (it counts as 1970 then);
                            in a log List(Float64); needed, as `ts` is, where the schema has `[history] ages`
    weight    Float64       what the row weighs in training, at least 0; optional
    conversion, or another name: Int8  0, 1 or null, the labels of a further head, where one is trained (`--set heads=click-conversion`)
    conversion_maturity Float64  how likely a conversion that is to come would have come by now, above 0, at most 1; optional
    user.X, context.X, ad.X: String (category), List(String) (list) or Float64 (number); null is missing

A `user.X` or `ad.X` that a split lacks is looked up in `users.parquet` (user_id, user.X …) or `ads.parquet` (ad_id, ad.X …).
Behaviours take their features from `ads.parquet`. A split may have further columns, which training leaves alone.

`histories.parquet` (user_id, history List(String), history_ts List(Int64)) is optional: each user's behaviours after the whole
log, oldest first, with their times. `states.py` reads it.
"""

import math
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import polars as pl
import tomli_w

from features.errors import AdrankError
from features.files import read_toml
from features.schema import FLOAT32_MAX, Field, Schema, SchemaError, parse_schema, sampling_in

from .memory import Memory
from .texts import plain_values, unless_missing

SPLITS = ("train", "valid", "test")
FACTS = "data.toml"
MANIFEST = "manifest.json"
"""What a bundle has, and no data set."""
SHARES = (0.8, 0.1, 0.1)
ROWS_PER_FILE = 100_000
DTYPES: dict[str, pl.DataType] = {
    "category": pl.String(),
    "list": pl.List(pl.String()),
    "number": pl.Float64(),
    "vector": pl.List(pl.Float64()),
}

COLUMNS = ("label", "user_id", "ad_id", "ts", "history", "history_ts", "weight", "click")
"""Names that no further head of a network can have: its labels are in a column of its name."""
HEAD = re.compile(r"[a-z][a-z0-9_]{0,40}")

Progress = Callable[[int, int], None]
"""Told how many rows of a preparation are written, and how many there are."""


class DataError(AdrankError, RuntimeError):
    """A data set cannot be read or prepared; the message says where and what was wrong."""


def wrong_head(head: str) -> str:
    """Why there can be no head of this name beside the click, "" where there can."""
    if head in COLUMNS or not HEAD.fullmatch(head):
        return f"{head!r} cannot be the name of a head: small letters, digits and _, a letter first, and none of {', '.join(COLUMNS)}"
    return ""


def silent(_done: int, _total: int) -> None:
    """The progress of a preparation that nobody watches."""


@dataclass(frozen=True)
class Prepared:
    """A prepared data set that has been opened and whose columns fit its schema."""

    folder: Path
    schema: Schema
    negative_sampling: float = field(default=1.0, kw_only=True)
    """The share of non-clicks that were kept; exported probabilities are corrected for it."""
    memory: Memory = field(default=Memory(), kw_only=True, compare=False)
    """What a run that reads it may use."""

    looked_up: ClassVar[tuple[str, ...]] = ("user", "ad")
    """Sides of which rows may lack what a table has."""

    def files(self, split: str) -> list[Path]:
        """The parquet files of a split, in order.

        Raises:
            DataError: the split has none.
        """
        files = sorted((self.folder / split).glob("*.parquet"))
        if not files:
            raise DataError(f"{self.folder / split} has no .parquet file; prepare the data set again, or choose another split")
        return files

    def frames(self, split: str, _more: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """The rows of a split, file by file and at most `ROWS_PER_FILE` at once, checked, with all of their columns.

        Raises:
            DataError: a file cannot be read, lacks a column, or holds a label that is not 0 or 1.
        """
        for path in self.files(split):
            for start in range(0, max(rows_in(path), 1), ROWS_PER_FILE):
                frame = read_parquet(path, start=start)
                check_rows(frame, self.schema, path)
                yield as_said(frame, self.schema)

    def slice(self, split: str, more: Sequence[str]) -> Iterator[pl.DataFrame]:
        """As `frames`, with `more` columns where the rows have them; those of a log may be none."""
        return self.frames(split, more)

    def sources(self, split: str) -> list[Path]:
        """All files that the rows of a split come from."""
        return [*self.files(split), *(path for side in ("user", "ad") if (path := self.folder / f"{side}s.parquet").exists())]

    @property
    def window(self) -> tuple[object, ...]:
        """What the rows of a split follow from beside their files."""
        return ()

    @property
    def span(self) -> tuple[float, float]:
        """When rows may begin, and when they end, in seconds since 1970."""
        return (-math.inf, math.inf)

    @property
    def held_out_from(self) -> float | None:
        """When test begins, in seconds since 1970; None where that is not known."""
        return None

    @property
    def padding(self) -> tuple[str, ...]:
        """Behaviours that are none."""
        return self.schema.history_padding

    def table(self, side: str) -> pl.DataFrame | None:
        """`ads.parquet` for "ad", `users.parquet` for "user"; None where the data set has no such table."""
        return _keyed(self.folder / f"{side}s.parquet", f"{side}_id", self.schema)

    def lookups(self, *sides: str) -> dict[str, pl.DataFrame | None]:
        """The tables that have what rows lack of these sides."""
        return {side: self.table(side) for side in sides if side in self.looked_up}

    def row_columns(self, path: Path) -> set[str]:
        """The columns that the rows of a file have."""
        return set(columns_of(path))

    def table_columns(self, side: str) -> Collection[str]:
        """The columns of the table of users or ads; none where there is no such table."""
        path = self.folder / f"{side}s.parquet"
        return columns_of(path) if path.exists() else ()

    def versions(self) -> pl.DataFrame | None:
        """The ads that rows and behaviours name by their `key`, with `ad.…`; None where there is no table of them."""
        ads = self.table("ad")
        return None if ads is None else ads.rename({"ad_id": "key"}).with_columns(ad_id="key")

    def behaviour_keys(self, _frame: pl.DataFrame, kept: pl.Series) -> pl.Series:
        """The keys in `versions` of the behaviours that are kept of each row, one after the other."""
        return kept.explode().drop_nulls()

    def ids_of(self, keys: list[str]) -> list[str]:
        """The ids of ads that `versions` lacks, by their keys; raises `DataError` where it should have them."""
        return keys

    def known(self, _frame: pl.DataFrame) -> pl.Series | None:
        """Whether each row's ad was known when it was served; None where rows are not what was served."""
        return None

    def histories(self) -> pl.DataFrame | None:
        """`histories.parquet`; None where the data set has no such table."""
        path = self.folder / "histories.parquet"
        frame = _keyed(path, "user_id", self.schema)
        if frame is None:
            return None
        check_columns(frame, {"history": pl.List(pl.String())}, path)
        if "history_ts" in frame.columns:
            check_columns(frame, {"history_ts": pl.List(pl.Int64())}, path)
            if (frame["history"].list.len() != frame["history_ts"].list.len()).any():
                raise DataError(f"{path}: history and history_ts differ in length")
        return frame


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared data set.

    Raises:
        DataError: the folder is not one.
    """
    schema, sampling = read_schema(folder), read_facts(folder)
    if (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is not a prepared data set but a bundle, a version of a model: name the data that it is to be used with")
    return Prepared(folder, schema, negative_sampling=1.0 if sampling is None else sampling)


def read_schema(folder: Path) -> Schema:
    """The schema of a data set.

    Raises:
        DataError: the folder has none.
    """
    try:
        return parse_schema((folder / "schema.toml").read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a prepared data set: {_seems(folder)}; adrank prepare makes one, adrank join a log") from error
    except OSError as error:
        raise DataError(f"{folder} is not a prepared data set: cannot read its schema.toml: {error.strerror or error}") from error
    except (UnicodeDecodeError, SchemaError) as error:
        raise DataError(f"{folder} is not a prepared data set: {folder / 'schema.toml'}: {error}") from error


def _seems(folder: Path) -> str:
    """What a folder without a schema seems to be."""
    if not folder.is_dir():
        return "there is no such folder"
    for inside in sorted(folder.glob("*")):
        if (inside / "schema.toml").is_file():
            kind = "a model" if (inside / MANIFEST).is_file() else "a folder of data sets"
            return f"it has no schema.toml, but {inside.name} in it has one, so this seems to be {kind}"
    return "it has no schema.toml"


def read_facts(folder: Path) -> float | None:
    """What `data.toml` says of how the rows were sampled; None where there is none, or it does not say.

    Raises:
        DataError: it cannot be read, or says something impossible.
    """
    path = folder / FACTS
    if not path.exists():
        return None
    document = read_toml(path, DataError)
    if rest := sorted(set(document) - {"negative_sampling"}):
        raise DataError(f"{path}: unknown entries {rest}; known is negative_sampling")
    try:
        return sampling_in(document)
    except SchemaError as error:
        raise DataError(f"{path}: {error}") from error


def as_said(frame: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Rows with their values as `values_as_said` gives them, and "" for a user where the schema says that the id means none."""
    frame = values_as_said(frame, schema)
    if not schema.nobody:
        return frame
    return frame.with_columns(user_id=pl.when(pl.col("user_id").is_in(schema.nobody)).then(pl.lit("")).otherwise(pl.col("user_id")))


def values_as_said(frame: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """A frame with its values as they are looked up, and nothing where the schema says that a value means that."""
    frame = plain_values(frame)
    fields = [field for field in schema.fields if field.missing_values and frame.schema.get(field.path) == DTYPES[field.kind]]
    return frame.with_columns(unless_missing(frame[field.path], field) for field in fields)


def column_of(frame: pl.DataFrame, field: Field) -> pl.Series | None:
    """A field's column, or None where the frame has none; identities are the frame's own `user_id` and `ad_id`, "" being missing.

    Raises:
        DataError: the column is of another type than the field's kind says.
    """
    name = field.name if field.name in ("user_id", "ad_id") else field.path
    if name not in frame.columns:
        return None
    column = frame[name]
    if column.dtype != DTYPES[field.kind]:
        raise DataError(f"column {name} is {column.dtype}; a {field.kind} needs {DTYPES[field.kind]}")
    return column.replace("", None) if name in ("user_id", "ad_id") else column


def read_parquet(path: Path, columns: Sequence[str] | None = None, start: int | None = None) -> pl.DataFrame:
    """A parquet file, or the named columns of it, or `ROWS_PER_FILE` rows from `start` on.

    Raises:
        DataError: it cannot be read as one, or lacks a column.
    """
    try:
        if start is not None:
            return pl.scan_parquet(path, glob=False).slice(start, ROWS_PER_FILE).collect()
        return pl.read_parquet(path, columns=None if columns is None else list(columns), glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _keyed(path: Path, key: str, schema: Schema) -> pl.DataFrame | None:
    if not path.exists():
        return None
    frame = values_as_said(read_parquet(path), schema)
    check_columns(frame, {key: pl.String()}, path)
    if frame[key].is_duplicated().any() or frame[key].has_nulls():
        raise DataError(f"{path}: {key} has duplicates or gaps; each row is one {key.removesuffix('_id')}")
    return frame


def columns_of(path: Path) -> list[str]:
    """The names of a parquet file's columns.

    Raises:
        DataError: it cannot be read as one.
    """
    try:
        return list(pl.read_parquet_schema(path))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def rows_in(path: Path) -> int:
    """How many rows a parquet file has.

    Raises:
        DataError: it cannot be read as one.
    """
    try:
        return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def check_rows(frame: pl.DataFrame, schema: Schema, path: Path) -> None:
    """Check the rows of a file against the schema.

    Raises:
        DataError: a column is missing or of another type, a label is not 0 or 1, or a number is not finite.
    """
    check_columns(frame, {"label": pl.Int8(), "user_id": pl.String(), "ad_id": pl.String()}, path)
    if frame["ad_id"].has_nulls():
        raise DataError(f'{path}: {frame["ad_id"].null_count():,} rows have no ad_id; leave them out, or write "" where no row has one')
    if schema.history_length:
        check_columns(frame, {"history": pl.List(pl.String())}, path)
    if schema.history_ages:
        _check_times(frame, path)
    check_columns(frame, {f.path: DTYPES[f.kind] for f in schema.fields if f.path in frame.columns}, path)
    for f in schema.fields:
        if f.kind == "number" and f.path in frame.columns and (frame[f.path].fill_nan(None).abs() > FLOAT32_MAX).any():
            raise DataError(f"{path}: column {f.path} holds a number that is not finite, or too large for float32")
        if f.kind == "vector" and f.path in frame.columns and not is_vector(frame[f.path], f.length).all():
            raise DataError(f"{path}: column {f.path} holds something else than vectors of {f.length} finite numbers that fit float32")
    if "weight" in frame.columns:
        check_columns(frame, {"weight": pl.Float64()}, path)
        if not frame["weight"].is_between(0, FLOAT32_MAX).fill_null(False).all():
            raise DataError(f"{path}: column weight, what a row weighs in training, holds something that is no number of at least 0")
    bad = frame.filter(pl.col("label").is_null() | ~pl.col("label").is_in([0, 1]))
    if len(bad):
        raise DataError(f"{path}: {len(bad)} labels are not 0 or 1, the first is {bad['label'][0]}")


def is_vector(column: pl.Series, length: int) -> pl.Series:
    """Which lists of numbers are vectors of that length, or none at all."""
    fits = pl.element().abs() <= FLOAT32_MAX  # that of NaN is larger
    whole = (pl.col("v").list.len() == length) & pl.col("v").list.eval(fits.fill_null(value=False)).list.all()
    return column.alias("v").to_frame().select(pl.col("v").is_null() | whole).to_series()


def _check_times(frame: pl.DataFrame, path: Path) -> None:
    """Check the times that ages are made of; that they are there has been checked, see `fields.py`."""
    if not {"ts", "history_ts"} <= set(frame.columns):
        return
    if not frame.schema["ts"].is_numeric() or frame["ts"].has_nulls():
        raise DataError(f"{path}: column ts has gaps or is no number, and the ages of behaviours are counted from it")
    if frame.schema.get("history_ts") != pl.List(pl.Float64()):  # as a log has them
        check_columns(frame, {"history_ts": pl.List(pl.Int64())}, path)
    dated = frame.filter(pl.col("history_ts").is_not_null())
    if (dated["history"].fill_null([]).list.len() != dated["history_ts"].list.len()).any():
        raise DataError(f"{path}: history and history_ts differ in length")


def check_columns(frame: pl.DataFrame, columns: Mapping[str, pl.DataType], path: Path) -> None:
    """Check that a file has columns of these types.

    Raises:
        DataError: one is missing or of another type.
    """
    for name, dtype in columns.items():
        if name not in frame.columns:
            raise DataError(f"{path}: column {name} is missing; it has {', '.join(frame.columns)}")
        if frame[name].dtype != dtype:
            raise DataError(f"{path}: column {name} is {frame[name].dtype}, expected {dtype}")


def check_name(out: Path) -> None:
    """That polars can write there.

    Raises:
        DataError: the path has bytes that are no UTF-8.
    """
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(out.absolute())!a} is not UTF-8; name another place to write to") from error


@contextmanager
def writing(out: Path, mode: int = 0o755) -> Iterator[Path]:
    """A staging folder that becomes `out` by one rename when the block ends well, and is gone when it does not.

    Raises:
        DataError: `out` exists already and holds something, or cannot be written.
    """
    check_name(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} already exists; name a new folder or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = out.parent / f".{out.name}-{secrets.token_hex(4)}"
        staging.mkdir(mode)  # less what the umask takes away
        try:
            yield staging
            staging.replace(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; nothing was written") from error


def write_table(folder: Path, name: str, table: pl.DataFrame) -> None:
    """Write one parquet file into a (staging) folder.

    Raises:
        OSError: it cannot be written; polars reports a full disk as an error of its own, which `writing` would not know.
    """
    try:
        table.write_parquet(folder / f"{name}.parquet")
    except pl.exceptions.PolarsError as error:
        raise OSError(f"{name}.parquet: {error}") from error


def write_tables(
    folder: Path, schema: Schema, ads: pl.DataFrame | None = None, users: pl.DataFrame | None = None, negative_sampling: float = 1.0
) -> None:
    """Write the schema and the tables of a data set, and how its rows were sampled, into a (staging) folder."""
    (folder / "schema.toml").write_text(schema.to_toml(), "utf-8")
    (folder / FACTS).write_text(tomli_w.dumps({"negative_sampling": negative_sampling}), "utf-8")
    for name, table in (("ads", ads), ("users", users)):
        if table is not None:
            write_table(folder, name, table)


def write_split(folder: Path, split: str, frames: Iterable[pl.DataFrame]) -> int:
    """Write a split's rows, one file a frame; how many rows there were.

    Raises:
        DataError: there was no row.
    """
    (folder / split).mkdir()
    rows = 0
    for i, frame in enumerate(frames):
        write_table(folder / split, f"{i:04}", frame)
        rows += len(frame)
    if not rows:
        raise DataError(f"the {split} split would be empty: there are too few rows to split, or the source is empty")
    return rows


def by_order(rows: int, shares: Sequence[float] = SHARES) -> dict[str, range]:
    """The rows of each split where the first share of the rows trains, the next validates and the last tests."""
    ends = [int(rows * share + 1e-6) for share in (shares[0], shares[0] + shares[1])]
    return dict(zip(SPLITS, map(range, (0, *ends), (*ends, rows)), strict=True))


def pieces(rows: range) -> list[range]:
    """The rows in the pieces that make one file each."""
    return [rows[start : start + ROWS_PER_FILE] for start in range(0, len(rows), ROWS_PER_FILE)]


def write_splits(
    folder: Path, splits: Mapping[str, range], frame: Callable[[range], pl.DataFrame], progress: Progress = silent
) -> dict[str, int]:
    """Write every split, piece by piece, so that only one `frame(rows)` is held at a time; rows by split.

    Raises:
        DataError: a split has no row.
    """
    total = sum(map(len, splits.values()))
    progress(0, total)

    def frames(rows: range, before: int) -> Iterator[pl.DataFrame]:
        for piece in pieces(rows):
            yield frame(piece)
            before += len(piece)
            progress(before, total)

    written: dict[str, int] = {}
    for split, rows in splits.items():
        written[split] = write_split(folder, split, frames(rows, sum(written.values())))
    return written
