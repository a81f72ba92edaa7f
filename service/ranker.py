"""From a request to a ranking: fetch the user, encode, score, sort. Knows nothing about HTTP, Redis or ONNX Runtime."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from features.encode import Encoder, Features, FieldError, Found, Request, clean, encode_found, look_up
from features.schema import IDENTITY
from features.state import Store, StoreError, UserState
from features.vocabulary import Ids, Numbers

from .catalogue import Catalogue
from .errors import DeadlineError, InvalidError, Mistake
from .explain import Seen, explain_ad, explain_request
from .metrics import Metrics, Stages
from .models import Model, Models

MISTAKES_TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A request to rank. `bids` stand beside `ad_ids`; `sent` holds candidates' features by position; no history: the stored one."""

    user_id: str
    user: Features = field(default_factory=dict)
    history: Sequence[str] | None = None
    context: Features = field(default_factory=dict)
    ad_ids: Sequence[str]
    bids: Sequence[float | None]
    sent: Mapping[int, Features] = field(default_factory=dict)
    model: str | None = None
    top_k: int | None = None
    objective: Literal["pctr", "ecpm"] = "pctr"
    explain: bool = False
    deadline: float | None = None
    """Seconds from the request's beginning."""


class RankedAd(NamedTuple):
    """An ad and its probability of a click; `ecpm` in the bid's currency for a thousand impressions."""

    ad_id: str
    p_click: float
    ecpm: float | None
    known: bool
    seen: Seen | None


class Degraded(NamedTuple):
    """What a ranking did without, why, and what stood in."""

    stage: str
    reason: str
    fallback: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer: every candidate once, in `ads` (best first) or in `omitted` as (ad id, reason)."""

    model: Mapping[str, str]
    ads: Sequence[RankedAd]
    omitted: Sequence[tuple[str, str]]
    degraded: Sequence[Degraded]
    seen: Mapping[str, Seen] | None


@dataclass(frozen=True, slots=True)
class Job:
    """What the scoring threads need of a request; `positions` lead from a candidate that is scored to the caller's list."""

    query: Query
    model: Model
    request: Request
    positions: Sequence[int]
    found: Found
    degraded: list[Degraded]


class Ranker:
    """Ranks with the models and the catalogue of the moment."""

    def __init__(self, store: Store, metrics: Metrics, threads: int) -> None:
        self._store, self._metrics = store, metrics
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self.models, self.catalogue = Models({}, {}), Catalogue(store, {}, metrics)

    def use(self, models: Models, catalogue: Catalogue) -> None:
        """Rank with these from the next request on."""
        self.models, self.catalogue = models, catalogue

    def close(self) -> None:
        """Let the scoring threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def rank(self, query: Query, stages: Stages) -> Ranking:
        """The ranking. The event loop only fetches; encoding, scoring and sorting are a thread's.

        Raises:
            ServiceError: an unknown model, no model, an invalid request, a deadline that passed, a model that failed.
        """
        model, catalogue = self.models.get(query.model), self.catalogue
        _check_bids(query)
        with stages.stage("features"):
            degraded = [] if catalogue.loaded else [Degraded("catalogue", "not_loaded", "unknown_ads")]
            state = await self._user(query, stages, model, degraded)
            job = _job(query, model, catalogue, state, degraded)
        self._metrics.ranked_with(len(job.found.behaviours), int(job.found.known.sum()), len(job.request.candidates))
        waiting_since = time.perf_counter()
        ranking = await asyncio.get_running_loop().run_in_executor(self._pool, self._score, job, stages, waiting_since)
        for entry in ranking.degraded:
            self._metrics.degraded(entry.stage, entry.reason)
        return ranking

    async def _user(self, query: Query, stages: Stages, model: Model, degraded: list[Degraded]) -> UserState:
        """The user's state as far as the store gives it and the schema can use it."""
        left = None if query.deadline is None else query.deadline - stages.total
        try:
            with self._metrics.lookup("user") as found:
                async with asyncio.timeout(left):
                    state = await self._store.get_user(query.user_id)
                found.extend([state] if state else [])
        except TimeoutError:
            raise DeadlineError("the deadline passed while the store was asked for the user") from None
        except StoreError as error:
            schema = model.bundle.schema
            if query.history is None and schema.history_fields:
                degraded.append(Degraded("history", error.reason, "empty_history"))
            if any(known.name not in IDENTITY.values() for known in schema.side("user")):
                degraded.append(Degraded("user", error.reason, "sent_features"))
            return UserState()
        if state is None:
            return UserState()
        features, mistyped = _usable(model.bundle.encoder, state.features)
        if mistyped:
            degraded.append(Degraded("user", "stored_feature_mistyped", "missing_feature"))
        return UserState(features, state.ad_ids, state.ts)

    def _score(self, job: Job, stages: Stages, waiting_since: float) -> Ranking:
        """Runs in a thread of the pool."""
        stages.add("queue", time.perf_counter() - waiting_since)
        if job.query.deadline is not None and stages.total > job.query.deadline:
            raise DeadlineError("the deadline passed before the candidates were scored")
        encoder = job.model.bundle.encoder
        with stages.stage("features"):
            try:
                feeds = encode_found(encoder, job.request, job.found)
            except FieldError as error:
                raise InvalidError("a feature does not fit the model's schema", [_mistake(error, job.positions)]) from None
        with stages.stage("inference"):
            scores = job.model.scorer.score(feeds)[0]
        with stages.stage("post"):
            self._metrics.clicks(job.model.name, scores)
            ads, unscored, cut = _sort(job, scores)
            if unscored:
                job.degraded.append(Degraded("inference", "not_finite", "omitted"))
            seen = explain_request(encoder, feeds, len(job.found.behaviours)) if job.query.explain else None
            if job.query.explain:
                rows = {ad_id: row for row, ad_id in enumerate(job.request.candidates)}
                ads = [ad._replace(seen=explain_ad(encoder, feeds, rows[ad.ad_id])) for ad in ads]
            omitted = [*_reasons(_duplicates(job), "duplicate"), *_reasons(unscored, "not_scored"), *_reasons(cut, "top_k")]
            return Ranking(job.model.facts(), ads, omitted, job.degraded, seen)


def _check_bids(query: Query) -> None:
    if query.objective == "ecpm" and None in query.bids:
        missing = [i for i, bid in enumerate(query.bids) if bid is None]
        mistakes = [Mistake(("candidates", i, "bid"), "missing; the objective ecpm needs it") for i in missing[:MISTAKES_TOLD]]
        raise InvalidError(f"the objective ecpm needs a bid for each candidate; {len(missing)} have none", mistakes)


def _usable(encoder: Encoder, stored: Features) -> tuple[dict[str, Any], int]:
    """Stored features that the schema knows and can read, and how many it knows but cannot read: they are not the caller's fault."""
    usable, mistyped = {}, 0
    for name, value in stored.items():
        known = encoder.schema.field("user", name)
        if known is None or name in IDENTITY.values():
            continue
        try:
            usable[name] = clean(known, value)
        except FieldError:
            mistyped += 1
    return usable, mistyped


def _job(query: Query, model: Model, catalogue: Catalogue, state: UserState, degraded: list[Degraded]) -> Job:
    first: dict[str, int] = {}
    for i, ad_id in enumerate(query.ad_ids):
        first.setdefault(ad_id, i)
    positions = list(first.values())
    sent = {row: query.sent[i] for row, i in enumerate(positions) if i in query.sent} if query.sent else {}
    history = state.ad_ids if query.history is None else query.history
    request = Request(query.user_id, {**state.features, **query.user}, query.context, history, list(first), sent)
    return Job(query, model, request, positions, look_up(catalogue.table(model.bundle.fingerprint), request), degraded)


def _sort(job: Job, scores: Numbers) -> tuple[list[RankedAd], list[str], list[str]]:
    """Ads best first; the ids of those without a finite score; and the ids of those beyond `top_k`. Ties go by ad id."""
    ad_ids, finite = job.request.candidates, np.isfinite(scores)
    bids = [job.query.bids[i] for i in job.positions]
    by: Any = scores
    if job.query.objective == "ecpm":
        by = np.where(finite, _shortest(scores), 0.0) * np.array(bids) * 1000
    order = _best_first(np.flatnonzero(finite), by, ad_ids)
    kept = order[: job.query.top_k]
    clicks, known = _shortest(scores[kept]).tolist(), job.found.known[kept].tolist()
    ads = [
        RankedAd(ad_ids[row], click, None if (bid := bids[row]) is None else click * bid * 1000, is_known, None)
        for row, click, is_known in zip(kept, clicks, known, strict=True)
    ]
    return ads, [ad_ids[row] for row in np.flatnonzero(~finite).tolist()], [ad_ids[row] for row in order[len(kept) :]]


def _best_first(rows: Ids, by: Any, ad_ids: Sequence[str]) -> list[int]:
    """The rows by falling value, equal ones by ad id; numpy does all but the ties, since ids of thousands sort slowly."""
    order = rows[np.argsort(-by[rows], kind="stable")]
    ties = np.diff(by[order[1:]] == by[order[:-1]], prepend=False, append=False)
    ordered: list[int] = order.tolist()
    edges = np.flatnonzero(ties).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        ordered[first : last + 1] = sorted(ordered[first : last + 1], key=ad_ids.__getitem__)
    return ordered


def _shortest(scores: Numbers) -> Any:
    """The shortest decimals that are these float32, as float64: no digit that the model did not mean, none lost."""
    return np.array([float(str(score)) for score in scores])


def _duplicates(job: Job) -> Iterable[str]:
    ranked = set(job.positions) if len(job.positions) < len(job.query.ad_ids) else None
    return [ad_id for i, ad_id in enumerate(job.query.ad_ids) if i not in ranked] if ranked else []


def _reasons(ad_ids: Iterable[str], reason: str) -> list[tuple[str, str]]:
    return [(ad_id, reason) for ad_id in ad_ids]


def _mistake(error: FieldError, positions: Sequence[int]) -> Mistake:
    """Where in the caller's document the field is."""
    if error.side == "ad" and error.row is not None:
        return Mistake(("candidates", positions[error.row], "features", error.name), error.detail)
    return Mistake((error.side, error.name) if error.side == "context" else (error.side, "features", error.name), error.detail)
