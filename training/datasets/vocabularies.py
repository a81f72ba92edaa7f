"""Vocabularies and moments, learned from the train split file by file. What is counted is in memory, or where it is much on disk."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from features.schema import Field, Schema
from features.vocabulary import HashBuckets, Moments, Vocabularies, Vocabulary

from ..tenure import Tenure
from .prepared import DataError, Prepared, column_of
from .spread import NOTHING, Spread

HELD = 500_000
"""Values of one vocabulary that are counted in memory, some 30 bytes each; where there are more, they go to disk."""
FEW = HELD // 50
PARTS = 16
"""Files that values go to, by their hash: one is summed up at a time."""


def learn_vocabularies(data: Prepared, base: Vocabularies | None = None, tenure: Tenure | None = None) -> Vocabularies:
    """Values and moments of the train split: most frequent first, then by the value, so that the order is certain.

    What `base` has stays as it is, ids and moments, and the values that are new come after it, or where `tenure` finds rows of idle ones.
    The moments of a number that was constant then are learned anew: it told nothing.

    Raises:
        DataError: the split is absent, a column is of another type than its field, or the disk is full.
    """
    schema = data.schema
    counts = {field.vocabulary: Counts() for field in schema.fields if not field.dense}
    spreads = {field.path: NOTHING for field in schema.fields if field.transform == "standard"}
    tables = {side: data.table(side) for side in ("user", "ad")}
    for frame in data.frames("train"):
        whole = joined(frame, schema, tables)
        for field in schema.fields:
            column = column_of(whole, field)
            if column is not None and field.path in spreads:
                spreads[field.path] = spreads[field.path].beside(Spread.of(column.drop_nulls().drop_nans().to_numpy()))
            elif column is not None and not field.dense and not field.buckets:
                counts[field.vocabulary].add(_counts(column))
        if schema.history and not schema.history[0].buckets:
            # A behaviour repeats with every later row of its user: it makes an ad known, and counts once a file.
            behaviours = _counts(frame["history"]).with_columns(count=pl.lit(1, pl.UInt32))
            counts[schema.history[0].vocabulary].add(behaviours)
    categories: dict[str, Vocabulary | HashBuckets] = {}
    for field in schema.fields:
        if not field.dense:
            kept = base.categories[field.vocabulary] if base else None
            first = kept.values if isinstance(kept, Vocabulary) else ()
            if field.buckets:
                categories[field.vocabulary] = HashBuckets(field.buckets)
            elif field.vocabulary not in categories:
                categories[field.vocabulary] = _vocabulary(counts[field.vocabulary], field, first, tenure or Tenure())
    kept_moments = {path: m for path, m in base.moments.items() if not m.constant} if base else {}
    return Vocabularies(categories, {path: kept_moments.get(path) or _moments(spread, path) for path, spread in spreads.items()})


class Counts:
    """How often the values of one vocabulary occur."""

    def __init__(self) -> None:
        self.held: list[pl.DataFrame] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, counts: pl.DataFrame) -> None:
        """Add the counts of a file.

        Raises:
            DataError: there are many values, and the disk is full.
        """
        if len(counts) < FEW:  # polars would keep the texts of the whole file for them
            counts = counts.with_columns(pl.Series("value", counts["value"].to_list(), pl.String))
        self.held.append(counts.cast({"count": pl.UInt64}))
        if sum(map(len, self.held)) > HELD:
            self.held = [_summed(self.held)]
            if len(self.held[0]) > HELD // 2:
                self._put_away(self.held.pop())

    def _put_away(self, counts: pl.DataFrame) -> None:
        try:
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="adrank-counts-")
            parts = counts.with_columns(part=pl.col("value").hash() % PARTS).partition_by("part", as_dict=True, include_key=False)
            for (part,), some in parts.items():
                folder = Path(self.folder.name) / str(part)
                folder.mkdir(exist_ok=True)
                some.write_parquet(folder / f"{len(list(folder.iterdir())):04}.parquet")
        except (OSError, pl.exceptions.PolarsError) as error:
            where = self.folder.name if self.folder else tempfile.gettempdir()
            raise DataError(f"cannot count values in {where}: {error}; make room there, or set TMPDIR to another folder") from error

    def totals(self) -> Iterator[pl.DataFrame]:
        """The values, and how often each occurs, in parts; a value is in one of them."""
        if self.folder is None:
            yield from [_summed(self.held)] if self.held else []
            return
        if self.held:
            self._put_away(_summed(self.held))
        for folder in Path(self.folder.name).iterdir():
            yield _summed([pl.read_parquet(path) for path in folder.iterdir()])
        self.folder.cleanup()


def _summed(counts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(counts).group_by("value").agg(pl.col("count").sum())


def _counts(column: pl.Series) -> pl.DataFrame:
    flat = column.explode() if column.dtype == pl.List else column
    return flat.drop_nulls().rename("value").value_counts(name="count")


def _vocabulary(counts: Counts, field: Field, first: Sequence[str], tenure: Tenure) -> Vocabulary:
    known, kept, seen, told = set(first), list[pl.DataFrame](), set[str](), False
    for total in counts.totals():
        told = True
        kept.append(total.filter(pl.col("count") >= field.min_count))
        seen |= known.intersection(total["value"].to_list()) if known else set()
    if not told:
        raise DataError(f"no column holds the values of {field.path}, neither the train split nor a table; prepare the data set again")
    ordered = pl.concat(kept).sort(["count", "value"], descending=[True, False])
    new = [value for value in ordered["value"].to_list() if value not in known]
    return Vocabulary(tenure.place(field.vocabulary, first, seen, new, field.max_size))


def _moments(spread: Spread, path: str) -> Moments:
    if not spread.count:
        raise DataError(f"the train split has no number for {path}, so it cannot be standardised")
    if spread.constant:
        return Moments(spread.mean, 1.0, 0.0)
    found = Moments(spread.mean, spread.deviation)
    return replace(found, weight=1.0) if found.constant else found


def joined(frame: pl.DataFrame, schema: Schema, tables: Mapping[str, pl.DataFrame | None]) -> pl.DataFrame:
    """Rows with the features of users and ads beside them, from the tables where the rows do not have their own."""
    for side, table in tables.items():
        if table is not None and not inline(frame, schema, side):
            frame = frame.join(table, on=f"{side}_id", how="left", maintain_order="left")
    return frame


def inline(frame: pl.DataFrame, schema: Schema, side: str) -> bool:
    """Whether rows have the features of a side themselves."""
    return any(field.path in frame.columns for field in schema.fields if field.side == side)
