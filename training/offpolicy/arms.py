"""What the arms of an experiment came to on a log: differences by user, with intervals that hold however often somebody looks.

A user is the unit: impressions of one user are alike, and it is users who are put into arms. The rate of an arm is R = Σ c_i / Σ n_i over
its users i, of c_i clicks in n_i impressions. To R each user adds (c_i - R n_i) / n̄ divided by the number of users, n̄ the mean of n_i (the
delta method), so the variance of R is s² / N with s² that of these influences over the arm's N users. The difference of two arms with
N = N_a + N_b users is then a mean over N users of variance σ² = N (s_a² / N_a + s_b² / N_b), and its interval is the asymptotic
confidence sequence of Waudby-Smith et al. (2024, https://arxiv.org/abs/2103.06476, theorem 2.2): at all N at once, with probability 1 - α,

    |estimate - truth| < σ √( 2 (N ρ² + 1) / (N² ρ²) · log( √(N ρ² + 1) / α ) ).

ρ makes it narrowest at the number of users that was planned, and must not be chosen by the data. A user whose visits come later adds to a
mean that has been looked at; `tests/test_arms.py` has what that does to the coverage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from scipy.stats import chisquare

from ..datasets.log import ImpressionLog
from ..datasets.prepared import DataError
from .revenue import BIDS, PAID

Array = np.ndarray[Any, np.dtype[Any]]
METRICS = {"ctr": "clicks", "conversion_rate": "conversions", "revenue": "paid"}
"""By impression; conversions and revenue are those that came so far, of both arms alike."""
FEW_USERS = 100
MISMATCH = 0.001
"""Of the chi-square test of the arms' users; below, how users were put into arms is not what was planned, and no difference counts."""


@dataclass(frozen=True)
class Difference:
    """An arm's rate, and by how much it is above the first arm's, with an always-valid interval."""

    rate: float
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class ArmsCompared:
    """By arm, the first being the one that others are compared with: how many users and impressions, and by metric what they came to."""

    arms: dict[str, dict[str, int]]
    metrics: dict[str, dict[str, Difference]]
    p_sample_ratio: float
    crossed: int
    """Users who were seen in more than one arm: they are left out."""

    @property
    def warnings(self) -> list[str]:
        """Why the differences are not to be relied on."""
        found = []
        if self.p_sample_ratio < MISMATCH:
            users = ", ".join(f"{arm} {counts['users']:,}" for arm, counts in self.arms.items())
            found.append(f"sample ratio mismatch (p = {self.p_sample_ratio:.1e}): {users} users are not the shares that were planned")
        if self.crossed:
            found.append(f"{self.crossed:,} users were seen in more than one arm and are left out; put users into arms by their ids")
        few = [arm for arm, counts in self.arms.items() if counts["users"] < FEW_USERS]
        return found + [f"arm {arm} has fewer than {FEW_USERS} users: its interval may be too narrow" for arm in few]


def always_valid(variance: float, users: int, planned: int, level: float = 0.95) -> float:
    """How far from the truth a mean over `users` of this variance may be, at all times at once; narrowest where `planned` are reached."""
    alpha = 1 - level
    rho2 = (-2 * log(alpha) + log(-2 * log(alpha) + 1)) / planned
    grown = users * rho2 + 1
    return sqrt(variance * 2 * grown / (users**2 * rho2) * log(sqrt(grown) / alpha))


def influence(totals: Array, impressions: Array) -> tuple[float, float]:
    """An arm's rate, and the variance of what each of its users `(N,)` adds to it."""
    rate = float(totals.sum() / impressions.sum())
    each = (totals - rate * impressions) / impressions.mean()
    return rate, float(each.var(ddof=1)) if len(each) > 1 else inf


def compare_arms(by_user: Mapping[str, pl.DataFrame], planned: int, shares: Sequence[float] = (), crossed: int = 0) -> ArmsCompared:
    """Compare arms, the first with each other one; of each a row a user: `impressions`, `clicks`, `conversions`, `paid`."""
    arms = {arm: {name: int(frame[name].sum()) for name in ("impressions", "clicks", "conversions")} for arm, frame in by_user.items()}
    users = {arm: len(frame) for arm, frame in by_user.items()}
    metrics = {}
    for metric, column in METRICS.items():
        sums = {arm: frame.select(pl.col(column, "impressions").cast(pl.Float64)).to_numpy() for arm, frame in by_user.items()}
        found = {arm: influence(*each.T) for arm, each in sums.items()}
        first, *others = found
        metrics[metric] = {first: Difference(found[first][0])}
        for arm in others:
            both, gap = users[first] + users[arm], found[arm][0] - found[first][0]
            reach = always_valid(both * sum(found[each][1] / users[each] for each in (first, arm)), both, planned)
            metrics[metric][arm] = Difference(found[arm][0], gap, gap - reach, gap + reach)
    expected = np.array(shares or [1] * len(users), np.float64)
    p = float(chisquare(list(users.values()), expected / expected.sum() * sum(users.values())).pvalue)
    return ArmsCompared({arm: {"users": users[arm], **counts} for arm, counts in arms.items()}, metrics, p, crossed)


def users_by_arm(log: ImpressionLog, experiment: str, arms: Sequence[str] = ()) -> tuple[dict[str, pl.DataFrame], int]:
    """What each user of an experiment came to, by arm, and how many users were seen in several; the arms in this order, or by name.

    A row without a user counts as its ranking's.

    Raises:
        DataError: the log has no such experiment, or fewer than two of its arms.
    """
    key, named = pl.when(user_id="").then(pl.format("\x1f{}", "request_id")).otherwise("user_id").alias("user"), f"{experiment}="
    parts = []
    for frame in log.hours(pl.lit(value=True), ("request_id", "experiment", *BIDS)):
        if "experiment" not in frame.columns:
            continue
        lacks = [pl.lit(None, dtype).alias(name) for name, dtype in BIDS.items() if name not in frame.columns]
        arm = pl.col("experiment").list.eval(pl.element().filter(pl.element().str.starts_with(named))).list.first().str.strip_prefix(named)
        rows = frame.with_columns(*lacks, arm=arm).filter(pl.col("arm").is_not_null())
        rows = rows.with_columns(pl.lit(None, pl.Float64).alias("conversion_maturity"), bidding=pl.col("bid").is_not_null())  # so far
        parts.append(rows.select(key, "arm", "label", pl.col("conversion").fill_null(0), PAID))
    if not any(map(len, parts)):
        raise DataError(f"{log.folder} has no ranking of an experiment {experiment}; requests name it in experiment (docs/experiments.md)")
    sums = {"impressions": pl.len(), "clicks": pl.sum("label"), "conversions": pl.sum("conversion"), "paid": pl.sum("paid")}
    rows = pl.concat(parts).with_columns(pl.col("label", "conversion").cast(pl.Int64))
    totals = rows.group_by("user", "arm").agg(**sums).sort("user", "arm")
    whole = totals.filter(pl.len().over("user") == 1)
    found = {str(arm): frame for (arm,), frame in whole.sort("arm").group_by("arm", maintain_order=True)}
    if lacking := [arm for arm in arms if arm not in found] or ([] if len(found) > 1 else ["a second one"]):
        raise DataError(f"the experiment {experiment} has no user in the arm {lacking[0]}; the log has {', '.join(found)}")
    return {arm: found[arm] for arm in arms or found}, totals.filter(pl.len().over("user") > 1)["user"].n_unique()


def show(found: ArmsCompared, console: Console) -> None:
    """A table a metric for people, and what stands behind it."""
    for metric, by_arm in found.metrics.items():
        table = Table("arm", "users", "impressions", metric, "above the first", "always-valid 95 % interval")
        for arm, each in by_arm.items():
            moved = (f"{each.difference:+.5f}", f"{each.low:+.5f} to {each.high:+.5f}") if each.low < each.high else ("", "")
            table.add_row(arm, *(f"{found.arms[arm][name]:,}" for name in ("users", "impressions")), f"{each.rate:.5f}", *moved)
        console.print(table)
    console.print(f"users by arm: chi-square p = {found.p_sample_ratio:.3g}")
    for warning in found.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
