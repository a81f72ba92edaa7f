"""Rankings, checked against the model worked out by hand, and the laws that hold for every one of them."""

import asyncio
import contextlib
import threading
import time
from typing import NamedTuple

import bundles
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.encode import AdTable, Request, encode_request
from features.policy import EpsilonGreedy
from features.state import Ad, MemoryStore, StoreError, UserState
from service.catalogue.catalogue import Catalogue, put_ads
from service.errors import DeadlineError, InvalidError, NotReadyError, UnknownModelError
from service.models.loaded import Models
from service.ranking.bids import CPC, Bids, to_micros
from service.ranking.executor import Inline, Pool
from service.ranking.ordering import best_first
from service.ranking.query import Degraded, Query
from service.ranking.ranker import Ranker
from service.settings import Settings
from service.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio
AD_IDS = st.sampled_from([*bundles.ADS, "new", "ünknown", "é\u0000"])
BIDS = st.none() | st.integers(0, 10**12).map(lambda micros: micros / 1e6)
USER_FEATURES = st.fixed_dictionaries({}, optional={"age": st.sampled_from(["25", "99"]), "income": st.floats(0, 1e6)})


@pytest.fixture(scope="session")
def models(repository):
    return bundles.loaded(Settings(models=repository))


class Stored(MemoryStore):
    """A store in memory that can be told to fail, or to take its time."""

    def __init__(self):
        super().__init__()
        self.failure, self.seconds = None, 0

    async def get_user(self, user_id):
        await asyncio.sleep(self.seconds)
        if self.failure:
            raise StoreError(self.failure, "as told")
        return await super().get_user(user_id)


class RankedAd(NamedTuple):
    ad_id: str
    p_click: float
    ecpm: float | None
    known: bool
    seen: object


class Rows:
    """A ranking by rows, as a caller reads it."""

    def __init__(self, ranking):
        self.omitted, self.degraded, self.model, self.seen = ranking.omitted, ranking.degraded, ranking.model.facts(), ranking.seen
        count = len(ranking.ad_ids)
        columns = (column or [absent] * count for column, absent in ((ranking.ecpm, None), (ranking.known, True), (ranking.ads_seen, None)))
        self.ads = [RankedAd(*row) for row in zip(ranking.ad_ids, ranking.p_click, *columns, strict=True)]


class Ranked:
    """A ranker with the test ads, and what it ranked with."""

    def __init__(self, models, scoring, ads=bundles.ADS):
        self.metrics, self.store, self.scoring = Metrics(), Stored(), scoring
        self.ranker = Ranker(self.store, self.metrics, scoring)
        fingerprint, encoder = next((m.bundle.fingerprint, m.bundle.encoder) for m in models.loaded.values())
        self.catalogue = Catalogue(self.store, {fingerprint: encoder}, self.metrics)
        self.catalogue.loaded = True
        put_ads(self.catalogue.table(fingerprint), [Ad(ad_id, features) for ad_id, features in ads.items()])
        self.ranker.use(models, self.catalogue)

    def retire(self, *ad_ids):
        """Ads that were there have left."""
        (fingerprint,) = {m.bundle.fingerprint for m in self.ranker.models.loaded.values()}
        self.catalogue.table(fingerprint).remove(ad_ids)

    async def rank(self, ad_ids, user_id="u1", **more):
        bids = more.pop("bids", None)
        if bids is not None:
            bids = Bids(to_micros(bids)[0], np.full(len(bids), CPC), np.full(len(bids), -1))
        query, stages = Query(user_id=user_id, ad_ids=ad_ids, bids=bids, **more), self.metrics.begin("/rank")
        stages.model = self.ranker.models.label(query.model)
        try:
            return Rows(await self.ranker.rank(query, stages))
        finally:
            self.metrics.end(stages)

    def line(self, text):
        self.metrics.flush()
        rows = [row for row in self.metrics.exposition().decode().splitlines() if row.startswith(text)]
        return float(rows[0].rpartition(" ")[2]) if rows else 0.0


@pytest.fixture(params=["inline", "pool"])
def ranked(request, models):
    made = Ranked(models, Inline() if request.param == "inline" else Pool(2))
    yield made
    made.ranker.close()


def by_hand(request):
    table = AdTable(bundles.encoder())
    put_ads(table, [Ad(ad_id, features) for ad_id, features in bundles.ADS.items()])
    scores = bundles.expected(encode_request(table, request)[0])[0]
    return dict(zip(request.candidates, scores, strict=True))


async def test_scores_are_those_of_the_model_best_first(ranked):
    await ranked.store.put_users([("u1", UserState({"age": "25", "income": 9.0}, ["a4", "a5"], [1, 2]))])
    ranking = await ranked.rank(["a1", "a2", "new"], context={"slot": "feed"})
    hand = by_hand(Request("u1", {"age": "25", "income": 9.0}, {"slot": "feed"}, ["a4", "a5"], ["a1", "a2", "new"]))
    assert {ad.ad_id: ad.p_click for ad in ranking.ads} == pytest.approx(hand, abs=1e-6)
    assert [ad.ad_id for ad in ranking.ads] == sorted(hand, key=lambda ad_id: -hand[ad_id])
    assert {ad.ad_id: ad.known for ad in ranking.ads} == {"a1": True, "a2": True, "new": False}
    assert (ranking.omitted, ranking.degraded, ranking.model["name"]) == ([], [], "din")


async def test_what_is_sent_overrides_what_is_stored(ranked):
    await ranked.store.put_users([("u1", UserState({"age": "25", "income": 9.0}, ["a4"], [1]))])
    ranking = await ranked.rank(["a1"], user={"age": "35"}, history=["a6", "a7"], sent={0: {"price": 3.0}})
    request = Request("u1", {"age": "35", "income": 9.0}, {}, ["a6", "a7"], ["a1"], {0: {"price": 3.0}})
    assert ranking.ads[0].p_click == pytest.approx(by_hand(request)["a1"], abs=1e-6)
    emptied = await ranked.rank(["a1"], history=[], user={"age": None})
    assert emptied.ads[0].p_click == pytest.approx(by_hand(Request("u1", {"income": 9.0}, {}, [], ["a1"]))["a1"], abs=1e-6)


async def test_duplicates_are_ranked_once_and_every_candidate_comes_back(ranked):
    ranking = await ranked.rank(["a1", "a2", "a1", "a1"], bids=[2.0, 1.0, 9.0, None], top_k=1, sent={2: {"agee": 1}})
    assert sorted(ranking.omitted) == [("a1", "duplicate"), ("a1", "duplicate"), (ranking.omitted[-1][0], "top_k")]
    everything = (await ranked.rank(["a1", "a2", "a1"], bids=[2.0, 1.0, 9.0])).ads
    assert {ad.ad_id: ad.ecpm for ad in everything} == {
        ad.ad_id: pytest.approx(ad.p_click * {"a1": 2, "a2": 1}[ad.ad_id] * 1000, abs=1e-6) for ad in everything
    }


@pytest.mark.parametrize("policy", [None, EpsilonGreedy(0.5)])
async def test_unknown_ads_are_omitted_where_asked_unless_they_are_described(models, policy):
    ranked = Ranked(models, Inline())
    ad_ids, sent = ["new", "a1", "told", "silent", "a2", "new"], {2: {"genre": "drama"}, 3: {"genre": None}}
    ranked.retire("a2")
    ranking = await ranked.rank(ad_ids, sent=sent, unknown_ads="omit", policy=policy)
    assert sorted((ad.ad_id, ad.known) for ad in ranking.ads) == [("a1", True), ("told", False)]
    gone = [("new", "duplicate"), ("new", "unknown_ad"), ("silent", "unknown_ad"), ("a2", "unknown_ad")]
    assert (ranking.omitted, ranking.degraded) == (gone, [])
    everything = await ranked.rank(ad_ids, sent=sent)
    assert len(everything.ads) == 5
    if policy is None:
        assert ranking.ads == [ad for ad in everything.ads if ad.ad_id in ("a1", "told")]


async def test_all_may_be_unknown_and_omitted(ranked):
    ranking = await ranked.rank(["x", "y"], unknown_ads="omit", top_k=1)
    assert (ranking.ads, ranking.omitted) == ([], [("x", "unknown_ad"), ("y", "unknown_ad")])


async def test_before_the_catalogue_is_read_no_ad_is_omitted_as_unknown(ranked):
    ranked.catalogue.loaded = False
    ranking = await ranked.rank(["a1", "x"], unknown_ads="omit")
    assert (len(ranking.ads), ranking.omitted) == (2, [])
    assert ranking.degraded == [Degraded("catalogue", "not_loaded", "unknown_ads")]


async def test_ecpm_orders_by_money(ranked):
    ranking = await ranked.rank(["a1", "a2", "a3"], bids=[0.0, 100.0, 1.0], objective="ecpm")
    assert [ad.ecpm for ad in ranking.ads] == sorted((ad.ecpm for ad in ranking.ads), reverse=True)
    assert ranking.ads[0].ad_id == "a2"
    with pytest.raises(InvalidError) as caught:
        await ranked.rank(["a1", "a2"], bids=[1.0, None], objective="ecpm")
    assert [mistake.pointer for mistake in caught.value.mistakes] == ["/candidates/1/bid"]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=12), st.randoms())
def test_best_first_is_the_plain_sort(scores, chance):
    by = np.array(scores, np.float32)
    ad_ids = [f"a{i}" for i in chance.sample(range(len(scores)), len(scores))]
    rows = np.array(sorted(chance.sample(range(len(scores)), chance.randint(0, len(scores)))), np.int64)
    assert best_first(rows, by, ad_ids).tolist() == sorted(rows.tolist(), key=lambda row: (-by[row], ad_ids[row]))


async def test_a_score_that_is_no_number_never_reaches_the_sort(ranked):
    sent = {1: {"price": bundles.TOO_DEAR}, 3: {"price": bundles.TOO_DEAR}}
    for objective in ("pctr", "ecpm"):
        ranking = await ranked.rank(["a1", "a2", "a3", "a4", "a5"], bids=[1.0] * 5, sent=sent, objective=objective)
        clean = await ranked.rank(["a1", "a3", "a5"], bids=[1.0] * 3, objective=objective)
        assert ranking.ads == clean.ads
        assert ranking.omitted == [("a2", "not_scored"), ("a4", "not_scored")]
        assert ranking.degraded == [Degraded("inference", "not_finite", "omitted")]
    assert ranked.line('adrank_degraded_total{reason="not_finite",stage="inference"}') == 2
    assert ranked.line('adrank_p_click_count{model="din"}') == 12


async def test_p_click_is_counted_in_its_buckets(ranked):
    scores = [ad.p_click for ad in (await ranked.rank(list(bundles.ADS))).ads]
    for bound in (0.05, 0.3, 0.5, 0.75):
        assert ranked.line(f'adrank_p_click_bucket{{le="{bound}",model="din"}}') == sum(score <= bound for score in scores)
    assert ranked.line('adrank_p_click_sum{model="din"}') == pytest.approx(sum(scores), rel=1e-6)


@pytest.mark.parametrize("reason", ["store_timeout", "store_unreachable", "store_error", "store_corrupt"])
async def test_without_the_store_it_ranks_and_says_so(ranked, reason):
    ranked.store.failure = reason
    ranking = await ranked.rank(["a1", "a2"], user={"age": "25"})
    assert ranking.degraded == [Degraded("history", reason, "empty_history"), Degraded("user", reason, "sent_features")]
    hand = by_hand(Request("u1", {"age": "25"}, {}, [], ["a1", "a2"]))
    assert {ad.ad_id: ad.p_click for ad in ranking.ads} == pytest.approx(hand, abs=1e-6)
    assert [entry.stage for entry in (await ranked.rank(["a1"], history=["a2"])).degraded] == ["user"]
    assert ranked.line(f'adrank_degraded_total{{reason="{reason}",stage="history"}}') == 1
    assert ranked.line('adrank_feature_lookups_total{group="user",result="error"}') == 2


async def test_stored_features_are_not_the_callers_fault(ranked):
    await ranked.store.put_users([("u1", UserState({"unheard_of": 1, "user_id": "u2", "age": ["25"], "income": 9.0}))])
    ranking = await ranked.rank(["a1"])
    assert ranking.degraded == [Degraded("user", "stored_feature_mistyped", "missing_feature")]
    assert ranking.ads[0].p_click == pytest.approx(by_hand(Request("u1", {"income": 9.0}, {}, [], ["a1"]))["a1"], abs=1e-6)


async def test_models_are_asked_for_by_name(ranked):
    assert (await ranked.rank(["a1"], model="other")).model["name"] == "other"
    with pytest.raises(UnknownModelError, match="din, other"):
        await ranked.rank(["a1"], model="nope")
    ranked.ranker.use(Models({}, {}), ranked.catalogue)
    for name in (None, "din"):
        with pytest.raises(NotReadyError):
            await ranked.rank(["a1"], model=name)


async def test_the_deadline_bounds_the_store(ranked):
    ranked.store.seconds = 5
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        await ranked.rank(["a1"], deadline=0.05)
    assert time.monotonic() - began < 1


async def test_the_deadline_counts_the_queue(models):
    ranked = Ranked(models, Pool(2))
    blocked = [ranked.scoring._threads.submit(time.sleep, 0.2) for _ in range(2)]
    with pytest.raises(DeadlineError):
        await ranked.rank(["a1"], deadline=0.1)
    assert all(each.result() is None for each in blocked)
    assert (await ranked.rank(["a1"], deadline=5.0)).ads
    assert ranked.line('adrank_stage_duration_seconds_bucket{le="0.05",stage="queue"}') == 1
    assert ranked.line('adrank_stage_duration_seconds_count{stage="queue"}') == 2
    ranked.ranker.close()


async def test_the_event_loop_runs_while_a_pool_runs_the_model(models, monkeypatch):
    ranked, ticked, seen = Ranked(models, Pool(1)), threading.Event(), []
    score = lambda _self, feeds: seen.append(ticked.wait(20)) or np.zeros((1, 1), np.float32)  # noqa: E731
    monkeypatch.setattr(type(models.loaded["din"].scorer), "score", score)
    ranking = asyncio.create_task(ranked.rank(["a1"]))
    await asyncio.sleep(0.05)
    assert not ranking.done()
    ticked.set()
    await ranking
    assert seen == [True]
    ranked.ranker.close()


async def test_explain_shows_what_the_model_saw(ranked):
    ranking = await ranked.rank(
        ["a1", "new"], user={"age": "25", "interests": ["news", "?"]}, history=["a2", "zz"], context={"slot": "side"}, explain=True
    )
    encoder = bundles.encoder()
    ids = {name: v.encode for name, v in encoder.vocabularies.categories.items()}
    assert ranking.seen["user"]["age"] == ids["age"](["25"])[0]
    assert ranking.seen["user"]["interests"] == [*ids["genre"](["news"]), 1, 0]
    assert ranking.seen["context"] == {"slot": ids["slot"](["side"])[0]}
    assert ranking.seen["history"] == {"ad_id": ids["ad_id"](["a2", "zz"]).tolist(), "genre": [*ids["genre"](["news"]), 1]}
    seen = {ad.ad_id: ad.seen for ad in ranking.ads}
    assert seen["a1"] == {"ad_id": ids["ad_id"](["a1"])[0], "genre": 3, "tags": [2, 0], "price": pytest.approx(np.log(2))}
    assert seen["new"]["genre"] == 1


@pytest.fixture(scope="session")
def kept(models):
    made = Ranked(models, Inline())
    yield made
    made.ranker.close()


LAW = settings(max_examples=40, suppress_health_check=list(HealthCheck))


class TestLaws:
    """For any candidates, in any order, with anything sent."""

    def ranking(self, kept, ad_ids, **more):
        return asyncio.run(kept.rank(ad_ids, **more))

    @LAW
    @given(
        st.lists(st.tuples(AD_IDS, BIDS.filter(lambda bid: bid is not None)), min_size=1, max_size=20, unique_by=lambda c: c[0]),
        USER_FEATURES,
        st.randoms(),
    )
    def test_the_order_of_candidates_does_not_matter(self, kept, candidates, user, chance):
        shuffled = chance.sample(candidates, len(candidates))
        for objective in ("pctr", "ecpm"):
            one, two = (
                self.ranking(kept, [c[0] for c in each], bids=[c[1] for c in each], user=user, objective=objective)
                for each in (candidates, shuffled)
            )
            assert one.ads == two.ads

    @LAW
    @given(st.lists(AD_IDS, min_size=1, max_size=30), st.integers(1, 30), st.lists(BIDS, min_size=30, max_size=30))
    def test_every_candidate_comes_back_exactly_once_in_a_total_order(self, kept, ad_ids, top_k, bids):
        ranking = self.ranking(kept, ad_ids, bids=bids[: len(ad_ids)], top_k=top_k)
        assert sorted([ad.ad_id for ad in ranking.ads] + [ad_id for ad_id, _ in ranking.omitted]) == sorted(ad_ids)
        assert len(ranking.ads) == min(top_k, len(set(ad_ids)))
        keys = [(-ad.p_click, ad.ad_id) for ad in ranking.ads]
        assert keys == sorted(keys)

    @LAW
    @given(st.lists(AD_IDS, max_size=12), st.lists(AD_IDS, min_size=1, max_size=3, unique=True))
    def test_only_the_newest_behaviours_count(self, kept, history, ad_ids):
        length = kept.ranker.models.loaded["din"].bundle.schema.history_length
        assert (
            self.ranking(kept, ad_ids, history=history).ads == self.ranking(kept, ad_ids, history=history[-length:] if history else []).ads
        )

    @LAW
    @given(st.lists(AD_IDS, min_size=2, max_size=10, unique=True))
    def test_a_candidate_scores_the_same_alone(self, kept, ad_ids):
        together = {ad.ad_id: ad.p_click for ad in self.ranking(kept, ad_ids).ads}
        alone = {ad_id: self.ranking(kept, [ad_id]).ads[0].p_click for ad_id in ad_ids}
        # ONNX Runtime may vectorise rows of other lengths in another order of float32 sums
        assert together == pytest.approx(alone, abs=1e-6)


async def test_a_caller_who_leaves_while_the_model_runs_breaks_nothing(ranked):
    for delay in np.linspace(0, 0.004, 40):
        asking = asyncio.create_task(ranked.rank(list(bundles.ADS)))
        await asyncio.sleep(delay)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    assert len((await ranked.rank(["a1", "a2"])).ads) == 2
