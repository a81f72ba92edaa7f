"""A prepared data set as tensors: vocabularies learned from its train split, and each split encoded through `features/`.

A log is encoded as it was served: an ad is keyed by its id and the revision of its features, and one that the catalogue did not know is
encoded as unknown but for what was sent with it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch

from features.ages import UNKNOWN_TIME, ages_of
from features.encode import IDENTITIES, AdTable, Block, Encoder
from features.schema import Field, Schema, Side
from features.vocabulary import UNKNOWN, HashBuckets, Ids, Moments, Vocabularies, Vocabulary

from ..networks.contract import CLICK, Labels, Part, RequestTensors
from ..tenure import Tenure
from .fields import check_fields
from .log import ImpressionLog
from .prepared import DataError, Prepared, column_of
from .spread import NOTHING, Spread

Outcome = np.ndarray[Any, np.dtype[np.float32]]
FEW_TIMES = 8
"""See `_distinct`."""
SEPARATOR = "\x1f"
"""Between an ad's id and its revision."""


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
    users: np.ndarray[Any, np.dtype[np.uint32]]
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

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> "Rows":
        """Some of the rows, in that order."""
        outcomes = {head: labels[rows] for head, labels in self.outcomes.items()}
        weight = None if self.weight is None else self.weight[rows]
        own = (self.labels[rows], self.users[rows], self.user.take(rows), self.ad.take(rows), self.history[rows])
        ages = None if self.ages is None else self.ages[rows]
        return Rows(*own, self.behaviours, self.strangers, self.catalogue, outcomes, weight, ages)

    @property
    def ads(self) -> Part:
        """All ads of the data set `(A, W)`."""
        return _part(self.catalogue)

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

    def labels_of(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Labels:
        """What came of some rows."""
        heads = {CLICK: self.labels, **self.outcomes}
        weight = None if self.weight is None else torch.from_numpy(self.weight[rows])
        return Labels({head: torch.from_numpy(labels[rows]) for head, labels in heads.items()}, weight)

    def batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> RequestTensors:
        """The tensors of some rows: `user (R, W)`, `history (R, T)` cut to the longest there, `ad (R, 1, W)`."""
        history = self.history[rows]
        longest = max(1, int((history > 0).sum(1).max(initial=0)))
        distinct, at = _distinct(history[:, :longest], len(self.behaviours))
        past = _part(self.behaviours.take(distinct))._replace(rows=torch.from_numpy(at))
        ages = None if self.ages is None else torch.from_numpy(self.ages[rows][:, :longest])
        return RequestTensors(_part(self.user.take(rows)), past, _part(self.ad.take(rows[:, None])), ages)


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


def _part(block: Block) -> Part:
    return Part(torch.from_numpy(block.ids), torch.from_numpy(block.numbers))


def learn_vocabularies(data: Prepared, base: Vocabularies | None = None, tenure: Tenure | None = None) -> Vocabularies:
    """Values and moments of the train split: most frequent first, then by the value, so that the order is certain.

    What `base` has stays as it is, ids and moments, and the values that are new come after it, or where `tenure` finds rows of idle ones.
    The moments of a number that was constant then are learned anew: it told nothing.

    Raises:
        DataError: the split is absent, or a column is of another type than its field.
    """
    schema = data.schema
    counts: dict[str, list[pl.DataFrame]] = {field.vocabulary: [] for field in schema.fields if not field.dense}
    spreads = {field.path: NOTHING for field in schema.fields if field.transform == "standard"}
    tables = {side: data.table(side) for side in ("user", "ad")}
    for frame in data.frames("train"):
        whole = joined(frame, schema, tables)
        for field in schema.fields:
            column = column_of(whole, field)
            if column is not None and field.path in spreads:
                spreads[field.path] = spreads[field.path].beside(Spread.of(column.drop_nulls().drop_nans().to_numpy()))
            elif column is not None and not field.dense and not field.buckets:
                counts[field.vocabulary].append(_counts(column))
        if schema.history and not schema.history[0].buckets:
            # A behaviour repeats with every later row of its user: it makes an ad known, and counts once a file.
            behaviours = _counts(frame["history"]).with_columns(count=pl.lit(1, pl.UInt32))
            counts[schema.history[0].vocabulary].append(behaviours)
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


def _counts(column: pl.Series) -> pl.DataFrame:
    flat = column.explode() if column.dtype == pl.List else column
    return flat.drop_nulls().rename("value").value_counts(name="count")


def _vocabulary(counts: Sequence[pl.DataFrame], field: Field, first: Sequence[str], tenure: Tenure) -> Vocabulary:
    if not counts:
        raise DataError(f"no column holds the values of {field.path}, neither the train split nor a table; prepare the data set again")
    total = pl.concat(counts).group_by("value").agg(pl.col("count").sum())
    kept = total.filter(pl.col("count") >= field.min_count).sort(["count", "value"], descending=[True, False])
    known = set(first)
    new = [value for value in kept["value"].to_list() if value not in known]
    return Vocabulary(tenure.place(field.vocabulary, first, set(total["value"].to_list()) if first else (), new))


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
        if table is not None and not _inline(frame, schema, side):
            frame = frame.join(table, on=f"{side}_id", how="left", maintain_order="left")
    return frame


def _inline(frame: pl.DataFrame, schema: Schema, side: str) -> bool:
    return any(field.path in frame.columns for field in schema.fields if field.side == side)


def _columns(frame: pl.DataFrame, fields: Sequence[Field]) -> dict[str, list[Any]]:
    named = {field.name: column_of(frame, field) for field in fields}
    return {name: column.to_list() for name, column in named.items() if column is not None}


def ad_table(data: Prepared, encoder: Encoder) -> AdTable:
    """The data set's ads, encoded; those of a log in every version, under the keys of `versions_of`."""
    table = AdTable(encoder)
    ads = data.versions() if isinstance(data, ImpressionLog) else data.table("ad")
    if ads is not None:
        keys = versions_of(ads["ad_id"], ads["revision"]) if isinstance(data, ImpressionLog) else ads["ad_id"]
        table.put(keys.to_list(), encoder.encode("ad", _columns(ads, data.schema.side("ad")), len(ads)))
    return table


def catalogue(data: Prepared, encoder: Encoder) -> tuple[list[str], Part] | None:
    """The ids of the data set's ads, and these as they are now `(A, W)`; None where it keeps no table of them."""
    ads = data.table("ad")
    if ads is None:
        return None
    return ads["ad_id"].to_list(), _part(encoder.encode("ad", _columns(ads, data.schema.side("ad")), len(ads)))


def versions_of(ad_ids: pl.Series, revisions: pl.Series) -> pl.Series:
    """The keys of ads as they were: id and revision, 0 being that of an ad that the catalogue did not have."""
    return ad_ids + SEPARATOR + revisions.cast(pl.String)


def encode_split(data: Prepared, split: str, encoder: Encoder, heads: Sequence[str] = (CLICK,)) -> Rows:
    """Encode a split; `heads` are the outcomes whose labels are wanted, each but the click in a column of its name.

    Raises:
        DataError: the split is absent or empty, or a column does not fit the schema or is not there.
    """
    check_fields(data, encoder.schema, data.files(split))
    more = [head for head in heads if head != CLICK]
    rows = encode_frames(data, data.frames(split, more), encoder, ad_table(data, encoder), more)
    if not len(rows):
        raise DataError(f"the {split} split of {data.folder} has no row")
    return rows


def encode_frames(data: Prepared, frames: Iterable[pl.DataFrame], encoder: Encoder, table: AdTable, heads: Sequence[str] = ()) -> Rows:
    """Encode frames of a data set, with `ad_table` of it, and the labels of further `heads`.

    Raises:
        DataError: a column does not fit the schema, or a log lacks an ad.
    """
    schema, users = data.schema, data.table("user")
    sides: tuple[Side, Side] = ("user", "context")
    names, labels = [pl.Series(dtype=pl.String)], [np.zeros(0, np.float32)]
    nobody, nothing = encoder.encode("user", {}, 0).beside(encoder.encode("context", {}, 0)), encoder.encode("ad", {}, 0)
    parts: dict[str, list[Block]] = {"user": [_narrow(nobody)], "ad": [_narrow(nothing)]}
    history = [np.zeros((0, max(schema.history_length, 1)), np.int32)]
    ages = [np.zeros((0, schema.history_length), np.float32)]
    outcomes, weights = {head: list[Outcome]() for head in heads}, list[pl.Series]()
    for frame in frames:
        labels.append(frame["label"].to_numpy().astype(np.float32))
        weights.append(frame["weight"] if "weight" in frame.columns else pl.Series([1.0]).new_from_index(0, len(frame)))
        for head, found in outcomes.items():
            found.append(outcome_of(frame, head, data))
        names.append(frame["user_id"])
        whole = joined(frame, schema, {"user": users})
        user, context = (encoder.encode(side, _columns(whole, schema.side(side)), len(frame)) for side in sides)
        parts["user"].append(_narrow(user.beside(context)))
        served = isinstance(data, ImpressionLog)
        parts["ad"].append(_narrow(_served_ads(frame, encoder) if served else _encode_ads(frame, data, encoder, table)))
        history.append(_history(frame, data, table))
        if schema.history_ages:
            ages.append(_ages(frame, data))
    numbers = _user_numbers(pl.concat(names))
    user, ad = _stack(parts["user"]), _stack(parts["ad"])
    past = encoder.history_of(table.block)
    known = np.flatnonzero(table.active(np.arange(len(table.block))))
    catalogue = table.block.take(known) if len(known) else ad.take(np.unique(ad.ids, axis=0, return_index=True)[1])
    whole_labels, known_outcomes = np.concatenate(labels), {head: np.concatenate(found) for head, found in outcomes.items()}
    rows, strangers, weight = np.concatenate(history), Strangers.of(encoder), _weight(weights)
    whole_ages = np.concatenate(ages) if schema.history_ages else None
    return Rows(whole_labels, numbers, user, ad, rows, past, strangers, catalogue, known_outcomes, weight, whole_ages)


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


def _weight(weights: Sequence[pl.Series]) -> Outcome | None:
    """What rows weigh, None where all weigh the same."""
    whole = pl.concat(weights) if weights else pl.Series([1.0])
    return None if (whole == 1.0).all() else whole.cast(pl.Float32).to_numpy()


def _user_numbers(names: pl.Series) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """A number a user. Rows of nobody are no group, so each has a number of its own."""
    numbers = names.rank("dense").to_numpy().astype(np.uint32)
    nobody = np.flatnonzero((names == "").to_numpy())
    numbers[nobody] = numbers.max(initial=0) + 1 + np.arange(len(nobody))
    return numbers


def _narrow(block: Block) -> Block:
    """The block with ids in the narrowest type that holds them all: a split is kept whole, and int64 would be most of it."""
    return Block(block.ids.astype(np.min_scalar_type(block.ids.max(initial=0))), block.numbers)


def _stack(blocks: Sequence[Block]) -> Block:
    return Block(np.concatenate([block.ids for block in blocks]), np.concatenate([block.numbers for block in blocks]))


def _encode_ads(frame: pl.DataFrame, data: Prepared, encoder: Encoder, table: AdTable) -> Block:
    if _inline(frame, encoder.schema, "ad"):
        return encoder.encode("ad", _columns(frame, encoder.schema.side("ad")), len(frame))
    return table.block.take(ad_rows(frame["ad_id"], data, table))


def _served_ads(frame: pl.DataFrame, encoder: Encoder) -> Block:
    """The ads of a log's rows; of one that the catalogue did not know, fields without a value were not sent and are unknown."""
    columns = _columns(frame, encoder.schema.side("ad"))
    ads = encoder.encode("ad", columns, len(frame))
    unknown = np.flatnonzero(~frame["known"].to_numpy())
    if len(unknown):
        filled = encoder.unknown_ads(frame["ad_id"].gather(unknown).to_list())
        for slot in encoder.layouts["ad"].ids:
            values = columns.get(slot.field.name)
            unsent = [at for at, row in enumerate(unknown) if values is None or values[row] is None]
            ads.ids[unknown[unsent], slot.columns] = filled.ids[unsent, slot.columns]
    return ads


def _history(frame: pl.DataFrame, data: Prepared, table: AdTable) -> np.ndarray[Any, np.dtype[np.int32]]:
    width = data.schema.history_length
    if not width:
        return np.zeros((len(frame), 1), np.int32)
    whole = frame["history"].fill_null([]).list.drop_nulls()
    if data.schema.history_padding and not isinstance(data, ImpressionLog):  # in a log stands what was encoded
        whole = whole.list.eval(pl.element().filter(~pl.element().is_in(data.schema.history_padding)))
    kept = whole.list.tail(width)
    lengths = kept.list.len().to_numpy().astype(np.int64)
    padded = np.zeros((len(frame), width), np.int32)
    if lengths.any():
        keys = kept.explode().drop_nulls()
        if isinstance(data, ImpressionLog):
            keys = versions_of(keys, frame["history_revisions"].list.tail(width).explode().drop_nulls())
        padded[np.arange(width) < lengths[:, None]] = ad_rows(keys, data, table)
    return padded


def _ages(frame: pl.DataFrame, data: Prepared) -> Outcome:
    """The ages `(N, T)` of the behaviours that `_history` keeps, oldest first, 0 where there is padding."""
    width, padding = data.schema.history_length, () if isinstance(data, ImpressionLog) else data.schema.history_padding
    unknown = pl.col("history").list.eval(pl.element().is_null().cast(pl.Float64) * UNKNOWN_TIME)
    times = pl.col("history_ts").cast(pl.List(pl.Float64)).fill_null(unknown)
    pairs = frame.select(pl.int_range(pl.len()).alias("row"), "history", times)
    behaviours = pairs.explode("history", "history_ts").filter(pl.col("history").is_not_null(), ~pl.col("history").is_in(list(padding)))
    kept = behaviours.group_by("row", maintain_order=True).agg(pl.col("history_ts").fill_null(UNKNOWN_TIME).tail(width))
    newest = pairs.select("row").join(kept, on="row", how="left", maintain_order="left")["history_ts"].fill_null([])
    behaved = np.arange(width) < newest.list.len().to_numpy().astype(np.int64)[:, None]
    ts = np.full((len(frame), width), UNKNOWN_TIME)
    ts[behaved] = newest.explode().drop_nulls().to_numpy()
    return np.where(behaved, ages_of(frame["ts"].to_numpy()[:, None], ts), np.float32(0))


def ad_rows(keys: pl.Series, data: Prepared, table: AdTable) -> Ids:
    """Row of each ad in `ad_table`; one that the table lacks joins it as the service would encode it, by its id alone.

    Raises:
        DataError: the ad is a version that its log should have.
    """
    unique = keys.unique()
    values = unique.to_list()
    missing = [value for value, row in zip(values, table.rows(values), strict=True) if not row]
    if missing:
        ad_ids = _without_revision(missing, data) if isinstance(data, ImpressionLog) else missing
        table.put(missing, table.encoder.unknown_ads(ad_ids), active=False)
    rows = keys.replace_strict(unique, table.rows(values), return_dtype=pl.Int64).to_numpy()
    return rows.astype(np.int64, copy=False)  # polars gives an empty column no type


def _without_revision(keys: Sequence[str], data: ImpressionLog) -> list[str]:
    parts = [key.rpartition(SEPARATOR) for key in keys]
    lost = [(ad_id, revision) for ad_id, _, revision in parts if revision != "0"]
    if lost:
        ad_id, revision = lost[0]
        raise DataError(f"{data.folder / 'ads'} lacks {len(lost)} versions of ads that rows name, the first is {revision} of {ad_id}")
    return [ad_id for ad_id, _, _ in parts]
