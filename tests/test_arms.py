"""Experiments: from a request's arm over the log to differences, whose intervals hold however often somebody looks."""

import json
from dataclasses import replace

import joining
import numpy as np
import polars as pl
import pytest
import small
from scipy.stats import norm
from test_cli import run

from features.served import pack_served, unpack_served
from service.api.requests import parse_request, to_query
from service.errors import InvalidError
from service.settings import Settings, SettingsError, load_settings
from service.telemetry.metrics import Metrics, RequestTimings
from training.offpolicy.arms import always_valid, compare_arms, influence

BODY = b'{"user": {"id": "u1"}, "candidates": ["a1"], "experiment": %s}'
ARMS = Settings(experiments="button=control|green,floor=none|low|high").arms


# --- from a request to the log and the metrics


def test_an_arm_goes_from_the_request_into_the_query() -> None:
    query = to_query(parse_request(BODY % b'{"button": "green", "floor": "low"}'), 10, arms=ARMS)
    assert query.experiment == {"button": "green", "floor": "low"}
    assert to_query(parse_request(BODY % b"{}"), 10).experiment == {}


@pytest.mark.parametrize(
    ("sent", "pointer", "says"),
    [
        (b'{"colour": "red"}', ("experiment", "colour"), "the service's setting experiments has button, floor"),
        (b'{"button": "red"}', ("experiment", "button"), "the experiment has control, green"),
        (b'{"button": "GREEN"}', ("experiment", "button"), "should match pattern"),
        (b"{" + b", ".join(b'"e%d": "a"' % i for i in range(9)) + b"}", ("experiment",), "at most 8"),
    ],
)
def test_an_experiment_or_arm_that_there_is_not_is_pointed_at(sent: bytes, pointer: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidError) as refused:
        to_query(parse_request(BODY % sent), 10, arms=ARMS)
    (mistake,) = refused.value.mistakes
    assert mistake.path == pointer
    assert says in mistake.detail


TWICE = ["a=x|x", "a=x|y,a=z|w"]


@pytest.mark.parametrize("text", [*TWICE, "button", "button=", "button=one", "button=a|b,", "b c=a|b", "button=a|" + "x" * 33])
def test_a_setting_of_experiments_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="setting ADRANK_EXPERIMENTS"):
        load_settings({"experiments": text})


def test_arms_are_counted_of_what_was_answered_well() -> None:
    metrics = Metrics()
    for outcome in ("ok", "ok", "over_limit"):
        metrics._rows.append(row := RequestTimings("/rank"))  # as the middleware does
        row.outcome, row.experiment = outcome, {"button": "green"}
    metrics.flush()
    assert metrics.registry.get_sample_value("adrank_experiment_requests_total", {"experiment": "button", "arm": "green"}) == 2


def test_a_record_keeps_its_arms_and_older_ones_have_none() -> None:
    record = joining.ranking(experiment={"button": "green"})
    assert unpack_served(pack_served(record)).experiment == {"button": "green"}
    assert len(pack_served(replace(record, experiment={}))) < len(pack_served(record)) - 20
    assert unpack_served(pack_served(joining.ranking())).experiment == {}


# --- what the arms came to


def test_a_comparison_by_hand() -> None:
    first, second = ((np.array([1.0, 0.0, 2.0]), np.array([2.0, 2.0, 4.0])), (np.array([3.0, 1.0]), np.array([4.0, 1.0])))
    rate, variance = influence(*first)
    assert (rate, variance) == pytest.approx((3 / 8, np.var([0.25 * 3 / 8, -0.75 * 3 / 8, 0.5 * 3 / 8], ddof=1)))
    frames = {
        arm: pl.DataFrame({"clicks": clicks, "impressions": seen, "conversions": clicks, "paid": 2 * clicks})
        for arm, (clicks, seen) in (("a", first), ("b", second))
    }
    found = compare_arms(frames, planned=5)
    move = found.metrics["ctr"]["b"]
    sigma2 = 5 * (variance / 3 + influence(*second)[1] / 2)
    rho2 = (-2 * np.log(0.05) + np.log(-2 * np.log(0.05) + 1)) / 5
    radius = np.sqrt(sigma2) * np.sqrt(2 * (5 * rho2 + 1) / (25 * rho2) * np.log(np.sqrt(5 * rho2 + 1) / 0.05))
    assert (move.rate, move.difference, move.high - move.difference) == pytest.approx((0.8, 0.8 - 3 / 8, radius))
    assert found.metrics["revenue"]["b"].difference == pytest.approx(2 * move.difference)
    assert found.p_sample_ratio == pytest.approx(0.6547, abs=1e-4)  # chi-square of 3 and 2: 0.2
    assert compare_arms(frames, 5, shares=(0.999, 0.001)).p_sample_ratio < 1e-9
    assert [each[:20] for each in found.warnings] == ["arm a has fewer than", "arm b has fewer than"]


WORLDS, USERS = 100, 1200


@pytest.mark.parametrize(("lift", "returning"), [(0.0, False), (0.3, False), (0.0, True)])
def test_intervals_hold_however_often_somebody_looks(lift: float, returning: bool) -> None:
    """Users of their own tastes, in arms by chance: one after the other with a look every 25, or all there and a look each day."""
    random, missed, naive = np.random.default_rng(4), 0, 0
    for _ in range(WORLDS):
        arm = random.integers(0, 2, USERS)
        taste = 0.7 * random.beta(1, 6, USERS) * (1 + lift * arm)
        if returning:
            seen = random.poisson(0.2, (60, USERS)).cumsum(0)
            new = np.diff(seen, axis=0, prepend=0)
            clicks = random.binomial(new, taste).cumsum(0)
            looks = [(np.flatnonzero(n), c, n) for n, c in zip(seen[3:], clicks[3:], strict=True)]
        else:
            n = 1 + random.poisson(2, USERS)
            c = random.binomial(n, taste)
            looks = [(np.arange(upto), c, n) for upto in range(200, USERS, 25)]
        truth, wrong, off = lift * 0.1, False, False
        for users, c, n in looks:
            (r0, v0), (r1, v1) = (influence(c[some], n[some].astype(float)) for some in (users[arm[users] == 0], users[arm[users] == 1]))
            both = v0 / (arm[users] == 0).sum() + v1 / (arm[users] == 1).sum()
            wrong |= abs(r1 - r0 - truth) > always_valid(len(users) * both, len(users), 1000)
            off |= abs(r1 - r0 - truth) > norm.ppf(0.975) * both**0.5
        missed, naive = missed + wrong, naive + off
    assert missed <= 0.05 * WORLDS + 3 * (0.05 * 0.95 * WORLDS) ** 0.5
    assert naive > 0.08 * WORLDS  # what a plain interval would say


def log_of(folder, users: int = 600) -> None:
    """Users by turns in two arms: of control each fourth clicks its ad, of green each second; one user is in both."""
    made, events = [], []
    for i in range(2 * users):
        user, arm = f"u{i % users}", ("control", "green")[i % 2 if i else 1]
        ts = joining.T0 + i
        experiment = {"button": arm, "other": "x"}
        made.append(
            joining.ranking(f"r{i}", ts, ("a1",), user_id=user, history=[], experiment=experiment, bids=[2_000_000], bid_types=["cpc"])
        )
        if (i // 2) % (4 if arm == "control" else 2) == 0:
            events.append(joining.click(f"r{i}", ts=ts + 1, user_id=user))
            events.append(joining.conversion(f"r{i}", ts=ts + 2, user_id=user))
    made.append(joining.ranking("without", joining.T0, ("a1",)))
    joining.write_raw(folder, small.schema(), made, sorted(events, key=lambda e: e.ts))


def test_the_command_compares_the_arms_of_a_log(tmp_path) -> None:
    log_of(tmp_path / "log")
    code, out, err = run("compare-arms", "--log", tmp_path / "log", "--experiment", "button", "--planned", 600, "--json")
    assert code == 0, (out, err)
    found = json.loads(out)
    assert {arm: counts["users"] for arm, counts in found["arms"].items()} == {"control": 299, "green": 300}
    assert found["crossed"] == 1
    ctr, revenue = found["metrics"]["ctr"]["green"], found["metrics"]["revenue"]["green"]
    assert ctr["difference"] == pytest.approx(0.25, abs=0.005)
    assert 0 < ctr["low"] < ctr["difference"] < ctr["high"] < 0.5
    assert revenue["difference"] == pytest.approx(2 * ctr["difference"])
    assert found["metrics"]["conversion_rate"]["green"]["rate"] == pytest.approx(0.5, abs=0.005)
    code, out, err = run(
        "compare-arms", "--log", tmp_path / "log", "--experiment", "button", "--arms", "green,control", "--shares", "0.7,0.3"
    )
    assert code == 3  # the users are not in such shares
    assert "sample ratio mismatch" in out
    assert "always-valid 95 % interval" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--experiment", "colour"), "has no ranking of an experiment colour"),
        (("--experiment", "other"), "has no user in the arm a second one"),
        (("--experiment", "button", "--arms", "control,red"), "has no user in the arm red; the log has control, green"),
        (("--experiment", "button", "--shares", "0.5"), "expected a share above 0 for each of the arms control, green"),
        (("--experiment", "button", "--arms", "control"), "expected at least two arms, each once"),
        (("--experiment", "button", "--arms", "control,control"), "expected at least two arms, each once"),
        (("--experiment", "button", "--shares", "nan,1"), "expected a share above 0 for each of the arms control, green"),
        (("--experiment", "button", "--shares", "half"), "expected numbers apart by commas"),
    ],
)
def test_mistakes_are_sentences(words: tuple[str, ...], says: str, tmp_path) -> None:
    log_of(tmp_path / "log", 10)
    code, _, err = run("compare-arms", "--log", tmp_path / "log", *words)
    assert (code, says in err) == (2, True), err
