"""How long conversions take: an exponential delay, fitted to those that came, and cut off where their window ends.

Of a conversion that comes within the window W, the delay D has P(D <= d) = (1 - e^(-λ d)) / (1 - e^(-λ W)), the exponential of
Chapelle (2014, https://doi.org/10.1145/2623330.2623634) with one λ for all rows. After so long a wait e, at most W, only
conversions with D <= e can have been seen, so each counts by its likelihood given that: λ e^(-λ d) / (1 - e^(-λ e)). Without that the
quick ones, which are all that young rows have, would make λ too large.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import minimize_scalar

Array = np.ndarray[Any, np.dtype[Any]]
SLOWEST, FASTEST = 1e-3, 1e7
"""λ W: below, delays are all as likely; above, all is there within a second of a week."""


@dataclass(frozen=True)
class Delay:
    """Conversions come with the rate λ, a second, within `window` seconds; with `rate` infinite at once."""

    window: float
    rate: float = np.inf

    def share(self, waited: pl.Expr) -> pl.Expr:
        """P(D <= waited): how likely a conversion that is to come would have come by now, 1 where its window is over."""
        if not np.isfinite(self.rate) or self.window <= 0:
            return pl.lit(1.0)
        grown = 1 - (-self.rate * waited.clip(1e-3, self.window)).exp()
        come = (grown / -float(np.expm1(-self.rate * self.window))).clip(1e-9, 1.0)
        return pl.when(waited < self.window).then(come).otherwise(1.0)


def fit_delay(took: Array, waited: Array, window: float) -> Delay:
    """The likeliest λ of conversions that `took (N,)` seconds, of rows that were `waited (N,)` seconds for; of none, no delay."""
    most = np.minimum(waited, window)
    took, most = np.maximum(took[most > 0], 0.0), most[most > 0]
    if not len(took) or window <= 0:
        return Delay(window)
    took = np.minimum(took, most)
    took, most = took[order := np.lexsort((most, took))], most[order]  # sums in one order, however they came

    def loss(log_rate: float) -> float:
        rate = np.exp(log_rate)
        return float(np.mean(rate * took - log_rate + np.log(-np.expm1(-rate * most))))

    ends = np.log(SLOWEST / window), np.log(FASTEST / window)
    return Delay(window, float(np.exp(minimize_scalar(loss, bounds=ends, method="bounded").x)))
