"""A prepared data set as tensors: each split encoded through `features/`, in memory or in files."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from features.encode import IDENTITIES, AdTable, Block, Encoder
from features.schema import Side
from features.vocabulary import UNKNOWN, Ids, fingerprint

from ..networks.contract import CLICK, Labels, Part, RequestTensors
from .ads import ad_table, ads_of, columns_of_side, part_of
from .behaviours import history_ages, history_of
from .columns import Array, Columns, InMemory, Mapped, cached
from .distinct import DistinctAds
from .fields import check_fields
from .memory import CACHE
from .prepared import DataError, Prepared, rows_in
from .vocabularies import joined

Outcome = np.ndarray[Any, np.dtype[np.float32]]
FEW_TIMES = 8
"""See `_distinct`."""
FORMAT = 2
"""Raise this whenever encoding gives other columns: those on disk are made anew."""


@dataclass(frozen=True)
class Strangers:
    """One row each: a user (without the context) and an ad of which nothing is known, as they are served, and a behaviour on that ad."""

    user: Block
    ad: Block
    behaviour: Block

    @classmethod
    def of(cls, encoder: Encoder) -> "Strangers":
        """As an encoder encodes them; an identity that is hashed is unknown too, since a bucket would be some ad's."""
        user, ad = encoder.encode("user", {}, 1), encoder.unknown_ads([""])
        for side, block in (("user", user), ("ad", ad)):
            for slot in encoder.sides[side].ids:  # type: ignore[index]  # the two of them are sides
                if slot.field.name in IDENTITIES:
                    block.ids[:, slot.columns] = UNKNOWN
        return cls(user, ad, encoder.history_of(ad))


@dataclass(frozen=True)
class Rows:
    """One split, encoded: N rows, each a request with one candidate.

    `labels (N,)` float32; `users (N,)` a number a user, for per-user metrics; a row of nobody has one of its own; `user` and `ad` blocks,
    whose ids are as narrow as they fit and which `Block.take` widens; `history (N, T)` rows of `table`, oldest first, padded with 0 at the
    end, and `ages (N, T)` beside it.
    """

    labels: np.ndarray[Any, np.dtype[np.float32]]
    users: np.ndarray[Any, np.dtype[np.uint64]]
    user: Block
    ad: Block
    history: np.ndarray[Any, np.dtype[np.int32]]
    behaviours: Block
    strangers: Strangers
    catalogue: Block
    """The ads of the data set, one row each; of one that keeps no table of them, those of the rows."""
    outcomes: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)
    """What else came of the rows `(N,)`, by head: 0, 1, or NaN where that is not known."""
    weight: Outcome | None = None
    """How much each row weighs in training `(N,)`; None: 1."""
    ages: Outcome | None = None
    """How old the behaviours of `history` were `(N, T)`, in seconds, 0 where there is padding; None: the schema has no ages."""
    maturity: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)
    """How likely an outcome that is to come would have come by now `(N,)`, by head; one that waits for nothing is not there."""
    place: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    """Where each ad was shown `(N,)`, from 0, for a training that asks (`position.py`)."""
    mapped: Mapped | None = None
    """The files that all that is `(N, ...)` is mapped from; None: it is in memory."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> "Rows":
        """Some of the rows, in that order, in memory."""
        outcomes, maturity = ({head: each[rows] for head, each in found.items()} for found in (self.outcomes, self.maturity))
        weight, place = (None if each is None else each[rows] for each in (self.weight, self.place))
        user, ad = (Block(block.ids[rows], block.numbers[rows]) for block in (self.user, self.ad))
        own = (self.labels[rows], self.users[rows], user, ad, self.history[rows])
        ages = None if self.ages is None else self.ages[rows]
        if self.mapped:
            self.mapped.release()
        return Rows(*own, self.behaviours, self.strangers, self.catalogue, outcomes, weight, ages, maturity, place)

    @property
    def ads(self) -> Part:
        """All ads of the data set `(A, W)`."""
        return part_of(self.catalogue)

    def known(self, head: str) -> tuple[Outcome, np.ndarray[Any, np.dtype[np.bool_]]]:
        """The labels `(N,)` of a head, and which of them are known.

        Raises:
            DataError: none is.
        """
        labels = self.labels if head == CLICK else self.outcomes[head]
        known = ~np.isnan(labels)
        if not known.any():
            raise DataError(f"no row of the split has a label of {head}; leave it out of heads, or split the data set otherwise")
        return labels, known

    @property
    def places(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """`place`, where the training asked for it."""
        assert self.place is not None  # noqa: S101  # see `position.placed`
        return self.place

    def maturity_of(self, head: str, rows: np.ndarray[Any, Any]) -> Outcome:
        """The maturity of some rows."""
        found: Outcome = self.maturity[head][rows] if head in self.maturity else np.ones(len(self), np.float32)[rows]
        return found

    def labels_of(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Labels:
        """What came of some rows."""
        heads = {CLICK: self.labels, **self.outcomes}
        weight = None if self.weight is None else torch.from_numpy(self.weight[rows])
        place = None if self.place is None else torch.from_numpy(self.place[rows].astype(np.int64))
        known, maturity = ({head: torch.from_numpy(each[rows]) for head, each in found.items()} for found in (heads, self.maturity))
        return Labels(known, weight, maturity, place)

    def batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> RequestTensors:
        """The tensors of some rows: `user (R, W)`, `history (R, T)` cut to the longest there, `ad (R, 1, W)`."""
        if self.mapped:
            return self.take(rows).batch(np.arange(len(rows)))
        history = self.history[rows]
        longest = max(1, int((history > 0).sum(1).max(initial=0)))
        distinct, at = _distinct(history[:, :longest], len(self.behaviours))
        past = part_of(self.behaviours.take(distinct))._replace(rows=torch.from_numpy(at))
        ages = None if self.ages is None else torch.from_numpy(self.ages[rows][:, :longest])
        return RequestTensors(part_of(self.user.take(rows)), past, part_of(self.ad.take(rows[:, None])), ages)


def _distinct(values: np.ndarray[Any, np.dtype[np.int32]], below: int) -> tuple[Ids, Ids]:
    """The distinct ones among some numbers from 0 on, in order, and where each is among them, in the shape that they have.

    Ticked off where they are not many `below` the highest, which is several times faster than to sort them.
    """
    if below > FEW_TIMES * values.size:
        distinct, at = np.unique(values, return_inverse=True)
        return distinct.astype(np.int64), at.reshape(values.shape)
    there = np.zeros(below, np.bool_)
    there[values] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[values]


def encode_split(data: Prepared, split: str, encoder: Encoder, heads: Sequence[str] = (CLICK,), delayed: bool = True) -> Rows:
    """Encode a split; `heads` are the outcomes whose labels are wanted, each but the click in a column of its name.

    Unless `delayed`, rows have no maturity: what has not come is a negative.

    One that would take much of the memory that a run may use is encoded into files, unless they are there already, and mapped.

    Raises:
        DataError: the split is absent or empty, a column does not fit the schema or is not there, or the files cannot be written.
    """
    check_fields(data, encoder.schema, files := data.files(split))
    more = [head for head in heads if head != CLICK]

    def fill(columns: Columns) -> None:
        _encode(columns, data, data.frames(split, (*more, *map(maturity_name, more))), encoder, ad_table(data, encoder), more)

    each = sum(column.dtype.itemsize * int(np.prod(column.shape[1:])) for column in _empty(encoder, more).values())
    if data.memory.holds(each * sum(map(rows_in, files))):
        fill(columns := InMemory())
        rows = _rows(columns.arrays(), encoder, more)
    else:
        folder = data.memory.cache or data.folder / CACHE
        stored, mapped = cached(folder, split, _source(data, split, encoder, more), fill)
        rows = _rows(stored, encoder, more, mapped)
    if not len(rows):
        raise DataError(f"the {split} split of {data.folder} has no row")
    return rows if delayed else dataclasses.replace(rows, maturity={})


def _source(data: Prepared, split: str, encoder: Encoder, heads: Sequence[str]) -> str:
    """The digest of what an encoded split follows from; files count by their sizes and times."""
    files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in data.sources(split)]
    encoding = (fingerprint(encoder.schema, encoder.vocabularies), data.schema.to_toml())
    return hashlib.sha256(repr((FORMAT, encoding, files, data.window, heads)).encode()).hexdigest()


def encode_frames(data: Prepared, frames: Iterable[pl.DataFrame], encoder: Encoder, table: AdTable, heads: Sequence[str] = ()) -> Rows:
    """Encode frames of a data set, with `ad_table` of it, and the labels of further `heads`.

    Raises:
        DataError: a column does not fit the schema, or a log lacks an ad.
    """
    columns = InMemory()
    _encode(columns, data, frames, encoder, table, heads)
    return _rows(columns.arrays(), encoder, heads)


def _empty(encoder: Encoder, heads: Sequence[str]) -> dict[str, Array]:
    """The columns that have a row for each row, of none; ids are as narrow as their vocabularies allow."""
    schema = encoder.schema
    columns: dict[str, Array] = {"labels": np.zeros(0, np.float32), "users": np.zeros(0, np.uint64), "weight": np.zeros(0, np.float32)}
    for name in ("user", "ad"):
        layout = encoder.layouts[name]
        largest = max((encoder.vocabularies.categories[slot.field.vocabulary].size for slot in layout.ids), default=0)
        columns[f"{name}.ids"] = np.zeros((0, layout.width), np.min_scalar_type(largest))
        columns[f"{name}.numbers"] = np.zeros((0, layout.number_width), np.float32)
    columns["history"] = np.zeros((0, max(schema.history_length, 1)), np.int32)
    if schema.history_ages:
        columns["ages"] = np.zeros((0, schema.history_length), np.float32)
    return columns | {f"{what}.{head}": np.zeros(0, np.float32) for head in heads for what in ("outcomes", "maturity")}


def _encode(
    columns: Columns, data: Prepared, frames: Iterable[pl.DataFrame], encoder: Encoder, table: AdTable, heads: Sequence[str]
) -> None:
    """Put the rows of frames into columns, frame by frame, and after them the ads that they are about."""
    schema, users, empty = data.schema, data.table("user"), _empty(encoder, heads)
    sides: tuple[Side, Side] = ("user", "context")
    ads, count, alike = DistinctAds(), 0, True
    for name, column in empty.items():
        columns.add(name, column)
    for frame in frames:
        whole = joined(frame, schema, {"user": users})
        user, context = (encoder.encode(side, columns_of_side(whole, schema.side(side)), len(frame)) for side in sides)
        ad = ads_of(frame, data, encoder, table)
        weight = frame["weight"] if "weight" in frame.columns else pl.Series([1.0]).new_from_index(0, len(frame))
        found = {"labels": frame["label"], "users": _user_numbers(frame["user_id"], count), "weight": weight}
        for name, block in (("user", user.beside(context)), ("ad", ad)):
            found |= {f"{name}.ids": block.ids, f"{name}.numbers": block.numbers}
        found["history"] = history_of(frame, data, table)
        if schema.history_ages:
            found["ages"] = history_ages(frame, data)
        found |= {f"outcomes.{head}": outcome_of(frame, head, data) for head in heads}
        found |= {f"maturity.{head}": maturity_of(frame, head, data) for head in heads}
        typed = {name: np.asarray(values).astype(empty[name].dtype, copy=False) for name, values in found.items()}
        for name, values in typed.items():
            columns.add(name, values)
        ads.add(Block(typed["ad.ids"], typed["ad.numbers"]))
        count, alike = count + len(frame), alike and bool((weight == 1.0).all())
    past, known = encoder.history_of(table.block), np.flatnonzero(table.active(np.arange(len(table.block))))
    catalogue = table.block.take(known) if len(known) else ads.block()
    for name, block in (("behaviours", past), ("catalogue", catalogue)):
        columns.add(f"{name}.ids", block.ids)
        columns.add(f"{name}.numbers", block.numbers)
    columns.add("alike", np.array([alike]))


def _rows(columns: Mapping[str, Array], encoder: Encoder, heads: Sequence[str], mapped: Mapped | None = None) -> Rows:
    user, ad = (Block(columns[f"{name}.ids"], columns[f"{name}.numbers"]) for name in ("user", "ad"))
    held = np.array if mapped else np.asarray  # what every batch needs is in memory
    past, ads = (Block(held(columns[f"{name}.ids"]), held(columns[f"{name}.numbers"])) for name in ("behaviours", "catalogue"))
    own = (columns["labels"], columns["users"], user, ad, columns["history"], past, Strangers.of(encoder), ads)
    outcomes, weight = {head: columns[f"outcomes.{head}"] for head in heads}, None if columns["alike"].all() else columns["weight"]
    maturity = {head: found for head in heads if ((found := columns[f"maturity.{head}"]) < 1).any()}
    return Rows(*own, outcomes, weight, columns.get("ages"), maturity, mapped=mapped)


def outcome_of(frame: pl.DataFrame, head: str, data: Prepared) -> Outcome:
    """The labels `(N,)` of a head other than the click, NaN where a row has none.

    Raises:
        DataError: the rows have no such column, or it holds something else than 0, 1 and nothing.
    """
    if head not in frame.columns:
        raise DataError(
            f"{data.folder} has no column {head}: the head {head} needs a label for each row, 0, 1 or null; leave it out of heads"
        )
    column = frame[head]
    if not column.dtype.is_integer() or not column.drop_nulls().is_in([0, 1]).all():
        raise DataError(f"{data.folder}: the column {head}, the labels of a head, must be of whole numbers, 0, 1 or null")
    return column.cast(pl.Float32).fill_null(float("nan")).to_numpy()


def maturity_name(head: str) -> str:
    """The column of how likely an outcome of the head would have come by now, see `Rows.maturity`."""
    return f"{head}_maturity"


def maturity_of(frame: pl.DataFrame, head: str, data: Prepared) -> Outcome:
    """The maturity `(N,)` of a head, 1 where a row has none.

    Raises:
        DataError: it is no probability above 0.
    """
    name = maturity_name(head)
    if name not in frame.columns:
        return np.ones(len(frame), np.float32)
    column = frame[name].fill_null(1.0)
    if not column.dtype.is_numeric() or not column.is_between(0, 1, closed="right").all():
        raise DataError(f"{data.folder}: the column {name} must hold numbers above 0, at most 1: how likely it would have come by now")
    found: Outcome = np.maximum(column.cast(pl.Float32).to_numpy(), np.float32(1e-6))
    return found


def _user_numbers(names: pl.Series, before: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number a user, by a hash of 64 bits. Rows of nobody are no group, so each has a number of its own: that of the row."""
    users = names.unique()
    hashes = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) for name in users]
    numbers = names.replace_strict(users, pl.Series(hashes, dtype=pl.UInt64), return_dtype=pl.UInt64).to_numpy()
    return np.where((names == "").to_numpy(), before + np.arange(len(names), dtype=np.uint64), numbers)
