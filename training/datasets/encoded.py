"""A prepared data set as tensors: vocabularies learned from its train split, and each split encoded through `features/`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from features.encode import AdTable, Block, Encoder
from features.schema import Field, Schema, Side
from features.vocabulary import HashBuckets, Ids, Moments, Vocabularies, Vocabulary
from training.networks.blocks import Part

from .prepared import DataError, Prepared, column_of

Batch = tuple[Part, Part, Part]


@dataclass(frozen=True)
class Rows:
    """One split, encoded: N rows, each a request with one candidate.

    `labels (N,)` float32; `users (N,)` a number a user, for per-user metrics; `user` and `ad` blocks of N rows;
    `history (N, T)` rows of `table`, oldest first, padded with 0 at the end.
    """

    labels: np.ndarray[Any, np.dtype[np.float32]]
    users: np.ndarray[Any, np.dtype[np.uint32]]
    user: Block
    ad: Block
    history: np.ndarray[Any, np.dtype[np.int32]]
    behaviours: Block

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        """The tensors of some rows: `user (R, W)`, `history (R, T)` cut to the longest there, `ad (R, 1, W)`."""
        history = self.history[rows]
        longest = max(1, int((history > 0).sum(1).max(initial=0)))
        distinct, at = np.unique(history[:, :longest], return_inverse=True)
        past = _part(self.behaviours.take(distinct))._replace(rows=torch.from_numpy(at.reshape(len(rows), longest)))
        return _part(self.user.take(rows)), past, _part(self.ad.take(rows[:, None]))


def _part(block: Block) -> Part:
    return Part(torch.from_numpy(block.ids), torch.from_numpy(block.numbers))


def learn_vocabularies(data: Prepared, base: Vocabularies | None = None) -> Vocabularies:
    """Values and moments of the train split: most frequent first, then by the value, so that the order is certain.

    What `base` has stays as it is, ids and moments, and the values that are new come after it.

    Raises:
        DataError: the split is absent, or a column is of another type than its field.
    """
    schema = data.schema
    counts: dict[str, list[pl.DataFrame]] = {field.vocabulary: [] for field in schema.fields if field.kind != "number"}
    sums: dict[str, list[tuple[int, float, float]]] = {field.path: [] for field in schema.fields if field.transform == "standard"}
    tables = {side: data.table(side) for side in ("user", "ad")}
    for frame in data.frames("train"):
        whole = joined(frame, schema, tables)
        for field in schema.fields:
            column = column_of(whole, field)
            if column is not None and field.path in sums:
                known = column.drop_nulls().drop_nans()
                sums[field.path].append((len(known), float(known.sum()), float((known**2).sum())))
            elif column is not None and field.kind != "number" and not field.buckets:
                counts[field.vocabulary].append(_counts(column))
        if schema.history and not schema.history[0].buckets:
            # A behaviour repeats with every later row of its user: it makes an ad known, and counts once a file.
            behaviours = _counts(frame["history"]).with_columns(count=pl.lit(1, pl.UInt32))
            counts[schema.history[0].vocabulary].append(behaviours)
    categories: dict[str, Vocabulary | HashBuckets] = {}
    for field in schema.fields:
        if field.kind != "number":
            kept = base.categories[field.vocabulary] if base else None
            first = kept.values if isinstance(kept, Vocabulary) else ()
            categories[field.vocabulary] = (
                HashBuckets(field.buckets) if field.buckets else _vocabulary(counts[field.vocabulary], field, first)
            )
    return Vocabularies(categories, base.moments if base else {path: _moments(parts, path) for path, parts in sums.items()})


def _counts(column: pl.Series) -> pl.DataFrame:
    flat = column.explode() if column.dtype == pl.List else column
    return flat.drop_nulls().rename("value").value_counts(name="count")


def _vocabulary(counts: Sequence[pl.DataFrame], field: Field, first: Sequence[str]) -> Vocabulary:
    if not counts:
        raise DataError(f"no column holds the values of {field.path}, neither the train split nor a table; prepare the data set again")
    total = pl.concat(counts).group_by("value").agg(pl.col("count").sum())
    kept = total.filter(pl.col("count") >= field.min_count).sort(["count", "value"], descending=[True, False])
    known = set(first)
    return Vocabulary([*first, *(value for value in kept["value"].to_list() if value not in known)])


def _moments(parts: Sequence[tuple[int, float, float]], path: str) -> Moments:
    count, total, squares = (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0.0, 0.0)
    if not count:
        raise DataError(f"the train split has no number for {path}, so it cannot be standardised")
    mean = total / count
    return Moments(mean, max(squares / count - mean**2, 0.0) ** 0.5 or 1.0)


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
    """The data set's ads, encoded."""
    table, ads = AdTable(encoder), data.table("ad")
    if ads is not None:
        table.put(ads["ad_id"].to_list(), encoder.encode("ad", _columns(ads, data.schema.side("ad")), len(ads)))
    return table


def encode_split(data: Prepared, split: str, encoder: Encoder) -> Rows:
    """Encode a split.

    Raises:
        DataError: the split is absent or empty, or a column does not fit the schema.
    """
    schema, table = data.schema, ad_table(data, encoder)
    users = data.table("user")
    parts: dict[str, list[Any]] = {"labels": [], "users": [], "user": [], "ad": [], "history": []}
    for frame in data.frames(split):
        parts["labels"].append(frame["label"].to_numpy().astype(np.float32))
        parts["users"].append(frame["user_id"])
        whole = joined(frame, schema, {"user": users})
        sides: tuple[Side, Side] = ("user", "context")
        user, context = (encoder.encode(side, _columns(whole, schema.side(side)), len(frame)) for side in sides)
        parts["user"].append(user.beside(context))
        parts["ad"].append(_encode_ads(frame, encoder, table))
        parts["history"].append(_history(frame, schema, table))
    labels = np.concatenate(parts["labels"])
    if not len(labels):
        raise DataError(f"the {split} split of {data.folder} has no row")
    numbers = pl.concat(parts["users"]).rank("dense").to_numpy().astype(np.uint32)
    behaviours = encoder.history_of(table.block)
    return Rows(labels, numbers, _stack(parts["user"]), _stack(parts["ad"]), np.concatenate(parts["history"]), behaviours)


def _stack(blocks: Sequence[Block]) -> Block:
    return Block(np.concatenate([block.ids for block in blocks]), np.concatenate([block.numbers for block in blocks]))


def _encode_ads(frame: pl.DataFrame, encoder: Encoder, table: AdTable) -> Block:
    if _inline(frame, encoder.schema, "ad"):
        return encoder.encode("ad", _columns(frame, encoder.schema.side("ad")), len(frame))
    return table.block.take(_rows(frame["ad_id"], table))


def _history(frame: pl.DataFrame, schema: Schema, table: AdTable) -> np.ndarray[Any, np.dtype[np.int32]]:
    width = schema.history_length
    if not width:
        return np.zeros((len(frame), 1), np.int32)
    kept = frame["history"].fill_null([]).list.drop_nulls().list.tail(width)
    lengths = kept.list.len().to_numpy().astype(np.int64)
    padded = np.zeros((len(frame), width), np.int32)
    if lengths.any():
        padded[np.arange(width) < lengths[:, None]] = _rows(kept.explode().drop_nulls(), table)
    return padded


def _rows(ad_ids: pl.Series, table: AdTable) -> Ids:
    """Row of each ad in the table; an ad that the table lacks joins it as the service would encode it, by its id alone."""
    unique = ad_ids.unique()
    values = unique.to_list()
    missing = [value for value, row in zip(values, table.rows(values), strict=True) if not row]
    if missing:
        table.put(missing, table.encoder.unknown_ads(missing), active=False)
    rows = ad_ids.replace_strict(unique, table.rows(values), return_dtype=pl.Int64).to_numpy()
    return rows.astype(np.int64, copy=False)  # polars gives an empty column no type
