"""What another bundle's click rate would have been on a log: its policy's propensities at the places that were shown.

The reward model of the doubly robust estimate is that bundle's own p(click). Knows no estimators (`estimators.py`).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from features.bundle import Bundle
from features.encode import AdTable
from features.policy import Policy, places

from ..datasets.behaviours import ad_rows, versions_of
from ..datasets.encoded import Rows, ad_table, encode_frames
from ..datasets.fields import check_fields
from ..datasets.log import ImpressionLog
from ..datasets.prepared import DataError, Prepared, check_columns
from ..export.graph import Graph
from .estimators import Estimate, Estimates, Trail, estimate, joined

Array = np.ndarray[Any, np.dtype[Any]]
AT_ONCE = 65_536
"""Candidates of the rankings that are weighed at once."""
RANKING = ("request_id", "user_id", "ts")
SHOWN: dict[str, pl.DataType] = {"request_id": pl.String(), "position": pl.Int64(), "propensity": pl.Float64(), "policy": pl.String()}
OFFERED: dict[str, pl.DataType] = {"candidates": pl.List(pl.String()), "candidate_revisions": pl.List(pl.UInt64())}
METHODS = {"ips": "IPS", "snips": "SNIPS", "dr": "doubly robust"}


@dataclass(frozen=True)
class Rankings:
    """N rankings and the M impressions in them, ranking by ranking, each from its first place on.

    `first (N,)` and `count (N,)` say which rows of `rows` are a ranking's; `propensity (M,)` is that of the log. `candidates` are rows
    of `ads`, those of a ranking from `edges[n]` to `edges[n + 1]`, in the order of their ids; `column (M,)` is the shown one among them.
    """

    rows: Rows
    first: Array
    count: Array
    propensity: Array
    ads: AdTable
    candidates: Array
    edges: Array
    column: Array


@dataclass
class Replay:
    """The estimates, and what of the log they leave out."""

    policy: Policy
    estimates: Estimates
    rankings: int
    impressions: int
    greedy: int
    """Impressions of rankings that did not explore, which cannot be weighed."""
    unfit: int
    """Impressions that cannot be weighed although their ranking explored: an ad above was not shown, or the candidates are not told."""
    clip: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not a number is None there."""
        counts = {name: getattr(self, name) for name in ("rankings", "impressions", "greedy", "unfit", "clip")}
        rates = {name: _finite(getattr(self.estimates, name)) for name in ("log", *METHODS)}
        facts = {name: getattr(self.estimates, name) for name in ("effective_sample", "largest_weight", "clicks", "warnings")}
        return {"policy": str(self.policy), **counts, **rates, **facts}


def _finite(rate: Estimate) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in asdict(rate).items()}


class Weigher:
    """Weighs rankings by what a bundle and a policy had done."""

    def __init__(self, data: Prepared, bundle: Bundle, policy: Policy, split: str = "test") -> None:
        check_fields(data, bundle.schema, [part.path for part in data.parts] if isinstance(data, ImpressionLog) else data.files(split))
        self.data: Prepared = replace(data, schema=bundle.schema)
        self.encoder, self.policy = bundle.encoder, policy
        self.ads, self._graph = ad_table(self.data, self.encoder), Graph(bundle)

    def encode(self, frame: pl.DataFrame) -> Rows:
        """A frame's rows as the bundle encodes them."""
        return encode_frames(self.data, [frame], self.encoder, self.ads)

    def trails(self, rankings: Rankings) -> Iterator[Trail]:
        """Weigh rankings, those with about as many candidates together."""
        sizes = np.diff(rankings.edges)
        order = np.argsort(sizes, kind="stable")
        while len(order):
            # As many as fit if all had the candidates of the largest; the first alone may have more.
            fits = max(1, int((sizes[order] * np.arange(1, len(order) + 1) <= AT_ONCE).sum()))
            yield self._trail(rankings, order[:fits])
            order = order[fits:]

    def _trail(self, rankings: Rankings, chosen: Array) -> Trail:
        sizes, count = np.diff(rankings.edges)[chosen], rankings.count[chosen]
        left = np.arange(sizes.max()) < sizes[:, None]
        at = np.where(left, rankings.edges[chosen][:, None] + np.arange(sizes.max()), 0)
        ads = rankings.ads.take(np.where(left, rankings.candidates[at], 0))
        shown = np.arange(count.max()) < count[:, None]
        rows = np.where(shown, rankings.first[chosen][:, None] + np.arange(count.max()), 0)
        column = np.where(shown, rankings.column[rows], 0)
        ranking, place = np.nonzero(shown)
        own = rankings.rows.ad.take(rows[ranking, place])  # as it was shown, with what was sent
        ads.ids[ranking, column[ranking, place]], ads.numbers[ranking, column[ranking, place]] = own.ids, own.numbers
        values = self._graph.p_click(_heads(rankings.rows, rankings.first[chosen]), ads).astype(np.float64)
        if not np.isfinite(values[left]).all():
            raise DataError("the bundle's score of a candidate is not a number; it cannot be replayed")
        return self._followed(np.where(left, values, 0.0), left, column, shown, rankings.rows.labels[rows], rankings.propensity[rows])

    def _followed(self, values: Array, left: Array, column: Array, shown: Array, clicks: Array, propensity: Array) -> Trail:
        """Go down the places, once as they were shown and once as the target would fill them."""
        found = {name: np.zeros(shown.shape) for name in ("ratios", "predicted", "expected", "baseline")}
        best = np.argsort(np.where(left, -values, np.inf), axis=1, kind="stable")[:, : shown.shape[1]]
        for n in np.unique(shown.sum(1)):  # rankings of n places together
            some = np.flatnonzero(shown.sum(1) == n)
            rankings, v = np.arange(len(some)), values[some]
            likely = places(self.policy, v, left[some], best[some, :n])
            for place, chances in enumerate(places(self.policy, v, left[some], column[some, :n])):
                ads = column[some, place]
                found["ratios"][some, place] = chances[rankings, ads] / propensity[some, place]
                found["predicted"][some, place] = v[rankings, ads]
                found["expected"][some, place] = (chances * v).sum(1)
                found["baseline"][some, place] = (next(likely) * v).sum(1)
        return Trail(shown, np.where(shown, clicks, 0.0), **found)


def _heads(rows: Rows, first: Array) -> Rows:
    """The rows that stand for their ranking: its user, its context and its history."""
    return replace(
        rows,
        labels=rows.labels[first],
        users=rows.users[first],
        user=rows.user.take(first),
        ad=rows.ad.take(first),
        history=rows.history[first],
        ages=None if rows.ages is None else rows.ages[first],
    )


def replay(
    data: Prepared, bundle: Bundle, policy: Policy, top_k: int | None = None, clip: float | None = None, split: str = "test"
) -> Replay:
    """Estimate the clicks an impression of the bundle's scores under a policy, at the first `top_k` places.

    Of a log, its window is replayed. Of a prepared data set with a column `propensity`, one split: each row is one action of a
    contextual bandit, and the ads in its `candidates`, or else all of `ads.parquet`, could have been shown.

    Raises:
        DataError: the data is damaged, was sampled by label, or has less than two rankings that explored.
    """
    if data.negative_sampling != 1:
        kept = f"{data.negative_sampling:g} of its non-clicks (negative_sampling)"
        raise DataError(f"{data.folder} kept {kept}, so no click rate can be estimated from it; replay a log that kept all")
    weigher, counted = Weigher(data, bundle, policy, split), {"greedy": 0, "unfit": 0}
    source = _of_log(data, weigher, top_k, counted) if isinstance(data, ImpressionLog) else _of_bandit(data, weigher, split, top_k, counted)
    trail = joined([trail for rankings in source for trail in weigher.trails(rankings)])
    if len(trail) < 2:
        impressions = f"{counted['greedy']:,} impressions are of greedy rankings, {counted['unfit']:,} of rankings that are not whole"
        raise DataError(f"{data.folder} has {len(trail)} rankings that explored, which replay needs at least two of; {impressions}")
    return Replay(policy, estimate(trail, clip), len(trail), trail.impressions, **counted, clip=clip)


def _of_log(data: ImpressionLog, weigher: Weigher, top_k: int | None, counted: dict[str, int]) -> Iterator[Rankings]:
    """The rankings of a log that explored, hour by hour."""
    for frame in data.hours(pl.lit(value=True), (*SHOWN, *OFFERED)):
        check_columns(frame, {**SHOWN, **OFFERED}, data.folder)
        explored = frame.filter(pl.col("policy") != "greedy")
        counted["greedy"] += len(frame) - len(explored)
        if top_k is not None:
            explored = explored.filter(pl.col("position") <= top_k)
        whole, offered = _whole(explored)
        counted["unfit"] += len(explored) - len(whole)
        if len(whole):
            yield _rankings(whole, offered, weigher)


def _whole(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The impressions that can be weighed, with `n`, their ranking's number, and `column`; and the candidates by `n` and id."""
    within = {"partition_by": RANKING, "order_by": "position"}
    rows = rows.sort(*RANKING, "position").with_columns(
        recorded=pl.col("candidates").is_not_null().sum().over(RANKING),
        place=pl.int_range(1, pl.len() + 1).over(**within),  # type: ignore[arg-type]
    )
    fits = (pl.col("position") == pl.col("place")) & (pl.col("recorded") == 1) & pl.col("propensity").is_between(0, 1, closed="right")
    rows = rows.with_columns(fits=fits)
    keys = rows.filter(pl.col("candidates").is_not_null(), pl.col("recorded") == 1).select(*RANKING, *OFFERED)
    keys = keys.filter(pl.col("candidates").list.len() == pl.col("candidates").list.n_unique())
    keys = keys.filter(pl.col("candidates").list.len() == pl.col("candidate_revisions").list.len()).with_row_index("n")
    offered = keys.select("n", ad_id="candidates", revision="candidate_revisions").explode("ad_id", "revision").sort("n", "ad_id")
    offered = offered.with_columns(column=pl.int_range(pl.len()).over("n"))
    rows = rows.join(keys.select(*RANKING, "n"), on=RANKING, how="left").join(offered.drop("revision"), on=("n", "ad_id"), how="left")
    rows = rows.sort("n", "position", nulls_last=True)
    fits = pl.col("fits") & pl.col("column").is_not_null()
    rows = rows.filter(pl.col("n").is_not_null()).with_columns(fits=fits.cast(pl.Int8).cum_min().over("n") == 1)
    return rows.filter("fits"), offered


def _rankings(whole: pl.DataFrame, offered: pl.DataFrame, weigher: Weigher) -> Rankings:
    numbers, first, count = np.unique(whole["n"].to_numpy(), return_index=True, return_counts=True)
    offered = offered.filter(pl.col("n").is_in(numbers.tolist()))
    candidates = ad_rows(versions_of(offered["ad_id"], offered["revision"]), weigher.data, weigher.ads)
    edges = np.append(np.unique(offered["n"].to_numpy(), return_index=True)[1], len(offered))
    rows = weigher.encode(whole)
    return Rankings(rows, first, count, whole["propensity"].to_numpy(), weigher.ads, candidates, edges, whole["column"].to_numpy())


def _of_bandit(data: Prepared, weigher: Weigher, split: str, top_k: int | None, counted: dict[str, int]) -> Iterator[Rankings]:
    """The rows of a split as rankings of one place, with the row's own candidates, or else all ads."""
    ads = data.table("ad")
    if ads is None:
        raise DataError(f"{data.folder} has no ads.parquet; replay takes all of its ads as candidates")
    ids = ads["ad_id"].sort().to_list()
    for frame in data.frames(split):
        rows = _shown_within(frame, top_k, data.folder / split)
        if "candidates" in rows.columns:
            check_columns(rows, {"candidates": pl.List(pl.String())}, data.folder / split)
            rows = rows.with_columns(pl.col("candidates").list.drop_nulls().list.unique().list.sort())
        else:
            rows = rows.with_columns(candidates=pl.lit(ids, dtype=pl.List(pl.String())))
        most = max(1, int(rows["candidates"].list.len().max() or 1))  # type: ignore[arg-type]  # of numbers
        for piece in rows.iter_slices(max(1, AT_ONCE // most)):
            fit = piece.filter(pl.col("candidates").list.contains(pl.col("ad_id")), pl.col("propensity").is_between(0, 1, closed="right"))
            counted["unfit"] += len(piece) - len(fit)
            if len(fit):
                yield _actions(fit, weigher)


def _shown_within(frame: pl.DataFrame, top_k: int | None, where: Path) -> pl.DataFrame:
    """The rows that can be replayed, at the first places where that is asked for."""
    if "propensity" not in frame.columns:
        raise DataError(
            f"{where}: column propensity is missing: replay needs the probability with which each row's ad was shown, Float64 in every "
            'file of a split; adrank prepare csv writes it where the schema file says [table] propensity = "COLUMN", and beside it '
            "position (which place) and candidates (which ads could have been shown), see docs/replay.md"
        )
    check_columns(frame, {"propensity": pl.Float64()}, where)
    if top_k is None:
        return frame
    if "position" not in frame.columns:
        raise DataError(f"{where}: --top-k needs a column position (Int64, from 1), which prepare csv writes where [table] names it")
    check_columns(frame, {"position": pl.Int64()}, where)
    return frame.filter(pl.col("position") <= top_k)


def _actions(fit: pl.DataFrame, weigher: Weigher) -> Rankings:
    rows, each = weigher.encode(fit), np.arange(len(fit))
    offered = fit.select("candidates", shown="ad_id").with_row_index("n").explode("candidates")
    sizes = fit["candidates"].list.len().to_numpy().astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(sizes)])
    column = np.flatnonzero((offered["candidates"] == offered["shown"]).to_numpy()) - edges[:-1]
    candidates = ad_rows(offered["candidates"], weigher.data, weigher.ads)
    return Rankings(rows, each, np.ones_like(each), fit["propensity"].to_numpy(), weigher.ads, candidates, edges, column)


def show(found: Replay, console: Console) -> None:
    """A table for people, and what stands behind it."""
    table = Table("clicks an impression", "estimate", "95 % interval")
    for name, title in {"log": "of the log", **METHODS}.items():
        rate: Estimate = getattr(found.estimates, name)
        known = isfinite(rate.value)
        table.add_row(title, *((f"{rate.value:.5f}", f"{rate.low:.5f} to {rate.high:.5f}") if known else ("-", "-")))
    console.print(table)
    facts = found.estimates
    console.print(
        f"{found.policy}: {found.rankings:,} rankings, {found.impressions:,} impressions; effective sample {facts.effective_sample:,.1f} "
        f"rankings, largest weight {facts.largest_weight:.4g}, {facts.clicks:,} clicks count",
        soft_wrap=True,
    )
    if found.greedy:
        console.print(f"left out: {found.greedy:,} impressions of rankings that did not explore; they cannot be weighed", soft_wrap=True)
    if found.unfit:
        console.print(f"left out: {found.unfit:,} impressions whose ranking is not whole in the log", soft_wrap=True)
    if found.clip is not None:
        console.print(f"weights are clipped at {found.clip:g}: the estimates are biased, IPS towards too little")
    for warning in facts.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
