"""Policies that explore: how they draw the order in which ads are shown, and how likely they are to put an ad at a place.

The propensity of a place is the probability that the policy puts this ad there, given the ads above it. The product over the places is that
of the whole order, which is what inverse propensity scoring weighs a ranking by (Swaminathan and Joachims 2015, "Counterfactual Risk
Minimization"). Knows nothing about where values come from. Of equal values the ad in the lower column is the better one: where columns
stand in the order of ad ids, ties are broken as the service breaks them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import AdrankError
from .temperatures import COLDEST, HOTTEST
from .vocabulary import Ids

Array = np.ndarray[Any, np.dtype[Any]]
PLACES = 20
"""That Thompson sampling draws at most: each costs an integral over all ads. Those below follow best first."""
NODES, REACH, NARROWEST = 128, 6.0, 0.1
"""Of that integral: points, deviations on either side, and the least deviation as a share of the largest, which the points can tell."""
FLOOR = 1e-12
"""What a value of 0 counts as where weights are made of values: every ad then has a chance, if a small one."""
EXAMPLES = "greedy, epsilon_greedy:0.1 or plackett_luce:0.5"


class PolicyError(AdrankError, ValueError):
    """A text names no policy; the message says what would."""


class Drawn(NamedTuple):
    """`ranks (n,)`, a permutation of the ads by how good they are (0 is the best); `propensity (places,)` of the first of them."""

    ranks: Ids
    propensity: Array


class Policy(Protocol):
    """A way to fill places one after the other. Its text is what the log calls it."""

    def draw(self, falling: Array, places: int, random: np.random.Generator) -> Drawn:
        """Draw the ads of the first `places`, of which there are no more than ads; the ads that are left follow, best first.

        `falling (n,)` are the ads' values, best first.
        """

    def chances(self, values: Array, left: Array) -> Array:
        """The probability `(R, C)` of each ad for the next place, of R rankings with `values (R, C)`.

        `left (R, C)` says which ads are not above that place yet: at least one of each ranking, the others have no chance.
        """


@dataclass(frozen=True, slots=True)
class EpsilonGreedy:
    """At each place the best ad that is left, but with the probability `epsilon` any one of those left, the best included; 0 is greedy."""

    epsilon: float

    def __str__(self) -> str:
        return f"epsilon_greedy {self.epsilon}" if self.epsilon else "greedy"

    def chances(self, values: Array, left: Array) -> Array:
        """See `Policy`."""
        chances: Array = np.where(left, self.epsilon / left.sum(1, keepdims=True), 0.0)
        best = np.where(left, values, -np.inf).argmax(1)
        chances[np.arange(len(values)), best] += 1 - self.epsilon
        return chances

    def draw(self, falling: Array, places: int, random: np.random.Generator) -> Drawn:
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

    def chances(self, values: Array, left: Array) -> Array:
        """See `Policy`."""
        logs = np.where(left, np.log(np.maximum(values, FLOOR)) / self.temperature, -np.inf)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        chances: Array = weights / weights.sum(1, keepdims=True)
        return chances

    def draw(self, falling: Array, places: int, random: np.random.Generator) -> Drawn:
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


@dataclass(frozen=True, slots=True)
class Thompson:
    """At each place the best ad left by values drawn from what training could not tell apart (Thompson 1933; Chapelle and Li 2011).

    The logarithm of an ad's value is normal around what the model says, with deviations `spread`: so the probability of a place is an
    integral, and is computed rather than sampled. Each place has draws of its own.
    """

    spread: Array | None = None
    """`(n,)`, those of the ads in the order in which they are drawn from; None until a model has said them."""

    def __str__(self) -> str:
        return "thompson"

    def chances(self, values: Array, left: Array) -> Array:
        """See `Policy`; P(i) is the integral of density i times the distributions of all others left."""
        assert self.spread is not None  # noqa: S101  # `placing` sees to that
        chances = np.zeros(values.shape)
        for ranking, (value, mask) in enumerate(zip(values, left, strict=True)):
            some = np.flatnonzero(mask)
            deviation = np.maximum(self.spread[some], max(NARROWEST * self.spread[some].max(), FLOOR))
            mean = np.log(np.maximum(value[some], FLOOR))
            lowest = (mean - REACH * deviation).max()
            may = mean + REACH * deviation > lowest  # the others are below that ad but for one time in 10 ** 9
            mean, deviation = mean[may, None], deviation[may, None]
            x = np.linspace(lowest, (mean + REACH * deviation).max(), NODES)
            z = (x - mean) / deviation
            below = np.interp(z, *_LOG_NORMAL)
            weights = np.exp(below.sum(0) - below - z * z / 2) / deviation
            chances[ranking, some[may]] = weights.sum(1) / weights.sum()
        return chances

    def draw(self, falling: Array, places: int, random: np.random.Generator) -> Drawn:
        """See `Policy`; after `PLACES` the ads are no longer drawn."""
        left, drawn = np.ones(len(falling), np.bool_), list[int]()
        propensity: Array = np.ones(places)
        for place in range(min(places, PLACES)):
            chances = self.chances(falling[None], left[None])[0]
            drawn.append(int(random.choice(len(chances), p=chances)))
            propensity[place] = chances[drawn[-1]]
            left[drawn[-1]] = False
        return Drawn(_then_the_rest(np.array(drawn, np.int64), ~left), propensity)


_Z = np.linspace(-40.0, 8.0, 4801)
_LOG_NORMAL = _Z, np.log([max(math.erfc(-z / math.sqrt(2)) / 2, np.finfo(np.float64).tiny) for z in _Z])
"""The logarithm of the normal distribution's function, and where."""


def _then_the_rest(drawn: Ids, taken: np.ndarray[Any, np.dtype[np.bool_]]) -> Ids:
    return np.concatenate([drawn, np.flatnonzero(~taken)])


def parse_policy(text: str) -> Policy:
    """The policy that a text names, with `:` or, as in the log, a space before its number.

    Raises:
        PolicyError: it names none, or the number is out of bounds.
    """
    name, _, rest = text.replace(":", " ", 1).partition(" ")
    try:
        number = float(rest) if rest else None
    except ValueError:
        number = np.nan
    if name == "greedy" and number is None:
        return EpsilonGreedy(0.0)
    if name == "epsilon_greedy" and number is not None and 0 <= number <= 1:
        return EpsilonGreedy(number)
    if name == "plackett_luce" and number is not None and COLDEST <= number <= HOTTEST:
        return PlackettLuce(number)
    bounds = f"epsilon is from 0 to 1, the temperature from {COLDEST:g} to {HOTTEST:g}"
    raise PolicyError(f"{text!r} is not a policy; expected one such as {EXAMPLES}, where {bounds}")


def places(policy: Policy, values: Array, left: Array, shown: Array) -> Iterator[Array]:
    """The chances `(R, C)` of all ads at each place in turn, given the ads that were shown above it.

    `values (R, C)` are those of all candidates, `left (R, C)` says which columns are candidates at all, and `shown (R, K)` which of them
    were shown, from the first place on.
    """
    left, rankings = left.copy(), np.arange(len(values))
    for ads in shown.T:
        yield policy.chances(values, left)
        left[rankings, ads] = False


def propensities(policy: Policy, values: Array, left: Array, shown: Array) -> Array:
    """The probability `(R, K)` of each ad shown to be put where it was, given the ads above it; arguments as for `places`."""
    rankings = np.arange(len(values))
    found = [chances[rankings, ads] for chances, ads in zip(places(policy, values, left, shown), shown.T, strict=True)]
    return np.stack(found, axis=1)
