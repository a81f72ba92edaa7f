"""What ads offer and what they are worth: in whole millionths of the currency, exact, and in columns. Knows nothing about requests.

Float64 cannot hold the product of a price and a probability exactly, and money must not depend on how it was rounded on its way.
So a bid is a whole number of micros, a probability counts to 12 decimals, and an eCPM is their product, rounded down to a micro.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from features.vocabulary import Ids, Numbers

Floats = np.ndarray[Any, np.dtype[np.float64]]
Micros = np.ndarray[Any, np.dtype[np.int64]]
MICRO, NANO = 10**6, 10**9
HIGHEST = 10**9 * MICRO
"""The highest bid, with its multiplier: a product with a probability still fits int64 then."""
ABSENT = -1
BID_TYPES = ("cpm", "cpc", "cpa")
CPM, CPC, CPA = range(3)
CLICK, CONVERSION = "click", "conversion"
DECIMALS = 12
"""That probabilities and weighted sums of them count to."""


@dataclass(frozen=True, slots=True)
class Bids:
    """What is offered for each candidate, all `(C,)`: `ABSENT` where nothing is said, in micros."""

    bid: Micros
    """With its multiplier: what the ad is ready to pay for a thousand impressions, a click or a conversion."""
    kind: Ids
    """Which of `BID_TYPES`: what is paid for."""
    value: Micros
    """What a click is worth, or where conversions are paid for, a conversion."""

    def take(self, rows: Any) -> "Bids":
        """Those of some candidates."""
        return Bids(self.bid.take(rows), self.kind.take(rows), self.value.take(rows))

    def chances(self, p: Mapping[str, Floats]) -> Micros:
        """What one unit of each bid comes to in a thousand impressions, in billionths, of probabilities `(C,)` by head."""
        paid = np.where(self.kind == CPM, NANO, per_thousand(p[CLICK]))
        return np.where(self.kind == CPA, per_thousand(p[CONVERSION]), paid) if CONVERSION in p else paid

    def worth(self, p: Mapping[str, Floats]) -> Micros:
        """What a thousand impressions are worth by `value`, in micros."""
        return times(self.value, per_thousand(np.where(self.kind == CPA, p[CONVERSION], p[CLICK]) if CONVERSION in p else p[CLICK]))


def per_thousand(p: Floats) -> Micros:
    """How often something of these probabilities comes in a thousand impressions, in billionths."""
    return np.rint(p * (1000 * NANO)).astype(np.int64)


def times(micros: Micros, nano: Micros) -> Micros:
    """Amounts up to `HIGHEST`, each times its factor up to 1,000 in billionths, rounded down; `ABSENT` stays. In parts: no product of
    two whole ones would fit 64 bits.
    """
    whole, rest = np.divmod(micros, NANO)
    coarse, fine = np.divmod(nano, MICRO)
    high = coarse * rest
    product = nano * whole + high // 1000 + (high % 1000 * MICRO + fine * rest) // NANO
    return np.where(micros < 0, ABSENT, product)


class Worth(NamedTuple):
    """What candidates `(C,)` are worth."""

    by: Any
    """What they are ordered by."""
    ecpm: Micros | None
    """None where nobody bids."""
    chances: Micros | None
    """What one unit of each bid comes to in a thousand impressions, in billionths."""


def worth_of(objective: str, bids: Bids | None, p: Mapping[str, Floats], weights: Mapping[str, float], scores: Numbers) -> Worth:
    """By probabilities `(C,)` of each head that is needed, as decimals; `scores` are those of the click as the model gave them."""
    by: Any = scores
    if objective == "weighted":
        by = np.round(sum((weight * p[head] for head, weight in weights.items()), np.zeros(len(scores))), DECIMALS)
    if bids is None:
        return Worth(by, None, None)
    chances = bids.chances(p)
    ecpm = times(bids.bid, chances)
    if objective in ("ecpm", "value"):
        by = ecpm if objective == "ecpm" else bids.worth(p)
    return Worth(by, ecpm, chances)


def best_below(worth: Worth, order: Ids) -> list[int]:
    """By place of an order the eCPM of the best ad below it, 0 at the end."""
    assert worth.ecpm is not None  # noqa: S101  # prices are asked of bids
    return [*np.maximum.accumulate(worth.ecpm.take(order)[:0:-1])[::-1].tolist(), 0][: len(order)]


def second_prices(worth: Worth, placed: Ids, below: Sequence[int], reserves: Sequence[int]) -> Micros:
    """By the generalised second price, in micros of each one's own unit: the least bid whose eCPM reaches that of the best other ad, or
    the place's reserve, the last of which is that of all further places. No ad pays more than its bid, though a policy that explores may
    have passed a better one over; one whose place was not for sale, `ABSENT` below, has no price.
    """
    assert worth.ecpm is not None and worth.chances is not None  # noqa: S101, PT018
    floors = [reserves[min(place, len(reserves) - 1)] for place in range(len(placed))]
    reached = map(min, map(max, below, floors), worth.ecpm.take(placed).tolist())
    chances = worth.chances.take(placed).tolist()
    # Whole numbers of Python, since the product does not fit 64 bits.
    prices = [ABSENT if rival < 0 else -(-each * NANO // max(one, 1)) for rival, each, one in zip(below, reached, chances, strict=True)]
    return np.array(prices, np.int64)


def to_micros(amounts: Sequence[float | None]) -> tuple[Micros, list[int]]:
    """Amounts up to a billion in micros, `ABSENT` where there is none; and which of them need more than 6 decimals."""
    numbers = np.array(amounts, np.float64)
    missing, micros = np.isnan(numbers), np.rint(numbers * MICRO)
    return np.where(missing, ABSENT, micros).astype(np.int64), np.flatnonzero((micros / MICRO != numbers) & ~missing).tolist()


def from_micros(micros: Micros) -> list[float | None]:
    """As decimals of at most 6 places; None where there is none."""
    return [None if each < 0 else each / MICRO for each in micros.tolist()]
