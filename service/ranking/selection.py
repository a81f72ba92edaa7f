"""Which ads of the catalogue are candidates, where a request does not list them. Knows nothing about HTTP, and ranks nothing."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from features.encode import Encoder, Mask
from features.schema import IDENTITY, Field, Slot
from features.state import unpack_features
from features.vocabulary import UNKNOWN, Ids, Numbers

from ..catalogue.ads import View
from ..errors import InvalidError
from ..models.loaded import Model
from .query import Selection

DENSE = 4
"""Where one in so many ads pass the filters, or more, it is quicker to multiply all vectors than to copy theirs together first."""

SAMPLE = 2**14
"""Products among which it is looked how large those of the best are: to part all of them takes half as long as to multiply."""


def searcher(models: Mapping[str, Model], ranks: Model) -> Model:
    """The model whose vectors are searched: the one that ranks, or the first by name of those that have vectors.

    Raises:
        InvalidError: none has.
    """
    for model in (models.get(ranks.name), *(models[name] for name in sorted(models))):
        if model is not None and model.towers is not None:
            return model
    raise InvalidError.at(
        ("options", "retrieve"), "no model is live that has vectors: train --model two_tower and promote it; docs/retrieval.md"
    )


def select(
    selection: Selection, model: Model, view: View, vector: Callable[[], Numbers], pinned: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """The active ads that pass the filters, or those of them that are nearest to the request's vector and those pinned; and how many
    are not, by reason.

    Raises:
        InvalidError: a filter names no category or list of ads, or the candidates are too many.
    """
    view.renew()
    table = view.table
    active = table.active(slice(len(table.block)))
    rows = _passing(selection, model, view, active)
    left = {"filtered": int(np.count_nonzero(active)) - len(rows)}
    if selection.retrieve and model.towers and len(rows) > selection.retrieve:
        left["not_retrieved"] = len(rows) - selection.retrieve
        rows = _nearest(table.vectors[model.towers], rows, vector(), selection.retrieve, table.rows(pinned))
    if len(rows) > selection.most:
        raise InvalidError.at(
            ("candidates",),
            f"{len(rows)} ads of the catalogue pass the filters; at most {selection.most} are ranked in one request: filter by more, "
            "or retrieve",
        )
    return table.ad_ids(rows), {reason: count for reason, count in left.items() if count}


def _nearest(vectors: Numbers, rows: Ids, vector: Numbers, count: int, pinned: Ids) -> Ids:
    """So many of the rows, which are more, in their order: those that are pinned, and the ones with the largest inner products.

    All are looked at: docs/decisions/2026-11-30-retrieval.md has what an index would save.
    """
    near = (vectors @ vector)[rows] if len(rows) * DENSE > len(vectors) else vectors[rows] @ vector
    near[np.isin(rows, pinned)] = np.inf
    sample = near[:: max(1, len(near) // SAMPLE)]
    high = min(len(sample), 2 * count * len(sample) // len(near) + 1)
    above = np.flatnonzero(near >= np.partition(sample, -high)[-high])  # about twice as many as are wanted
    if len(above) >= count:  # nearly always
        rows, near = rows[above], near[above]
    return rows[np.sort(np.argpartition(near, -count)[-count:])]


def _passing(selection: Selection, model: Model, view: View, active: Mask) -> Ids:
    """Rows of the active ads that pass: by the ids of the vocabularies, and where those do not tell values apart by the values."""
    encoder, fits, unsure = model.bundle.encoder, active, np.zeros(len(active), np.bool_)
    slots = {slot.field.name: slot for slot in encoder.layouts["ad"].ids if slot.field.name not in IDENTITY.values()}
    for name, values in selection.filters.items():
        if name not in slots:
            known = f"no category or list of ads of model {model.name}: {', '.join(sorted(slots))}"
            raise InvalidError.at(("filters", name), f"{name} is {known}")
        sure, shared = _found(encoder, slots[name], values, view.table.block.ids)
        fits, unsure = fits & (sure | shared), unsure | (shared & ~sure)
    rows, look = np.flatnonzero(fits), np.flatnonzero(fits & unsure)
    if len(look) > selection.most:
        what = f"{len(look)} ads would have to be looked at one by one, as no vocabulary tells some of these values from others"
        raise InvalidError.at(("filters",), f"{what}; at most {selection.most} are: filter by more")
    if not len(look):
        return rows
    fields = {name: slots[name].field for name in selection.filters}
    packed = view.features(ad_ids := view.table.ad_ids(look))
    values_of = [encoder.usable("ad", unpack_features(packed[ad_id]))[0] if ad_id in packed else {} for ad_id in ad_ids]
    wrong = [not all(_has(fields[name], each.get(name), values) for name, values in selection.filters.items()) for each in values_of]
    return np.setdiff1d(rows, look[wrong], assume_unique=True)


def _found(encoder: Encoder, slot: Slot, values: Sequence[str], ids: Ids) -> tuple[Mask, Mask]:
    """Which rows have one of the values for sure, and which have an id that it shares with others."""
    vocabulary = encoder.vocabularies.categories[slot.field.vocabulary]
    wanted = vocabulary.encode(values)
    shared = wanted <= UNKNOWN if not slot.field.buckets else np.ones(len(wanted), np.bool_)
    return _have(ids[:, slot.columns], wanted[~shared], vocabulary.size), _have(ids[:, slot.columns], wanted[shared], vocabulary.size)


def _have(ids: Ids, wanted: Ids, size: int) -> Mask:
    """Which rows of ids `(n, k)` below `size` have one of those that are wanted."""
    hit: Mask = np.zeros(size, np.bool_)
    hit[wanted] = True
    return np.asarray(hit[ids].any(axis=1)) if len(wanted) else np.zeros(len(ids), np.bool_)


def _has(field: Field, value: object, wanted: Sequence[str]) -> bool:
    """Whether an ad's own clean value is one of those, or has one of them among what the model is given of it."""
    mine = value[: field.length] if isinstance(value, list) else [value]
    return not set(wanted).isdisjoint(mine)
