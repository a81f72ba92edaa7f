from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from features.policy import PLACES, EpsilonGreedy, PlackettLuce, Policy, PolicyError, Thompson, parse_policy, propensities

POLICIES: list[Policy] = [EpsilonGreedy(0.0), EpsilonGreedy(0.25), EpsilonGreedy(1.0), PlackettLuce(0.5), PlackettLuce(2.0)]
VALUES = np.array([[0.2, 0.5, 0.1]])
ALL = np.ones((1, 3), np.bool_)


@pytest.mark.parametrize(
    ("policy", "order", "expected"),
    [
        (EpsilonGreedy(0.0), [1, 0, 2], [1, 1, 1]),
        (EpsilonGreedy(0.0), [0, 1, 2], [0, 1, 1]),
        (EpsilonGreedy(0.3), [1, 2, 0], [0.7 + 0.1, 0.15, 1]),
        (EpsilonGreedy(1.0), [2, 1, 0], [1 / 3, 1 / 2, 1]),
        (PlackettLuce(1.0), [2, 1, 0], [1 / 8, 5 / 7, 1]),
        (PlackettLuce(0.5), [0, 1, 2], [4 / 30, 25 / 26, 1]),
    ],
)
def test_propensities_worked_out_by_hand(policy: Policy, order: list[int], expected: list[float]) -> None:
    assert propensities(policy, VALUES, ALL, np.array([order]))[0] == pytest.approx(expected)
    assert propensities(policy, VALUES, ALL, np.array([order[:1]]))[0] == pytest.approx(expected[:1])


@given(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.2, 0.9]), min_size=1, max_size=5), st.sampled_from(POLICIES))
def test_the_orders_of_all_ads_have_probabilities_that_sum_to_one(values: list[float], policy: Policy) -> None:
    orders = np.array(list(permutations(range(len(values)))))
    each = propensities(policy, np.tile(values, (len(orders), 1)), np.ones(orders.shape, np.bool_), orders)
    assert ((each >= 0) & (each <= 1 + 1e-12)).all()
    assert each.prod(1).sum() == pytest.approx(1)


def test_of_equal_values_the_lower_column_is_the_better_one() -> None:
    assert EpsilonGreedy(0.0).chances(np.array([[0.5, 0.5]]), np.ones((1, 2), np.bool_)).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_above_has_no_chance_and_rankings_do_not_mix(policy: Policy) -> None:
    left = np.array([[True, False, True], [True, True, True]])
    values = np.vstack([VALUES, VALUES[:, ::-1]])
    chances = policy.chances(values, left)
    assert chances[0, 1] == 0
    assert chances.sum(1) == pytest.approx(1)
    assert chances[1].tolist() == policy.chances(values[1:], left[1:])[0].tolist()


@pytest.mark.parametrize("drawing", [EpsilonGreedy(0.25), EpsilonGreedy(1.0), PlackettLuce(0.5), PlackettLuce(3)])
def test_the_service_tells_the_same_of_what_it_draws(drawing: Policy) -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        falling = np.sort(random.random(7) * random.integers(0, 2, 7))[::-1]
        drawn = drawing.draw(falling, 4, random)
        logged = propensities(parse_policy(str(drawing)), falling[None], np.ones((1, 7), np.bool_), drawn.ranks[None, :4])
        assert drawn.propensity == pytest.approx(logged[0])


def test_what_is_no_candidate_changes_nothing() -> None:
    padded = np.array([[0.2, 0.5, 0.1, 0.9]])
    for policy in POLICIES:
        order = np.array([[2, 0, 1]])
        left = np.array([[True, True, True, False]])
        assert propensities(policy, padded, left, order).tolist() == propensities(policy, VALUES, ALL, order).tolist()
        assert left.tolist() == [[True, True, True, False]]


def test_small_values_do_not_underflow() -> None:
    chances = PlackettLuce(0.01).chances(np.array([[1e-9, 2e-9, 0.0]]), np.ones((1, 3), np.bool_))
    assert np.isfinite(chances).all()
    assert chances[0, 1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("greedy", EpsilonGreedy(0.0)),
        ("epsilon_greedy:0.1", EpsilonGreedy(0.1)),
        ("epsilon_greedy 0.1", EpsilonGreedy(0.1)),
        ("plackett_luce:0.5", PlackettLuce(0.5)),
    ],
)
def test_a_policy_is_named_by_a_text(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    "text", ["", "best", "greedy:1", "epsilon_greedy", "epsilon_greedy:", "epsilon_greedy:2", "plackett_luce:0", "plackett_luce:nan"]
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match=r"is not a policy; expected one such as greedy, epsilon_greedy:0\.1"):
        parse_policy(text)


def test_of_two_ads_the_chance_is_that_of_a_difference_of_normals() -> None:
    for values, spread in (([0.3, 0.1], [0.5, 1.0]), ([0.1, 0.1], [0.2, 0.1]), ([0.02, 0.9], [3.0, 0.3])):
        chances = Thompson(np.array(spread)).chances(np.array([values]), np.ones((1, 2), np.bool_))[0]
        expected = norm.cdf(np.log(values[0] / values[1]) / np.hypot(*spread))
        assert chances == pytest.approx([expected, 1 - expected], abs=1e-6)


def test_of_many_ads_it_is_how_often_a_draw_is_the_largest() -> None:
    random = np.random.default_rng(0)
    values, spread = random.uniform(0.01, 0.3, 12), random.uniform(0.1, 1, 12)
    left = random.random(12) < 0.8
    chances = Thompson(spread).chances(values[None], left[None])[0]
    drawn = np.log(values) + spread * random.standard_normal((200_000, 12))
    best = np.where(left, drawn, -np.inf).argmax(1)
    assert chances == pytest.approx(np.bincount(best, minlength=12) / 200_000, abs=0.005)
    assert chances.sum() == pytest.approx(1)


def test_thompson_draws_so_many_places_and_the_rest_follows_best_first() -> None:
    falling = np.linspace(0.5, 0.1, PLACES + 30)
    policy = Thompson(np.ones(PLACES + 30))
    drawn = policy.draw(falling, PLACES + 10, np.random.default_rng(3))
    assert sorted(drawn.ranks) == list(range(PLACES + 30))
    assert (drawn.ranks[PLACES:] == np.sort(drawn.ranks[PLACES:])).all()
    logged = propensities(policy, falling[None], np.ones((1, PLACES + 30), np.bool_), drawn.ranks[None, :PLACES])[0]
    assert drawn.propensity == pytest.approx([*logged, *[1.0] * 10])
    none = policy.draw(np.zeros(0), 0, np.random.default_rng(3))
    assert (none.ranks.tolist(), none.propensity.tolist()) == ([], [])
