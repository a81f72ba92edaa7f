"""How good probabilities are: AUC, GAUC, log loss, normalised entropy and calibration, from numpy arrays alone."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from .datasets.prepared import DataError

Array = np.ndarray[Any, np.dtype[Any]]
BINS = 20


@dataclass(frozen=True, slots=True)
class Measures:
    """Of N rows with `labels` and `p_click`."""

    auc: float
    """Area under the ROC curve; not a number where only one class occurs."""
    gauc: float
    """Per-user AUC weighted by the user's rows, users with one class left out (DIN paper, eq. 7)."""
    log_loss: float
    """Mean, in nats."""
    normalised_entropy: float
    """Log loss over the entropy of the click rate (He et al. 2014, eq. 1): 1 is no better than the constant."""
    calibration_error: float
    """Mean |click rate - mean p(click)| over 20 bins of about equally many rows; rows of one p(click) are in one bin."""
    calibration_ratio: float
    """Sum of p(click) over clicks."""
    rows: int
    clicks: int

    def as_dict(self) -> dict[str, float | None]:
        """By name, for JSON; what is not a number is None there."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def measure(labels: Array, p_click: Array, users: Array) -> Measures:
    """All metrics of `labels (N,)` in {0, 1}, `p_click (N,)` and `users (N,)`, a number a user.

    Raises:
        DataError: a probability is not a number.
        ValueError: there is no row.
    """
    p, labels = np.asarray(p_click, np.float64), np.asarray(labels, np.float64)
    if not len(p):
        raise ValueError("no row to measure")
    check_finite(p)
    loss, rate = log_loss(labels, p), float(labels.mean())
    entropy = log_loss(labels, np.full(len(p), rate)) if 0 < rate < 1 else float("nan")
    clicks = int(labels.sum())
    ratio = float(p.sum() / clicks) if clicks else float("nan")
    error = calibration_error(labels, p)
    return Measures(auc(labels, p), gauc(labels, p, users), loss, loss / entropy, error, ratio, len(p), clicks)


def check_finite(*found: Array) -> None:
    """Raise where what a network gives for rows `(N, ...)` is no number.

    Raises:
        DataError: it says how many rows, and what to do.
    """
    for each in found:
        wrong = ~np.isfinite(each.reshape(len(each), -1)).all(1)
        if wrong.any():
            raise DataError(
                f"what the network gives is no number for {np.count_nonzero(wrong):,} of {len(each):,} rows, the first of them row "
                f'{wrong.argmax() + 1:,}: numbers there are too large for it; give such fields transform = "log" and train again'
            )


def unmeasured(labels: Array) -> Measures:
    """Of rows whose probabilities are no numbers."""
    none = math.nan
    return Measures(none, none, none, none, none, none, len(labels), int(labels.sum()))


def auc(labels: Array, p_click: Array) -> float:
    """Area under the ROC curve, ties counted half: one user's grouped AUC."""
    return gauc(labels, p_click, np.zeros(len(labels), np.int64))


def gauc(labels: Array, p_click: Array, users: Array) -> float:
    """Per-user AUC weighted by rows, over users with both classes; not a number where there is none."""
    order = np.lexsort((p_click, users))
    users, labels, p = users[order], labels[order], p_click[order]
    _, group, sizes = np.unique(users, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    # Mid-ranks over (user, p): within a user they are its own ranks, shifted by the rows of the users before it.
    runs = np.cumsum(np.r_[True, (p[1:] != p[:-1]) | (users[1:] != users[:-1])])
    ranks = rankdata(runs) - starts[group]
    positives = np.bincount(group, labels, len(sizes))
    negatives = sizes - positives
    sums = np.bincount(group, ranks * labels, len(sizes))
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return float("nan")
    areas = (sums[both] - positives[both] * (positives[both] + 1) / 2) / (positives[both] * negatives[both])
    return float(np.average(areas, weights=sizes[both]))


def log_loss(labels: Array, p_click: Array) -> float:
    """Mean negative log likelihood in nats; a certainty that is wrong counts as 1e-12."""
    p = np.clip(np.asarray(p_click, np.float64), 1e-12, 1 - 1e-12)  # in 32 bits the largest would be 1
    return float(-np.mean(np.where(labels > 0, np.log(p), np.log1p(-p))))


def calibration_error(labels: Array, p_click: Array) -> float:
    """Mean |click rate - mean p(click)| over the bins of `bin_starts`, weighted by their rows."""
    order = np.argsort(p_click)
    p = np.asarray(p_click, np.float64)[order]
    gaps = np.add.reduceat(np.asarray(labels, np.float64)[order] - p, bin_starts(p))
    return float(np.abs(gaps).sum() / len(p))


def bin_starts(p_click: Array) -> Array:
    """Where `BINS` bins of about equally many rows begin, of `p_click (N,)` in ascending order; there may be fewer.

    Rows of one p(click) are in one bin: cut among them, the bins would depend on the order in which the rows came.
    """
    begins = np.arange(BINS) * len(p_click) // BINS
    return np.unique(np.searchsorted(p_click, p_click[begins], "left"))


def reliability(labels: Array, p_click: Array) -> tuple[Array, Array, Array]:
    """Mean p(click), click rate and rows of the bins of `bin_starts`, by p(click)."""
    order = np.argsort(p_click)
    p, clicks = p_click[order].astype(np.float64), labels[order].astype(np.float64)
    starts = bin_starts(p)
    rows = np.diff(starts, append=len(p))
    return np.add.reduceat(p, starts) / rows, np.add.reduceat(clicks, starts) / rows, rows
