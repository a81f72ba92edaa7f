"""Whether a version that was just trained may go live: what it must come up to by itself, and beside the live one.

`adrank train` and `adrank retrain` ask the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress

from features.bundle import Bundle, Contents

from ..datasets.prepared import DataError, Prepared
from ..export.export import scores, scores_of
from ..fit import Epoch
from ..networks.contract import CLICK
from ..train import Trained
from . import compare, data_checks
from .report import brief

COIN, WORSE = math.log(2), 1.5
"""The log loss of who says one half to everything, and how many times the loss at the start is no noise of a batch."""


def compared(
    champion: Bundle | None, data: Prepared, trained: Trained, graph: Contents, progress: Progress
) -> dict[str, compare.Comparison]:
    """By head, what was trained beside the live version, if there is one that has it, on the rows held out: the test split.

    A head other than the click is compared on the rows whose label is known, if there are any of each class.

    Raises:
        DataError: the rows do not fit the live version's schema.
    """
    rows = trained.held_out
    ours = scores(graph, data.schema, data.negative_sampling, rows, progress)
    theirs = scores_of(champion, data, "test", progress)[1] if champion else {}
    users, found = users_of(data), {}
    for head, p in ours.items():
        labels = rows.labels if head == CLICK else rows.outcomes[head]
        known = np.flatnonzero(~np.isnan(labels))
        if head == CLICK or len(np.unique(labels[known])) > 1:
            seen = rows.maturity_of(head, known)
            before = theirs[head][known] * seen if head in theirs else None
            found[head] = compare.compare(labels[known], users[known], p[known] * seen, before)
    return found


def against(found: Mapping[str, compare.Comparison], trained: Trained, gate: compare.Gate) -> list[str]:
    """Why what was trained should not go live by what its heads come to, a sentence each."""
    return [
        reason if head == CLICK else f"p({head}): {reason.replace('click', head)}"
        for head, each in found.items()
        for reason in compare.violations(each, gate, trained.calibrations[head].clicks, main=head == CLICK)
    ]


def users_of(data: Prepared, split: str = "test") -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number a user for each row of a split; a ranking without a user is a user of its own, and so is a row without either."""
    keys = []
    for i, frame in enumerate(data_checks.slices(data, (split,))[split]):
        nobody = pl.col("request_id") if "request_id" in frame.columns else pl.format(f"{i} {{}}", pl.int_range(pl.len()))
        user = pl.when(pl.col("user_id") == "").then(pl.lit("\x1f") + nobody).otherwise(pl.col("user_id"))
        keys.append(frame.select(user.alias("key"))["key"])
    numbers: np.ndarray[Any, np.dtype[np.int64]] = pl.concat(keys).rank("dense").to_numpy().astype(np.int64) - 1
    return numbers


def flaws(trained: Trained, enough: data_checks.Enough) -> list[str]:
    """Why a training is not to be relied on whatever it measures: it diverged, or had too little to learn from or to be judged by."""
    return [*diverged(trained.epochs), *data_checks.too_little(trained.rows, trained.clicks, enough, "data set")]


def diverged(epochs: Sequence[Epoch]) -> Iterator[str]:
    """That the loss of a training is no number any more, or worse than at its start."""
    if not epochs:
        return
    last, fix = epochs[-1], f"try a learning_rate below {epochs[-1].learning_rate:g}"
    if not math.isfinite(last.valid.log_loss):
        kept = f"after epoch {last.number - 1}" if len(epochs) > 1 else "before it"
        yield f"the training diverged in epoch {last.number}, the weights are the best of those {kept}; {fix}"
        return
    start, loss = max(COIN, epochs[0].first_loss), min(epoch.train_loss for epoch in epochs)
    if loss > WORSE * start:
        yield f"the training diverged: its loss began at {epochs[0].first_loss:.3g}, and no epoch's mean is below {loss:.3g}; {fix}"


def violations(
    champion: Bundle | None, data: Prepared, trained: Trained, graph: Contents, gate: compare.Gate, progress: Progress
) -> tuple[list[str], dict[str, Any]]:
    """Why what was trained should not go live by what it measures, none where it may; and the comparison, for the manifest.

    Beside a champion it has to be better than that one as well.
    """
    on_valid = compare.no_better(trained.metrics["valid"])
    reasons = [f"on valid {on_valid}"] if on_valid else []
    try:
        found = compared(champion, data, trained, graph, progress)
    except DataError as error:
        return [*reasons, f"it cannot be compared with the live version {champion.path.name if champion else ''}: {error}"], {}
    if champion and (alone := compare.no_better(found[CLICK].challenger)):
        reasons.append(alone)
    return [*reasons, *against(found, trained, gate)], brief(found)
