"""Rules after ranking: orders, reasons and propensities held to their definitions, place by place."""

import asyncio
import contextlib
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_bids import ask, clicks, converting, plain, rank  # noqa: F401  # fixtures

from features.policy import PLACES, EpsilonGreedy, PlackettLuce, Thompson
from service.api.requests import parse_request, to_query
from service.errors import InvalidError
from service.feedback.impression_log import served
from service.ranking.query import DRAWN_FROM, LOOKED_AT, check_candidates
from service.ranking.rules import Filling, Rules

DRAWS = 1_500
ADS = st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 1), st.integers(0, 9)), min_size=1, max_size=8)


def filled(rules, ads, places, policy=None, pins=(), seed=0):
    """Of ads (genre, brand, eCPM), in the order of which they are worth."""
    ads = sorted(ads, key=lambda ad: -ad[2])
    genre, brand, ecpm = (np.array(column) for column in zip(*ads, strict=True))
    filling = Filling(rules, ecpm.astype(float), ecpm, {"genre": genre, "brand": brand}, dict(pins))
    return ads, filling.fill(min(places, len(ads)), policy, np.random.default_rng(seed))


def keeps(rules, ads, order, ad):
    """Which rules keep an ad from the next place."""
    found, above = [], [ads[i] for i in order]
    columns = {"genre": 0, "brand": 1}
    for name, most in rules.max_per.items():
        if (value := ads[ad][columns[name]]) >= 0 and sum(each[columns[name]] == value for each in above) >= most:
            found.append(f"max_per_{name}")
    for name, distance in rules.distance.items():
        if (value := ads[ad][columns[name]]) >= 0 and any(each[columns[name]] == value for each in above[1 - distance :]):
            found.append(f"distance_{name}")
    if rules.reserves and ads[ad][2] < rules.reserves[min(len(order), len(rules.reserves) - 1)]:
        found.append("below_reserve")
    return found


@settings(max_examples=100)
@given(
    ADS,
    st.builds(
        lambda most, distance, reserves: Rules(max_per=most, distance=distance, reserves=reserves),
        st.dictionaries(st.sampled_from(["genre", "brand"]), st.integers(1, 3)),
        st.dictionaries(st.sampled_from(["genre", "brand"]), st.integers(2, 4)),
        st.lists(st.integers(0, 8), max_size=3),
    ),
    st.integers(1, 9),
    st.dictionaries(st.integers(1, 9), st.integers(0, 7), max_size=2),
)
def test_each_place_gets_the_best_ad_that_may_stand_there(ads, rules, places, pinned):
    pins = {place: ad for place, ad in pinned.items() if ad < len(ads) and list(pinned.values()).count(ad) == 1}
    ads, found = filled(rules, ads, places, pins=pins)
    order, below, waiting = [], [], dict(pins)
    while len(order) < min(places, len(ads)):
        free = [i for i in range(len(ads)) if i not in order and i not in pins.values() and not keeps(rules, ads, order, i)]
        pin = len(order) + 1 if len(order) + 1 in waiting else min(waiting) if waiting and not free else None
        if pin is None and not free:
            break
        chosen = free[0] if pin is None else waiting.pop(pin)
        below.append(max((ads[i][2] for i in free if i != chosen), default=0) if pin is None else -1)
        order.append(chosen)
    assert (found.order.tolist(), found.below) == (order, below)
    reasons = {ad: reason for reason, those in found.fallen.items() for ad in those.tolist()}
    for ad in set(range(len(ads))) - set(order):  # all that have no place
        kept = [] if ad in pins.values() else keeps(rules, ads, order, ad)
        kept = [reason for reason in kept if len(order) < min(places, len(ads)) or reason.startswith("max_per")]
        assert reasons.pop(ad) == [*kept, "top_k"][0]
    assert not reasons


@pytest.mark.parametrize("policy", [EpsilonGreedy(0.4), PlackettLuce(0.7)], ids=str)
@pytest.mark.parametrize(
    ("rules", "pins"),
    [
        (Rules(max_per={"genre": 1}), {}),
        (Rules(distance={"genre": 2}, max_per={"brand": 2}), {}),
        (Rules(max_per={"genre": 2}), {2: 3}),
        (Rules(alike=["genre", "brand"], trade_off=0.4, max_per={"genre": 2}), {}),
    ],
    ids=["most", "distance", "pinned", "diverse"],
)
def test_propensities_are_the_probabilities_given_what_may_stand_there(policy, rules, pins):
    ads = [(0, 0, 9), (0, 1, 7), (1, 0, 4), (1, 1, 3), (2, -1, 2)]

    def orders(order=(), chance=1.0, given=()):
        """All orders of three places, their probabilities, and the propensity of each place."""
        free = [i for i in range(5) if i not in order and i not in pins.values() and not keeps(rules, ads, list(order), i)]
        if len(order) == 3 or not free:
            return {order: (chance, given)}
        if len(order) + 1 in pins:
            return orders((*order, pins[len(order) + 1]), chance, (*given, 1.0))
        worth = {i: float(ads[i][2]) for i in free}
        if rules.alike:
            like = {
                i: max((sum(a == b >= 0 for a, b in zip(ads[i][:2], ads[j][:2], strict=True)) / 2 for j in order), default=0) for i in free
            }
            worth = {i: rules.trade_off * worth[i] / 9 + (1 - rules.trade_off) * (1 - like[i]) for i in free}
        best = max(free, key=lambda i: worth[i])
        total = math.fsum(value ** (1 / 0.7) for value in worth.values())
        found = {}
        for i in free:
            explored = 0.6 * (i == best) + 0.4 / len(free)
            p = explored if isinstance(policy, EpsilonGreedy) else worth[i] ** (1 / 0.7) / total
            found |= orders((*order, i), chance * p, (*given, p))
        return found

    truth = orders()
    assert math.fsum(chance for chance, _ in truth.values()) == pytest.approx(1)
    random, drawn = np.random.default_rng(5), Counter()
    columns = (np.array(column) for column in zip(*ads, strict=True))
    genre, brand, ecpm = columns
    for _ in range(DRAWS):
        found = Filling(rules, ecpm.astype(float), ecpm, {"genre": genre, "brand": brand}, pins).fill(3, policy, random)
        order = tuple(found.order.tolist())
        assert found.propensity == pytest.approx(truth[order][1])
        drawn[order] += 1
    common = [order for order, (chance, _) in truth.items() if chance * DRAWS >= 5]
    counts, chances = [drawn[order] for order in common], np.array([truth[order][0] for order in common])
    assert chisquare(counts, chances * sum(counts) / chances.sum()).pvalue > 1e-3


def test_diversity_worked_out_by_hand():
    """Worth 1, 0.9, 0.5 of the best. After the first of genre 0: 0.6 · 0.9 + 0 against 0.6 · 0.5 + 0.4 = 0.7; then what is left."""
    ads = [(0, -1, 10), (0, -1, 9), (1, -1, 5)]
    for trade_off, order in ((0.6, [0, 2, 1]), (0.8, [0, 1, 2])):  # 0.72 against 0.6
        assert filled(Rules(alike=["genre"], trade_off=trade_off), ads, 3)[1].order.tolist() == order


def test_thompson_draws_as_many_places_as_without_rules():
    ads = [(i, -1, 60 - i) for i in range(PLACES + 30)]
    _, found = filled(Rules(max_per={"genre": 1}), ads, len(ads), Thompson(np.ones(len(ads))))
    rest = found.order[PLACES:].tolist()
    assert (rest, found.propensity[PLACES:].tolist()) == (sorted(rest), [1.0] * 30)
    assert max(found.propensity[:PLACES]) < 1


CANDIDATES = [{"ad_id": f"a{i}"} for i in range(12)]


def test_values_are_told_apart_though_the_model_does_not_know_them(plain):  # noqa: F811
    """Of the genres of the schema's vocabulary, and of two it does not have, which encode alike; an ad without a genre is free."""
    sent = [
        *CANDIDATES[:6],
        *({"ad_id": f"n{i}", "features": {"genre": genre}} for i, genre in enumerate(["opera", "opera", "jazz", None, None])),
    ]
    found = ask(plain, sent, {"objective": "pctr", "rules": {"max_per": {"genre": 1}}})
    assert Counter(each["reason"] for each in found["omitted"]) == {"max_per_genre": 4}
    places = {ad["ad_id"] for ad in found["ads"]}
    assert len(places & {f"a{i}" for i in range(6)}) == 3
    assert len(places & {"n0", "n1"}) == 1
    assert {"n2", "n3", "n4"} <= places


def test_pinned_ads_reserves_and_prices_in_an_answer(converting):  # noqa: F811
    candidates = [{"ad_id": f"a{i}", "bid": i * 10**6, "bid_type": "cpm"} for i in range(6)]
    rules = {"pinned": {"1": "a0"}, "reserves": [0, 4, 2.5], "max_per": {"genre": 2}}
    found = ask(converting, candidates, {"objective": "ecpm", "prices": True, "min_score": 0.0, "reserve": 10**6, "rules": rules})
    assert [(ad["ad_id"], ad.get("price")) for ad in found["ads"]] == [("a0", None), ("a5", 4), ("a4", 3), ("a3", 2.5)]
    assert sorted((each["ad_id"], each["reason"]) for each in found["omitted"]) == [("a1", "below_reserve"), ("a2", "below_reserve")]


def test_a_ranking_with_rules_says_its_propensities_and_is_not_replayed(converting):  # noqa: F811
    options = {"objective": "pctr", "explore": {"policy": "epsilon_greedy", "epsilon": 1.0}, "rules": {"max_per": {"genre": 1}}}
    ranking, _ = rank(converting, CANDIDATES, options)
    assert ranking.propensity == pytest.approx([1 / 12, 1 / 8, 1 / 4])
    assert served(ranking, 1.0, 100, False).candidates == []


@pytest.mark.parametrize(
    ("rules", "pointer"),
    [
        ({"max_per": {"brand": 1}}, "/options/rules/max_per/brand"),
        ({"max_per": {"genre": 0}}, "/options/rules/max_per/genre"),
        ({"distance": {"price": 2}}, "/options/rules/distance/price"),
        ({"diversity": {"trade_off": 0.5, "by": ["tags"]}}, "/options/rules/diversity/by"),
        ({"pinned": {"1": "a9"}}, "/options/rules/pinned/1"),
        ({"pinned": {"1": "a1", "2": "a1"}}, "/options/rules/pinned/1"),
        ({"pinned": {"0": "a1"}}, "/options/rules/pinned/0"),
        ({"reserves": [1]}, "/candidates/2/bid"),
        ({"reserves": [0.0000001]}, "/options/rules/reserves"),
        ({"most": 1}, "/options/rules/most"),
    ],
)
def test_a_rule_that_cannot_hold_is_pointed_at(plain, rules, pointer):  # noqa: F811
    candidates = [{"ad_id": "a1", "bid": 1}, {"ad_id": "a2", "bid": 1}, {"ad_id": "a3"}]
    body = json.dumps({"user": {"id": "u1"}, "candidates": candidates, "options": {"rules": rules}}).encode()
    with pytest.raises(InvalidError) as caught:
        asyncio.run(plain.ranker.rank(to_query(parse_request(body), 100), plain.metrics.begin("/rank")))
    assert [mistake.pointer for mistake in caught.value.mistakes] == [pointer]


@pytest.mark.parametrize(
    ("options", "most", "pointer"),
    [
        ({"rules": {"distance": {"genre": 2}}}, math.isqrt(LOOKED_AT), "/options/top_k"),
        ({"rules": {"distance": {"genre": 2}}, "top_k": 64}, LOOKED_AT // 64, "/options/top_k"),
        ({"explore": {"policy": "thompson"}}, DRAWN_FROM, "/options/explore/policy"),
    ],
)
def test_more_than_can_be_placed_without_holding_up_others_is_refused(options, most, pointer):
    """Rules held the event loop for six seconds with 10,000 candidates, and Thompson sampling for four."""
    for count, pointers in ((most, []), (most + 1, [pointer])):
        body = json.dumps({"user": {"id": "u1"}, "candidates": [f"a{i}" for i in range(count)], "options": options}).encode()
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(pytest.raises(InvalidError)) if pointers else None
            check_candidates(to_query(parse_request(body), 10**5))
        assert not caught or [mistake.pointer for mistake in caught.value.mistakes] == pointers


def test_caps_alone_are_no_matter_of_places():
    assert not Rules(frequency={"seen": 2}, already_clicked=True).by_place
