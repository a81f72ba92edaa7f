"""A fresh network whose embeddings begin with those of a trained one: other fields, vocabularies and layers, the same values."""

from typing import NamedTuple

import torch
from torch import Tensor

from features.vocabulary import UNKNOWN, HashBuckets, Vocabularies, Vocabulary

from .contract import Network
from .embeddings import Embeddings


class Copied(NamedTuple):
    """What of one table was copied."""

    name: str
    width: int
    values: int
    of: int

    def line(self) -> str:
        """In words."""
        return f"{self.name} ({self.width} wide): {self.values:,} of {self.of:,} values begin with those of the bundle"


@torch.no_grad()
def copy_embeddings(old: Network, before: Vocabularies, new: Network, now: Vocabularies) -> list[Copied]:
    """Copy the rows of values that both networks know, by vocabulary and value; all others begin as they are.

    A table takes from the one of its name, such as `second`, or else from one of its width.

    Raises:
        ValueError: no table fits, or one of a name is of another width; the message says how wide they are.
    """
    sources, copied = _tables(old), []
    for name, table in _tables(new).items():
        width = table.table.embedding_dim
        if name in sources and sources[name].table.embedding_dim != width:
            wide = sources[name].table.embedding_dim
            raise ValueError(f"the bundle's embeddings {name!r} are {wide} wide and this network's {width}: add --set embedding={wide}")
        source = sources.get(name) or next((each for each in sources.values() if each.table.embedding_dim == width), None)
        if source is None:
            continue
        found = [_copy(source, before, table, now, vocabulary) for vocabulary in table.sizes]
        _copy_scales(source, table)
        copied.append(Copied(name, width, sum(found), sum(size - UNKNOWN - 1 for size in table.sizes.values())))
    if not copied:
        widths = ["; ".join(f"{name} {each.table.embedding_dim}" for name, each in _tables(of).items()) for of in (old, new)]
        raise ValueError(f"none of the bundle's embeddings are as wide as this network's: {widths[0]} against {widths[1]}")
    return copied


def _tables(network: Network) -> dict[str, Embeddings]:
    """By the last part of their names."""
    return {name.rpartition(".")[2]: module for name, module in network.named_modules() if isinstance(module, Embeddings)}


def _copy(source: Embeddings, before: Vocabularies, table: Embeddings, now: Vocabularies, vocabulary: str) -> int:
    """Copy the rows of one vocabulary; how many values there were."""
    if vocabulary not in source.sizes:
        return 0
    rows = _rows(before.categories[vocabulary], now.categories[vocabulary])
    known = rows >= 0
    known_rows = source.table.weight[source.rows_of(vocabulary)][rows[known]]
    table.table.weight[table.rows_of(vocabulary)] = table.table.weight[table.rows_of(vocabulary)].index_put((known,), known_rows)
    return int(known[UNKNOWN:].sum())


def _rows(before: Vocabulary | HashBuckets, now: Vocabulary | HashBuckets) -> Tensor:
    """For each id of `now` from the unknown on, where it stood `(size - 1,)`; -1: nowhere."""
    if isinstance(now, Vocabulary) and isinstance(before, Vocabulary):
        ids = torch.from_numpy(before.encode(now.values))
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.where(ids == UNKNOWN, 0, ids) - UNKNOWN])
    if isinstance(now, HashBuckets) and isinstance(before, HashBuckets) and now.buckets == before.buckets:
        return torch.arange(now.size - 1)
    return torch.full((now.size - 1,), -1)


def _copy_scales(source: Embeddings, table: Embeddings) -> None:
    """The vectors that numbers scale, by part and field."""
    for part, layout in table.layouts.items():
        there = {(slot.field.name, slot.field.length): slot for slot in source.layouts[part].numbers} if part in source else {}
        for slot in layout.numbers:
            if source_slot := there.get((slot.field.name, slot.field.length)):
                table.scales[part][slot.columns] = source.scales[part][source_slot.columns]
