"""The ads of a data set, encoded: its table of them, and those of its rows.

A log is encoded as it was served: an ad is keyed by its id and the revision of its features, and one that the catalogue did not know is
encoded as unknown but for what was sent with it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from features.encode import AdTable, Block, Encoder
from features.schema import Field
from features.vocabulary import Ids

from ..networks.contract import Part
from .prepared import Prepared, column_of
from .vocabularies import inline


def part_of(block: Block) -> Part:
    """A block's tensors."""
    return Part(torch.from_numpy(block.ids), torch.from_numpy(block.numbers))


def columns_of_side(frame: pl.DataFrame, fields: Sequence[Field]) -> dict[str, list[Any]]:
    """The values of some fields by name, as encoding takes them; without those that the frame has no column of."""
    named = {field.name: column_of(frame, field) for field in fields}
    return {name: column.to_list() for name, column in named.items() if column is not None}


def ad_table(data: Prepared, encoder: Encoder) -> AdTable:
    """The data set's ads, encoded; those of a log in every version."""
    table, ads = AdTable(encoder), data.versions()
    if ads is not None:
        table.put(ads["key"].to_list(), encoder.encode("ad", columns_of_side(ads, data.schema.side("ad")), len(ads)))
    return table


def catalogue(data: Prepared, encoder: Encoder) -> tuple[list[str], Part] | None:
    """The ids of the data set's ads, and these as they are now `(A, W)`; None where it keeps no table of them."""
    ads = data.table("ad")
    if ads is None:
        return None
    return ads["ad_id"].to_list(), part_of(encoder.encode("ad", columns_of_side(ads, data.schema.side("ad")), len(ads)))


def ads_of(frame: pl.DataFrame, data: Prepared, encoder: Encoder, table: AdTable) -> Block:
    """The ad of each row, encoded; raises as `ad_rows` does."""
    if (known := data.known(frame)) is not None:
        return _served_ads(frame, known, encoder)
    if inline(frame, encoder.schema, "ad"):
        return encoder.encode("ad", columns_of_side(frame, encoder.schema.side("ad")), len(frame))
    return table.take(ad_rows(frame["ad_id"], data, table))


def _served_ads(frame: pl.DataFrame, known: pl.Series, encoder: Encoder) -> Block:
    """The ads of a log's rows; of one that the catalogue did not know, fields without a value were not sent and are unknown."""
    columns = columns_of_side(frame, encoder.schema.side("ad"))
    ads = encoder.encode("ad", columns, len(frame))
    unknown = np.flatnonzero(~known.to_numpy())
    if len(unknown):
        filled = encoder.unknown_ads(frame["ad_id"].gather(unknown).to_list())
        for slot in encoder.layouts["ad"].ids:
            values = columns.get(slot.field.name)
            unsent = [at for at, row in enumerate(unknown) if values is None or values[row] is None]
            ads.ids[unknown[unsent], slot.columns] = filled.ids[unsent, slot.columns]
    return ads


def ad_rows(keys: pl.Series, data: Prepared, table: AdTable) -> Ids:
    """Row of each ad in `ad_table`; one that the table lacks joins it as the service would encode it, by its id alone.

    Raises:
        DataError: the ad is a version that its log should have.
    """
    unique = keys.unique()
    values = unique.to_list()
    missing = [value for value, row in zip(values, table.rows(values), strict=True) if not row]
    if missing:
        table.put(missing, table.encoder.unknown_ads(data.ids_of(missing)), active=False)
    rows = keys.replace_strict(unique, table.rows(values), return_dtype=pl.Int64).to_numpy()
    return rows.astype(np.int64, copy=False)  # polars gives an empty column no type
