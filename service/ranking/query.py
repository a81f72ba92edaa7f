"""What a ranking is asked for, and what it comes to: the carriers of a request on its road. Knows nothing about HTTP or stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from features.encode import Features, Feeds, Mask, Request
from features.policy import Policy, Thompson
from features.schema import IDENTITY
from features.state import StoreError, UserState
from features.vocabulary import Ids

from ..catalogue.ads import View
from ..errors import FieldProblem, InvalidError
from ..models.loaded import Model
from .bids import ABSENT, CLICK, CONVERSION, CPA, Bids
from .explain import Seen
from .rules import Rules

MISTAKES_TOLD = 20
LOOKED_AT = 2**20
"""Candidates that rules look at for all places of one request: with several features, a quarter of a second of a processor."""
DRAWN_FROM = 1_000
"""Candidates of a request that Thompson sampling draws from, which takes it as long."""


class Selection(NamedTuple):
    """The ads of the catalogue that are candidates, where a request does not list them."""

    filters: Mapping[str, Sequence[str]]
    """By category or list of ads, the values of which an ad must have one."""
    most: int
    """Candidates of a request."""
    retrieve: int | None = None
    """Of those that pass so many, the nearest to the request's vector; None: all."""


@dataclass(slots=True, kw_only=True)
class Query:
    """A request to rank. `bids` stand beside `ad_ids`, None where no candidate has one; `sent` holds candidates' features by position;
    no history: the stored one.
    """

    user_id: str
    user: Features = field(default_factory=dict)
    history: Sequence[str] | None = None
    history_ts: Sequence[float] = ()
    """When the behaviours of `history` were; empty: not known."""
    context: Features = field(default_factory=dict)
    ad_ids: Sequence[str]
    selection: Selection | None = None
    """Which ads are the candidates; `ad_ids` has them once the user is known. None: the caller listed them."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """How many ads of the catalogue a selection left out, by reason."""
    names: Sequence[str] | None = None
    """The ads' ids as the caller wrote them, where those are other texts (`features/values.py`)."""
    bids: Bids | None = None
    sent: Mapping[int, Features] = field(default_factory=dict)
    model: str | None = None
    version: str | None = None
    """That of the model that is to rank, and no other; None: the live one, or a canary that the user falls to."""
    top_k: int | None = None
    shown: int | None = None
    """How many ads of the answer are shown, if that is not `top_k`; not known where neither is there."""
    objective: Literal["pctr", "ecpm", "value", "weighted"] = "pctr"
    weights: Mapping[str, float] = field(default_factory=dict)
    """By head, of the objective `weighted`."""
    min_score: float | None = None
    """The least p(click) of an ad."""
    reserve: int | None = None
    """The least eCPM of an ad, in micros."""
    prices: bool = False
    rules: Rules | None = None
    explain: bool = False
    unknown_ads: Literal["rank", "omit"] = "rank"
    """What becomes of an ad that the catalogue does not have and that comes without features."""
    policy: Policy | None = None
    """How to explore; None: not at all."""
    deadline: float | None = None
    """Seconds from the request's beginning."""
    request_id: str = ""
    experiment: Mapping[str, str] = field(default_factory=dict)
    """The user's arm by experiment, for the log."""
    stored: UserState | StoreError = field(default_factory=UserState)
    """The user's state, or why the store does not give it; once it has been asked."""
    ts: float = 0.0
    """When that was, in seconds since 1970: whichever version ranks sees the same ages."""

    @property
    def heads(self) -> set[str]:
        """Those that it needs beside the click."""
        if self.bids is None and not self.weights:
            return set()
        pays = self.bids is not None and bool((self.bids.kind == CPA).any())
        return {*self.weights, *([CONVERSION] if pays else [])} - {CLICK}


class Degraded(NamedTuple):
    """What a ranking did without, why, and what stood in."""

    stage: str
    reason: str
    fallback: str


class Encoded(NamedTuple):
    """A request as a model takes it: each candidate once."""

    query: Query
    model: Model
    request: Request
    feeds: Feeds
    known: Mask
    view: View
    """The features that the ads' rows were encoded from."""
    repeated: Sequence[int] | None
    """The positions of the request's candidates in the query, None where they are the same."""
    behaviours: int
    degraded: list[Degraded]
    """What the model does without."""
    rows: Ids | None = None
    """Those of the catalogue's table that the candidates are, where they are no more than that."""

    @property
    def scored(self) -> Feeds:
        """What the model is given: in place of its candidates' tensors what it has made of them before, where it keeps that."""
        ads = self.model.ads
        return self.feeds if ads is None or self.rows is None else {**self.feeds, **ads.of(self.view.table, self.rows)}


@dataclass(slots=True)
class Ranking:
    """The answer, every candidate once, in the columns of the ranked (best first) or in `omitted` as (ad id, reason); and what it
    was made of, for the log.
    """

    encoded: Encoded
    rows: Ids
    """Which of the request's candidates could be ranked: those that a policy draws from."""
    ad_ids: Sequence[str]
    p_click: Sequence[float]
    """The shortest decimals that are the model's float32: no digit that it did not mean, none lost."""
    ecpm: Sequence[float | None] | None
    """In the bid's currency for a thousand impressions; None for all where there is no bid."""
    known: Sequence[bool] | None
    """Whether the catalogue has the ad; None where it has all."""
    omitted: Sequence[tuple[str, str]]
    seen: Mapping[str, Any] | None = None
    ads_seen: Sequence[Seen] | None = None
    score: Sequence[float | None] | None = None
    """What ads were ordered by, where that is neither p(click) nor eCPM."""
    p_conversion: Sequence[float] | None = None
    """Where the head was asked for."""
    price: Sequence[float | None] | None = None
    """What each ad would have to pay, in the unit of its bid; None where nobody asked."""
    bids: Bids | None = None
    """Of the request's candidates `(C,)`."""
    kept: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which of them the ads are."""
    propensity: Sequence[float] | None = None
    """How likely the policy was to put each ad at its place, given those above it; None where it did not explore."""
    why: Sequence[Mapping[str, Any]] = ()
    """What `explanations` has to say of the first ads."""
    omitted_by_reason: Mapping[str, int] | None = None
    """How many ads of the catalogue are not in the answer, in place of `omitted` where the candidates are a selection."""

    @property
    def explored(self) -> bool:
        """Whether the policy alone chose the order, by chance: what can be replayed."""
        return self.propensity is not None and self.encoded.query.rules is None

    @property
    def query(self) -> Query:
        """What was asked."""
        return self.encoded.query

    @property
    def model(self) -> Model:
        """What ranked."""
        return self.encoded.model

    @property
    def degraded(self) -> Sequence[Degraded]:
        """What the ranking did without."""
        return self.encoded.degraded


def check_query(query: Query, model: Model) -> None:
    """That a model can rank as the request asks.

    Raises:
        InvalidError: it lacks a bid, or asks for what the model or the service does not have.
    """
    if query.prices and query.objective != "ecpm":
        raise InvalidError.at(("options", "prices"), "prices are those of an order by eCPM: ask for the objective ecpm")
    if lacks := sorted(query.heads.difference(model.scorer.heads)):
        what = f"model {model.name} predicts no {lacks[0]}; it predicts {', '.join(model.scorer.heads)}"
        if query.bids is None or query.objective == "weighted":
            raise InvalidError.at(("options", "objective"), what)
        raise InvalidError.at(("candidates", int(np.flatnonzero(query.bids.kind == CPA)[0]), "bid_type"), what)
    if query.objective == "weighted" and not query.weights:
        raise InvalidError.at(("options", "objective"), "needs the service's setting weights, such as ADRANK_WEIGHTS=click=1,conversion=20")
    if isinstance(query.policy, Thompson) and model.bundle.ad_deviations is None:
        why = f"model {model.name} version {model.bundle.version} does not say how sure it is of each ad; train it again, with ad_id"
        raise InvalidError.at(("options", "explore", "policy"), why)
    if query.rules is not None:
        _check_rules(query.rules, query, model)
    if query.selection is None:
        check_candidates(query)
    if query.objective == "ecpm" or query.reserve is not None or (query.rules and query.rules.reserves):
        _check_all("bid", query, "the objective ecpm needs" if query.objective == "ecpm" else "a reserve needs")
    elif query.objective == "value":
        _check_all("value", query, "the objective value needs")


def _check_rules(rules: Rules, query: Query, model: Model) -> None:
    categories = {field.name for field in model.bundle.schema.side("ad") if field.kind == "category"} - {*IDENTITY.values()}
    for name, path in rules.features.items():
        if name not in categories:
            raise InvalidError.at(
                ("options", "rules", *path), f"{name} is no category of ads of model {model.name}: {', '.join(sorted(categories))}"
            )
    check_counters(rules, model)
    if query.prices and rules.alike:
        raise InvalidError.at(
            ("options", "prices"), "an ad that stands where it does for diversity has no price that would just keep it there"
        )


def check_candidates(query: Query) -> None:
    """That the candidates can be placed as asked without holding up what else the worker does, and those that are pinned are among them.

    Raises:
        InvalidError: they are too many, or one that is pinned is none of them, or is pinned twice.
    """
    count = len(query.ad_ids)
    if isinstance(query.policy, Thompson) and count > DRAWN_FROM:
        raise InvalidError.at(
            ("options", "explore", "policy"), f"thompson draws from at most {DRAWN_FROM:,} candidates, and there are {count:,}"
        )
    if query.rules is not None and query.rules.by_place and min(query.top_k or count, count) * count > LOOKED_AT:
        detail = f"with rules, at most {LOOKED_AT // count:,} places are filled from {count:,} candidates: say top_k"
        raise InvalidError.at(("options", "top_k"), detail)
    pinned = {} if query.rules is None else query.rules.pinned
    for place, ad_id in pinned.items():
        if ad_id not in query.ad_ids or list(pinned.values()).count(ad_id) > 1:
            raise InvalidError.at(("options", "rules", "pinned", str(place)), "expected one of the candidates, each pinned to one place")


def check_counters(rules: Rules, model: Model) -> None:
    """That a model counts what caps are about.

    Raises:
        InvalidError: it does not.
    """
    shown = {name for name, each in model.bundle.schema.counters.items() if each.by == ("user", "ad_id") and len(each.of) == 1}
    for name in rules.frequency.keys() - shown:
        detail = f'{name} is no counter of model {model.name} by = ["user", "ad_id"]: {", ".join(sorted(shown)) or "it has none"}'
        raise InvalidError.at(("options", "rules", "frequency", name), detail)


def _check_all(name: Literal["bid", "value"], query: Query, needs: str) -> None:
    if query.selection is not None:
        raise InvalidError.at(("candidates",), f"{needs} a {name} for each candidate, and the catalogue has none: list the candidates")
    column = np.full(len(query.ad_ids), ABSENT) if query.bids is None else getattr(query.bids, name)
    missing = np.flatnonzero(column == ABSENT).tolist()
    if missing:
        mistakes = [FieldProblem(("candidates", i, name), f"missing; {needs} it") for i in missing[:MISTAKES_TOLD]]
        raise InvalidError(f"{needs} a {name} for each candidate; {len(missing)} have none", mistakes)
