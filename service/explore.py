"""In which order ads are shown: the best first, or by a policy that explores; and how likely the policy was to do what it did.

The propensity of a position is the probability that the policy puts this ad there, given the ads above it. The product over the
positions is that of the whole order, which is what inverse propensity scoring weighs a ranking by (Swaminathan and Joachims 2015,
"Counterfactual Risk Minimization"). Knows nothing about requests, models or logs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from features.policy import FLOOR
from features.vocabulary import Ids

Values = np.ndarray[Any, np.dtype[np.float64]]


class Drawn(NamedTuple):
    """`ranks (n,)`, a permutation of the ads by how good they are (0 is the best); `propensity (places,)` of the first of them."""

    ranks: Ids
    propensity: Values


class Policy(Protocol):
    """A way to order ads that explores. Its text is what the log calls it."""

    def draw(self, falling: Values, places: int, random: np.random.Generator) -> Drawn:
        """Draw the ads of the first `places`, of which there are no more than ads; the ads that are left follow, best first.

        `falling (n,)` are the ads' values, best first.
        """


@dataclass(frozen=True, slots=True)
class EpsilonGreedy:
    """At each place the best ad that is left, but with the probability `epsilon` any one of those left, the best included."""

    epsilon: float

    def __str__(self) -> str:
        return f"epsilon_greedy {self.epsilon}"

    def draw(self, falling: Values, places: int, random: np.random.Generator) -> Drawn:
        """See `Policy`."""
        explored = random.random(places) < self.epsilon
        taken = np.zeros(len(falling), np.bool_)
        if np.count_nonzero(explored):
            ranks, best = _walk(explored.tolist(), random.permutation(len(falling)).tolist())
        else:
            ranks, best = list(range(places)), [True] * places
        taken[ranks] = True
        left = np.arange(len(falling), len(falling) - places, -1)
        propensity = np.minimum((1 - self.epsilon) * np.array(best, np.float64) + self.epsilon / left, 1.0)
        return Drawn(_then_the_rest(np.array(ranks, np.int64), taken), propensity)


def _walk(explored: list[bool], by_chance: list[int]) -> tuple[list[int], list[bool]]:
    """The rank that each place gets, and whether it was the best one left.

    A place that explores takes the next of a random permutation that is not taken yet. That is any of those left with the same
    probability whatever came before, since nothing that came before tells one of those left from another in the permutation.
    """
    taken, chances = bytearray(len(by_chance)), iter(by_chance)
    ranks, best, head = [], [], 0
    for explores in explored:
        while taken[head]:
            head += 1
        rank = next(rank for rank in chances if not taken[rank]) if explores else head
        taken[rank] = True
        ranks.append(rank)
        best.append(rank == head)
    return ranks, best


@dataclass(frozen=True, slots=True)
class PlackettLuce:
    """At each place one of the ads left, with probabilities in proportion to value ** (1 / temperature).

    Luce 1959, "Individual Choice Behavior"; Plackett 1975, "The Analysis of Permutations". Drawn all at once: the order of
    log-weights with Gumbel noise is such an order (Kool, van Hoof and Welling 2019, "Stochastic Beams and Where to Find Them").
    """

    temperature: float

    def __str__(self) -> str:
        return f"plackett_luce {self.temperature}"

    def draw(self, falling: Values, places: int, random: np.random.Generator) -> Drawn:
        """See `Policy`."""
        weights = np.log(np.maximum(falling, FLOOR)) / self.temperature
        noisy = weights + random.gumbel(size=len(weights))
        drawn = np.argsort(-noisy, kind="stable")[:places]
        taken = np.zeros(len(falling), np.bool_)
        taken[drawn] = True
        ranks = _then_the_rest(drawn, taken)
        # log(sum(exp)) of what is left at each place, from the end: sums of small terms first, and no exponential overflows.
        left = np.logaddexp.accumulate(weights.take(ranks)[::-1])[::-1]
        return Drawn(ranks, np.exp(weights.take(drawn) - left[:places]))


def _then_the_rest(drawn: Ids, taken: np.ndarray[Any, np.dtype[np.bool_]]) -> Ids:
    return np.concatenate([drawn, np.flatnonzero(~taken)])


class Arranged(NamedTuple):
    """The rows in the order in which they are shown, and the propensity of the first of them; None where nothing was drawn."""

    order: Ids
    propensity: Values | None


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
