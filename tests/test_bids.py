"""Ranking by value: order, eCPM and prices held to the definitions, worked out in fractions for each request."""

import asyncio
import json
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor

import bundles
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ranker import Ranked

from features import bundle
from features.encode import AdTable, Request, encode_request
from features.served import pack_served, unpack_served
from features.state import Ad
from service.api.requests import parse_request, to_query
from service.api.wire import RankAnswer, answer
from service.catalogue.catalogue import put_ads
from service.errors import InvalidError
from service.feedback.impression_log import served
from service.ranking.bids import HIGHEST, NANO, times
from service.ranking.executor import Inline
from service.ranking.scorer import TiledScorer
from service.settings import Settings, SettingsError, load_settings

WEIGHTS = {"click": 1.0, "conversion": 20.0}
MONEY = st.integers(0, 10**8) | st.integers(0, 10**15) | st.just(0) | st.just(10**15)
CANDIDATE = st.fixed_dictionaries(
    {"ad_id": st.sampled_from([f"a{i}" for i in range(12)]), "bid": MONEY, "value": MONEY},
    optional={"bid_type": st.sampled_from(["cpm", "cpc", "cpa"]), "multiplier": st.integers(0, 10**6)},
)
OPTIONS = st.fixed_dictionaries(
    {"objective": st.sampled_from(["pctr", "ecpm", "value", "weighted"])},
    optional={"top_k": st.integers(1, 6), "min_score": st.sampled_from([0.0, 0.2, 0.5]), "reserve": st.integers(0, 10**9)},
)
MONEYS = ("bid", "value", "multiplier", "reserve")


@pytest.fixture(scope="module")
def converting(tmp_path_factory):
    """A ranker whose model predicts conversions too."""
    models = tmp_path_factory.mktemp("models")
    bundles.publish(models, "din", files={bundle.MODEL: bundles.model(conversion=True)})
    made = Ranked(bundles.loaded(Settings(models=models)), Inline())
    yield made
    made.ranker.close()


@pytest.fixture(scope="module")
def plain(repository):
    """One whose models do not."""
    made = Ranked(bundles.loaded(Settings(models=repository, model="din")), Inline())
    yield made
    made.ranker.close()


def decimals(document):
    """The document with its amounts, here in millionths, as JSON numbers of 6 decimals."""
    text = {name: f"{value // 10**6}.{value % 10**6:06}" if name in MONEYS else json.dumps(value) for name, value in document.items()}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in text.items()) + "}"


def rank(ranked, candidates, options):
    candidates = ", ".join(map(decimals, candidates))
    body = f'{{"user": {{"id": "u1"}}, "candidates": [{candidates}], "options": {decimals(options)}}}'
    query, stages = to_query(parse_request(body.encode()), 100, weights=WEIGHTS), ranked.metrics.begin("/rank")
    return asyncio.run(ranked.ranker.rank(query, stages)), stages


def ask(ranked, candidates, options):
    ranking, stages = rank(ranked, candidates, options)
    document = answer("r", ranking, stages)
    RankAnswer.model_validate_json(document)
    return json.loads(document, parse_float=Decimal, parse_int=Decimal)


def by_hand(ad_ids):
    """p(click) by the model's definition."""
    table = AdTable(bundles.encoder())
    put_ads(table, [Ad(ad_id, features) for ad_id, features in bundles.ADS.items()])
    return bundles.expected(encode_request(table, Request("u1", {}, {}, [], ad_ids))[0])[0]


class Reference:
    """A request by the definitions."""

    def __init__(self, candidates, options, clicks):
        self.options = options
        self.first = {}
        for candidate in candidates:
            self.first.setdefault(candidate["ad_id"], candidate)
        self.p = {ad_id: {"click": Fraction(str(p)), "conversion": Fraction(str(p * p))} for ad_id, p in clicks.items()}
        fit = [ad_id for ad_id in self.first if self.p[ad_id]["click"] >= Fraction(str(options.get("min_score", 0)))]
        self.fit = [ad_id for ad_id in fit if self.ecpm(ad_id) >= options.get("reserve", 0)]
        self.order = sorted(self.fit, key=lambda ad_id: (-self.score(ad_id), ad_id))

    def chance(self, ad_id, head):
        return Fraction(round(self.p[ad_id][head] * 10**12), 10**12)

    def per_unit(self, ad_id):
        kind = self.first[ad_id].get("bid_type", "cpc")
        return Fraction(1) if kind == "cpm" else 1000 * self.chance(ad_id, "conversion" if kind == "cpa" else "click")

    def ecpm(self, ad_id):
        said = self.first[ad_id]
        return floor(floor(said["bid"] * Fraction(said.get("multiplier", 10**6), 10**6)) * self.per_unit(ad_id))

    def score(self, ad_id):
        said, kind = self.first[ad_id], self.options["objective"]
        if kind == "value":
            return floor(said["value"] * 1000 * self.chance(ad_id, "conversion" if said.get("bid_type") == "cpa" else "click"))
        return {"pctr": self.p[ad_id]["click"], "ecpm": self.ecpm(ad_id)}.get(kind, self.weighted(ad_id))

    def weighted(self, ad_id):
        return sum(Fraction(weight) * self.p[ad_id][head] for head, weight in WEIGHTS.items())

    def price(self, place):
        """The least price whose eCPM reaches the next one's, or the reserve."""
        below = self.ecpm(self.order[place + 1]) if place + 1 < len(self.order) else 0
        reached = max(below, self.options.get("reserve", 0))
        return ceil(reached / self.per_unit(self.order[place])) if reached else 0


@pytest.fixture(scope="module")
def clicks(converting):
    ad_ids = [f"a{i}" for i in range(12)]
    ads = ask(converting, [{"ad_id": ad_id} for ad_id in ad_ids], {"objective": "pctr"})["ads"]
    found = {ad["ad_id"]: np.float32(ad["p_click"]) for ad in ads}
    assert [found[ad_id] for ad_id in ad_ids] == pytest.approx(by_hand(ad_ids), abs=1e-6)
    return found


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(CANDIDATE, min_size=1, max_size=9), OPTIONS)
def test_order_and_prices_are_those_of_the_definitions(converting, clicks, candidates, options):
    priced = {"prices": True} if options["objective"] == "ecpm" else {}
    found, wanted = ask(converting, candidates, {**options, **priced}), Reference(candidates, options, clicks)
    ads, top_k = found["ads"], options.get("top_k", len(candidates))
    assert [ad["ad_id"] for ad in ads] == wanted.order[:top_k]
    assert [ad["ecpm"] * 10**6 for ad in ads] == [pytest.approx(wanted.ecpm(ad["ad_id"]), rel=1e-15, abs=0) for ad in ads]
    if priced:
        assert [ad["price"] * 10**6 for ad in ads] == [pytest.approx(wanted.price(place), rel=1e-15, abs=0) for place in range(len(ads))]
        assert all(ad["price"] <= Fraction(wanted.first[ad["ad_id"]]["bid"], 10**6) for ad in ads)
    if options["objective"] == "weighted":
        assert [ad["score"] for ad in ads] == [
            pytest.approx(Decimal(float(wanted.weighted(ad["ad_id"]))), abs=Decimal("1e-11")) for ad in ads
        ]
    assert all(
        -each.as_tuple().exponent <= 6 for ad in ads for name in ("ecpm", "price") for each in [ad.get(name, Decimal(0)).normalize()]
    )
    reasons = [each["reason"] for each in found["omitted"]]
    floor_reasons = reasons.count("below_floor") + reasons.count("below_reserve")
    assert (floor_reasons, reasons.count("top_k")) == (len(wanted.first) - len(wanted.fit), max(0, len(wanted.fit) - top_k))


def test_an_auction_worked_out_by_hand(converting, clicks):
    """Of a3 with p 1, a1 and a2 as they are: what a2 must bid is what a1's eCPM comes to, over a2's p(click)."""
    candidates = [
        {"ad_id": "a1", "bid": 250_000, "multiplier": 2_000_000},
        {"ad_id": "a2", "bid": 9_000_000},
        {"ad_id": "a3", "bid": 30_000_000, "bid_type": "cpm"},
    ]
    ads = {ad["ad_id"]: ad for ad in ask(converting, candidates, {"objective": "ecpm", "prices": True, "reserve": 10_000_000})["ads"]}
    p1, p2 = (float(str(clicks[ad_id])) for ad_id in ("a1", "a2"))
    assert float(ads["a1"]["ecpm"]) == pytest.approx(1000 * p1 * 0.5, abs=2e-6)
    assert float(ads["a2"]["ecpm"]) == pytest.approx(1000 * p2 * 9, abs=2e-6)
    assert ads["a3"]["ecpm"] == 30
    order = sorted(ads, key=lambda ad_id: -ads[ad_id]["ecpm"])
    units = {"a1": 1000 * p1, "a2": 1000 * p2, "a3": 1}
    for above, below in zip(order, [*order[1:], None], strict=True):
        assert float(ads[above]["price"]) == pytest.approx(float(ads[below]["ecpm"] if below else 10) / units[above], abs=2e-6)


@settings(max_examples=100)
@given(st.integers(-1, HIGHEST), st.integers(0, 1000 * NANO))
def test_products_of_money_are_exact(micros, nano):
    assert times(np.array([micros]), np.array([nano])).tolist() == [-1 if micros < 0 else micros * nano // NANO]


@pytest.mark.parametrize("explore", [{}, {"explore": {"policy": "plackett_luce", "temperature": 1.0}}])
def test_the_log_says_what_was_bid_and_would_have_been_paid(converting, explore):
    candidates = [
        {"ad_id": "a1", "bid": 8_000_000, "multiplier": 500_000},
        {"ad_id": "a2", "bid": 10**9, "bid_type": "cpm"},
        {"ad_id": "a3", "bid": 0},
        {"ad_id": "a4", "bid": 9_000_000, "bid_type": "cpa"},
    ]
    ranking, _ = rank(converting, candidates, {"objective": "ecpm", "prices": True, "reserve": 1, "top_k": 2, **explore})
    record = served(ranking, 1.0, 100, False)
    offered = {"a1": (4_000_000, "cpc"), "a2": (10**9, "cpm"), "a4": (9_000_000, "cpa")}  # a3 is below the reserve
    assert record.candidates == (list(offered) if explore else [])
    assert list(zip(record.bids, record.bid_types, strict=True)) == [offered[ad_id] for ad_id in record.candidates or record.ad_ids]
    assert (record.objective, [price / 10**6 for price in record.prices]) == ("ecpm", list(ranking.price))
    again = unpack_served(pack_served(record))
    assert (again.prices, again.p_conversion) == (record.prices, record.p_conversion)
    assert record.p_conversion == pytest.approx([p**2 for p in record.p_click], abs=1e-6)


def test_all_heads_come_in_slices_and_in_tiles_as_at_once(converting):
    scorer = converting.ranker.models.loaded["din"].scorer
    table = AdTable(bundles.encoder())
    feeds = encode_request(table, Request("u1", {}, {}, ["a2"], [f"x{i}" for i in range(600)]))[0]
    tiled = TiledScorer(converting.ranker.models.loaded["din"].bundle.path / bundle.MODEL, "cpu", 5)
    for each in (scorer, tiled):
        clicks, heads = each.score(feeds), each.whole.score(feeds)
        assert (clicks.shape, heads.shape, each.heads) == ((1, 600), (1, 600, 2), ("click", "conversion"))
        np.testing.assert_allclose(heads, np.stack([clicks, clicks**2], -1), atol=1e-6)


@pytest.mark.parametrize(
    ("candidates", "options", "pointer"),
    [
        ([{"ad_id": "a1", "bid": 1, "bid_type": "cpa"}], {}, "/candidates/0/bid_type"),
        ({"ad_id": ["a0", "a1"], "bid": [1, 1], "bid_type": [None, "cpa"]}, {}, "/candidates/1/bid_type"),
        ([{"ad_id": "a1", "bid": 1e-7}], {}, "/candidates/0/bid"),
        ({"ad_id": ["a1", "a2"], "bid": [0.1, 0.30000000000000004]}, {}, "/candidates/bid/1"),
        ([{"ad_id": "a1", "bid": 1e9, "multiplier": 1.000001}], {}, "/candidates/0/multiplier"),
        ([{"ad_id": "a1", "bid": 1, "multiplier": -1}], {}, "/candidates/0/multiplier"),
        ([{"ad_id": "a1", "bid": 1, "bid_type": "cpx"}], {}, "/candidates/0/bid_type"),
        ([{"ad_id": "a1", "bid": 1e10}], {}, "/candidates/0/bid"),
        ([{"ad_id": "a1", "bid": 1}, {"ad_id": "a2"}], {"reserve": 1}, "/candidates/1/bid"),
        ([{"ad_id": "a1", "bid": 1}], {"objective": "value"}, "/candidates/0/value"),
        ([{"ad_id": "a1", "bid": 1}], {"prices": True}, "/options/prices"),
        ([{"ad_id": "a1", "bid": 1}], {"objective": "weighted"}, "/options/objective"),
        (["a1"], {"objective": "weighted"}, "/options/objective"),
        (["a1"], {"reserve": 0.1234567}, "/options/reserve"),
    ],
)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_what_cannot_be_ranked_so_is_pointed_at(plain, candidates, options, pointer, weights):
    body = json.dumps({"user": {"id": "u1"}, "candidates": candidates, "options": options}).encode()
    with pytest.raises(InvalidError) as caught:
        asyncio.run(plain.ranker.rank(to_query(parse_request(body), 100, weights=weights), plain.metrics.begin("/rank")))
    assert [mistake.pointer for mistake in caught.value.mistakes] == [pointer]


def test_the_setting_of_weights():
    assert Settings(weights="click=1,conversion=20.5").head_weights == {"click": 1.0, "conversion": 20.5}
    assert Settings().head_weights == {}
    with pytest.raises(SettingsError, match="ADRANK_WEIGHTS: expected a value such as click=1,conversion=20"):
        load_settings({"weights": "click:1"})
    with pytest.raises(SettingsError, match="ADRANK_WEIGHTS: click is there twice; name each once"):
        load_settings({"weights": "click=1,conversion=20,click=2"})
