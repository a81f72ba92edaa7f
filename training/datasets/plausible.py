"""What a log looks like that nobody has said of it: values that mean missing, users who are nobody, padded histories, strange times.

Knows nothing about files. A doubt is a sentence with its fix, and the log is taken as it is; only what cannot be meant is refused.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl

from features.schema import Field, Schema
from features.vocabulary import Ids

from .prepared import DataError
from .table_settings import TableSettings
from .times import LOOKED_AT, SECOND, from_formats, plausible, span

Doubts = Callable[[str], None]
"""Told what there is to doubt, a sentence at a time."""
WORDS = ("null", "none", "nan", "na", "n/a", "nil", "undefined")
USUAL = (
    *(spelt for word in WORDS for spelt in (word, word.upper(), word.capitalize())),
    *("NaN", "NaT", "<NA>", "\\N", "(null)", "<null>", "<nil>", "#N/A", "-", "?"),
)
"""How programs write that there is no value."""
NO_ID = r"^(?:[0:-]{7,}|[fF:-]{12,}|\s+|-1)$"
"""The ids of devices that do not tell theirs, blanks, and what stands for no number."""
SAID = ("true", "false")
FLAGS = {*SAID, "0", "1"}
SHARE = 0.01
"""Of a column's rows, from which on a usual word for missing is told."""
USER_SHARE, USER_TIMES = 0.05, 10
"""Of all rows, and of the rows of the user in the middle: one who has more of both may be many."""
HALF = 0.5
OFTEN = 0.2
MINUTES = "%y%m%d%H%M"
ENOUGH = 100_000
"""Rows, from all over a log, whose values are counted by their spelling: of all, histories would take gigabytes."""
FEW = 10
"""Histories that may be alike by chance."""
TOLD = 3
"""Values that are told of one column."""


def silent_doubts(_doubt: str) -> None:
    """The doubts about a table that nobody reads."""


def look_through(log: pl.DataFrame, instants: Ids | None, schema: Schema, settings: TableSettings) -> Iterator[str]:
    """Every doubt about the rows of a log, with times in microseconds.

    Raises:
        DataError: most histories are filled up with something that is no ad.
    """
    if settings.history and settings.padding is None:
        yield from _padded_histories(log, settings)
    if settings.user_id and settings.nobody != ():
        yield from _crowds(log["user_id"])
    if settings.missing != ():
        yield from _spellings(log)
        if settings.ad_id:
            yield from _no_ads(log["ad_id"])
        for field in schema.fields:
            if field.path in log.columns:
                yield from _stand_ins(log[field.path], field)
    yield from _brackets(log)
    if instants is not None:
        yield from _strange_times(instants)
        yield from _compact_times(instants, settings)
    if settings.propensity:
        yield from _strange_propensities(log)


def _listed(values: Sequence[object]) -> str:
    return "[" + ", ".join('"' + str(value).replace("\\", "\\\\") + '"' for value in values) + "]"


def _spellings(log: pl.DataFrame) -> Iterator[str]:
    """Texts that are two values and may be meant to be one: with blanks, with zeros before a number, and true beside 1."""
    for column in log.gather_every(max(1, len(log) // ENOUGH)).select(pl.col(pl.String, pl.List(pl.String))):
        flat = (column.explode() if column.dtype == pl.List else column).drop_nulls()
        values, text, least = flat.value_counts(name="rows"), pl.col(column.name), max(SHARE * len(flat), 2)
        padded = values.filter(text.str.contains(r"^\s+\S|\S\s+$"))
        if padded["rows"].sum() >= least:
            shown = f"{column.name} has values that begin or end with blanks, such as {padded[0, 0]!r}"
            yield f"{shown}, and a request without those is of another value; trim them in the table if they mean nothing"
        zeros = values.filter(text.str.contains("^0+[0-9]+$")).with_columns(short=text.str.replace("^0+(.)", "${1}"))
        both = zeros.join(values, left_on="short", right_on=column.name)
        if both["rows"].sum() >= least:
            yield f"{column.name} has {both[0, 0]!r} and {both['short'][0]!r}, which are two values; write one if they are meant to be one"
        if set(values[column.name].head(5)) <= FLAGS and values[column.name].is_in(SAID).n_unique() == 2:
            yield f"{column.name} has true or false beside 0 or 1, which are other values; write them one way in all parts"


def _crowds(users: pl.Series) -> Iterator[str]:
    counts = users.filter(users != "").value_counts(sort=True)
    if counts.is_empty():
        return
    middle, rows = float(counts["count"].median()), len(users)  # type: ignore[arg-type]  # of numbers
    large = (pl.col("count") >= USER_SHARE * rows) & (pl.col("count") >= USER_TIMES * middle)
    odd = pl.col("user_id").is_in(USUAL) | pl.col("user_id").str.contains(NO_ID)
    found = counts.filter(large | (odd & (pl.col("count") > 1))).head(TOLD)
    if len(found):
        found_text = ", ".join(f"{user_id!r} {count / rows:.1%}" for user_id, count in found.rows())
        yield (
            f"some users have many rows: {found_text}, the user in the middle {middle / rows:.2%}; if they are nobody (a default, "
            f"a phone that does not tell its id), say nobody = {_listed(found['user_id'].to_list())}, else nobody = []"
        )


def _no_ads(ads: pl.Series) -> Iterator[str]:
    counts = ads.filter(ads.is_in(USUAL) | ads.str.contains(NO_ID)).value_counts(sort=True).head(TOLD)
    for ad_id, count in counts.rows():
        yield f"{count:,} rows have the ad {ad_id!r}, which looks like no ad: leave such rows out, or say missing = [] if it is one"


def _stand_ins(column: pl.Series, field: Field) -> Iterator[str]:
    """Values of a column that look as if they meant that there is none."""
    if field.kind == "vector":
        return
    if field.kind == "number":
        yield from _negative(column, field)
        return
    if field.kind == "list":
        yield from _padded_lists(column, field)
        column = column.drop_nulls().explode().alias(column.name)
    rows = max(len(column), 1)
    words = column.filter(column.is_in([*USUAL, "-1"])).value_counts(sort=True).filter(pl.col("count") >= max(SHARE * rows, 2)).head(TOLD)
    if len(words):
        found_text = ", ".join(f"{value!r} ({count / rows:.1%})" for value, count in words.rows())
        fix = f"if they mean missing, say missing = {_listed(words[column.name].to_list())}"
        yield f"{field.path} has {found_text} as values like any other; {fix}"


def _negative(column: pl.Series, field: Field) -> Iterator[str]:
    below = column.filter(column < 0)
    if len(below) >= max(SHARE * len(column), 2) and below.n_unique() == 1 and below[0] == round(below[0]):
        value = f"{below[0]:.0f}"
        found_text = f"{field.path} is {value} in {len(below) / len(column):.1%} of the rows, and never below 0 else"
        yield f'{found_text}; if that means missing, say missing_values = ["{value}"] in [{field.path}]'


def _padded_lists(column: pl.Series, field: Field) -> Iterator[str]:
    several = column.filter(column.list.len() > 1)
    last = several.list.get(-1, null_on_oob=True)
    twice = several.filter((last == several.list.get(-2, null_on_oob=True)).fill_null(value=False)).list.last()
    if len(several) and len(twice) >= OFTEN * len(several) and len(twice) > 1:
        value = twice.value_counts(sort=True)[0, 0]
        found_text = f"{len(twice) / len(several):.0%} of the lists of {field.path} end with a value twice, mostly {value!r}"
        yield f"{found_text}; if that fills them up, say missing_values = {_listed([value])} in [{field.path}]"


def _padded_histories(log: pl.DataFrame, settings: TableSettings) -> Iterator[str]:
    histories = log["history"].filter(log["history"].list.len() > 0)
    if histories.is_empty():
        return
    counts = histories.list.unique().explode().value_counts(sort=True)
    value, count = counts.row(0)
    share, behaviours = count / len(histories), int(histories.list.len().sum())
    if share < HALF or len(histories) < 2:
        return
    found_text = f"{value!r} is in {share:.0%} of the histories in column {settings.history}"
    fix = f"if it only fills them up, say padding = {_listed([value])}, else padding = []"
    if value not in log["ad_id"]:
        found_text = f"{found_text}, and is no ad of the table; {fix}"
        if len(histories) >= FEW:
            raise DataError(found_text)
        yield found_text
        return
    at_an_end = max(int((histories.list.first() == value).sum()), int((histories.list.last() == value).sum()))
    if at_an_end >= HALF * len(histories) and histories.list.count_matches(value).sum() >= OFTEN * behaviours:
        yield f"{found_text}, mostly at an end; {fix}"


def _brackets(log: pl.DataFrame) -> Iterator[str]:
    """Lists as Python or JSON write them, in a table whose lists are texts."""
    for lists in log.select(pl.col(pl.List(pl.String))):
        some = lists.filter(lists.list.len() > 0)
        written = some.list.first().str.starts_with("[") & some.list.last().str.ends_with("]")
        if len(some) and written.sum() >= HALF * len(some):
            found_text = (
                f"{written.sum() / len(some):.0%} of the lists of {lists.name} are written in brackets, as {'|'.join(some[0])[:50]!r}"
            )
            yield f"{found_text}, which become part of their values: write the values alone, with list_separator between them"


def _compact_times(instants: Ids, settings: TableSettings) -> Iterator[str]:
    """From 2010 to 2017 yymmddHHMM are numbers that seconds since 1970 are too, but of those only one in 200 has a month, a day, ..."""
    if settings.ts_unit != "s" or settings.ts_format:
        return
    seconds = pl.Series(np.unique(instants // SECOND)[:LOOKED_AT])
    read = from_formats(seconds.cast(pl.String), (MINUTES,))
    first, last = (second * SECOND for second in plausible())
    if len(seconds) >= FEW and read.is_between(first, last).fill_null(value=False).all():
        yield (
            f"every time is {span(seconds * SECOND)} in seconds since 1970, and looks like yymmddHHMM, {span(read)}: "
            f'if it is that, say ts_format = "{MINUTES}"'
        )


def _strange_times(instants: Ids) -> Iterator[str]:
    first, last = (second * SECOND for second in plausible())
    for what, wrong in (("before 1990", instants < first), ("after next year", instants > last)):
        count = int(np.count_nonzero(wrong))
        if count:
            found_text = pl.Series(instants[wrong][[0, -1]]).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%d %H:%M:%S").to_list()
            which = f"{count:,} of {len(instants):,} rows have a time {what}"
            yield f"{which} ({found_text[0]} to {found_text[1]} UTC); see ts_unit and ts_format if it is none"


def _strange_propensities(log: pl.DataFrame) -> Iterator[str]:
    """The mean of 1 / propensity is the number of ads that could have been shown, if propensities are what they should be."""
    weights = (1 / log["propensity"]).to_numpy()
    offered = float(log["candidates"].list.len().mean()) if "candidates" in log.columns else float(log["ad_id"].n_unique())  # type: ignore[arg-type]
    mean, error = float(weights.mean()), float(weights.std() / len(weights) ** 0.5)
    if abs(mean - offered) > max(OFTEN * offered, 4 * error):
        whose = "named in candidates" if "candidates" in log.columns else "in the table"
        yield (
            f"1 / propensity is {mean:.4g} on average, and {offered:.4g} ads are {whose}: these should be about equal, "
            "if each ad had its propensity of being shown in that row"
        )
