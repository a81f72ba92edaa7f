"""In which order ads are shown: the best first, or by a policy that explores. Knows nothing about requests, models or logs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from features.policy import Array, Policy
from features.vocabulary import Ids


class Arranged(NamedTuple):
    """The rows in the order in which they are shown, and the propensity of the first of them; None where nothing was drawn."""

    order: Ids
    propensity: Array | None


def arrange(best: Ids, values: Any, policy: Policy | None, places: int | None, random: np.random.Generator) -> Arranged:
    """Rows `(n,)` that stand best first, arranged by a policy for so many places, None: for all; `values` are those of all rows.

    No policy is greedy: the best first, without any chance.
    """
    if policy is None:
        return Arranged(best, None)
    drawn = policy.draw(values.take(best).astype(np.float64), min(places or len(best), len(best)), random)
    return Arranged(best.take(drawn.ranks), drawn.propensity)


def best_first(rows: Ids, by: Any, ad_ids: Sequence[str]) -> Ids:
    """The rows by falling value, equal ones by ad id; numpy does all but the ties, since ids of thousands sort slowly."""
    order: Ids = rows.take((-by.take(rows)).argsort(kind="stable"))
    falling = by.take(order)
    same = falling[1:] == falling[:-1]
    if np.count_nonzero(same):
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False)).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            order[first : last + 1] = sorted(order[first : last + 1].tolist(), key=ad_ids.__getitem__)
    return order
