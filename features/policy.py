"""How likely a policy is to put an ad at a place, given the ads above it. What off-policy estimates weigh a ranking by.

Knows nothing about where values come from. Of equal values the ad in the lower column is the better one: where columns stand in the
order of ad ids, ties are broken as the service breaks them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
COLDEST, HOTTEST = 0.01, 100.0
"""Bounds of a temperature: colder than this hardly ever explores, hotter is uniform."""
FLOOR = 1e-12
"""What a value of 0 counts as where weights are made of values: every ad then has a chance, if a small one."""
EXAMPLES = "greedy, epsilon_greedy:0.1 or plackett_luce:0.5"


class PolicyError(ValueError):
    """A text names no policy; the message says what would."""


class Policy(Protocol):
    """A way to fill places one after the other."""

    def chances(self, values: Array, left: Array) -> Array:
        """The probability `(R, C)` of each ad for the next place, of R rankings with `values (R, C)`.

        `left (R, C)` says which ads are not above that place yet: at least one of each ranking, the others have no chance.
        """


@dataclass(frozen=True, slots=True)
class EpsilonGreedy:
    """The best ad that is left, but with the probability `epsilon` any one of those left, the best included; 0 is greedy."""

    epsilon: float

    def __str__(self) -> str:
        return f"epsilon_greedy {self.epsilon}" if self.epsilon else "greedy"

    def chances(self, values: Array, left: Array) -> Array:
        """See `Policy`."""
        chances: Array = np.where(left, self.epsilon / left.sum(1, keepdims=True), 0.0)
        best = np.where(left, values, -np.inf).argmax(1)
        chances[np.arange(len(values)), best] += 1 - self.epsilon
        return chances


@dataclass(frozen=True, slots=True)
class PlackettLuce:
    """One of the ads left, with probabilities in proportion to value ** (1 / temperature)."""

    temperature: float

    def __str__(self) -> str:
        return f"plackett_luce {self.temperature}"

    def chances(self, values: Array, left: Array) -> Array:
        """See `Policy`."""
        logs = np.where(left, np.log(np.maximum(values, FLOOR)) / self.temperature, -np.inf)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        chances: Array = weights / weights.sum(1, keepdims=True)
        return chances


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
