"""What each field is worth to a bundle: how far AUC falls when its values are dealt anew to the rows (Breiman 2001, section 10)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.progress import Progress
from scipy.stats import t

from features.bundle import Bundle
from features.encode import Block
from features.schema import Schema, Slot

from .datasets.encoded import Rows, encode_split
from .datasets.fields import check_fields
from .datasets.prepared import Prepared
from .evaluate import auc
from .export.graph import Graph

ROWS, REPEATS, SURE = 20_000, 5, 0.95
Scores = np.ndarray[Any, np.dtype[Any]]
Order = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Importance:
    """How far AUC falls without what a field says, as a mean over the deals, and the 95 % interval of that mean."""

    field: str
    drop: float
    low: float
    high: float


def importances(bundle: Bundle, data: Prepared, split: str, progress: Progress, seed: int = 0) -> tuple[float, int, list[Importance]]:
    """The AUC on at most 20,000 rows of a split, how many there were, and the fields, the one that is worth most first.

    A history is dealt as a whole, and counts as one field. Of two fields that say the same, each seems to be
    worth little: the other still says it.

    Raises:
        DataError: the split is absent, or does not fit the bundle's schema or lacks a field of it.
    """
    check_fields(data, bundle.schema, data.files(split))
    rows = encode_split(replace(data, schema=bundle.schema), split, bundle.encoder)
    return importances_of(Graph(bundle).p_click, rows, bundle.schema, progress, ROWS, seed)


def importances_of(
    score: Callable[[Rows], Scores], rows: Rows, schema: Schema, progress: Progress, most: int, seed: int = 0
) -> tuple[float, int, list[Importance]]:
    """The same of what `score` gives, on at most so many of the rows."""
    random = np.random.default_rng(seed)
    rows = rows.take(np.sort(random.permutation(len(rows))[:most]))
    base = auc(rows.labels, score(rows))
    found = []
    for name in progress.track(list(fields_of(schema)), description="fields"):
        deals = [dealt(rows, schema, name, random.permutation(len(rows))) for _ in range(REPEATS)]
        found.append(_importance(name, [base - auc(each.labels, score(each)) for each in deals]))
    return base, len(rows), sorted(found, key=lambda each: -each.drop)


def _importance(name: str, drops: list[float]) -> Importance:
    mean, error = float(np.mean(drops)), float(np.std(drops, ddof=1) / np.sqrt(len(drops)))
    reach = float(t.ppf((1 + SURE) / 2, len(drops) - 1)) * error
    return Importance(name, mean, mean - reach, mean + reach)


def fields_of(schema: Schema) -> Iterator[str]:
    """The fields of a schema by their paths, and `history` where it has one."""
    yield from (field.path for field in schema.fields)
    if schema.history_fields:
        yield "history"


def dealt(rows: Rows, schema: Schema, field: str, order: Order) -> Rows:
    """The rows with the values of a field in another order."""
    if field == "history":
        return replace(rows, history=rows.history[order], ages=None if rows.ages is None else rows.ages[order])
    side = field.partition(".")[0]
    part = "ad" if side == "ad" else "user"
    block: Block = getattr(rows, part)
    layout = schema.layouts[part]
    ids, numbers = block.ids.copy(), block.numbers.copy()
    for array, slots in ((ids, layout.ids), (numbers, layout.numbers)):
        for slot in _of(slots, field):
            array[:, slot.columns] = array[order, slot.columns]
    other = Block(ids, numbers)
    return replace(rows, ad=other) if part == "ad" else replace(rows, user=other)


def _of(slots: tuple[Slot, ...], field: str) -> Iterator[Slot]:
    return (slot for slot in slots if slot.field.path == field)
