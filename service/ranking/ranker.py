"""From a request to a ranking: fetch the user, encode, score, sort. Knows nothing about HTTP, Redis or ONNX Runtime.

Candidates are columns from the request to the answer: nothing here makes an object for each.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from features.counting import numbers_of
from features.encode import AdTable, Feeds, FieldError, Request, encode_rows
from features.schema import IDENTITY
from features.state import Store, StoreError, UserState
from features.vocabulary import Numbers

from ..catalogue.ads import View
from ..catalogue.catalogue import Catalogue
from ..errors import DeadlineError, FieldProblem, InvalidError, NotReadyError, ScoringError, ServiceError, UnknownModelError
from ..models.canary import Challenge, LateError
from ..models.loaded import Model, Models
from ..telemetry.metrics import Metrics, RequestTimings
from .executor import Scoring
from .placing import ranked
from .query import Degraded, Encoded, Query, Ranking, Selection, check_candidates, check_query
from .selection import searcher, select


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
        model = self.models.get(query.model)
        challenge = self.challenges.get(model.name)
        if query.version is not None:
            model, challenge = of_version(query, model, challenge)
        check_query(query, model)
        by_share = challenge if query.version is None and not query.heads else None  # a canary gives the click alone
        canary = by_share.canary(query.user_id) if by_share else None
        # The catalogue may let go of them while the store is asked.
        views = {each: self.catalogue.view(each.bundle.fingerprint) for each in (model, canary) if each is not None}
        stages.enter("features")
        query.stored, query.ts = await self._user(query, stages), self._clock()
        if query.selection is not None:
            self._select(query, query.selection, model, views[model])
            challenge = challenge if query.ad_ids else None
        if challenge is None:
            return await self._by_live(query, stages, model, views[model], None)
        if query.version is not None:
            if challenge.model is not model:
                raise UnknownModelError("the challenger was stopped while the store was asked for the user")
            try:
                return await self._by_canary(query, stages, model, views[model], challenge)
            except LateError as error:
                raise DeadlineError(str(error)) from None
        failure: ServiceError | None = None
        if canary is not None and challenge.model is canary:  # it may have been stopped meanwhile
            try:
                return await self._by_canary(query, stages, canary, views[canary], challenge)
            except (ScoringError, InvalidError) as error:
                failure = error
        ranking = await self._by_live(query, stages, model, views[model], challenge if canary is None else None)
        if failure is not None:
            challenge.failed(failure)
        return ranking

    def _select(self, query: Query, selection: Selection, model: Model, view: View) -> None:
        """Make the ads of the catalogue that the request is for its candidates."""
        by = searcher(self.models.loaded, model) if selection.retrieve else model
        if not self.catalogue.loaded:
            raise NotReadyError("the catalogue has not been loaded yet; /readyz says why")
        view = view if by is model else self.catalogue.view(by.bundle.fingerprint)

        def vector() -> Numbers:
            assert by.towers is not None  # noqa: S101  # as `searcher` has it
            return by.towers.request(self._encoded(query, by, view).feeds)

        pinned = [] if query.rules is None else list(query.rules.pinned.values())
        query.ad_ids, query.passed_over = select(selection, by, view, vector, pinned)
        check_candidates(query)

    async def _by_live(self, query: Query, stages: RequestTimings, model: Model, view: View, challenge: Challenge | None) -> Ranking:
        stages.enter("features")
        encoded = self._encoded(query, model, view)
        _note(stages, encoded)
        scorer = model.scorer.whole if query.heads else model.scorer
        if encoded.request.candidates:
            scores = await self._scoring.score(scorer, encoded.scored, stages, query.deadline)
        else:  # no ad of the catalogue passes the filters
            scores = scorer.none
        stages.enter("post")
        if challenge is not None:

            def encode(other: Model) -> Feeds:
                if other.bundle.fingerprint == model.bundle.fingerprint:
                    return encoded.feeds
                return self._encoded(query, other, self.catalogue.view(other.bundle.fingerprint)).feeds

            challenge.beside(query.user_id, stages.seconds["inference"], scores if scores.ndim == 1 else scores[:, 0], encode)
        return self._ranking(stages, encoded, scores)

    async def _by_canary(self, query: Query, stages: RequestTimings, canary: Model, view: View, challenge: Challenge) -> Ranking:
        """By the challenger; what is waited for it in vain counts as waiting, so that the stages are those of the version that ranks."""
        encoded = self._encoded(query, canary, view)
        _note(stages, encoded)
        patience = None if query.deadline is None else (query.deadline - stages.total) / 2
        stages.enter(None)
        began, stage = time.perf_counter(), "queue"
        try:
            scores = await challenge.score(canary, encoded.scored, patience, query.version is None)
            stage = "inference"
        finally:
            stages.add(stage, began, time.perf_counter())
        stages.enter("post")
        return self._ranking(stages, encoded, scores)

    def _ranking(self, stages: RequestTimings, encoded: Encoded, scores: Numbers) -> Ranking:
        stages.scores = scores if scores.ndim == 1 else scores[:, 0]
        ranking = ranked(encoded, scores, self._random)
        stages.degraded = [(entry.stage, entry.reason) for entry in ranking.degraded]
        return ranking

    def _encoded(self, query: Query, model: Model, view: View) -> Encoded:
        """The request as a model takes it, with what the store gave for its user.

        Raises:
            InvalidError: a feature does not fit the model's schema.
        """
        degraded = [] if self.catalogue.loaded else [Degraded("catalogue", "not_loaded", "unknown_ads")]
        stored = query.stored
        if isinstance(stored, StoreError):
            degraded += _without_user(query, model, stored.reason)
            stored = UserState()
        usable = _usable(model, query, stored, degraded)
        repeated = _first_of_each(query)
        request = _request(query, usable, repeated, view.table)
        try:
            feeds, known, rows = encode_rows(view.table, request)
        except FieldError as error:
            raise InvalidError("a feature does not fit the model's schema", [_mistake(error, repeated)]) from None
        view.renew()
        behaviours = min(len(request.history), model.bundle.schema.history_length)
        return Encoded(query, model, request, feeds, known, view, repeated, behaviours, degraded, rows)

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


def _note(stages: RequestTimings, encoded: Encoded) -> None:
    """Tell the metrics what is about to be scored, and by which version."""
    stages.version = encoded.model.bundle.version
    stages.ranked_with(encoded.behaviours, int(np.count_nonzero(encoded.known)), len(encoded.known))


def of_version(query: Query, live: Model, challenge: Challenge | None) -> tuple[Model, Challenge | None]:
    """The version that a request names, and its challenge where it is no live one.

    Raises:
        UnknownModelError: it is not loaded.
        InvalidError: it is a challenger, and more than p(click) is needed.
    """
    challenger = challenge.model if challenge else None
    loaded = {str(each.bundle.version): each for each in (live, challenger) if each is not None}
    model = loaded.get(query.version or "")
    if model is None:
        raise UnknownModelError(f"no such version of {live.name} is loaded; there are: {', '.join(loaded)}")
    if model is live:
        return live, None
    if query.heads:
        raise InvalidError.at(("options", "version"), f"a challenger gives p(click) alone, and the request needs {sorted(query.heads)[0]}")
    return model, challenge


def _without_user(query: Query, model: Model, reason: str) -> list[Degraded]:
    """What a model does without where the store does not give the user, and why."""
    schema, without = model.bundle.schema, []
    if query.history is None and schema.history_fields:
        without.append(Degraded("history", reason, "empty_history"))
    counted = any(tally.by == "user" for tally in model.bundle.encoder.tallies)
    if counted or any(known.name not in IDENTITY.values() for known in schema.side("user")):
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
    return UserState(features, stored.ad_ids, times, counts=stored.counts)


def _first_of_each(query: Query) -> list[int] | None:
    """Positions of the candidates to rank where some are named twice, None where all are."""
    if len(set(query.ad_ids)) == len(query.ad_ids):
        return None
    first: dict[str, int] = {}
    for i, ad_id in enumerate(query.ad_ids):
        first.setdefault(ad_id, i)
    return list(first.values())


def _request(query: Query, state: UserState, repeated: Sequence[int] | None, table: AdTable) -> Request:
    ad_ids, sent = query.ad_ids, query.sent
    if repeated is not None:
        ad_ids = [ad_ids[i] for i in repeated]
        sent = {row: sent[i] for row, i in enumerate(repeated) if i in sent}
    history, times = (state.ad_ids, state.ts) if query.history is None else (query.history, query.history_ts)
    stored, rows, counted = state.features, None, None
    if table.encoder.tallies:
        rows = table.rows(ad_ids)
        of_user, counted = numbers_of(table, ad_ids, rows, state.counts, query.ts)
        stored = {**stored, **of_user}
    return Request(query.user_id, query.user, query.context, history, ad_ids, sent, stored, times, query.ts, rows, counted)


def _mistake(error: FieldError, positions: Sequence[int] | None) -> FieldProblem:
    """Where in the caller's document the field is."""
    if error.side == "ad" and error.row is not None:
        position = error.row if positions is None else positions[error.row]
        return FieldProblem(("candidates", position, "features", error.name), error.detail)
    return FieldProblem((error.side, error.name) if error.side == "context" else (error.side, "features", error.name), error.detail)
