"""Policies: the propensities are the probabilities, by the definition and by counting what is drawn."""

import io
import itertools
import math
from collections import Counter

import bundles
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from features import bundle
from features.policy import FLOOR, PLACES, EpsilonGreedy, PlackettLuce, Thompson, propensities
from service.api.wire import RankAnswer
from service.ranking.ordering import arrange as arrange_rows
from service.ranking.ordering import best_first

VALUES = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=12)
POLICIES = st.builds(EpsilonGreedy, st.floats(0, 1)) | st.builds(PlackettLuce, st.floats(0.01, 100))
DRAWS = 4_000


def arrange(values, policy, places=None, seed=0, ad_ids=None):
    """Ad ids in the order in which they are shown, and the propensities."""
    ad_ids = ad_ids or [f"a{i}" for i in range(len(values))]
    by, rows = np.array(values, np.float64), np.arange(len(values))
    arranged = arrange_rows(best_first(rows, by, ad_ids), by, policy, places, np.random.default_rng(seed))
    return [ad_ids[row] for row in arranged.order.tolist()], arranged.propensity


def by_definition(order, values, policy):
    """The conditional probability of each place of an order, worked out place by place from what the policies promise."""
    left, found = dict(values), []
    for ad_id in order:
        if isinstance(policy, EpsilonGreedy):
            best = min(left, key=lambda each: (-left[each], each))
            found.append((1 - policy.epsilon) * (ad_id == best) + policy.epsilon / len(left))
        else:
            weights = {each: math.log(max(value, FLOOR)) / policy.temperature for each, value in left.items()}
            top = max(weights.values())
            found.append(math.exp(weights[ad_id] - top) / math.fsum(math.exp(weight - top) for weight in weights.values()))
        del left[ad_id]
    return found


@given(VALUES, POLICIES, st.integers(1, 15), st.integers(0, 2**32))
def test_propensities_are_those_of_the_definition(values, policy, places, seed):
    order, propensity = arrange(values, policy, places, seed)
    named = {f"a{i}": value for i, value in enumerate(values)}
    assert sorted(order) == sorted(named)
    assert len(propensity) == min(places, len(values))
    assert propensity == pytest.approx(by_definition(order[:places], named, policy), rel=1e-9)
    assert all(0 < each <= 1 for each in propensity)
    rest = order[places:]
    assert rest == sorted(rest, key=lambda ad_id: (-named[ad_id], ad_id)), "what was not drawn goes best first"


@pytest.mark.parametrize("policy", [EpsilonGreedy(0.4), EpsilonGreedy(1.0), PlackettLuce(1.0), PlackettLuce(0.4)], ids=str)
@pytest.mark.parametrize("values", [[0.3, 0.1, 0.7, 0.25], [0.5, 0.5, 0.2], [0.02, 0.9, 0.4, 0.3, 0.35], [0.0, 0.0, 0.0]], ids=len)
def test_orders_come_as_often_as_their_propensities_say(values, policy):
    random, rows, by = np.random.default_rng(7), np.arange(len(values)), np.array(values)
    ad_ids = [f"a{i}" for i in rows]
    best = best_first(rows, by, ad_ids)
    drawn, exact = Counter(), {}
    for _ in range(DRAWS):
        order, propensity = arrange_rows(best, by, policy, None, random)
        drawn[tuple(order.tolist())] += 1
        exact[tuple(order.tolist())] = math.prod(propensity.tolist())
    named = dict(zip(ad_ids, values, strict=True))
    truth = {
        order: math.prod(by_definition([ad_ids[row] for row in order], named, policy)) for order in itertools.permutations(rows.tolist())
    }
    assert math.fsum(truth.values()) == pytest.approx(1)
    assert exact == pytest.approx({order: truth[order] for order in exact})
    assert chi_square(drawn, truth) > 1e-3


def test_the_count_would_notice_a_wrong_policy():
    named = {"a0": 0.3, "a1": 0.1, "a2": 0.7}
    truth = {
        order: math.prod(by_definition([f"a{i}" for i in order], named, PlackettLuce(1.25))) for order in itertools.permutations(range(3))
    }
    random, by = np.random.default_rng(7), np.array(list(named.values()))
    best = best_first(np.arange(3), by, list(named))
    drawn = Counter(tuple(arrange_rows(best, by, PlackettLuce(1.0), None, random).order.tolist()) for _ in range(DRAWS))
    assert chi_square(drawn, truth) < 1e-3


def chi_square(drawn, truth):
    """The chance of counts that are at least so far off; the rarest orders together, so that each count may be expected to be 5."""
    common = [order for order, chance in truth.items() if chance * DRAWS >= 5]
    counts = [drawn[order] for order in common]
    chances = [truth[order] for order in common]
    if DRAWS * (1 - math.fsum(chances)) >= 5:
        counts, chances = [*counts, DRAWS - sum(counts)], [*chances, 1 - math.fsum(chances)]
    scale = sum(counts) / math.fsum(chances)
    return chisquare(counts, [chance * scale for chance in chances]).pvalue


@given(VALUES, POLICIES, st.integers(0, 2**32), st.randoms())
def test_the_order_of_the_input_does_not_matter(values, policy, seed, chance):
    ad_ids = [f"a{i}" for i in range(len(values))]
    shuffled = chance.sample(range(len(values)), len(values))
    one = arrange(values, policy, None, seed, ad_ids)
    two = arrange([values[i] for i in shuffled], policy, None, seed, [ad_ids[i] for i in shuffled])
    assert one[0] == two[0]
    assert one[1].tolist() == two[1].tolist()


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12), st.integers(0, 2**32))
def test_without_chance_it_is_the_greedy_order(values, seed):
    greedy, nothing = arrange(values, None)
    assert nothing is None
    order, propensity = arrange(values, EpsilonGreedy(0.0), None, seed)
    assert (order, propensity.tolist()) == (greedy, [1.0] * len(values))


@given(st.lists(st.integers(-20, 0), min_size=1, max_size=12, unique=True), st.integers(0, 2**32))
def test_cold_is_greedy_and_hot_is_uniform(powers, seed):
    values = [3.0**power for power in powers]
    order, propensity = arrange(values, PlackettLuce(0.01), None, seed)
    assert order == arrange(values, None)[0]
    assert propensity == pytest.approx([1.0] * len(values))
    _, hot = arrange(values, PlackettLuce(1e9), None, seed)
    _, chance = arrange(values, EpsilonGreedy(1.0), None, seed)
    uniform = [1 / left for left in range(len(values), 0, -1)]
    assert hot == pytest.approx(uniform, rel=1e-6)
    assert chance.tolist() == uniform


@pytest.mark.parametrize("policy", [EpsilonGreedy(0.5), EpsilonGreedy(1.0), PlackettLuce(0.01), PlackettLuce(100.0)], ids=str)
def test_many_ads_of_any_size_have_propensities_that_are_numbers(policy):
    values = np.concatenate([np.zeros(5_000), np.logspace(-300, 12, 4_999), [1e300]])
    order, propensity = arrange(values, policy)
    assert len(set(order)) == 10_000
    assert np.isfinite(propensity).all()
    assert (propensity > 0).all()
    assert (propensity <= 1).all()
    few, propensities = arrange(values, policy, 3)
    assert (len(few), len(propensities)) == (10_000, 3)


@pytest.mark.parametrize("policy", [EpsilonGreedy(0.5), PlackettLuce(1.0)], ids=str)
def test_nothing_to_show_is_nothing(policy):
    order, propensity = arrange([], policy)
    assert (order, propensity.tolist()) == ([], [])


ALL = [f"a{i}" for i in range(30)]
EXPLORES = [{"policy": "epsilon_greedy", "epsilon": 0.5}, {"policy": "plackett_luce", "temperature": 2}]


@pytest.mark.anyio
class TestRequests:
    """What a caller asks for, and gets."""

    @pytest.mark.parametrize("explore", EXPLORES, ids=lambda explore: explore["policy"])
    async def test_an_explored_answer_says_how_likely_it_was(self, client, explore):
        greedy = await client.rank(candidates=ALL)
        answer = await client.rank(candidates=ALL, options={"explore": explore, "top_k": 7})
        RankAnswer.model_validate(answer)
        assert list(answer) == list(greedy)
        p_click = {ad["ad_id"]: ad["p_click"] for ad in greedy["ads"]}
        assert {ad["ad_id"]: ad["p_click"] for ad in answer["ads"]}.items() <= p_click.items()
        assert [ad["rank"] for ad in answer["ads"]] == list(range(1, 8))
        policy = EpsilonGreedy(0.5) if "epsilon" in explore else PlackettLuce(2.0)
        exact = [ad["propensity"] for ad in answer["ads"]]
        assert exact == pytest.approx(by_definition([ad["ad_id"] for ad in answer["ads"]], p_click, policy))
        assert len(answer["omitted"]) == 23
        orders = {tuple(ad["ad_id"] for ad in (await client.rank(candidates=ALL, options={"explore": explore}))["ads"]) for _ in range(5)}
        assert len(orders) > 1

    async def test_money_is_explored_too(self, client):
        rows = [{"ad_id": ad_id, "bid": float(i)} for i, ad_id in enumerate(ALL)] + [{"ad_id": "new", "bid": 1}]
        options = {"objective": "ecpm", "explore": EXPLORES[1], "explain": True}
        ads = (await client.rank(candidates=rows, options=options))["ads"]
        ecpm = {ad["ad_id"]: ad["ecpm"] for ad in ads}
        exact = [ad["propensity"] for ad in ads]
        assert exact == pytest.approx(by_definition(list(ecpm), ecpm, PlackettLuce(2.0)))
        assert [list(ad) for ad in ads if ad["ad_id"] == "new"] == [["ad_id", "rank", "p_click", "ecpm", "propensity", "known", "explain"]]

    async def test_the_best_first_is_said_as_ever(self, client):
        one, two = [
            await client.post("/rank", json={"request_id": "r", "user": {"id": "u"}, "candidates": ALL, **more})
            for more in ({}, {"options": {"explore": {"policy": "greedy"}}})
        ]
        assert one.content.partition(b'"timings_ms"')[0] == two.content.partition(b'"timings_ms"')[0]
        assert [list(ad) for ad in one.json()["ads"]] == [["ad_id", "rank", "p_click"]] * 30

    @pytest.mark.parametrize(
        ("settings", "policy"),
        [
            ({"explore": "epsilon_greedy", "epsilon": 1.0}, EpsilonGreedy(1.0)),
            ({"explore": "plackett_luce", "temperature": 0.5}, PlackettLuce(0.5)),
        ],
    )
    async def test_the_setting_is_for_requests_that_say_nothing(self, run, ads, settings, policy):
        async with run(ads, **settings) as client:
            exact = (await client.rank(candidates=ALL))["ads"]
            values = {ad["ad_id"]: ad["p_click"] for ad in exact}
            assert [ad["propensity"] for ad in exact] == pytest.approx(by_definition(list(values), values, policy))
            greedy = (await client.rank(candidates=ALL, options={"explore": {"policy": "greedy"}}))["ads"]
            assert [ad["p_click"] for ad in greedy] == sorted(values.values(), reverse=True)
            assert "propensity" not in greedy[0]

    async def test_ads_that_were_seldom_shown_are_tried(self, run, ads, tmp_path):
        deviations = np.full(5_002, 0.05, np.float32)
        encoder = bundles.encoder()
        new = encoder.vocabularies.categories["ad_id"].id("a7")
        deviations[new] = 3.0
        file = io.BytesIO()
        np.save(file, deviations)
        bundles.publish(tmp_path, files={bundle.AD_DEVIATIONS: file.getvalue()})
        async with run(ads, models=tmp_path, explore="thompson") as client:
            greedy = (await client.rank(candidates=ALL, options={"explore": {"policy": "greedy"}}))["ads"]
            values = {ad["ad_id"]: ad["p_click"] for ad in greedy}
            answers = [(await client.rank(candidates=ALL, options={"top_k": 3}))["ads"] for _ in range(40)]
            bids = [{"ad_id": ad_id, "bid": 400 if ad_id == "a7" else 1, "bid_type": "cpm" if ad_id == "a7" else "cpc"} for ad_id in ALL]
            paid = (await client.rank(candidates=bids, options={"objective": "ecpm"}))["ads"]
        known = Thompson(np.array([0.0 if ad["ad_id"] == "a7" else (1 - ad["p_click"]) * 0.05 for ad in paid]))  # an ad by cpm is
        ecpm, left = np.array([[ad["ecpm"] for ad in paid]]), np.ones((1, 30), np.bool_)
        expected = propensities(known, ecpm, left, np.arange(PLACES)[None])[0]
        assert [ad["propensity"] for ad in paid[:PLACES]] == pytest.approx(expected, rel=1e-4)
        p = np.array(list(values.values()))
        spread = (1 - p) * np.where([ad_id == "a7" for ad_id in values], 3.0, 0.05)
        policy = Thompson(spread)
        rows = {ad_id: row for row, ad_id in enumerate(values)}
        for answer in answers:
            order = np.array([[rows[ad["ad_id"]] for ad in answer]])
            expected = propensities(policy, p[None], np.ones((1, 30), np.bool_), order)[0]
            assert [ad["propensity"] for ad in answer] == pytest.approx(expected, rel=1e-4)
        assert list(values).index("a7") > 3
        assert any(ad["ad_id"] == "a7" for answer in answers for ad in answer)

    @pytest.mark.parametrize(
        ("explore", "pointers"),
        [
            ("epsilon_greedy", ["/options/explore"]),
            ({}, ["/options/explore"]),
            ({"policy": "ucb"}, ["/options/explore"]),
            ({"policy": "thompson"}, ["/options/explore/policy"]),  # the bundle does not say how sure it is
            ({"policy": "thompson", "scale": 2}, ["/options/explore/scale"]),
            ({"policy": ["greedy"]}, ["/options/explore"]),
            ({"policy": "greedy", "epsilon": 0.1}, ["/options/explore/epsilon"]),
            ({"policy": "epsilon_greedy"}, ["/options/explore/epsilon"]),
            ({"policy": "epsilon_greedy", "epsilon": 1.1}, ["/options/explore/epsilon"]),
            ({"policy": "epsilon_greedy", "epsilon": "0.1"}, ["/options/explore/epsilon"]),
            ({"policy": "plackett_luce", "temperature": 0}, ["/options/explore/temperature"]),
            ({"policy": "plackett_luce", "temperature": 1e9, "epsilon": 1}, ["/options/explore/temperature", "/options/explore/epsilon"]),
        ],
    )
    async def test_a_wrong_policy_is_pointed_at(self, client, explore, pointers):
        answer = await client.post("/rank", json={"user": {"id": "u"}, "candidates": ["a1"], "options": {"explore": explore}})
        assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (422, pointers)
        assert all(error["detail"] for error in answer.json()["errors"])
