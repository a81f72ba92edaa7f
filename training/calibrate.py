"""Logits to probabilities: Platt scaling fitted on valid, and the correction of negative down-sampling. Both end in the graph.

The slope is fitted by penalised likelihood, so that a few clicks cannot make probabilities of 1e-17, and is always above 0, so that
the order is the network's. The intercept is then what makes the mean p(click) the click rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit, logit

Array = np.ndarray[Any, np.dtype[Any]]
PRIOR = 0.35
"""Standard deviation of the prior of the slope's logarithm, around a slope of 1: what the network says. About 8 clicks weigh as much."""
SPAN = 12.0
"""Logits between the lowest and the highest row that are believed: odds of 1 to 160,000. Where there are more, the prior is about fewer."""
FLATTEST, STEEPEST = math.log(1e-6), math.log(1e3)


@dataclass(frozen=True, slots=True)
class Calibration:
    """p(click) = sigmoid(scale · logit + shift + sampling)."""

    scale: float = 1.0
    shift: float = 0.0
    sampling: float = 0.0
    """log of the share of non-clicks that the data set kept. 0 where it kept all."""
    rows: int = 0
    clicks: int = 0
    """What it was fitted on: it is as good as these are many."""

    def on_log(self, logits: Array) -> Array:
        """Probabilities `(N,)` for the data set as it was sampled, to be compared with its labels."""
        p: Array = expit(self.scale * logits.astype(np.float64) + self.shift)
        return p

    def line(self, head: str = "click") -> str:
        """For people: how good it can be."""
        sentence = (
            f"calibrated on {self.clicks:,} {head}s in {self.rows:,} rows of valid: slope {self.scale:.4g}, intercept {self.shift:+.4g}"
        )
        off = f"; so few leave the mean p({head}) uncertain by about {1 / math.sqrt(max(self.clicks, 1)):.0%}" if self.clicks < 100 else ""
        return sentence + off


def as_sampled(p_click: Array, negative_sampling: float) -> Array:
    """Probabilities `(N,)` as they are served to those of rows of which a share of the non-clicks was kept, to compare with labels."""
    p = np.minimum(p_click.astype(np.float64), 1.0 - 1e-9)
    odds = p / (1.0 - p) / negative_sampling
    share: Array = odds / (1.0 + odds)
    return share


def sampled_heads(served: Mapping[str, Array], negative_sampling: float) -> dict[str, Array]:
    """The same by head: what follows a click is as far from such rows as p(click) is."""
    click = served["click"].astype(np.float64)
    sampled = as_sampled(click, negative_sampling)
    moved = np.divide(sampled, click, out=np.ones_like(click), where=click > 0)
    return {head: sampled if head == "click" else p * moved for head, p in served.items()}


def fit(logits: Array, labels: Array, negative_sampling: float = 1.0, maturity: Array | None = None) -> Calibration:
    """Platt (1999) scaling of `logits (N,)` by `labels (N,)`, the slope with a log-normal prior around 1, the mean p(click) exact.

    The slope is fitted to Platt's smoothed targets, (N+ + 1) / (N+ + 2) and 1 / (N- + 2): a network that tells two clicks apart by
    hundreds of logits is not believed. They would set the mean of two clicks in a thousand rows 25 % too high, so the intercept is
    not. Where all rows are of one class the slope stays 1 and the mean is what his targets say, 1 / (N + 2) or (N + 1) / (N + 2).

    Keeping a share w of the non-clicks multiplies the odds of a click by 1 / w, hence log w is added to the logit
    (He et al. 2014, section 6.3). A row of `maturity (N,)` m is seen as 1 with probability m p, see `networks.contract.cross_entropy`.
    """
    rows, clicks = len(labels), int(labels.sum())
    x, seen = logits.astype(np.float64), np.ones(rows) if maturity is None else maturity.astype(np.float64)
    if 0 < clicks < rows:
        targets = np.where(labels > 0, (clicks + 1) / (clicks + 2), 1 / (rows - clicks + 2))
        scale, rate = _slope(x, targets, seen), clicks / rows
    else:
        scale, rate = 1.0, (1 if clicks == 0 else rows + 1) / (rows + 2)
    return Calibration(scale, _intercept(scale * x, rate, seen), math.log(negative_sampling), rows, clicks)


def _slope(x: Array, targets: Array, maturity: Array) -> float:
    """Of all slopes above 0 the likeliest, the intercept being free."""
    middle, spread, rate = x.mean(), x.std(), targets.mean()
    if not spread:
        return 1.0
    centred, expected = x - middle, min(0.0, math.log(SPAN / np.ptp(x)))
    with np.errstate(divide="ignore"):
        still_open = np.log1p(-maturity)  # of the share that has not come yet; -inf: none

    def loss(at: Array) -> tuple[float, Array]:
        log_scale, shift = at
        scaled = math.exp(log_scale) * centred
        z = scaled + shift
        gaps = expit(z) - targets - (1 - targets) * expit(z + still_open)
        likelihood = np.logaddexp(0.0, z).sum() - targets @ z - (1 - targets) @ np.logaddexp(0.0, z + still_open)
        gradient = np.array([gaps @ scaled + (log_scale - expected) / PRIOR**2, gaps.sum()])
        return (likelihood + 0.5 * ((log_scale - expected) / PRIOR) ** 2) / len(x), gradient / len(x)

    start = np.array([min(0.0, math.log(2 / spread)), logit(_eventual(rate, maturity))])  # where no probability is saturated yet
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(FLATTEST, STEEPEST), (None, None)], tol=1e-14)
    return math.exp(found.x[0])


def _intercept(scaled: Array, rate: float, maturity: Array) -> float:
    """What to add to logits `(N,)` so that the mean probability of what has come by now is `rate`."""
    ends = logit(rate) - scaled.max(), logit(_eventual(rate, maturity)) - scaled.min()
    if ends[0] == ends[1] or (maturity * expit(scaled + ends[1])).mean() < rate:  # of fewer rows than have come, all come
        return float(ends[1])
    return float(brentq(lambda shift: (maturity * expit(scaled + shift)).mean() - rate, *ends, xtol=1e-12, maxiter=1000))


def _eventual(rate: float, maturity: Array) -> float:
    """The rate that will have come in the end, of rows of which `rate` has come by now."""
    most = float(maturity.mean())
    return rate if most == 1 else min(rate / most, 1 - 1e-6)
