"""The challenger beside the champion on the same rows: metrics, intervals by the bootstrap over users, and the gate.

Knows probabilities, labels and users alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import hypot, isfinite, log, sqrt
from typing import Any

import numpy as np

from ..evaluate import Measures, bin_starts, measure, reliability
from ..train_settings import TrainError

Array = np.ndarray[Any, np.dtype[Any]]
RESAMPLES, SEED, LEVEL = 1000, 1, 0.95
METRICS = ("auc", "gauc", "log_loss", "normalised_entropy", "calibration_error", "calibration_distance")


@dataclass(frozen=True)
class Gate:
    """What a challenger has to come up to."""

    gate: str = "better"
    """Of log loss: `better` asks that the interval of the difference lies below 0, `not-worse` that it lies below the tolerance."""
    log_loss_tolerance: float = 0.001
    """Of `not-worse`, as a share of the champion's log loss."""
    calibration_tolerance: float = 0.01
    """How much further than the champion's the logarithm of p(click) over clicks may be from 0, its distance; more if that is noise."""
    first_calibration: float = 0.1
    """The distance that is allowed where there is no champion; more if that is noise."""

    def __post_init__(self) -> None:
        if self.gate not in ("better", "not-worse"):
            raise TrainError(f"gate is {self.gate!r}; it must be better or not-worse")
        for name in ("log_loss_tolerance", "calibration_tolerance", "first_calibration"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)!r}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Interval:
    """A value on all rows, and the 95 % interval that the bootstrap gives it."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether the interval has the value in it."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Comparison:
    """What challenger and champion come to on the same rows; without a champion there are no differences."""

    challenger: Measures
    champion: Measures | None
    differences: dict[str, Interval]
    """Challenger less champion, by the names in `METRICS`."""
    calibration: Interval
    """log(sum of p(click) / clicks) of the challenger."""
    reliability: dict[str, list[tuple[float, float]]]
    """For each of the two (mean p(click), click rate) of bins of about equally many rows."""
    users: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        metrics = {name: m.as_dict() for name, m in (("champion", self.champion), ("challenger", self.challenger)) if m is not None}
        differences = {name: _finite(asdict(interval)) for name, interval in self.differences.items()}
        bootstrap = {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL, "of": "users", "users": self.users}
        rest = {"calibration_log_ratio": _finite(asdict(self.calibration)), "reliability": self.reliability, "bootstrap": bootstrap}
        return {"metrics": metrics, "differences": differences, **rest}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in values.items()}


def compare(labels: Array, users: Array, challenger: Array, champion: Array | None) -> Comparison:
    """Measure both on the same rows: `labels (N,)`, `users (N,)` a number a user, and what each gives for p(click) `(N,)`.

    Raises:
        ValueError: there is no row, or a probability is not a number.
    """
    users = np.unique(users, return_inverse=True)[1]
    new = _Resampled(labels, users, challenger)
    old = None if champion is None else _Resampled(labels, users, champion)

    def statistics(weights: Array) -> Array:
        ours = new(weights)
        return np.r_[ours[-1], ours[:-1] - old(weights)[:-1]] if old else ours[-1:]

    found = bootstrap(statistics, int(users.max()) + 1)
    differences = dict(zip(METRICS, found[1:], strict=False))
    both = {"champion": champion, "challenger": challenger}
    bins = {name: points(labels, p) for name, p in both.items() if p is not None}
    measured = None if champion is None else measure(labels, champion, users)
    return Comparison(measure(labels, challenger, users), measured, differences, found[0], bins, int(users.max()) + 1)


def bootstrap(statistics: Callable[[Array], Array], units: int, resamples: int = RESAMPLES, seed: int = SEED) -> list[Interval]:
    """Percentile intervals (Efron 1979; Efron and Tibshirani 1993, chapters 13 and 8.5) of statistics `(K,)` of weights `(units,)`.

    A unit is drawn with all its rows, so that rows of one user may depend on each other. A weight is how often it was drawn.
    """
    random = np.random.default_rng(seed)
    drawn = np.array([statistics(np.bincount(random.integers(0, units, units), minlength=units)) for _ in range(resamples)])
    values = statistics(np.ones(units, np.int64))
    return [Interval(float(value), *_tails(column)) for value, column in zip(values, drawn.T, strict=True)]


def _tails(drawn: Array) -> tuple[float, float]:
    """The ends of the interval; a resample in which the statistic is not defined does not count."""
    known, tail = drawn[np.isfinite(drawn)], 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


class _Resampled:
    """The metrics of `METRICS` of one model, on rows of which each user's are weighted. Nothing is sorted a second time."""

    def __init__(self, labels: Array, users: Array, p_click: Array) -> None:
        order = np.argsort(p_click, kind="stable")
        p, self.labels, self.users = p_click[order].astype(np.float64), labels[order].astype(np.float64), users[order]
        starts = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
        tie = np.cumsum(np.r_[False, p[1:] != p[:-1]])
        self.clicks = np.flatnonzero(self.labels)
        self.ties = starts[tie[self.clicks]], np.r_[starts[1:], len(p)][tie[self.clicks]]
        """Of each click, how many rows have a smaller p, and how many a smaller one or its own."""
        self.gaps, self.others = self.labels - p, 1 - self.labels
        self.bins = bin_starts(p)
        losses = -np.where(self.labels > 0, np.log(np.clip(p, 1e-12, 1)), np.log1p(-np.clip(p, 0, 1 - 1e-12)))
        count = int(users.max()) + 1
        self.sums = np.stack([np.bincount(self.users, each, count) for each in (np.ones(len(p)), self.labels, p, losses)])
        self.areas, self.ranked = self._areas(p, count)

    def _areas(self, p: Array, count: int) -> tuple[Array, Array]:
        """Each user's AUC, and the rows that it counts for: none where the user has one class."""
        order = np.lexsort((p, self.users))
        users, p, labels = self.users[order], p[order], self.labels[order]
        new = np.r_[True, (p[1:] != p[:-1]) | (users[1:] != users[:-1])]
        starts = np.flatnonzero(new)
        ends, run = np.r_[starts[1:], len(p)], np.cumsum(new) - 1
        rows, clicks = self.sums[0], self.sums[1]
        before = (np.cumsum(rows) - rows)[users]
        ranks = (starts[run] + ends[run] + 1) / 2 - before
        pairs = clicks * (rows - clicks)
        sums = np.bincount(users, ranks * labels, count)
        areas = np.divide(sums - clicks * (clicks + 1) / 2, pairs, out=np.zeros(count), where=pairs > 0)
        return areas, np.where(pairs > 0, rows, 0.0)

    def __call__(self, weights: Array) -> Array:
        """The metrics `(6,)`, and the logarithm of p(click) over clicks, where each user counts `weights (U,)` times."""
        rows, clicks, p, loss = self.sums @ weights
        rate = clicks / rows
        each = weights.astype(np.float64)[self.users]
        others = np.cumsum(np.r_[0.0, each * self.others])
        pairs = clicks * (rows - clicks)
        area = (each[self.clicks] * (others[self.ties[0]] + others[self.ties[1]])).sum() / 2
        ranked = weights @ self.ranked
        error = np.abs(np.add.reduceat(each * self.gaps, self.bins)).sum() / rows
        entropy = -(rate * log(rate) + (1 - rate) * log(1 - rate)) if 0 < rate < 1 else np.nan
        none = float("nan")
        ratio = log(p / clicks) if clicks and p else none
        return np.array(
            [
                area / pairs if pairs else none,
                weights @ (self.areas * self.ranked) / ranked if ranked else none,
                loss / rows,
                loss / rows / entropy,
                error,
                abs(ratio),
                ratio,
            ]
        )


def points(labels: Array, p_click: Array) -> list[tuple[float, float]]:
    """(mean p(click), click rate) of the bins of a reliability diagram."""
    means, rates, _ = reliability(labels, p_click)
    return list(zip(means.tolist(), rates.tolist(), strict=True))


def violations(found: Comparison, gate: Gate, rests_on: int = 0, main: bool = True) -> list[str]:
    """Why a challenger should not go live, a sentence each; none where it may. Its calibration `rests_on` so many clicks, 0: not told.

    A head that is not the `main` one need not be better, for which it may have too few labels; it must not be worse beyond doubt.
    """
    loss = _loss(found, gate) if main else _surely_worse(found, gate)
    return [reason for reason in (_calibration(found, gate, rests_on), loss) if reason]


def no_better(metrics: Measures) -> str | None:
    """That probabilities tell no more than their mean does, or rank no better than chance; None where they do."""
    entropy, auc = metrics.normalised_entropy, metrics.auc
    if not entropy < 1:
        return f"it is no better than the click rate alone: normalised entropy is {entropy:.4f}, it must be below 1 (AUC {auc:.4f})"
    return None if auc > 0.5 else f"it ranks no better than chance: AUC is {auc:.4f}"


def _calibration(found: Comparison, gate: Gate, rests_on: int) -> str | None:
    ratio, ours = found.challenger.calibration_ratio, found.calibration
    if found.champion is None:
        # Two noises: of these rows, which the interval tells, and of the fewer or more clicks that it was calibrated on.
        noise = hypot((ours.high - ours.low) / 2, 1.96 / sqrt(rests_on)) if rests_on else 0.0
        if abs(ours.value) <= max(gate.first_calibration, noise) or ours.covers(0):
            return None
        interval = f"its logarithm {ours.value:+.4f} (95 % interval {ours.low:+.4f} to {ours.high:+.4f})"
        return f"calibration is off: p(click) over clicks is {ratio:.4f}, {interval} may be {max(gate.first_calibration, noise):.4f} from 0"
    difference = found.differences["calibration_distance"]
    if difference.value <= gate.calibration_tolerance or difference.covers(0):
        return None
    ratios = f"p(click) over clicks is {ratio:.4f}, the champion's {found.champion.calibration_ratio:.4f}"
    interval = f"{difference.value:+.4f} further from 0 (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    return f"calibration is worse: {ratios}; its logarithm is {interval}, {gate.calibration_tolerance:.4f} is allowed"


def _surely_worse(found: Comparison, gate: Gate) -> str | None:
    if found.champion is None:
        return None
    difference, limit = found.differences["log_loss"], gate.log_loss_tolerance * found.champion.log_loss
    if not difference.low > limit:
        return None
    interval = f"{difference.value:+.5f} (95 % interval {difference.low:+.5f} to {difference.high:+.5f})"
    return f"log loss {found.challenger.log_loss:.5f} is worse than the champion's {found.champion.log_loss:.5f}: {interval}"


def _loss(found: Comparison, gate: Gate) -> str | None:
    if found.champion is None:
        return no_better(found.challenger)
    difference, before = found.differences["log_loss"], found.champion.log_loss
    limit = 0.0 if gate.gate == "better" else gate.log_loss_tolerance * before
    if difference.high < limit:
        return None
    interval = f"{difference.value:+.5f} (95 % interval {difference.low:+.5f} to {difference.high:+.5f})"
    asked = "the interval must lie below 0" if gate.gate == "better" else f"the interval must lie below {limit:.5f}"
    return (
        f"log loss {found.challenger.log_loss:.5f} against the champion's {before:.5f}, difference {interval}: {asked} (gate {gate.gate})"
    )
