"""Rules after ranking: which ad may stand at a place, given those above it. Knows nothing about requests, models or logs.

Places are filled one after the other, the policy choosing among the ads that are allowed there: so a propensity is the probability given
the ads above and the rules, and nothing is drawn and then thrown away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from features.policy import PLACES, Array, Policy, Thompson
from features.vocabulary import Ids

from .bids import ABSENT, Floats, Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for the ads of an answer; features are categories of ads, and an ad without a value of one is free of its rules."""

    max_per: Mapping[str, int] = field(default_factory=dict)
    """At most so many ads of one value, by feature."""
    distance: Mapping[str, int] = field(default_factory=dict)
    """From an ad to the next of the same value it is at least so many places, by feature."""
    trade_off: float = 1.0
    """Of what an ad is worth against how it differs from those above it, in `alike`; 1: worth alone."""
    alike: Sequence[str] = ()
    """Features: two ads are alike in the share of them that have the same value."""
    pinned: Mapping[int, str] = field(default_factory=dict)
    """Ads by place, from 1; no other rule holds for them, but they count in those for others."""
    reserves: Sequence[int] = ()
    """The least eCPM at each place, in micros; the last is that of all further places."""
    frequency: Mapping[str, int] = field(default_factory=dict)
    """About how often at most an ad is shown to a user in a window, by the counter of that; an ad that is above it is no candidate."""
    already_clicked: bool = False
    """Whether ads among the user's behaviours are no candidates."""

    @property
    def by_place(self) -> bool:
        """Whether who may stand at a place depends on it, or on the ads above: then places are filled one after the other."""
        return bool(self.max_per or self.distance or self.alike or self.pinned or self.reserves)

    @property
    def features(self) -> dict[str, tuple[str, ...]]:
        """The features that are needed, and where in a request each is named."""
        named = {name: (rule, name) for rule in ("max_per", "distance") for name in getattr(self, rule)}
        return {**dict.fromkeys(self.alike, ("diversity", "by")), **named}


class Placed(NamedTuple):
    """Ads by place."""

    order: Ids
    propensity: Floats | None
    below: Sequence[int]
    """By place the eCPM of the best other ad that might stand there, in micros, where that is what is best; `ABSENT` for a pinned ad."""
    fallen: Mapping[str, Ids]
    """Ads that have no place, by reason: the rule that keeps them from the next one, or `top_k`."""


class Filling:
    """Places that are being filled with ads `(n,)`."""

    def __init__(self, rules: Rules, values: Floats, ecpm: Micros, codes: Mapping[str, Ids], pins: Mapping[int, int]) -> None:
        """Of ads that stand best first: their `values`, at least 0, and eCPM; by feature the `codes` of what they have, below 0 where they
        have nothing; `pins` are places, from 1, and the ads that are pinned there.
        """
        self._rules, self._codes, self._ecpm, self._pins = rules, codes, ecpm, dict(pins)
        self._worth = values / max(values.max(initial=0.0), np.finfo(np.float64).tiny) if rules.alike else values
        self._left = np.ones(len(values), np.bool_)
        self._left[list(pins.values())] = False
        self._had = {name: np.zeros(len(values), np.int64) for name in rules.max_per}
        """How many ads of an ad's value have a place."""
        self._until = {name: np.zeros(len(values), np.int64) for name in rules.distance}
        """Up to which place an ad is too near to another."""
        self._likeness = np.zeros(len(values))
        """To the ad above that is most like it."""

    def fill(self, places: int, policy: Policy | None, random: np.random.Generator) -> Placed:
        """Fill so many places, as far as ads may stand there; ads that are pinned to places that are not reached follow at once."""
        order, propensity, below, pinned = list[int](), list[float](), list[int](), set(self._pins.values())
        while len(order) < places:
            place, blocked = len(order) + 1, self._blocked(len(order) + 1)
            allowed = self._left.copy()
            for those in blocked.values():
                allowed &= ~those
            first = int(allowed.argmax())
            if place not in self._pins and allowed[first]:
                drawn = not isinstance(policy, Thompson) or place <= PLACES
                chosen, chance = self._choose(allowed, policy if drawn else None, random)
            elif self._pins:
                chosen, chance = self._pins.pop(place if place in self._pins else min(self._pins)), 1.0
            else:
                break
            allowed[chosen] = False
            rival = int(allowed.argmax())
            below.append(ABSENT if chosen in pinned else int(self._ecpm[rival]) * bool(allowed[rival]))
            order.append(chosen)
            propensity.append(chance)
            self._place(chosen, place)
        fallen = {}
        for reason, those in self._blocked(len(order) + 1).items():
            if len(order) < places or reason.startswith("max_per"):
                fallen[reason] = np.flatnonzero(self._left & those)
                self._left &= ~those
        self._left[list(self._pins.values())] = True
        return Placed(np.array(order, np.int64), np.array(propensity), below, {**fallen, "top_k": np.flatnonzero(self._left)})

    def _choose(self, allowed: Array, policy: Policy | None, random: np.random.Generator) -> tuple[int, float]:
        values = self._worth
        if self._rules.alike:
            # Maximal marginal relevance (Carbonell and Goldstein 1998), moved up to where it is at least 0: policies draw in proportion.
            values = self._rules.trade_off * values + (1 - self._rules.trade_off) * (1 - self._likeness)
        if policy is None:
            return int((np.where(allowed, values, -1.0) if self._rules.alike else allowed).argmax()), 1.0
        chances = policy.chances(values[None], allowed[None])[0]
        chosen = int(random.choice(len(chances), p=chances / chances.sum()))
        return chosen, float(chances[chosen])

    def _place(self, ad: int, place: int) -> None:
        self._left[ad] = False
        same = {name: (codes == codes[ad]) & (codes >= 0) for name, codes in self._codes.items()}
        for name in self._had:
            self._had[name] += same[name]
        for name, until in self._until.items():
            until[same[name]] = place + self._rules.distance[name] - 1
        if self._rules.alike:
            self._likeness = np.maximum(self._likeness, np.mean([same[name] for name in self._rules.alike], axis=0))

    def _blocked(self, place: int) -> dict[str, Array]:
        """By rule the ads that it keeps from a place."""
        found: dict[str, Array] = {f"max_per_{name}": had >= self._rules.max_per[name] for name, had in self._had.items()}
        found |= {f"distance_{name}": until >= place for name, until in self._until.items()}
        if self._rules.reserves:
            found["below_reserve"] = self._ecpm < self._rules.reserves[min(place, len(self._rules.reserves)) - 1]
        return found
