"""From a request to a ranking: fetch the user, encode, score, sort. Knows nothing about HTTP, Redis or ONNX Runtime.

Candidates are columns from the request to the answer: nothing here makes an object for each.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from features.encode import Features, Feeds, FieldError, Mask, Request, encode_request
from features.policy import Policy
from features.schema import IDENTITY
from features.state import Store, StoreError, UserState
from features.vocabulary import Ids, Numbers

from ..catalogue.ads import View
from ..catalogue.catalogue import Catalogue
from ..errors import DeadlineError, FieldProblem, InvalidError, ScoringError, ServiceError
from ..models.canary import Challenge
from ..models.loaded import Model, Models
from ..telemetry.metrics import Metrics, RequestTimings
from .bids import ABSENT, CLICK, CONVERSION, CPA, Bids, Floats, from_micros, second_prices, worth_of
from .executor import Scoring
from .explain import Seen, explain_ad, explain_request
from .ordering import arrange, best_first

MISTAKES_TOLD = 20


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
    names: Sequence[str] | None = None
    """The ads' ids as the caller wrote them, where those are other texts (`features/values.py`)."""
    bids: Bids | None = None
    sent: Mapping[int, Features] = field(default_factory=dict)
    model: str | None = None
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
    explain: bool = False
    unknown_ads: Literal["rank", "omit"] = "rank"
    """What becomes of an ad that the catalogue does not have and that comes without features."""
    policy: Policy | None = None
    """How to explore; None: not at all."""
    deadline: float | None = None
    """Seconds from the request's beginning."""
    request_id: str = ""

    @property
    def heads(self) -> set[str]:
        """Those that it needs beside the click."""
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


class Ranker:
    """Ranks with the models and the catalogue of the moment."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        scoring: Scoring,
        random: np.random.Generator | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`random` is by default seeded by the system; `clock` gives seconds since 1970."""
        self._store, self._scoring, self._clock = store, scoring, clock
        self._random = random or np.random.default_rng()
        self.models, self.catalogue = Models({}, {}), Catalogue(store, {}, metrics)
        self.challenges: Mapping[str, Challenge] = {}

    def use(self, models: Models, catalogue: Catalogue, challenges: Mapping[str, Challenge] | None = None) -> None:
        """Rank with these from the next request on; those on their way are ranked with what they began with."""
        self.models, self.catalogue, self.challenges = models, catalogue, challenges or {}

    def close(self) -> None:
        """Let the scoring threads end."""
        self._scoring.close()

    async def rank(self, query: Query, stages: RequestTimings) -> Ranking:
        """Rank a request.

        Raises:
            ServiceError: an unknown model, no model, an invalid request, a deadline that passed, a model that failed.
        """
        model, catalogue = self.models.get(query.model), self.catalogue
        challenge = self.challenges.get(model.name)
        _check_bids(query, model)
        canary = challenge.canary(query.user_id) if challenge and not query.heads else None  # which gives the click alone
        # The catalogue may let go of them while the store is asked.
        views = {each: catalogue.view(each.bundle.fingerprint) for each in (model, canary) if each is not None}
        stages.enter("features")
        asked = Asked(query, stages, catalogue, await self._user(query, stages), self._clock())
        if challenge is None:
            return await self._by_live(asked, model, views[model], None)
        failure: ServiceError | None = None
        if canary is not None and challenge.model is canary:  # it may have been stopped meanwhile
            try:
                return await self._by_canary(asked, canary, views[canary], challenge)
            except (ScoringError, InvalidError) as error:
                failure = error
        ranking = await self._by_live(asked, model, views[model], challenge if canary is None else None)
        if failure is not None:
            challenge.failed(failure)
        return ranking

    async def _by_live(self, asked: "Asked", model: Model, view: View, challenge: Challenge | None) -> Ranking:
        query, stages = asked.query, asked.stages
        stages.enter("features")
        encoded = asked.encoded(model, view)
        asked.note(encoded)
        scorer = model.scorer.whole if query.heads else model.scorer
        scores = await self._scoring.score(scorer, encoded.feeds, stages, query.deadline)
        stages.enter("post")
        if challenge is not None:

            def encode(other: Model) -> Feeds:
                if other.bundle.fingerprint == model.bundle.fingerprint:
                    return encoded.feeds
                return asked.encoded(other, asked.catalogue.view(other.bundle.fingerprint)).feeds

            challenge.beside(query.user_id, stages.seconds["inference"], scores if scores.ndim == 1 else scores[:, 0], encode)
        return self._ranking(stages, encoded, scores)

    async def _by_canary(self, asked: "Asked", canary: Model, view: View, challenge: Challenge) -> Ranking:
        """By the challenger; what is waited for it in vain counts as waiting, so that the stages are those of the version that ranks."""
        query, stages = asked.query, asked.stages
        encoded = asked.encoded(canary, view)
        asked.note(encoded)
        patience = None if query.deadline is None else (query.deadline - stages.total) / 2
        stages.enter(None)
        began, stage = time.perf_counter(), "queue"
        try:
            scores = await challenge.score(canary, encoded.feeds, patience)
            stage = "inference"
        finally:
            stages.add(stage, began, time.perf_counter())
        stages.enter("post")
        return self._ranking(stages, encoded, scores)

    def _ranking(self, stages: RequestTimings, encoded: Encoded, scores: Numbers) -> Ranking:
        stages.scores = scores if scores.ndim == 1 else scores[:, 0]
        ranking = _ranked(encoded, scores, self._random)
        stages.degraded = [(entry.stage, entry.reason) for entry in ranking.degraded]
        return ranking

    async def _user(self, query: Query, stages: RequestTimings) -> UserState | StoreError:
        """The user's state, or why the store does not give it. It is asked once, whichever version ranks in the end."""
        stages.user = "error"
        try:
            state = await self._stored(query, stages)
        except TimeoutError:
            raise DeadlineError("the deadline passed while the store was asked for the user") from None
        except StoreError as error:
            return error
        stages.user = "hit" if state else "miss"
        return state or UserState()

    async def _stored(self, query: Query, stages: RequestTimings) -> UserState | None:
        if query.deadline is None:
            return await self._store.get_user(query.user_id)
        async with asyncio.timeout(query.deadline - stages.total):
            return await self._store.get_user(query.user_id)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with what the store gave for it, to be encoded for any of the models."""

    query: Query
    stages: RequestTimings
    catalogue: Catalogue
    stored: UserState | StoreError
    ts: float
    """When, in seconds since 1970: whichever version ranks sees the same ages."""

    def encoded(self, model: Model, view: View) -> Encoded:
        """The request as a model takes it.

        Raises:
            InvalidError: a feature does not fit the model's schema.
        """
        degraded = [] if self.catalogue.loaded else [Degraded("catalogue", "not_loaded", "unknown_ads")]
        if isinstance(self.stored, StoreError):
            degraded += self._without_user(model, self.stored.reason)
        stored = UserState() if isinstance(self.stored, StoreError) else self.stored
        usable = _usable(model, self.query, stored, degraded)
        repeated = _first_of_each(self.query)
        request = _request(self.query, usable, repeated, self.ts)
        try:
            feeds, known = encode_request(view.table, request)
        except FieldError as error:
            raise InvalidError("a feature does not fit the model's schema", [_mistake(error, repeated)]) from None
        view.renew()
        behaviours = min(len(request.history), model.bundle.schema.history_length)
        return Encoded(self.query, model, request, feeds, known, view, repeated, behaviours, degraded)

    def note(self, encoded: Encoded) -> None:
        """Tell the metrics what is about to be scored, and by which version."""
        self.stages.version = encoded.model.bundle.version
        self.stages.ranked_with(encoded.behaviours, int(np.count_nonzero(encoded.known)), len(encoded.known))

    def _without_user(self, model: Model, reason: str) -> list[Degraded]:
        schema = model.bundle.schema
        without = []
        if self.query.history is None and schema.history_fields:
            without.append(Degraded("history", reason, "empty_history"))
        if any(known.name not in IDENTITY.values() for known in schema.side("user")):
            without.append(Degraded("user", reason, "sent_features"))
        return without


def _usable(model: Model, query: Query, stored: UserState, degraded: list[Degraded]) -> UserState:
    """The user's state as far as the model's schema can use it; nobody has none, whatever is stored under such an id."""
    if model.bundle.encoder.is_nobody(query.user_id):
        return UserState()
    features, mistyped = model.bundle.encoder.usable("user", stored.features)
    if mistyped:
        degraded.append(Degraded("user", "stored_feature_mistyped", "missing_feature"))
    times = stored.ts
    if model.bundle.encoder.schema.history_ages and query.history is None and not set(map(type, times)) <= {int, float}:
        degraded.append(Degraded("history", "stored_times_mistyped", "unknown_ages"))
        times = ()
    return UserState(features, stored.ad_ids, times)


def _check_bids(query: Query, model: Model) -> None:
    """That the request can be ranked as it asks."""
    if query.prices and query.objective != "ecpm":
        raise _cannot(("options", "prices"), "prices are those of an order by eCPM: ask for the objective ecpm")
    if lacks := sorted(query.heads.difference(model.scorer.heads)):
        what = f"model {model.name} predicts no {lacks[0]}; it predicts {', '.join(model.scorer.heads)}"
        if query.bids is None or query.objective == "weighted":
            raise _cannot(("options", "objective"), what)
        raise _cannot(("candidates", int(np.flatnonzero(query.bids.kind == CPA)[0]), "bid_type"), what)
    if query.objective == "weighted" and not query.weights:
        raise _cannot(("options", "objective"), "needs the service's setting weights, such as ADRANK_WEIGHTS=click=1,conversion=20")
    if query.objective == "ecpm" or query.reserve is not None:
        _check_all("bid", query, "the objective ecpm needs" if query.objective == "ecpm" else "a reserve needs")
    elif query.objective == "value":
        _check_all("value", query, "the objective value needs")


def _check_all(name: Literal["bid", "value"], query: Query, needs: str) -> None:
    column = np.full(len(query.ad_ids), ABSENT) if query.bids is None else getattr(query.bids, name)
    missing = np.flatnonzero(column == ABSENT).tolist()
    if missing:
        mistakes = [FieldProblem(("candidates", i, name), f"missing; {needs} it") for i in missing[:MISTAKES_TOLD]]
        raise InvalidError(f"{needs} a {name} for each candidate; {len(missing)} have none", mistakes)


def _cannot(path: tuple[str | int, ...], detail: str) -> InvalidError:
    return InvalidError(detail, [FieldProblem(path, detail)])


def _first_of_each(query: Query) -> list[int] | None:
    """Positions of the candidates to rank where some are named twice, None where all are."""
    if len(set(query.ad_ids)) == len(query.ad_ids):
        return None
    first: dict[str, int] = {}
    for i, ad_id in enumerate(query.ad_ids):
        first.setdefault(ad_id, i)
    return list(first.values())


def _request(query: Query, state: UserState, repeated: Sequence[int] | None, ts: float) -> Request:
    ad_ids, sent = query.ad_ids, query.sent
    if repeated is not None:
        ad_ids = [ad_ids[i] for i in repeated]
        sent = {row: sent[i] for row, i in enumerate(repeated) if i in sent}
    history, times = (state.ad_ids, state.ts) if query.history is None else (query.history, query.history_ts)
    return Request(query.user_id, query.user, query.context, history, ad_ids, sent, state.features, times, ts)


def _ranked(encoded: Encoded, scores: Numbers, random: np.random.Generator) -> Ranking:
    """Ads best first, or as the policy drew them, those beyond `top_k` omitted, and those without a finite score. Ties go by ad id."""
    query, ad_ids, repeated = encoded.query, encoded.request.candidates, encoded.repeated
    heads = scores.reshape(len(ad_ids), -1).T
    finite: Mask = np.logical_and.reduce(np.isfinite(heads))
    if np.count_nonzero(finite) < len(finite):
        encoded.degraded.append(Degraded("inference", "not_finite", "omitted"))
        heads = np.where(finite, heads, np.float32(0))
    p = {name: shortest(head) for name, head in zip(encoded.model.scorer.heads, heads, strict=False)}
    bids = query.bids if query.bids is None or repeated is None else query.bids.take(repeated)
    clicks, worth = p[CLICK], worth_of(query.objective, bids, p, query.weights, heads[0])
    rankable = _rankable(encoded)
    fit, fallen = finite & rankable, dict[str, Mask]()
    if query.min_score is not None:
        fit &= ~fallen.setdefault("below_floor", fit & (clicks < query.min_score))
    if query.reserve is not None and worth.ecpm is not None:
        fit &= ~fallen.setdefault("below_reserve", fit & (worth.ecpm < query.reserve))
    (rows,) = fit.nonzero()
    order, propensity = arrange(best_first(rows, worth.by, ad_ids), worth.by, query.policy, query.top_k, random)
    kept = order[: query.top_k]
    places, known = kept.tolist(), encoded.known.take(kept)
    omitted = [] if repeated is None else [(ad_id, "duplicate") for ad_id in _others(query.ad_ids, repeated)]
    if len(places) < len(ad_ids):
        fallen = {"unknown_ad": ~rankable, "not_scored": rankable & ~finite, **fallen}
        omitted += [(ad_ids[row], reason) for reason, those in fallen.items() for row in np.flatnonzero(those).tolist()]
        omitted += [(ad_ids[row], "top_k") for row in order[len(kept) :].tolist()]
    ranking = Ranking(
        encoded,
        rows,
        list(map(ad_ids.__getitem__, places)),
        clicks.take(kept).tolist(),
        None if worth.ecpm is None else from_micros(worth.ecpm.take(kept)),
        None if np.count_nonzero(known) == len(known) else known.tolist(),
        omitted,
        propensity=None if propensity is None else propensity.tolist(),
        bids=bids,
        kept=kept,
    )
    if query.objective in ("value", "weighted"):
        ranking.score = from_micros(worth.by.take(kept)) if query.objective == "value" else worth.by.take(kept).tolist()
    if query.prices:
        ranking.price = from_micros(second_prices(worth, order, query.reserve or 0)[: len(kept)])
    if query.explain:
        encoder = encoded.model.bundle.encoder
        ranking.seen = explain_request(encoder, encoded.feeds, encoded.behaviours)
        ranking.ads_seen = [explain_ad(encoder, encoded.feeds, row) for row in places]
    return ranking


def _rankable(encoded: Encoded) -> Mask:
    """Which candidates may be ranked: all but those of which nothing is known, where the request wants those omitted.

    While the catalogue has not been read, no ad can be told from an unknown one: then all are ranked, as `degraded` says.
    """
    if encoded.query.unknown_ads == "rank" or any(entry.stage == "catalogue" for entry in encoded.degraded):
        return np.ones(len(encoded.known), np.bool_)
    rankable = encoded.known.copy()
    rankable[[row for row, features in encoded.request.sent.items() if any(value is not None for value in features.values())]] = True
    return rankable


def _others(ad_ids: Sequence[str], ranked: Sequence[int]) -> list[str]:
    places = set(ranked)
    return [ad_id for i, ad_id in enumerate(ad_ids) if i not in places]


def shortest(scores: Numbers) -> Floats:
    """The shortest decimals that are these finite float32, as float64."""
    return np.array(orjson.loads(orjson.dumps(np.ascontiguousarray(scores), option=orjson.OPT_SERIALIZE_NUMPY)), np.float64)


def _mistake(error: FieldError, positions: Sequence[int] | None) -> FieldProblem:
    """Where in the caller's document the field is."""
    if error.side == "ad" and error.row is not None:
        position = error.row if positions is None else positions[error.row]
        return FieldProblem(("candidates", position, "features", error.name), error.detail)
    return FieldProblem((error.side, error.name) if error.side == "context" else (error.side, "features", error.name), error.detail)
