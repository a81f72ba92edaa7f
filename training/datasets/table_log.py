"""The rows of a table as the columns of a prepared data set, in the order of the source.

Every column of some rows is looked at before one is refused, so that a message has the first mistake in each, in the order of lines.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from features.schema import IDENTITY, Field, Schema

from .prepared import SPLITS, DataError
from .rows import CURE, Dialect
from .source import RowError, Table
from .table_settings import TableSettings
from .tables import read_tables
from .texts import unless_missing, without, without_elements
from .times import SECOND

INSTANT, SPLIT = "\x1finstant", "\x1fsplit"
"""Columns that the rows have until they are in order: microseconds since 1970, and the number of the split."""
LARGEST_POSITION = 100_000


def read_log(source: Path, schema: Schema, settings: TableSettings, read: Callable[[int], None]) -> pl.DataFrame:
    """The columns of the splits, but for a history that is built from them; `read` is told how many rows there are so far.

    Raises:
        DataError: a file cannot be read, lacks a column, or has a row that is not what it should be.
    """
    split = settings.split if isinstance(settings.split, str) else ""
    named = (settings.label, settings.user_id, settings.ad_id, settings.ts, settings.history, split)
    more = (settings.propensity, settings.position, settings.candidates, settings.weight, *settings.outcomes.values())
    needed = [name for name in dict.fromkeys((*named, *more, *_columns(schema, settings).values())) if name]
    dialect = Dialect(settings.separator, settings.quote, settings.quoted_newlines, CURE)
    parts, rows = list[pl.DataFrame](), 0
    for table in read_tables(source, needed, dialect):
        parts.append(_log(table, schema, settings))
        rows += len(table)
        read(rows)
    return pl.concat(parts)


def _columns(schema: Schema, settings: TableSettings) -> dict[str, str]:
    """The source's column of every feature, by path."""
    features = [feature for feature in schema.fields if feature.name not in IDENTITY.values()]
    return {feature.path: settings.columns.get(feature.path, feature.name) for feature in features}


def _log(table: Table, schema: Schema, settings: TableSettings) -> pl.DataFrame:
    columns: dict[str, Callable[[], pl.Series]] = {
        "label": lambda: table.labels(settings.label),
        "user_id": lambda: _users(table, settings),
        "ad_id": lambda: _ads(table, settings),
    }
    if settings.ts:
        columns[INSTANT] = lambda: table.instants(settings.ts, settings.ts_unit, settings.ts_format or ())
    if settings.history:
        columns["history"] = lambda: _given_history(table, schema, settings)
    for feature in schema.fields:
        if feature.name not in IDENTITY.values():
            columns[feature.path] = partial(_values, table, feature, _columns(schema, settings)[feature.path], settings)
    if settings.propensity:
        columns |= _of_the_policy(table, settings)
    for head, name in settings.outcomes.items():
        columns[head] = partial(table.outcomes, name)
    if settings.weight:
        columns["weight"] = lambda: _weights(table, settings.weight)
    if isinstance(settings.split, str):
        columns[SPLIT] = partial(_split_numbers, table, settings.split)
    log = pl.DataFrame([column.alias(name) for name, column in _all_or_mistakes(columns).items()])
    return log.with_columns(ts=pl.col(INSTANT) // SECOND) if settings.ts else log


def _all_or_mistakes(columns: Mapping[str, Callable[[], pl.Series]]) -> dict[str, pl.Series]:
    read, mistakes = dict[str, pl.Series](), list[RowError]()
    for name, column in columns.items():
        try:
            read[name] = column()
        except RowError as mistake:
            mistakes.append(mistake)
    if mistakes:
        sentences = [str(mistake) for mistake in sorted(mistakes, key=lambda mistake: mistake.line)]
        raise DataError("\n".join(dict.fromkeys(sentences)))
    return read


def _users(table: Table, settings: TableSettings) -> pl.Series:
    return without(table.text(settings.user_id), settings.nobodies).fill_null("") if settings.user_id else _nobody(table)


def _nobody(table: Table) -> pl.Series:
    return pl.repeat("", len(table), dtype=pl.String, eager=True)


def _ads(table: Table, settings: TableSettings) -> pl.Series:
    if not settings.ad_id:
        return _nobody(table)
    ads = without(table.required(settings.ad_id), settings.missing or ())
    table.refuse(settings.ad_id, ads.is_null(), "an ad; missing says that this is none")
    return ads


def _values(table: Table, feature: Field, column: str, settings: TableSettings) -> pl.Series:
    if feature.kind == "list":
        return unless_missing(table.lists(column, settings.list_separator), feature)
    if feature.kind == "vector":
        return table.vectors(column, feature.length, settings.list_separator)
    if feature.kind == "category":
        return unless_missing(table.text(column), feature)
    numbers = _blanked(table, column, (*(settings.missing or ()), *feature.missing_values)).numbers(column)
    return unless_missing(numbers, feature)


def _blanked(table: Table, column: str, tokens: tuple[str, ...]) -> Table:
    """The table, with nothing where a text in the column is one of the tokens."""
    if not tokens or table.column(column).dtype != pl.String:
        return table
    return replace(table, frame=table.frame.with_columns(without(table.column(column), tokens)))


def _given_history(table: Table, schema: Schema, settings: TableSettings) -> pl.Series:
    """The newest behaviours, once what fills up a history is out of it."""
    given = without_elements(table.lists(settings.history, settings.list_separator), schema.history_padding)
    return given.list.drop_nulls().list.tail(schema.history_length).to_frame("h").select(pl.col("h").fill_null([]))["h"]


def _of_the_policy(table: Table, settings: TableSettings) -> dict[str, Callable[[], pl.Series]]:
    """What replay needs: the propensity of each row's ad, perhaps its position, and the ads that could have been shown in its place."""
    columns: dict[str, Callable[[], pl.Series]] = {"propensity": lambda: propensities(table, settings.propensity)}
    if settings.position:
        columns["position"] = lambda: table.whole(settings.position, 1, LARGEST_POSITION)
    if settings.candidates:
        columns["candidates"] = lambda: _candidates(table, settings)
    return columns


def propensities(table: Table, name: str) -> pl.Series:
    """A column of probabilities above 0, as Float64."""
    values = table.numbers(name)
    table.refuse(name, ~((values > 0) & (values <= 1)), "a probability above 0, at most 1")
    return values


def _weights(table: Table, name: str) -> pl.Series:
    """A column of what rows weigh, as Float64."""
    values = table.numbers(name)
    table.refuse(name, ~(values >= 0).fill_null(value=False), "a weight of at least 0")
    return values


def _candidates(table: Table, settings: TableSettings) -> pl.Series:
    lists = without_elements(table.lists(settings.candidates, settings.list_separator), settings.missing or ()).list.drop_nulls()
    rows = pl.DataFrame({"offered": lists, "ad": table.required(settings.ad_id)})
    wrong = rows.select(
        ~pl.col("offered").list.contains(pl.col("ad")) | (pl.col("offered").list.n_unique() != pl.col("offered").list.len())
    )
    table.refuse(settings.candidates, wrong.to_series(), "the ads that could have been shown, each once, the row's own among them")
    return lists


def _split_numbers(table: Table, name: str) -> pl.Series:
    names = table.text(name)
    table.refuse(name, ~names.is_in(SPLITS), f"one of {', '.join(SPLITS)}")
    return names.replace_strict(SPLITS, range(len(SPLITS)), return_dtype=pl.Int64)
