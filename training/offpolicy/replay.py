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

from ..datasets.ads import ad_rows, ad_table
from ..datasets.encoded import Rows, encode_frames
from ..datasets.fields import check_fields
from ..datasets.log import ImpressionLog, versions_of
from ..datasets.prepared import DataError, Prepared, check_columns
from ..export.graph import Graph
from .estimators import Estimate, Estimates, Trail, estimate, joined
from .revenue import BIDS, CONVERSION, PAID, worth_of

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
    bids: pl.DataFrame | None = None
    """Of each of `candidates`: `bid`, -1 where there is none, and `bid_type`; None where the log has none."""
    paid: Array | None = None
    """By impression `(M,)` what it came to, in the currency; no number where the ranking's ads do not bid."""


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
    revenue: Estimates | None = None
    """The same of what was paid for an impression, over the rankings whose ads bid."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not a number is None there."""
        counts = {name: getattr(self, name) for name in ("rankings", "impressions", "greedy", "unfit", "clip")}
        rates: dict[str, Any] = _rates(self.estimates)
        if self.revenue is not None:
            rates["revenue"] = _rates(self.revenue)
        facts = {name: getattr(self.estimates, name) for name in ("effective_sample", "largest_weight", "clicks", "warnings")}
        return {"policy": str(self.policy), **counts, **rates, **facts}


def _rates(found: Estimates) -> dict[str, dict[str, float | None]]:
    return {name: _finite(getattr(found, name)) for name in ("log", *METHODS)}


def _finite(rate: Estimate) -> dict[str, float | None]:
    return {name: value if isfinite(value) else None for name, value in asdict(rate).items()}


class Weigher:
    """Weighs rankings by what a bundle and a policy had done."""

    def __init__(self, data: Prepared, bundle: Bundle, policy: Policy, split: str = "test", by_ecpm: bool = False) -> None:
        check_fields(data, bundle.schema, [part.path for part in data.parts] if isinstance(data, ImpressionLog) else data.files(split))
        self.data: Prepared = replace(data, schema=bundle.schema)
        self.encoder, self.policy, self._by_ecpm = bundle.encoder, policy, by_ecpm
        self.ads, self._graph = ad_table(self.data, self.encoder), Graph(bundle)

    def encode(self, frame: pl.DataFrame) -> Rows:
        """A frame's rows as the bundle encodes them."""
        return encode_frames(self.data, [frame], self.encoder, self.ads)

    def trails(self, rankings: Rankings) -> Iterator[tuple[Trail, Trail | None]]:
        """Weigh rankings, those with about as many candidates together: their clicks, and what was paid, of those whose ads bid."""
        sizes = np.diff(rankings.edges)
        order = np.argsort(sizes, kind="stable")
        while len(order):
            # As many as fit if all had the candidates of the largest; the first alone may have more.
            fits = max(1, int((sizes[order] * np.arange(1, len(order) + 1) <= AT_ONCE).sum()))
            yield self._trail(rankings, order[:fits])
            order = order[fits:]

    def _trail(self, rankings: Rankings, chosen: Array) -> tuple[Trail, Trail | None]:
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
        heads = {
            name: self._graph.p_click(_heads(rankings.rows, rankings.first[chosen]), ads, name).astype(np.float64)
            for name in {"p_click", CONVERSION}.intersection(self._graph.heads)
        }
        if not all(np.isfinite(p[left]).all() for p in heads.values()):
            raise DataError("the bundle's score of a candidate is not a number; it cannot be replayed")
        clicks, labels, propensity = np.where(left, heads["p_click"], 0.0), rankings.rows.labels[rows], rankings.propensity[rows]
        if rankings.bids is None or rankings.paid is None:
            self._need_bids(clicks[:1])
            return self._followed(clicks, clicks, left, column, shown, labels, propensity), None
        worth, paid = np.where(left, worth_of(rankings.bids, at, heads), 0.0), rankings.paid[rows]
        bidding = np.isfinite(paid[:, 0])
        self._need_bids(clicks[~bidding])
        order = worth if self._by_ecpm else clicks
        made = self._followed(order, clicks, left, column, shown, labels, propensity)
        some = (each[bidding] for each in (order, worth, left, column, shown, paid, propensity))
        return made, self._followed(*some) if bidding.any() else None

    def _need_bids(self, without: Array) -> None:
        if self._by_ecpm and len(without):
            raise DataError(
                "some rankings of the log have no bids, so their ads cannot be ordered by eCPM; replay those that have (--since)"
            )

    def _followed(self, order: Array, values: Array, left: Array, column: Array, shown: Array, clicks: Array, propensity: Array) -> Trail:
        """Go down the places, as they were shown and as the target would fill them by `order`; `values` are the reward model's."""
        found = {name: np.zeros(shown.shape) for name in ("ratios", "predicted", "expected", "baseline")}
        best = np.argsort(np.where(left, -order, np.inf), axis=1, kind="stable")[:, : shown.shape[1]]
        for n in np.unique(shown.sum(1)):  # rankings of n places together
            some = np.flatnonzero(shown.sum(1) == n)
            rankings, v = np.arange(len(some)), values[some]
            likely = places(self.policy, order[some], left[some], best[some, :n])
            for place, chances in enumerate(places(self.policy, order[some], left[some], column[some, :n])):
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
    data: Prepared,
    bundle: Bundle,
    policy: Policy,
    top_k: int | None = None,
    clip: float | None = None,
    split: str = "test",
    objective: str = "pctr",
) -> Replay:
    """Estimate the clicks an impression of the bundle's scores under a policy, at the first `top_k` places; and what is paid where ads bid.

    Of a log, its window is replayed. Of a prepared data set with a column `propensity`, one split: each row is one action of a
    contextual bandit, and the ads in its `candidates`, or else all of `ads.parquet`, could have been shown.

    Raises:
        DataError: the data is damaged, was sampled by label, or has less than two rankings that explored.
    """
    if data.negative_sampling != 1:
        kept = f"{data.negative_sampling:g} of its non-clicks (negative_sampling)"
        raise DataError(f"{data.folder} kept {kept}, so no click rate can be estimated from it; replay a log that kept all")
    weigher, counted = Weigher(data, bundle, policy, split, objective == "ecpm"), {"greedy": 0, "unfit": 0}
    source = _of_log(data, weigher, top_k, counted) if isinstance(data, ImpressionLog) else _of_bandit(data, weigher, split, top_k, counted)
    trails = [both for rankings in source for both in weigher.trails(rankings)]
    trail, paid = joined([clicks for clicks, _ in trails]), joined([money for _, money in trails if money is not None])
    if len(trail) < 2:
        impressions = f"{counted['greedy']:,} impressions are of greedy rankings, {counted['unfit']:,} of rankings that are not whole"
        raise DataError(f"{data.folder} has {len(trail)} rankings that explored, which replay needs at least two of; {impressions}")
    revenue = estimate(paid, clip) if len(paid) > 1 else None
    return Replay(policy, estimate(trail, clip), len(trail), trail.impressions, **counted, clip=clip, revenue=revenue)


def _of_log(data: ImpressionLog, weigher: Weigher, top_k: int | None, counted: dict[str, int]) -> Iterator[Rankings]:
    """The rankings of a log that explored, hour by hour."""
    for frame in data.hours(pl.lit(value=True), (*SHOWN, *OFFERED, *BIDS)):
        check_columns(frame, {**SHOWN, **OFFERED}, data.folder)
        frame = frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in BIDS.items() if name not in frame.columns)  # noqa: PLW2901
        check_columns(frame, BIDS, data.folder)
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
    keys = rows.filter(pl.col("candidates").is_not_null(), pl.col("recorded") == 1)
    bidding, each = pl.col("candidate_bids").is_not_null(), pl.col("candidates").list.len()
    none = {"bid": pl.lit(-1, pl.Int64).repeat_by(each), "bid_type": pl.lit("cpc").repeat_by(each)}
    bids = (pl.coalesce(f"candidate_{name}s", absent).alias(f"{name}_offered") for name, absent in none.items())
    keys = keys.select(*RANKING, *OFFERED, bidding.alias("bidding"), *bids)
    keys = keys.filter(pl.col("candidates").list.len() == pl.col("candidates").list.n_unique())
    keys = keys.filter(pl.col("candidates").list.len() == pl.col("candidate_revisions").list.len())
    keys = keys.filter(each == pl.col("bid_offered").list.len(), each == pl.col("bid_type_offered").list.len()).with_row_index("n")
    offered = keys.select("n", ad_id="candidates", revision="candidate_revisions", bid="bid_offered", bid_type="bid_type_offered")
    offered = offered.explode("ad_id", "revision", "bid", "bid_type").sort("n", "ad_id")
    offered = offered.with_columns(column=pl.int_range(pl.len()).over("n"))
    rows = rows.join(keys.select(*RANKING, "n", "bidding"), on=RANKING, how="left")
    rows = rows.join(offered.select("n", "ad_id", "column"), on=("n", "ad_id"), how="left")
    rows = rows.sort("n", "position", nulls_last=True)
    fits = pl.col("fits") & pl.col("column").is_not_null()
    rows = rows.filter(pl.col("n").is_not_null()).with_columns(fits=fits.cast(pl.Int8).cum_min().over("n") == 1)
    return rows.filter("fits"), offered


def _rankings(whole: pl.DataFrame, offered: pl.DataFrame, weigher: Weigher) -> Rankings:
    numbers, first, count = np.unique(whole["n"].to_numpy(), return_index=True, return_counts=True)
    offered = offered.filter(pl.col("n").is_in(numbers.tolist()))
    candidates = ad_rows(versions_of(offered["ad_id"], offered["revision"]), weigher.data, weigher.ads)
    edges = np.append(np.unique(offered["n"].to_numpy(), return_index=True)[1], len(offered))
    bids, paid = (offered.select("bid", "bid_type"), whole.select(PAID).to_series().to_numpy()) if whole["bidding"].any() else (None, None)
    return Rankings(
        weigher.encode(whole),
        first,
        count,
        whole["propensity"].to_numpy(),
        weigher.ads,
        candidates,
        edges,
        whole["column"].to_numpy(),
        bids,
        paid,
    )


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
    for what, estimates in (("clicks an impression", found.estimates), ("paid for an impression", found.revenue)):
        table = Table(what, "estimate", "95 % interval")
        for name, title in {"log": "of the log", **METHODS}.items() if estimates else ():
            rate: Estimate = getattr(estimates, name)
            known = isfinite(rate.value)
            table.add_row(title, *((f"{rate.value:.5f}", f"{rate.low:.5f} to {rate.high:.5f}") if known else ("-", "-")))
        if table.rows:
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
