"""Any table as a click log: a CSV with a header, or a parquet file, read as a schema file says.

The schema file is a `schema.toml` (`features/schema.py`) with one more section, all of whose entries may be left out:

    [table]
    label = "label"                  column of clicks, 0 or 1
    user_id = "user_id"              column of user ids; "" where the table has none
    ad_id = "ad_id"                  column of ad ids; "" where the table has none
    ts = "timestamp"                 column of times; left out, the rows are in order already and have no times
    ts_unit = "s"                    what numbers in it count since 1970: s, ms or us; ISO 8601 text needs none
    split = [0.8, 0.1, 0.1]          shares by order of time; or the column that says train, valid or test
    history = "clicked"              column of the ads clicked before, oldest first; left out, built from the rows themselves
    separator = ","                  between the columns of a CSV
    list_separator = "|"             between the elements of a list in a CSV
    columns = { "ad.genres" = "g" }  columns that are not called as their fields are

A history built from the rows holds the ads that the same user clicked at an earlier time: not at the same time, for the ads of one
request share it and their clicks were not known when they were ranked. Rows without a user id have no history.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import polars as pl
import tomli_w

from features.schema import IDENTITY, Field, Schema, SchemaError, Side, parse_schema
from features.vocabulary import Ids

from .history import Past
from .prepared import SHARES, SPLITS, DataError, Progress, by_order, silent, write_splits, write_table, write_tables, writing
from .source import MICROSECONDS, Table, read_csv, read_parquet_table

SECOND = MICROSECONDS["s"]


@dataclass(frozen=True)
class Settings:
    """The section [table] of a schema file."""

    label: str = "label"
    user_id: str = "user_id"
    ad_id: str = "ad_id"
    ts: str = ""
    ts_unit: str = "s"
    split: str | list[float] = field(default_factory=lambda: list(SHARES))
    history: str = ""
    separator: str = ","
    list_separator: str = "|"
    columns: Mapping[str, str] = field(default_factory=dict)


def prepare(source: Path, out: Path, schema_file: Path, progress: Progress = silent) -> dict[str, int]:
    """Prepare the table `source` as the data set `out`, as `schema_file` says; rows by split.

    Raises:
        DataError: the schema file or the table is missing or not what it claims, or `out` cannot be written.
    """
    with writing(out) as folder:
        schema, settings = read_schema(schema_file)
        table, instants = _in_order(_read(source, _columns(schema, settings), settings), settings)
        log = _log(table, instants, schema, settings)
        order, splits = _splits(table, settings)
        past = _past(log, instants, schema, settings)

        def frame(rows: range) -> pl.DataFrame:
            part = order[rows.start : rows.stop]
            return log[part].with_columns(history=past.histories(part)) if past else log[part]

        write_tables(folder, schema, *(_last(log, side) for side in ("ad", "user")))
        if past:
            write_table(folder, "histories", past.after())
        return write_splits(folder, splits, frame, progress)


def read_schema(path: Path) -> tuple[Schema, Settings]:
    """A schema file: the schema, and how the table holds it.

    Raises:
        DataError: the file cannot be read, or says something impossible.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
        settings = _settings(document.pop("table", {}))
        return _checked(parse_schema(tomli_w.dumps(document)), settings), settings
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, SchemaError) as error:
        raise DataError(f"{path}: {error}") from error


def _settings(entries: object) -> Settings:
    if not isinstance(entries, Mapping):
        raise SchemaError("[table] must be a section")
    known = {entry.name for entry in fields(Settings)}
    if not set(entries) <= known:
        raise SchemaError(f"[table]: unknown entries {sorted(set(entries) - known)}; known are {sorted(known)}")
    for name in known - {"split", "columns"}:
        if not isinstance(entries.get(name, ""), str):
            raise SchemaError(f"[table]: {name} must be text, not {entries[name]!r}")
    settings = Settings(**entries)
    _check_split(settings.split)
    if settings.ts_unit not in MICROSECONDS:
        raise SchemaError(f"[table]: ts_unit is {settings.ts_unit!r}; it must be one of {', '.join(MICROSECONDS)}")
    if len(settings.separator) != 1 or settings.separator in '"\r\n' or not settings.list_separator:
        raise SchemaError("[table]: separator must be one character, no quote or end of line, and list_separator at least one")
    return settings


def _check_split(split: object) -> None:
    if isinstance(split, str) and split:
        return
    shares = [share for share in split if type(share) in (int, float) and share > 0] if isinstance(split, list) else []
    if split != shares or len(shares) != len(SPLITS) or abs(sum(shares) - 1) > 1e-6:
        raise SchemaError(f"[table]: split is {split!r}; it must be three shares above 0 that add up to 1, or the name of a column")


def _checked(schema: Schema, settings: Settings) -> Schema:
    paths = {feature.path for feature in schema.fields}
    columns = settings.columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise SchemaError('[table]: columns must name columns by field, such as { "ad.genres" = "genre_list" }')
    if not set(columns) <= paths:
        raise SchemaError(f"[table]: columns names {sorted(set(columns) - paths)}, which are no fields; fields are {sorted(paths)}")
    for side, name in IDENTITY.items():
        if f"{side}.{name}" in columns:
            raise SchemaError(f"[table]: the column of {side}.{name} is named by {name} = …")
        if f"{side}.{name}" in paths and not getattr(settings, name):
            raise SchemaError(f'[table]: {name} = "" says that the table has none, but {side}.{name} is a field')
    if settings.history and not schema.history_length:
        raise SchemaError("[table]: history names a column, but the schema has no [history]")
    if schema.history_length and not settings.ad_id:
        raise SchemaError('[table]: ad_id = "" says that the table has no ads, but the schema has a history of them')
    return schema


def _columns(schema: Schema, settings: Settings) -> dict[str, str]:
    """The source's column of every feature, by path."""
    features = [feature for feature in schema.fields if feature.name not in IDENTITY.values()]
    return {feature.path: settings.columns.get(feature.path, feature.name) for feature in features}


def _read(source: Path, columns: Mapping[str, str], settings: Settings) -> Table:
    named = (settings.label, settings.user_id, settings.ad_id, settings.ts, settings.history)
    split = settings.split if isinstance(settings.split, str) else ""
    needed = [name for name in dict.fromkeys((*named, split, *columns.values())) if name]
    if _is_parquet(source):
        return read_parquet_table(source, needed)
    return read_csv(source, settings.separator, needed)


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _in_order(table: Table, settings: Settings) -> tuple[Table, Ids | None]:
    """The rows in order of time, and their times in microseconds."""
    if not settings.ts:
        return table, None
    instants = table.instants(settings.ts, settings.ts_unit).to_numpy()
    order = np.argsort(instants, kind="stable")
    return table.take(order), instants[order]


def _log(table: Table, instants: Ids | None, schema: Schema, settings: Settings) -> pl.DataFrame:
    """The columns of the splits, but for a history that is built from them."""
    log = {"label": table.labels(settings.label)}
    log["user_id"] = table.text(settings.user_id).fill_null("") if settings.user_id else _nobody(table)
    log["ad_id"] = table.required(settings.ad_id) if settings.ad_id else _nobody(table)
    if instants is not None:
        log["ts"] = pl.Series(instants // SECOND)
    if settings.history:
        given = table.lists(settings.history, settings.list_separator).list.tail(schema.history_length)
        log["history"] = given.to_frame("history").with_columns(pl.col("history").fill_null([]))["history"]
    columns = _columns(schema, settings)
    for feature in schema.fields:
        if feature.path in columns:
            log[feature.path] = _values(table, feature, columns[feature.path], settings.list_separator)
    return pl.DataFrame(log)


def _nobody(table: Table) -> pl.Series:
    return pl.repeat("", len(table), dtype=pl.String, eager=True)


def _values(table: Table, feature: Field, column: str, separator: str) -> pl.Series:
    if feature.kind == "number":
        return table.numbers(column)
    return table.text(column) if feature.kind == "category" else table.lists(column, separator)


def _past(log: pl.DataFrame, instants: Ids | None, schema: Schema, settings: Settings) -> Past | None:
    if not schema.history_length or settings.history:
        return None
    before = None if instants is None else np.searchsorted(instants, instants)
    return Past(log, schema.history_length, before)


def _splits(table: Table, settings: Settings) -> tuple[Ids, dict[str, range]]:
    """The rows in the order in which they are written, and which of those belong to each split."""
    if not isinstance(settings.split, str):
        return np.arange(len(table)), by_order(len(table), settings.split)
    names = table.text(settings.split)
    table.refuse(settings.split, ~names.is_in(SPLITS), f"one of {', '.join(SPLITS)}")
    codes = names.replace_strict(SPLITS, range(len(SPLITS)), return_dtype=pl.Int64).to_numpy()
    ends = np.searchsorted(np.sort(codes), range(len(SPLITS) + 1)).tolist()
    return np.argsort(codes, kind="stable"), {split: range(*ends[i : i + 2]) for i, split in enumerate(SPLITS)}


def _last(log: pl.DataFrame, side: Side) -> pl.DataFrame | None:
    """The features of each user or ad at its last row, or None where there is nothing to tell."""
    key = IDENTITY[side]
    features = [name for name in log.columns if name.startswith(f"{side}.")]
    known = log.select(key, *features).filter(pl.col(key) != "")
    if known.is_empty() or (side == "user" and not features):
        return None
    return known.unique(key, keep="last", maintain_order=True)
