import json
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import bundles
import logs
import numpy as np
import polars as pl
import pytest
import small
from test_cli import run

from features.bundle import Bundle, load_bundle
from features.policy import EpsilonGreedy, PlackettLuce
from features.served import ServedRecord
from features.state import pack_features
from training.datasets import open_bandit
from training.datasets.log import ImpressionLog, open_log
from training.datasets.prepared import SPLITS, DataError, Prepared, open_prepared
from training.offpolicy.estimators import Estimate, Trail, estimate
from training.offpolicy.replay import replay
from training.retrain.publish import train_and_publish

pytestmark = pytest.mark.usefixtures("traced_export")
START = 1_763_798_400
SOURCE = Path(__file__).parent.parent.parent / "shared" / "data" / "open_bandit"


def drawn(values: np.ndarray, count: int, temperature: float, random: np.random.Generator) -> tuple[list[int], list[float]]:
    """The first places of a Plackett-Luce order, drawn one by one, and how likely each was."""
    left, order, chances = list(range(len(values))), [], []
    for _ in range(count):
        weights = values[left] ** (1 / temperature)
        at = int(random.choice(len(left), p=weights / weights.sum()))
        chances.append(float(weights[at] / weights.sum()))
        order.append(left.pop(at))
    return order, chances


def ranking(number: int, candidates: Sequence[str], order: Sequence[int], chances: Sequence[float], **more: Any) -> ServedRecord:
    ad_ids = [candidates[i] for i in order]
    whole = {
        "user": {},
        "context": {},
        "history": [],
        "ad_ids": ad_ids,
        "p_click": [0.5] * len(ad_ids),
        "propensity": chances,
        "candidates": candidates,
        "policy": "plackett_luce 0.5",
        **more,
    }
    return ServedRecord(
        **{"request_id": f"r{number}", "ts": START + number * 7, "model": "din", "version": 1, "user_id": f"u{number % 9}", **whole}
    )


# --- estimators


def trail(**arrays: Any) -> Trail:
    whole = {name: np.array(values, np.float64) for name, values in arrays.items()}
    whole["shown"] = whole.get("shown", np.ones(whole["clicks"].shape)) > 0
    zeros = dict.fromkeys(("predicted", "expected", "baseline"), np.zeros(whole["clicks"].shape))
    return Trail(**{**zeros, **whole})


def test_estimates_worked_out_by_hand() -> None:
    made = trail(
        clicks=[[1, 0], [0, 1], [1, 0]],
        ratios=[[2, 0.5], [0.5, 3], [0.5, 0]],
        shown=[[1, 1], [1, 1], [1, 0]],
        predicted=[[0.5, 0.2], [0.1, 0.4], [0.6, 0]],
        expected=[[0.4, 0.3], [0.3, 0.2], [0.2, 0]],
        baseline=[[0.4, 0.1], [0.3, 0.2], [0.2, 0]],
    )
    found = estimate(made)
    # Weights 2, 1; 0.5, 1.5; 0.5 alone.
    assert found.log.value == pytest.approx(3 / 5)
    assert found.ips.value == pytest.approx((2 + 1.5 + 0.5) / 5)
    assert found.snips.value == pytest.approx((3 * (2.5 / 3) + 2 * (1.5 / 2.5)) / 5)
    first = 0.4 + 2 * 0.5 + 0.1 + 2 * (0.3 - 0.1) + 1 * (0 - 0.2)
    second = 0.3 + 0.5 * -0.1 + 0.2 + 0.5 * 0 + 1.5 * (1 - 0.4)
    third = 0.2 + 0.5 * (1 - 0.6)
    assert found.dr.value == pytest.approx((first + second + third) / 5)
    assert found.effective_sample == pytest.approx(min(9 / 4.5, 2.5**2 / 3.25))
    assert (found.largest_weight, found.clicks) == (2, 3)
    clipped = estimate(made, clip=1.0)
    assert clipped.ips.value == pytest.approx((1 + 1 + 0.5) / 5)
    assert clipped.largest_weight == 1


def test_the_interval_of_the_log_is_that_of_a_mean() -> None:
    clicks = (np.random.default_rng(1).random((500, 1)) < 0.1).astype(float)
    found = estimate(trail(clicks=clicks, ratios=np.ones((500, 1))))
    error = 1.959964 * clicks.std(ddof=1) / 500**0.5
    for each in (found.log, found.ips, found.snips, found.dr):
        assert [each.value, each.low, each.high] == pytest.approx([clicks.mean(), clicks.mean() - error, clicks.mean() + error])


@pytest.mark.parametrize(("expected", "weight"), [(0.1, 1.0), (0.001, 0.0), (0.0, 0.0)])
def test_a_doubly_robust_interval_is_that_of_a_mean_also_below_any_click_rate_and_without_weights(expected: float, weight: float) -> None:
    ratios = weight * np.array([[2], [1.5], [1]])
    predicted, baseline = np.array([[0.2], [0.1], [0.1]]), expected * np.array([[0.5], [2], [1]])
    made = trail(clicks=[[0], [0], [0]], ratios=ratios, predicted=predicted, expected=baseline, baseline=baseline)
    found, values = estimate(made).dr, (baseline - ratios * predicted)[:, 0]
    error = 1.959964 * values.std(ddof=1) / 3**0.5
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), values.mean() - error, values.mean() + error))


def test_what_cannot_be_estimated_is_no_number_and_warned_of() -> None:
    found = estimate(trail(clicks=[[1], [0]], ratios=[[0], [0]]))
    for each in (found.snips, found.ips):
        assert np.isnan([each.value, each.low, each.high]).all(), "0 of 0 would seem certain"
    assert found.effective_sample == 0
    assert found.warnings == [
        "the effective sample is 0.0 rankings; below 100 the intervals are too narrow",
        "0 clicks speak of this policy; below 10 the intervals are too narrow",
    ]
    with pytest.raises(ValueError, match="two rankings"):
        estimate(trail(clicks=[[1]], ratios=[[1]]))


@pytest.mark.parametrize("places", [1, 2])
def test_intervals_hold_the_truth_as_often_as_they_say(places: int) -> None:
    """Repeated logs of a small world: 4 ads, 5 kinds of contexts, clicks that depend on the ad above; a wrong reward model."""
    random = np.random.default_rng(places)
    orders = np.array(list(permutations(range(4), places)))
    true = random.uniform(0.05, 0.5, (5, 4))
    logging, target = (_order_chances(orders, random.uniform(0.5, 1.5, (5, 4)) ** power) for power in (1.0, 2.0))
    clicking = np.stack([true[:, orders[:, k]] * (1 if not k else 0.5 + true[:, orders[:, k - 1]]) for k in range(places)], 2)
    truth = float((target.prod(2)[:, :, None] * clicking).sum((1, 2)).mean()) / places
    model = np.clip(true + random.normal(0, 0.1, true.shape), 0, 1)
    held = dict.fromkeys(("ips", "snips", "dr"), 0)
    widths: dict[str, list[float]] = {name: [] for name in held}
    for _ in range(400):
        context = random.integers(0, 5, 600)
        cumulative = logging.prod(2)[context].cumsum(1)
        order = (random.random((600, 1)) > cumulative / cumulative[:, -1:]).sum(1)
        ads = orders[order]
        made = Trail(
            np.ones((600, places), np.bool_),
            (random.random((600, places)) < clicking[context, order]).astype(float),
            target[context, order] / logging[context, order],
            np.stack([model[context, ads[:, k]] for k in range(places)], 1),
            np.stack([_expected(target, orders, model, context, ads, k) for k in range(places)], 1),
            np.tile(model.mean(1)[context][:, None], places),
        )
        found = estimate(made)
        for name in held:
            each: Estimate = getattr(found, name)
            held[name] += each.low <= truth <= each.high
            widths[name].append(each.high - each.low)
    assert {name: 0.92 <= count / 400 <= 0.98 for name, count in held.items()} == dict.fromkeys(held, True), held
    assert np.mean(widths["dr"]) < np.mean(widths["ips"])


def _order_chances(orders: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Conditional propensities `(contexts, orders, places)` of Plackett-Luce orders."""
    found, left = [], weights.sum(1, keepdims=True)
    for k in range(orders.shape[1]):
        found.append(weights[:, orders[:, k]] / left)
        left = left - weights[:, orders[:, k]]
    return np.stack(found, 2)


def _expected(target: np.ndarray, orders: np.ndarray, model: np.ndarray, context: np.ndarray, ads: np.ndarray, place: int) -> np.ndarray:
    """The model's value of the target's choice at a place, given the ads above it, by summing over all orders."""
    total = np.zeros(len(context))
    same = (orders[None, :, :place] == ads[:, None, :place]).all(2)
    chosen = target.prod(2)[context] * same
    chosen /= chosen.sum(1, keepdims=True)
    for order in range(len(orders)):
        total += chosen[:, order] * model[context, orders[order, place]]
    return total


# --- a log of the test bundle, whose scores can be worked out


def explored(count: int, places: int = 3, temperature: float = 0.5, bias: float = 0.0, seed: int = 0) -> list[ServedRecord]:
    """Rankings by the test bundle's scores, with ads that have left, unknown ones, and features sent with one that was shown."""
    random, encoder, found = np.random.default_rng(seed), bundles.encoder(), []
    for number in range(count):
        size = int(random.integers(places, 9))
        candidates = [f"a{i}" for i in random.permutation(20)[:size]]
        candidates[-1] = "new" if number % 3 else candidates[-1]
        history = [f"a{i}" for i in random.integers(0, 20, number % 4)]
        made = ranking(
            number,
            candidates,
            range(size),
            [1.0] * size,
            user={"age": ("25", "35")[number % 2], "income": float(number % 50)},
            context={"slot": ("feed", "side")[number % 2]},
            history=history,
            ads={ad_id: pack_features(bundles.ADS[ad_id]) for ad_id in {*candidates, *history} if ad_id != "new"},
            unknown=[candidates[0], "new"][: 1 + ("new" in candidates)]
            if number % 5 == 0
            else [each for each in candidates if each == "new"],
            policy=f"plackett_luce {temperature}",
        )
        values = bundles.expected(made.feeds(encoder, candidates), bias)[0].astype(np.float64)
        order, chances = drawn(values, places, temperature, random)
        found.append(changed(made, ad_ids=[candidates[i] for i in order], p_click=values[order].tolist(), propensity=chances))
    return found


def clicked(rankings: Sequence[ServedRecord], seed: int = 1) -> set[tuple[str, str]]:
    random = np.random.default_rng(seed)
    return {(each.request_id, ad_id) for each in rankings for ad_id in each.ad_ids if random.random() < 0.3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(bundles.publish(tmp_path_factory.mktemp("models"), "din"))


@pytest.fixture
def logged(tmp_path: Path) -> Callable[..., ImpressionLog]:
    def write(rankings: Sequence[ServedRecord], clicks: set[tuple[str, str]] | None = None, files: int = 3) -> ImpressionLog:
        schema = bundles.encoder().schema
        return open_log(logs.write_log(tmp_path / "log", rankings, schema, clicked(rankings) if clicks is None else clicks, files=files))

    return write


def test_the_logging_policy_s_own_value_is_the_log_s_click_rate(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings = explored(150)
    clicks = clicked(rankings)
    found = replay(logged(rankings, clicks), bundle, PlackettLuce(0.5))
    rate = len(clicks) / 450
    assert (found.rankings, found.impressions, found.greedy, found.unfit) == (150, 450, 0, 0)
    estimates = found.estimates
    assert [estimates.log.value, estimates.ips.value, estimates.snips.value] == pytest.approx([rate] * 3, rel=1e-5)
    assert estimates.largest_weight == pytest.approx(1, rel=1e-5)
    assert estimates.effective_sample == pytest.approx(150)
    assert estimates.dr.low < rate < estimates.dr.high


def test_only_the_first_places_count_where_that_is_asked(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings = explored(60)
    clicks = clicked(rankings)
    found = replay(logged(rankings, clicks), bundle, PlackettLuce(0.5), top_k=1)
    assert (found.impressions, found.estimates.log.value) == (60, sum((r.request_id, r.ad_ids[0]) in clicks for r in rankings) / 60)


def test_greedy_keeps_the_rankings_that_it_would_have_made(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings, encoder = explored(120, places=2), bundles.encoder()
    clicks = clicked(rankings)
    total = 0.0
    for each in rankings:
        # What was sent with a candidate that was not shown is not logged; here nothing was sent.
        values = bundles.expected(each.feeds(encoder, each.candidates))[0]
        best = [ad_id for _, ad_id in sorted(zip((-values).tolist(), each.candidates, strict=True))]
        weight = 1.0
        for place, ad_id in enumerate(each.ad_ids):
            weight *= (best[place] == ad_id) / each.propensity[place]
            total += weight * ((each.request_id, ad_id) in clicks)
    found = replay(logged(rankings, clicks), bundle, EpsilonGreedy(0.0))
    assert found.estimates.ips.value == pytest.approx(total / 240)


def bidding(rankings: Sequence[ServedRecord], seed: int = 3) -> list[ServedRecord]:
    """The same with bids for clicks and impressions, all but the first four, and every other with prices below them."""
    random, found = np.random.default_rng(seed), list(rankings[:4])
    for number, each in enumerate(rankings[4:]):
        bids = random.integers(-1, 5, len(each.candidates)) * 1_000_000
        kinds = random.choice(["cpc", "cpm"], len(bids)).tolist()
        prices = [int(bids[each.candidates.index(ad_id)]) // 2 for ad_id in each.ad_ids] if number % 2 else []
        found.append(changed(each, bids=np.maximum(bids, -1).tolist(), bid_types=kinds, prices=[max(0, each) for each in prices]))
    return found


def paid_by_hand(each: ServedRecord, place: int, clicked: bool) -> float:
    at = each.candidates.index(each.ad_ids[place])
    amount = max(0, each.prices[place] if each.prices else each.bids[at]) / 1e6
    return amount * (clicked if each.bid_types[at] == "cpc" else 0.001)


def test_revenue_is_estimated_over_the_rankings_whose_ads_bid(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings, encoder = bidding(explored(120, places=2)), bundles.encoder()
    clicks = clicked(rankings)
    earned = weighted = direct = 0.0
    for each in rankings[4:]:
        values = bundles.expected(each.feeds(encoder, each.candidates))[0].astype(np.float64)
        worth = [
            max(0, bid) / 1e6 * (p if kind == "cpc" else 0.001) for bid, kind, p in zip(each.bids, each.bid_types, values, strict=True)
        ]
        best = sorted(range(len(worth)), key=lambda i: (-worth[i], each.candidates[i]))
        weight, above = 1.0, 1.0
        for place, ad_id in enumerate(each.ad_ids):
            # The target is greedy: its choice given the ads above is the best of those left.
            left = [i for i in best if each.candidates[i] not in each.ad_ids[:place]]
            weight *= (each.candidates[left[0]] == ad_id) / each.propensity[place]
            paid = paid_by_hand(each, place, (each.request_id, ad_id) in clicks)
            earned, weighted = earned + paid, weighted + weight * paid
            predicted = worth[each.candidates.index(ad_id)]
            direct += worth[best[place]] + above * (worth[left[0]] - worth[best[place]]) + weight * (paid - predicted)
            above = weight
    with pytest.raises(DataError, match="some rankings of the log have no bids"):
        replay(logged(rankings, clicks), bundle, EpsilonGreedy(0.0), objective="ecpm")
    log = logged(rankings[4:], clicks)
    found = replay(log, bundle, EpsilonGreedy(0.0), objective="ecpm").revenue
    assert found is not None
    assert [found.log.value, found.ips.value] == pytest.approx([earned / 232, weighted / 232])
    assert found.dr.value == pytest.approx(direct / 232, rel=1e-4)


def test_the_logging_policy_s_own_revenue_is_the_log_s(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings = bidding(explored(80, places=2))
    clicks = clicked(rankings)
    earned = sum(paid_by_hand(each, i, (each.request_id, each.ad_ids[i]) in clicks) for each in rankings[4:] for i in range(2))
    found = replay(logged(rankings, clicks), bundle, PlackettLuce(0.5))
    assert found.rankings == 80
    assert found.revenue is not None
    assert [found.revenue.log.value, found.revenue.ips.value] == pytest.approx([earned / 152] * 2, rel=1e-5)
    assert found.as_dict()["revenue"]["ips"]["value"] == found.revenue.ips.value
    assert replay(logged(rankings[:4], clicks), bundle, PlackettLuce(0.5)).revenue is None


def test_of_equal_values_the_ad_with_the_lower_id_is_the_better_one(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    by_id: dict[int, str] = {}
    for name in (f"b{i}" for i in range(1000)):
        number = int(bundles.encoder().vocabularies.categories["ad_id"].id(name))
        if number in by_id:
            break
        by_id[number] = name
    lower, higher = sorted([by_id[number], name])
    for shown, weight in ((0, 0), (1, 2)):
        pair = [ranking(i, [higher, lower], [shown], [0.5], unknown=[lower, higher]) for i in range(2)]
        values = bundles.expected(pair[0].feeds(bundles.encoder(), [higher, lower]))[0]
        assert values[0] == values[1]
        found = replay(logged(pair), bundle, EpsilonGreedy(0.0))
        assert found.estimates.largest_weight == weight


def test_the_robust_estimate_is_its_recursion(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    """Jiang and Li's, with the model's value of the target's own order as what is to come."""
    rankings = explored(60)
    clicks = clicked(rankings)
    total = 0.0
    for each in rankings:
        values = bundles.expected(each.feeds(bundles.encoder(), each.candidates))[0].astype(np.float64).tolist()
        named = dict(zip(each.candidates, values, strict=True))
        ideal = [_soft(sorted(values, reverse=True)[place:])[1] for place in range(3)]
        robust, left = 0.0, dict(named)
        steps = []
        for place, ad_id in enumerate(each.ad_ids):
            chances, value = _soft(list(left.values()))
            ratio = chances[list(left).index(ad_id)] / each.propensity[place]
            steps.append((ratio, value, left.pop(ad_id), float((each.request_id, ad_id) in clicks), sum(ideal[place + 1 :])))
        for ratio, value, predicted, click, to_come in reversed(steps):
            robust = value + to_come + ratio * (click + robust - predicted - to_come)
        total += robust
    assert replay(logged(rankings, clicks), bundle, PlackettLuce(1.0)).estimates.dr.value == pytest.approx(total / 180, rel=1e-5)


def _soft(values: list[float]) -> tuple[list[float], float]:
    """The chances in proportion to values, and the value that they give."""
    chances = [value / sum(values) for value in values]
    return chances, sum(chance * value for chance, value in zip(chances, values, strict=True))


@pytest.mark.parametrize("sent", [{}, {"a1": {"genre": "drama", "tags": ["x", "y"]}}])
def test_a_shown_ad_is_scored_with_what_was_sent(bundle: Bundle, logged: Callable[..., ImpressionLog], sent: dict[str, Any]) -> None:
    """The ad is the better one with the features that were sent, and not with its own."""
    ads = {ad_id: pack_features(bundles.ADS[ad_id]) for ad_id in ("a1", "a2")}
    pair = [ranking(i, ["a1", "a2"], [0], [0.5], user_id="u", ads=ads, sent=sent, policy="epsilon_greedy 1.0") for i in range(2)]
    values = bundles.expected(pair[0].feeds(bundles.encoder(), ["a1", "a2"]))[0]
    assert bool(values[0] > values[1]) == bool(sent)
    found = replay(logged(pair, {("r0", "a1")}), bundle, EpsilonGreedy(0.0))
    assert found.estimates.largest_weight == (2 if sent else 0)


def test_rankings_that_cannot_be_weighed_are_counted_and_left_out(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings = explored(20)
    rankings[0] = changed(rankings[0], policy="greedy", candidates=[], propensity=[1.0] * 3)
    rankings[1] = changed(rankings[1], candidates=[])  # not told
    rankings[2] = changed(rankings[2], positions=[1, 3, 4])  # one above was not shown
    rankings[3] = changed(rankings[3], positions=[2, 3, 4])
    rankings[4] = changed(rankings[4], candidates=[each for each in rankings[4].candidates if each != rankings[4].ad_ids[1]])
    rankings[5] = changed(rankings[5], propensity=[0.5, 0.0, 0.5])
    rankings[6] = changed(rankings[6], positions=[1, 2, 2])
    rankings[7] = changed(rankings[7], candidates=[*rankings[7].candidates, rankings[7].candidates[0]])
    found = replay(logged(rankings), bundle, EpsilonGreedy(0.5))
    # Nothing of the rankings 1, 3 and 7, one impression of 2, 4 and 5, two of 6.
    assert (found.greedy, found.unfit) == (3, 3 + 2 + 3 + 2 + 2 + 1 + 3)
    assert (found.rankings, found.impressions) == (16, 12 * 3 + 1 + 1 + 1 + 2)


def test_a_log_without_exploration_is_refused(bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    greedy = [changed(each, policy="greedy", candidates=[], propensity=[1.0] * 3) for each in explored(4)]
    with pytest.raises(DataError, match="has 0 rankings that explored, which replay needs at least two of; 12 impressions are of greedy"):
        replay(logged(greedy), bundle, EpsilonGreedy(0.0))


def test_how_rankings_lie_in_files_makes_no_difference(
    bundle: Bundle, logged: Callable[..., ImpressionLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings = explored(90)
    one = replay(logged(rankings, files=1), bundle, PlackettLuce(1.0)).estimates
    monkeypatch.setattr("training.offpolicy.replay.AT_ONCE", 20)
    monkeypatch.setattr("training.export.graph.PAIRS", 16)
    many = replay(logged(rankings, files=7), bundle, PlackettLuce(1.0)).estimates
    for name in ("ips", "snips", "dr"):
        assert getattr(many, name).value == pytest.approx(getattr(one, name).value, rel=1e-5)
        assert getattr(many, name).high == pytest.approx(getattr(one, name).high, rel=1e-5)


# --- a prepared data set with propensities


@pytest.fixture
def bandit(tmp_path: Path) -> Prepared:
    """Rows of the test bundle's schema, each with one of 30 ads that was shown by chance."""
    random, folder = np.random.default_rng(2), tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "schema.toml").write_text(bundles.SCHEMA)
    types = {"ad.tags": pl.List(pl.String), "label": pl.Int8, "history": pl.List(pl.String)}
    ads = [{"ad_id": ad_id} | {f"ad.{name}": value for name, value in features.items()} for ad_id, features in bundles.ADS.items()]
    pl.DataFrame(ads, schema_overrides={"ad.tags": types["ad.tags"]}).write_parquet(folder / "ads.parquet")
    rows = {
        "label": (random.random(600) < 0.3).astype(np.int8),
        "user_id": [f"u{i % 7}" for i in range(600)],
        "ad_id": [f"a{i}" for i in random.integers(0, 30, 600)],
        "history": [["a3"] * (i % 3) for i in range(600)],
        "user.age": [("25", "35")[i % 2] for i in range(600)],
        "propensity": [1 / 30] * 600,
    }
    absent = {"user.interests": pl.List(pl.String), "user.income": pl.Float64, "context.slot": pl.String}
    frame = pl.DataFrame(rows, schema_overrides={"history": types["history"]})
    frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in absent.items()).write_parquet(folder / "train" / "0.parquet")
    return open_prepared(folder)


def test_a_data_set_with_propensities_is_replayed_row_by_row(bandit: Prepared, bundle: Bundle) -> None:
    (frame,) = bandit.frames("train")
    uniform = replay(bandit, bundle, EpsilonGreedy(1.0), split="train")
    assert (uniform.rankings, uniform.impressions) == (600, 600)
    assert uniform.estimates.ips.value == pytest.approx(frame["label"].mean())
    assert uniform.estimates.snips.value == pytest.approx(frame["label"].mean())
    encoder, packed = bundles.encoder(), {ad_id: pack_features(features) for ad_id, features in bundles.ADS.items()}

    @cache
    def chosen(user_id: str, age: str, behaviours: int) -> str:
        asked = ranking(0, ["a1"], [0], [1.0], user_id=user_id, user={"age": age}, history=["a3"] * behaviours, ads=packed)
        return f"a{bundles.expected(asked.feeds(encoder, list(bundles.ADS)))[0].argmax()}"

    rows = frame.select("label", "ad_id", "user_id", "user.age", pl.col("history").list.len()).iter_rows()
    best = sum(label * (ad_id == chosen(*asked)) for label, ad_id, *asked in rows)
    greedy = replay(bandit, bundle, EpsilonGreedy(0.0), split="train").estimates
    assert greedy.ips.value == pytest.approx(best * 30 / 600)
    assert greedy.largest_weight == pytest.approx(30)


def test_what_such_a_data_set_lacks_is_said(bandit: Prepared, bundle: Bundle) -> None:
    path = bandit.folder / "train" / "0.parquet"
    whole = pl.read_parquet(path)
    whole.with_columns(ad_id=pl.Series(["gone", *whole["ad_id"][1:]])).write_parquet(path)
    assert replay(bandit, bundle, EpsilonGreedy(0.0), split="train").unfit == 1
    whole.drop("propensity").write_parquet(path)
    with pytest.raises(DataError, match="column propensity is missing"):
        replay(bandit, bundle, EpsilonGreedy(0.0), split="train")
    (bandit.folder / "ads.parquet").unlink()
    with pytest.raises(DataError, match=r"no column holds ad\.genre, ad\.tags, ad\.price"):
        replay(bandit, bundle, EpsilonGreedy(0.0), split="train")


def test_rows_may_have_candidates_and_positions_of_their_own(bandit: Prepared, bundle: Bundle) -> None:
    path = bandit.folder / "train" / "0.parquet"
    whole = pl.read_parquet(path)
    offered = [[ad, f"a{(int(ad[1:]) + 1) % 30}"] for ad in whole["ad_id"]]
    whole = whole.with_columns(candidates=pl.Series(offered), propensity=pl.lit(0.5), position=pl.Series([1, 2] * 300))
    whole.write_parquet(path)
    uniform = replay(bandit, bundle, EpsilonGreedy(1.0), split="train")
    assert (uniform.rankings, uniform.unfit) == (600, 0)
    assert uniform.estimates.ips.value == pytest.approx(whole["label"].mean())
    greedy = replay(bandit, bundle, EpsilonGreedy(0.0), split="train").estimates
    assert greedy.largest_weight == pytest.approx(2)
    first = replay(bandit, bundle, EpsilonGreedy(1.0), top_k=1, split="train")
    assert first.rankings == 300
    assert first.estimates.ips.value == pytest.approx(whole.filter(pl.col("position") == 1)["label"].mean())
    whole.drop("position").write_parquet(path)
    with pytest.raises(DataError, match="--top-k needs a column position"):
        replay(bandit, bundle, EpsilonGreedy(1.0), top_k=1, split="train")


@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"a set of public data is not in {SOURCE}")
def test_open_bandit_s_own_policy_has_the_log_s_click_rate(tmp_path: Path) -> None:
    open_bandit.prepare(SOURCE, tmp_path / "data")
    given = {"epochs": "1", "threads": "1", "embedding": "4", "hidden": "8"}
    path, _ = train_and_publish(open_prepared(tmp_path / "data"), "deepfm", tmp_path / "models", "deepfm", given, small.quiet())
    bundle, data, clicks = load_bundle(path), open_prepared(tmp_path / "data"), 0
    for split in SPLITS:
        found = replay(data, bundle, EpsilonGreedy(1.0), split=split)
        clicks += found.estimates.clicks
        rate = found.estimates.clicks / found.impressions
        assert [found.estimates.ips.value, found.estimates.snips.value] == pytest.approx([rate, rate])
        assert found.estimates.largest_weight == pytest.approx(1)
        assert found.estimates.dr.low <= rate <= found.estimates.dr.high
    assert clicks == 38
    greedy = replay(data, bundle, EpsilonGreedy(0.0), split="valid").estimates
    assert greedy.largest_weight in (0, pytest.approx(80))
    assert greedy.warnings


# --- the command


def test_the_command_prints_a_table_or_json(tmp_path: Path, bundle: Bundle, logged: Callable[..., ImpressionLog]) -> None:
    rankings = explored(40)
    rankings[0] = changed(rankings[0], policy="greedy", candidates=[])
    folder = logged(rankings).folder
    code, out, complaint = run("-q", "replay", "--log", folder, "--bundle", bundle.path, "--clip", 10)
    assert (code, complaint) == (0, "")
    for words in (
        "doubly robust",
        "greedy: 39 rankings, 117 impressions",
        "3 impressions of rankings that did not explore",
        "clipped at 10",
    ):
        assert words in out
    assert "warning: " in out
    code, out, _ = run("replay", "--log", folder, "--bundle", bundle.path, "--policy", "plackett_luce:0.5", "--top-k", 2, "--json")
    document = json.loads(out)
    assert (code, document["policy"], document["rankings"], document["impressions"]) == (0, "plackett_luce 0.5", 39, 78)
    assert document["ips"]["low"] <= document["ips"]["value"] <= document["ips"]["high"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--policy", "best"], "'best' is not a policy; expected one such as greedy"),
        (["--since", "2030-01-01"], "has no row from 2030-01-01 00:00:00 UTC"),
        (["--top-k", "0"], "0 is not in the range"),
        (["--bundle", "nowhere"], "bundle nowhere cannot be read"),
    ],
)
def test_mistakes_are_sentences(bundle: Bundle, logged: Callable[..., ImpressionLog], words: list[str], complaint: str) -> None:
    code, _, document = run("replay", "--log", logged(explored(5)).folder, "--bundle", bundle.path, *words)
    assert (code, "Traceback" in document) == (2, False)
    assert complaint in document
