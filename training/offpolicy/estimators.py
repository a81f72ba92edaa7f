"""What another policy's click rate, or revenue, would have been: IPS, SNIPS and doubly robust estimates, from arrays alone.

A place is weighed by the product of target / logged propensity over it and the places above it, so that a click may depend on the ads
above it (McInerney et al. 2020, "Counterfactual Evaluation of Slate Recommendations with Sequential Reward Interactions"); with one
place that is the contextual bandit. Rankings are taken as independent of each other, and how many places they have as independent of
the policy. Intervals are normal approximations at 95 %, with the variance over rankings of the linearised estimate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Z = 1.959963984540054
FEW_EFFECTIVE, FEW_CLICKS = 100, 10


@dataclass(frozen=True)
class Trail:
    """N rankings of at most K places, all `(N, K)`: what was shown there and what a target policy had done.

    Where `shown` is false the ranking has ended, and the rest is 0.
    """

    shown: Array
    clicks: Array
    """What came of it: clicks, or what was paid; then the reward model's values are amounts too."""
    ratios: Array
    """Target / logged propensity of the ad at the place, given the ads above it."""
    predicted: Array
    """The reward model's p(click) of that ad."""
    expected: Array
    """The reward model's p(click) of the target's choice for the place, given the ads above it."""
    baseline: Array
    """The same, given the ads that the target would rather have above it: known before anything is shown."""

    def __len__(self) -> int:
        return len(self.shown)

    @property
    def impressions(self) -> int:
        """Places that were filled."""
        return int(self.shown.sum())


def joined(trails: Sequence[Trail]) -> Trail:
    """Several trails as one."""
    widest = max((trail.shown.shape[1] for trail in trails), default=1)

    def together(name: str) -> Array:
        arrays = [getattr(trail, name) for trail in trails] or [np.zeros((0, widest))]
        return np.concatenate([np.pad(array, ((0, 0), (0, widest - array.shape[1]))) for array in arrays])

    return Trail(*(together(name) for name in Trail.__dataclass_fields__))


@dataclass(frozen=True)
class Estimate:
    """A click rate and its 95 % interval."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))
"""Where nothing that was shown has any weight: 0 would seem certain."""


@dataclass(frozen=True)
class Estimates:
    """What a policy's clicks an impression come to, and how much of the log speaks of it."""

    log: Estimate
    """The logging policies' own click rate."""
    ips: Estimate
    snips: Estimate
    dr: Estimate
    effective_sample: float
    """As many rankings under the target policy would say as much, at the place where they are fewest (Kish)."""
    largest_weight: float
    clicks: int
    """Clicks with a weight above 0."""

    @property
    def warnings(self) -> list[str]:
        """Why the estimates are not to be relied on."""
        found = []
        if self.effective_sample < FEW_EFFECTIVE:
            found.append(
                f"the effective sample is {self.effective_sample:.1f} rankings; below {FEW_EFFECTIVE} the intervals are too narrow"
            )
        if self.clicks < FEW_CLICKS:
            found.append(f"{self.clicks} clicks speak of this policy; below {FEW_CLICKS} the intervals are too narrow")
        return found


def estimate(trail: Trail, clip: float | None = None) -> Estimates:
    """All estimates of at least two rankings. Weights above `clip` count as `clip`: less variance, and a bias towards too little.

    Raises:
        ValueError: there are fewer rankings.
    """
    if len(trail) < 2:
        raise ValueError("an interval needs at least two rankings")
    shown, places = trail.shown.astype(np.float64), trail.shown.sum(1)
    weights: Array = np.cumprod(np.where(trail.shown, trail.ratios, 1.0), axis=1)
    weights = np.minimum(weights, np.inf if clip is None else clip)
    above = np.hstack([np.ones((len(trail), 1)), weights[:, :-1]])
    weights, above = weights * shown, above * shown
    residual = weights * (trail.clicks - trail.predicted)
    robust = trail.baseline * shown + above * (trail.expected - trail.baseline) + residual
    sums, squares = weights.sum(0), (weights**2).sum(0)
    effective = np.divide(sums**2, squares, out=np.zeros(len(sums)), where=squares > 0)
    return Estimates(
        _ratio((trail.clicks * shown).sum(1), places),
        _ratio((weights * trail.clicks).sum(1), places) if weights.any() else UNKNOWN,
        _normalised(weights, trail.clicks, shown),
        _ratio(robust.sum(1), places, least=-np.inf),
        float(effective.min()),
        float(weights.max()),
        int(((weights > 0) & (trail.clicks > 0)).sum()),
    )


def _ratio(totals: Array, places: Array, least: float = 0.0) -> Estimate:
    """The sum of the rankings' totals over that of their places, which is at least `least`."""
    value = totals.sum() / places.sum()
    return _interval(value, (totals - value * places) / places.sum(), least)


def _normalised(weights: Array, clicks: Array, shown: Array) -> Estimate:
    """At each place the weighted mean of clicks, and of these the mean over impressions; no number where a place has no weight at all."""
    sums, counts = weights.sum(0), shown.sum(0)
    if not (sums > 0).all():
        return UNKNOWN
    means = (weights * clicks).sum(0) / sums
    value = (counts * means).sum() / counts.sum()
    influence = shown * (means - value) + counts * weights * (clicks - means) / sums
    return _interval(value, influence.sum(1) / counts.sum())


def _interval(value: float, influence: Array, least: float = 0.0) -> Estimate:
    """Around an estimate to which each ranking adds its influence. A click rate is not below 0; a doubly robust estimate of one can be, and
    its interval then reaches as far below it as above.
    """
    count, value = len(influence), float(value)
    reach = Z * float(np.sqrt((influence**2).sum() * count / (count - 1)))
    return Estimate(value, max(least, value - reach), value + reach)
