"""How far the values that are served have moved from those that a model was trained on: the population stability index of each field.

PSI = Σ (a - e) ln(a / e) over the bins of a field, with a and e the shares of a bin now and in training (Siddiqi, Credit Risk
Scorecards, 2006, whose rule of thumb is: below 0.1 little has changed, above 0.25 much). Bins that are empty on both sides are
left out and every other count is raised by one half, so that no share is 0. Of samples of n and m rows of one population it comes
to about (bins - 1) (1/n + 1/m) (Yurdakul and Naranjo, 2020), so it is not told of fewer than `LEAST_ROWS`.

Bins of a category or a list: the 50 most frequent values of the train split, other values that the model knows, missing ones, and
those that encode as unknown. Of a number: the deciles of the train split, and missing. Of the history: its length.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from features.bundle import Bundle
from features.encode import IDENTITIES
from features.schema import Field, Schema
from features.vocabulary import UNKNOWN, HashBuckets, Vocabularies, Vocabulary

from ..datasets.prepared import DTYPES, Prepared, column_of
from ..datasets.vocabularies import Counts

REFERENCE = "reference.json"
"""The file of a bundle with its training reference; bundles of before have none."""
VALUES = 50
LARGEST_FILE = 4 * 2**20
LONGEST_VALUE = 256
"""Values of more characters are counted among the others."""
DECILES = tuple(i / 10 for i in range(1, 10))
LENGTHS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
HISTORY = "history"
LEAST_ROWS = 1_000
ROUNDED = 2.0**-23
"""The share by which edges stand above their decile, so that a number that is one is below it in 32 bits too: a log may have those, and
requests 64."""
SAMPLE = 200_000
"""Numbers of the train split, at random, that deciles are taken from."""

BinCounts = np.ndarray[Any, np.dtype[np.float64]]
Vocabularied = Vocabulary | HashBuckets | None


class UnfitReferenceError(ValueError):
    """A training reference cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Reference:
    """How often each bin of a field occurs in the train split. The bins are those of `values` or between `edges`, and the rest.

    `counts` stand beside the bins: each value, then other, missing, unseen; or below each edge, above the last, then missing.
    """

    kind: str
    """A field's kind, or `length`."""
    counts: Sequence[float]
    values: Sequence[str] = ()
    edges: Sequence[float] = ()

    def count(self, column: pl.Series, vocabulary: Vocabularied) -> BinCounts:
        """How often each bin occurs in a column of raw values."""
        if self.kind in ("category", "list"):
            return _count_values(column, self.values, vocabulary)
        return _count_numbers(column.list.len() if self.kind == "length" else column, self.edges)


def _count_values(column: pl.Series, values: Sequence[str], vocabulary: Vocabularied) -> BinCounts:
    is_list = column.dtype == pl.List
    bins = {value: i for i, value in enumerate(values)}
    other, missing, unseen = len(values), len(values) + 1, len(values) + 2
    counts = np.zeros(len(values) + 3)
    counts[missing] = (column.list.len().fill_null(0) == 0).sum() if is_list else column.null_count()
    flat = column.explode() if is_list else column
    found, times = flat.drop_nulls().rename("value").value_counts(name="count")
    texts = found.to_list()
    at = np.fromiter((bins.get(value, other) for value in texts), np.int64, len(texts))
    if isinstance(vocabulary, Vocabulary):  # hash buckets know every value
        at[vocabulary.encode(texts) == UNKNOWN] = unseen
    return counts + np.bincount(at, times.to_numpy(), minlength=len(counts))


def _count_numbers(column: pl.Series, edges: Sequence[float]) -> BinCounts:
    known = column.cast(pl.Float64).drop_nulls().drop_nans().to_numpy()
    counts = np.bincount(np.searchsorted(edges, known, "left"), minlength=len(edges) + 1)
    return np.append(counts, len(column) - len(known)).astype(np.float64)


def stability(now: BinCounts, then: BinCounts) -> float:
    """The population stability index of counts against counts beside the same bins."""
    some = (now > 0) | (then > 0)
    a, e = now[some] + 0.5, then[some] + 0.5
    a, e = a / a.sum(), e / e.sum()
    return float(((a - e) * np.log(a / e)).sum())


def make_reference(data: Prepared, vocabularies: Vocabularies) -> bytes:
    """The contents of `reference.json`: the train split counted by field.

    Raises:
        DataError: the split cannot be read, or a column does not fit the schema.
    """
    first = {path: _Tally(field, data.schema.history_length) for path, field in _fields(data.schema).items()}
    for frame in _whole(data):
        for path, tally in first.items():
            column = _column(frame, path, tally.field)
            if column is not None:
                tally.add(column)
    references = {}
    for path, tally in first.items():
        if tally.rows:
            references[path] = tally.bins()
    totals = {path: np.zeros(len(reference.counts)) for path, reference in references.items()}
    for frame in _whole(data):
        for path, reference in references.items():
            column = _column(frame, path, first[path].field)
            if column is not None:
                totals[path] += reference.count(column, vocabulary_of(first[path].field, vocabularies))
    whole = {path: {**asdict(reference), "counts": totals[path].tolist()} for path, reference in references.items()}
    return json.dumps({"fields": whole}, ensure_ascii=False, separators=(",", ":")).encode()


def read_reference(bundle: Bundle) -> Mapping[str, Reference] | None:
    """The bundle's training reference by field, None where it has none.

    Raises:
        UnfitReferenceError: it is not one.
    """
    if REFERENCE not in bundle.files:
        return None
    path = bundle.path / REFERENCE
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UnfitReferenceError(f"{path} is larger than {LARGEST_FILE} bytes")
        document = json.loads(path.read_text("utf-8"))
        references = {name: Reference(**each) for name, each in document["fields"].items()}
        if not all(_is_whole(reference) for reference in references.values()):
            raise UnfitReferenceError(f"{path} has counts that do not stand beside its bins")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, UnfitReferenceError) else UnfitReferenceError(f"{path} cannot be read: {error!r}") from error
    return references


def _is_whole(reference: Reference) -> bool:
    bins = len(reference.values) + 3 if reference.kind in ("category", "list") else len(reference.edges) + 2
    numbers = [*reference.counts, *reference.edges]
    return (
        reference.kind in (*DTYPES, "length")
        and len(reference.counts) == bins
        and all(type(value) is str for value in reference.values)
        and bool(np.isfinite(numbers).all())
        and sorted(reference.edges) == list(reference.edges)
    )


def vocabulary_of(field: Field | None, vocabularies: Vocabularies) -> Vocabularied:
    """What tells a field's known values, None where all are."""
    return None if field is None else vocabularies.categories.get(field.vocabulary)


class _Tally:
    """What the bins of a field are made from."""

    def __init__(self, field: Field | None, longest: int) -> None:
        self.field = field
        self._longest = longest
        self.rows = 0
        self._values = Counts()
        self._random, self._drawn, self._numbers = np.random.default_rng(1), np.zeros(0), np.zeros(0)

    def add(self, column: pl.Series) -> None:
        self.rows += len(column)
        if self.field is None:
            return
        if self.field.kind == "number":
            known = column.drop_nulls().drop_nans().to_numpy()
            self._numbers = np.append(self._numbers, known)
            self._drawn = np.append(self._drawn, self._random.random(len(known)))
            if len(self._drawn) > SAMPLE:
                kept = np.argpartition(self._drawn, SAMPLE)[:SAMPLE]
                self._numbers, self._drawn = self._numbers[kept], self._drawn[kept]
            return
        flat = column.explode() if column.dtype == pl.List else column
        self._values.add(flat.drop_nulls().rename("value").value_counts(name="count"))

    def bins(self) -> Reference:
        if self.field is None:
            edges = [length for length in LENGTHS if length < self._longest]  # the log has no more than were encoded
            return Reference("length", [0] * (len(edges) + 2), edges=edges)
        if self.field.kind == "number":
            known = np.sort(self._numbers)
            deciles = [float(known[int(share * (len(known) - 1))]) for share in DECILES] if len(known) else []
            edges = sorted({edge + abs(edge) * ROUNDED for edge in deciles})
            return Reference("number", [0] * (len(edges) + 2), edges=edges)
        most = pl.DataFrame(schema={"value": pl.String, "count": pl.UInt64})
        for total in self._values.totals():
            fitting = total.filter(pl.col("value").str.len_chars() <= LONGEST_VALUE)
            most = pl.concat([most, fitting]).sort(["count", "value"], descending=[True, False]).head(VALUES)
        values = most["value"].to_list()
        return Reference(self.field.kind, [0] * (len(values) + 3), values=values)


def _fields(schema: Schema) -> dict[str, Field | None]:
    """The fields that are watched, by path. The users' own ids are left out: new ones come all the time, and never drift back.

    So are vectors: their numbers have no meaning one by one.
    """
    fields: dict[str, Field | None] = {field.path: field for field in schema.fields if field.name != "user_id" and field.kind != "vector"}
    return fields | ({HISTORY: None} if schema.history_length else {})


def watched(schema: Schema, columns: Sequence[str]) -> dict[str, tuple[str, Field | None]]:
    """The column of a log's rows in which each field of a schema stands, and the field, for those that are there."""
    named = {path: (field.name if field and field.name in IDENTITIES else path, field) for path, field in _fields(schema).items()}
    return {path: (column, field) for path, (column, field) in named.items() if column in columns}


def _column(frame: pl.DataFrame, path: str, field: Field | None) -> pl.Series | None:
    return frame[path] if field is None else column_of(frame, field)


def _whole(data: Prepared) -> Iterator[pl.DataFrame]:
    """The train split, with the features that stand in the tables of users and ads.

    Of a log that kept a share of the non-clicks that share of the clicks is taken too: together they are like what is served.
    """
    tables, random = {side: data.table(side) for side in ("user", "ad")}, np.random.default_rng(1)
    for frame in data.frames("train"):
        kept = (frame["label"].to_numpy() == 0) | (random.random(len(frame)) < data.negative_sampling)
        whole = frame if data.negative_sampling == 1 else frame.filter(pl.Series(kept))
        for side, table in tables.items():
            if table is not None and not any(name.startswith(f"{side}.") for name in frame.columns):
                whole = whole.join(table, on=f"{side}_id", how="left", maintain_order="left")
        yield whole
