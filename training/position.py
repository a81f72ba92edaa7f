"""What a click owes to the place where the ad was shown, learned apart from what it owes to the ad, and left out of what is served.

`--set position_bias=` one of these, for any network that predicts the click alone. The column `position` says where each ad was.

`tower`, `pal`: see `networks/position_bias.py`.
`ips`, `em`: a click at place k weighs 1 / θ(k), but at most `MOST_WEIGHT`; θ is how likely place k is examined, as a share of the first.
With p(click | place k) = θ(k) γ, clicks and non-clicks are then as γ to 1 - γ mean(θ): in the order of γ whatever places an ad had, but
for that mean, which matters little where clicks are few. `ips` takes θ from rows that were drawn at random (`explored`), `em` by
regression EM (Wang et al. 2018, "Position bias estimation for unbiased learning to rank in personal search").

The network that is left has no place. Its calibration is fitted to valid as ever: p(click) is that of the places where the log shows ads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

from .datasets.encoded import Rows
from .datasets.log import ImpressionLog
from .datasets.prepared import DataError, Prepared, check_columns
from .networks.position_bias import PositionBias

LAST = 50
"""Places that are told apart; those below count as this one."""
MOST_WEIGHT = 10.0
LEAST_SAMPLE = 100
"""Rows that must speak of a place, in effect (Kish), for it to have a θ of its own; another has that of the place above."""
EM_ROWS, EM_ROUNDS, EM_STEPS, EM_L2 = 200_000, 60, 5, 1e-5
Z = 1.959963984540054
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Curve:
    """How likely a place is clicked `(P,)`, as a share of the first place for the same ads, with 95 % intervals."""

    value: Array
    low: Array
    high: Array
    rows: Array
    """That speak of each place, in effect."""

    @classmethod
    def of(cls, rates: Array, deviations: Array, rows: Array) -> "Curve":
        """From rates and the deviations of their logarithms; the places are taken as independent of each other."""
        value, off = rates / rates[0], Z * np.hypot(deviations, deviations[0]) * (np.arange(len(rates)) > 0)
        return cls(value, value * np.exp(-off), value * np.exp(off), rows)

    def told(self) -> list[dict[str, float]]:
        """By place, for JSON."""
        columns = {"examination": self.value, **{name: getattr(self, name).astype(np.float64) for name in ("low", "high", "rows")}}
        return pl.DataFrame({"place": np.arange(1, len(self.value) + 1), **columns}).to_dicts()

    def summary(self, rows: Rows) -> Iterator[str]:
        """For people: the curve and, where it weighs clicks, what that leaves of them."""
        yield "a click by place, of the same ad: " + " ".join(f"{value:.2f}" for value in self.value)
        if rows.weight is not None:
            weight, largest = rows.weight[rows.labels > 0].astype(np.float64), (1 / self.value).max()
            clipped = f"; weights are at most {MOST_WEIGHT:g}, where {largest:.3g} were due" if largest > MOST_WEIGHT else ""
            yield f"{len(weight):,} clicks weigh as much as {weight.sum() ** 2 / (weight**2).sum():,.0f} of one weight{clipped}"


def check_position_bias(data: Prepared, kind: str, heads: tuple[str, ...]) -> None:
    """That a data set and its heads can be trained so, before anything is read.

    Raises:
        DataError: they cannot.
    """
    if kind and len(heads) > 1:
        raise DataError(f"position_bias is of clicks alone, and heads asks for {', '.join(heads[1:])} too; leave one out")
    if kind and isinstance(data, ImpressionLog) and data.position_as:
        raise DataError(f"--position-as {data.position_as} makes the place a feature, and position_bias keeps it out; leave one out")
    if kind not in ("", "tower") and data.negative_sampling != 1:
        kept = f"{data.folder} kept {data.negative_sampling:g} of its non-clicks"
        raise DataError(f"{kept}, so its rates by place are not those of what was shown; say position_bias=tower")


def placed(data: Prepared, rows: Rows, valid: Rows) -> tuple[Rows, Rows]:
    """Both with the places that `places_of` finds; those that train does not have count as its last one."""
    place, more = places_of(data, "train"), places_of(data, "valid")
    return replace(rows, place=place), replace(valid, place=np.minimum(more, place.max()))


def places_of(data: Prepared, split: str) -> Array:
    """Where each row of a split was shown `(N,)`, from 0; in the order of its rows.

    Raises:
        DataError: the rows do not say, or all of train are of one place.
    """
    found = []
    for frame in data.frames(split, ("position",)):
        if "position" not in frame.columns:
            raise DataError(
                f"{data.folder} has no column position: position_bias needs the place where each ad was shown, Int64 from 1; a log has "
                "it, adrank prepare csv writes it where [table] says position"
            )
        check_columns(frame, {"position": pl.Int64()}, data.folder)
        if (frame["position"].fill_null(0) < 1).any():
            raise DataError(f"{data.folder}: column position has gaps, or places below 1")
        found.append(frame["position"].clip(1, LAST).to_numpy() - 1)
    places: Array = np.concatenate(found).astype(np.uint8)
    if split == "train" and (places == places[0]).all():
        raise DataError(
            f"{data.folder}: all ads were shown at place {places[0] + 1}, which tells nothing of others; leave out position_bias"
        )
    return places


def tower_of(kind: str, rows: Rows) -> PositionBias | None:
    """The tower that a network is trained with, of kinds that have one."""
    return PositionBias(int(rows.places.max()) + 1, kind == "pal") if kind in ("tower", "pal") else None


def by_tower(tower: PositionBias, logits: Array, place: Array) -> Curve:
    """What a tower makes of ads with `logits (N,)`, having learned from rows that were shown at `place (M,)`, from 0."""
    places, some = len(tower.bias), logits[:: max(1, len(logits) // 10_000)]
    rates = np.array([expit(tower.at(some, np.full(len(some), k))).mean() for k in range(places)])
    count = np.bincount(place, minlength=places)[:places].astype(np.float64)
    return Curve.of(rates, np.sqrt((1 - rates) / np.maximum(count * rates, 1e-9)), count)


def examined(data: Prepared, rows: Rows, kind: str) -> Curve | None:
    """The examination that clicks are weighed by, of kinds that do; raises as `by_exploring` does."""
    if kind not in ("ips", "em"):
        return None
    places = int(rows.places.max()) + 1
    return by_exploring(data, places) if kind == "ips" else by_regression(rows, places)


def weighted(rows: Rows, curve: Curve | None) -> Rows:
    """The rows, each click with the weight of its place beside its own."""
    if curve is None:
        return rows
    clicked = np.minimum(1 / np.maximum(curve.value, 1e-9), MOST_WEIGHT)[rows.places]
    weight = np.where(rows.labels > 0, clicked, 1.0) * (1.0 if rows.weight is None else rows.weight)
    return replace(rows, weight=weight.astype(np.float32))


def explored(data: Prepared) -> pl.DataFrame:
    """The rows of train that were drawn at random, with `weight`: by how much likelier drawing evenly would have shown what was shown.

    A row of a ranking counts the places above it too, and the ranking has to be whole down to there. Without `request_id` each row was
    drawn by itself.

    Raises:
        DataError: there are none.
    """
    columns, found = ("position", "request_id", "propensity", "candidates"), []
    for frame in data.frames("train", columns):
        if "propensity" in frame.columns:
            drawn = frame.filter(pl.col("propensity") < 1, pl.col("propensity") > 0)
            found.append(drawn.select("label", *(name for name in columns if name in frame.columns)))
    rows = pl.concat(found, how="diagonal") if found else pl.DataFrame()
    if not len(rows):
        raise DataError(
            f"{data.folder}: no ad of train was drawn at random (propensity below 1), so examination cannot be told from rankings that "
            "explored; let a share of requests explore, or say position_bias=em"
        )
    left = pl.col("candidates").list.len() if "candidates" in rows.columns else pl.lit(1)
    if "request_id" not in rows.columns:
        return rows.with_columns(weight=1 / (left * pl.col("propensity")))
    rows = rows.with_columns(left=left.max().over("request_id").cast(pl.Int64) - pl.col("position") + 1).sort("request_id", "position")
    ratio = 1 / (pl.col("left") * pl.col("propensity"))
    rows = rows.with_columns(place=pl.int_range(1, pl.len() + 1).over("request_id"), weight=ratio.cum_prod().over("request_id"))
    return rows.filter(pl.col("position") == pl.col("place"), pl.col("weight").is_not_null())


def by_exploring(data: Prepared, places: int) -> Curve:
    """Examination from rows that explored: weighted click rates by place.

    Raises:
        DataError: too few rows explored.
    """
    rows = explored(data)
    place, clicks, weight = (rows[name].cast(pl.Float64).to_numpy() for name in ("position", "label", "weight"))
    at = np.minimum(place, places).astype(np.int64) - 1
    total, squares, clicked = (np.bincount(at, each, places) for each in (weight, weight**2, weight * clicks))
    sample = np.divide(total**2, squares, out=np.zeros(places), where=squares > 0)
    rates = np.divide(clicked, total, out=np.zeros(places), where=total > 0)
    if sample[0] < LEAST_SAMPLE or not rates[0]:
        raise DataError(
            f"{data.folder}: {sample[0]:.0f} rows of the first place were drawn at random, at a click rate of {rates[0]:.2%}, and "
            f"{LEAST_SAMPLE} with clicks are needed to tell examination; let more requests explore, or say position_bias=em"
        )
    off = np.sqrt(np.bincount(at, (weight * (clicks - rates[at])) ** 2, places)) / np.maximum(clicked, 1e-9)
    known = np.where((sample >= LEAST_SAMPLE) & (rates > 0), np.arange(places), 0)
    taken = np.maximum.accumulate(known)
    return Curve.of(rates[taken], off[taken], sample)


def by_regression(rows: Rows, places: int) -> Curve:
    """Examination by EM: a click was examined and relevant; of what was not clicked each is inferred from the other.

    Relevance is a logistic regression of the ids of user, context and ad, and of each pair of one's and the other's.
    """
    some = np.sort(np.random.default_rng(0).permutation(len(rows))[:EM_ROWS])
    clicks, at, matrix = rows.labels[some] > 0, rows.places[some], _crossed(rows, some)
    count, weights, theta = np.bincount(at, minlength=places), np.zeros(matrix.shape[1]), np.full(places, 0.9)
    for _ in range(EM_ROUNDS):
        gamma = expit(matrix @ weights)
        missed = 1 - theta[at] * gamma
        examined = np.where(clicks, 1.0, theta[at] * (1 - gamma) / missed)
        relevant = np.where(clicks, 1.0, (1 - theta[at]) * gamma / missed)
        theta = (np.bincount(at, examined, places) + 1e-6) / (count + 2e-6)
        weights = _regressed(matrix, relevant, weights)
    p = theta[at] * expit(matrix @ weights)
    told = np.bincount(at, p / (1 - p), places)  # Fisher's information of log θ, relevance being given
    return Curve.of(theta, 1 / np.sqrt(np.maximum(told, 1e-9)), count.astype(np.float64))


def _crossed(rows: Rows, some: Array) -> Any:
    """One column a value, and one a pair of values of a request and of its ad, `(N, columns)`."""
    users, ads = (block.ids[some].astype(np.int64) for block in (rows.user, rows.ad))
    crosses = [user << 32 | ad for user in users.T for ad in ads.T]
    found, width = [np.zeros(len(some), np.int64)], 1
    for each in (*users.T, *ads.T, *crosses):
        values, at = np.unique(each, return_inverse=True)
        found.append(at + width)
        width += len(values)
    ends = np.arange(0, len(some) * len(found) + 1, len(found))
    return csr_matrix((np.ones(ends[-1]), np.column_stack(found).ravel(), ends), (len(some), width))


def _regressed(matrix: Any, targets: Array, weights: Array) -> Array:
    """Some steps of a logistic regression towards `targets (N,)` in [0, 1]."""

    def loss(at: Array) -> tuple[float, Array]:
        z = matrix @ at
        value = (np.logaddexp(0, z) - targets * z).mean() + EM_L2 / 2 * at @ at
        return value, matrix.T @ (expit(z) - targets) / len(z) + EM_L2 * at

    found: Array = minimize(loss, weights, jac=True, method="L-BFGS-B", options={"maxiter": EM_STEPS}).x
    return found
