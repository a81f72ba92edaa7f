"""A second version beside the live one: who is ranked by it, what is measured of it, and what stops it."""

import asyncio
import contextlib
import json
import re
import threading
import time
from types import SimpleNamespace

import bundles
import numpy as np
import pytest
from conftest import running, until
from processes import fill, serving
from test_swap import CANDIDATES, USERS, publish, until_version

from features.bundle import MODEL, BundleError, locked
from features.challenger import (
    CHALLENGER,
    VERDICT,
    CanaryBounds,
    CanaryDecision,
    Challenger,
    challenge,
    read_challenger,
    read_decision,
    write_decision,
)
from features.releases import promote, rollback, stop
from features.state import UserState
from service.errors import InvalidError
from service.models import canary as at_work
from service.models import watcher as reload
from service.models.canary import at_least, hopeless, judge
from service.models.evidence import CHALLENGING, LATE, LIVE, SLOT_SECONDS, SLOTS, EvidenceWindow
from service.ranking.query import Query
from service.ranking.ranker import of_version
from service.settings import Settings
from tests.test_cli import refused, run

pytestmark = pytest.mark.anyio

FEW = CanaryBounds(min_requests=20)
BROKEN = 1e30
"""A price for which the model has no number: see `bundles.TOO_DEAR`."""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(reload, "JUDGE_SECONDS", 0.02)


def two(models, bias=1.0, words=0, **more):
    """A live version and one that is not."""
    live, expected = publish(models)
    other, expected_of_other = publish(models, bias=bias, words=words, make_current=False, **more)
    return live, other, {live: expected, other: expected_of_other}


async def until_status(client, holds, seconds=20):
    """Wait until `/v1/models` says so of the challenger of `din`; what it says then."""

    def status(said):
        (found,) = [model["challenger"] for model in said["models"] if model["name"] == "din"]
        return found

    return status(await client.until("/v1/models", lambda said: holds(status(said)), seconds))


async def until_one_is_loaded(client):
    async with asyncio.timeout(90):
        while (await client.get("/metrics")).text.count("adrank_model_info{") != 1:
            await asyncio.sleep(0.02)


def there(status):
    return status is not None


def stopped(status):
    return status is not None and status["state"] == "stopped"


@contextlib.asynccontextmanager
async def challenged(models, store, mode="canary", share=1.0, bounds=FEW, **other):
    """A service, its live version, and that by which it is challenged, which is as `two` is told, for a `share` or for some."""
    live, version, expected = two(models, **other)
    async with running(Settings(models=models, redis="memory://"), store) as client:
        client.expected = expected
        challenge(models, "din", Challenger(int(version), mode, share or some_share(version), bounds))
        await until_status(client, there)
        yield client, live, version


def some_share(version):
    """A share to which some of the few users fall, and not all."""
    shares = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
    return next(s for s in shares if 0 < sum(Challenger(int(version), "canary", s).takes("din", f"u{i}") for i in USERS) < len(USERS))


async def filled(store):
    await store.put_users((f"u{i}", UserState({"age": ("25", "35")[i % 2], "income": float(i)}, [f"a{i % 30}"], [1])) for i in USERS)


class TestShare:
    def test_who_falls_to_it_is_always_the_same_and_as_many_as_stated(self):
        users = [f"u{i}" for i in range(20_000)]
        for share in (0.05, 0.1, 0.5, 1.0):
            facts = Challenger(7, "canary", share)
            taken = {user for user in users if facts.takes("din", user)}
            assert len(taken) / len(users) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(users)) + 1e-9)
            assert taken == {user for user in users if Challenger(7, "shadow", share).takes("din", user)}
            wider = Challenger(7, "canary", min(1.0, share * 1.5))
            assert all(wider.takes("din", user) for user in taken)

    def test_another_version_or_model_takes_others(self):
        users = [f"u{i}" for i in range(20_000)]
        taken = [
            {user for user in users if Challenger(version, "canary", 0.1).takes(name, user)}
            for version, name in ((7, "a"), (8, "a"), (7, "b"))
        ]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert len(taken[one] & taken[other]) / len(users) == pytest.approx(0.01, abs=0.004)

    def test_any_text_is_a_user(self):
        for user in ("", "é", "\ud800", "\0", "x" * 10_000):
            assert Challenger(7, "canary", 1.0).takes("din", user)


class TestFile:
    def test_it_is_read_as_it_was_written(self, tmp_path):
        _, other, _ = two(tmp_path)
        facts = Challenger(int(other), "shadow", 0.25, CanaryBounds(0.02, 2.0, (0.8, 1.25), 50))
        challenge(tmp_path, "din", facts)
        assert read_challenger(tmp_path / "din") == facts
        decision = CanaryDecision("p99", "slow")
        write_decision(tmp_path / "din", facts, decision)
        assert read_decision(tmp_path / "din", facts) == decision
        again = Challenger(int(other), "shadow", 0.25)
        challenge(tmp_path, "din", again)
        assert read_decision(tmp_path / "din", again) is None
        write_decision(tmp_path / "din", facts, decision)  # late, of the one before
        assert not (tmp_path / "din" / VERDICT).exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"share": 0},
            {"share": 1.5},
            {"share": float("nan")},
            {"share": "all"},
            {"mode": "live"},
            {"mode": ["shadow"]},
            {"version": "new"},
            {"version": -1},
            {"version": True},
            {"since": 3},
            {"bounds": None},
            {"bounds": {}},
            {"bounds": {"error_share": 2, "p99_ratio": 1, "p_click_ratio": [0, 1], "min_requests": 1}},
            {"bounds": {"error_share": 0, "p99_ratio": 0, "p_click_ratio": [0, 1], "min_requests": 1}},
            {"bounds": {"error_share": 0, "p99_ratio": 1, "p_click_ratio": [2, 1], "min_requests": 1}},
            {"bounds": {"error_share": 0, "p99_ratio": 1, "p_click_ratio": [0], "min_requests": 1}},
            {"bounds": {"error_share": 0, "p99_ratio": 1, "p_click_ratio": [0, 1], "min_requests": 0}},
            {"bounds": {"error_share": 0, "p99_ratio": 1, "p_click_ratio": [0, 1], "min_requests": 1, "max_seconds": 0}},
            {"bounds": {"error_share": 0, "p99_ratio": 1, "p_click_ratio": [0, 1], "min_requests": 1, "max_seconds": 1e9}},
            {"more": 1},
        ],
    )
    def test_one_that_is_none_is_a_sentence(self, tmp_path, change):
        _, other, _ = two(tmp_path)
        challenge(tmp_path, "din", Challenger(int(other), "shadow", 0.25))
        path = tmp_path / "din" / CHALLENGER
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(BundleError, match="challenger"):
            read_challenger(tmp_path / "din")

    @pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"version": 1}', "x" * 70_000, "[" * 60_000])
    def test_one_that_is_no_object_is_a_sentence(self, tmp_path, text):
        (tmp_path / CHALLENGER).write_text(text)
        with pytest.raises(BundleError, match="does not name a challenger"):
            read_challenger(tmp_path)
        (tmp_path / VERDICT).write_text(text)
        assert read_decision(tmp_path, Challenger(1, "shadow", 1.0)) is None

    def test_the_command_line(self, tmp_path):
        live, other, _ = two(tmp_path)
        home, where = tmp_path / "din", ("--models", tmp_path, "--name", "din")
        said = f"din {other} challenges the live version: canary, 0.1 of the users\n"
        bounds = ("--max-error-share", 0.5, "--max-p99-ratio", 3, "--p-click-ratio", 0.9, 1.1, "--min-requests", 7, "--max-seconds", 0.5)
        assert run("promote", *where, "--canary", 0.1, *bounds) == (0, said, "")
        facts = read_challenger(home)
        assert (facts.version, facts.mode, facts.share, facts.bounds) == (
            int(other),
            "canary",
            0.1,
            CanaryBounds(0.5, 3, (0.9, 1.1), 7, 0.5),
        )
        assert run("promote", *where, "--shadow", 1, "--version", other)[0] == 0
        assert read_challenger(home).bounds == CanaryBounds()
        assert run("promote", *where, "--stop") == (0, "no version of din challenges the live one any more\n", "")
        assert read_challenger(home) is None
        refused(run("promote", *where, "--stop"), "no version of din in .* challenges")
        refused(run("promote", *where, "--stop", "--shadow", 1), "choose one")
        refused(run("promote", *where, "--max-p99-ratio", 1), "give --shadow or --canary too")
        refused(run("promote", *where, "--canary", 0.1, "--version", live), "it is live")
        refused(run("promote", *where, "--canary", 0.1, "--p-click-ratio", 2, 1), "the lower first")
        refused(run("promote", *where, "--canary", 0.1, "--version", 7), "din has no version 7")
        refused(run("promote", "--models", tmp_path, "--name", "absent", "--canary", 0.1, "--version", 7), "absent")
        refused(run("promote", "--models", tmp_path, "--name", "../din", "--canary", 0.1, "--version", 7), "is not a model name")

    @pytest.mark.parametrize("end", [promote, rollback, stop])
    def test_a_promotion_a_rollback_and_a_stop_end_it(self, tmp_path, end):
        publish(tmp_path)
        _, other, _ = two(tmp_path)
        challenge(tmp_path, "din", facts := Challenger(int(other), "shadow", 0.25))
        write_decision(tmp_path / "din", facts, CanaryDecision("p99", "slow"))
        end(tmp_path, "din")
        assert not {CHALLENGER, VERDICT} & {path.name for path in (tmp_path / "din").iterdir()}


class TestCanary:
    async def test_its_users_get_it_and_the_others_the_live_version(self, tmp_path, ads):
        await filled(ads)
        async with challenged(tmp_path / "models", ads, "canary", None, CanaryBounds(p_click_ratio=(0, 100)), words=2) as (
            client,
            live,
            other,
        ):
            facts = read_challenger(tmp_path / "models" / "din")
            users = [f"u{i}" for i in USERS]
            assert 0 < sum(facts.takes("din", user) for user in users) < len(users)
            for _ in range(2):
                for user in users:
                    ranking = await client.rank(user, CANDIDATES)
                    version = ranking["model"]["version"]
                    assert version == (other if facts.takes("din", user) else live)
                    assert {ad["ad_id"]: ad["p_click"] for ad in ranking["ads"]} == pytest.approx(client.expected[version][user], abs=2e-6)
            (version,) = {
                (await client.rank(user, options={"model": "din"}))["model"]["version"] for user in users if facts.takes("din", user)
            }
            assert version == other
            taken = 3 * sum(facts.takes("din", user) for user in users)
            assert await client.metric('adrank_challenger_requests_total{mode="canary",model="din",outcome="ok"}') == taken
            assert (await client.get("/metrics")).text.count("adrank_model_info{") == 2
            status = await until_status(client, there)
            assert (status["version"], status["mode"], status["share"], status["state"]) == (other, "canary", facts.share, "running")
            assert status["last_10_minutes"]["requests"] == taken
            stop(tmp_path / "models", "din")
            await until_status(client, lambda status: status is None)
            assert {(await client.rank(user))["model"]["version"] for user in users} == {live}
            assert (await client.get("/metrics")).text.count("adrank_model_info{") == 1

    async def test_it_never_holds_up_the_live_version_and_stops_within_seconds(self, tmp_path, ads):
        """Each of its runs takes 0.6 s, and at 10 % of the users 200 of them would take minutes."""
        async with challenged(tmp_path / "models", ads, "canary", 0.5, CanaryBounds(max_seconds=0.1), bias=0.0) as (client, live, _):
            facts = read_challenger(tmp_path / "models" / "din")
            slow_down(client, 0.6)
            theirs, others = (next(f"u{i}" for i in range(99) if facts.takes("din", f"u{i}") is takes) for takes in (True, False))
            took, began, canary = [], time.monotonic(), []

            async def asking():
                while True:
                    at = time.monotonic()
                    answer = await client.rank(theirs, CANDIDATES)
                    assert (answer["model"]["version"], answer["degraded"]) == (live, [])
                    canary.append((time.monotonic() - at, answer["timings_ms"]))

            task = asyncio.create_task(asking())
            async with asyncio.timeout(90):
                while not stopped(status := await until_status(client, there)):
                    at = time.monotonic()
                    await client.rank(others, CANDIDATES)
                    took.append(time.monotonic() - at)
                    await asyncio.sleep(0.01)
            task.cancel()
            assert time.monotonic() - began < 10
            assert status["verdict"]["reason"] == "late"
            assert status["last_10_minutes"]["late"] >= 5
            assert (status["bounds"]["max_seconds"], status["bounds"]["min_requests"]) == (0.1, 200)
            # Held up, each that comes while it runs would take up to 0.6 s: more than half of them over 0.1 s.
            assert np.mean(np.array(took) > 0.1) < 0.2, took
            assert await client.metric('adrank_challenger_requests_total{mode="canary",model="din",outcome="late"}') >= 5
            assert all(timings["inference"] < 90 < timings["queue"] for seconds, timings in canary if seconds > 0.1)

    async def test_a_run_that_hangs_stops_it_by_itself(self, tmp_path, ads, monkeypatch):
        monkeypatch.setattr(at_work, "HANGS_SECONDS", 0.3)
        async with challenged(tmp_path / "models", ads, "canary", 1.0, CanaryBounds(max_seconds=0.1), bias=0.0) as (client, _, _):
            slow_down(client, 1.5)
            await client.rank("u1", CANDIDATES)
            status = await until_status(client, stopped, 5)
            assert re.search(r"a run has taken [01]\.\d s, 0\.1 s are allowed", status["verdict"]["detail"])

    async def test_a_caller_s_deadline_is_kept_and_no_fault_of_it(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads, "canary", 1.0, CanaryBounds(max_seconds=10, p99_ratio=1e6), bias=0.0) as (
            client,
            live,
            _,
        ):
            slow_down(client, 1.5)
            began = time.monotonic()
            answer = await client.rank("u1", CANDIDATES, options={"deadline_ms": 1_000})
            assert (answer["model"]["version"], time.monotonic() - began < 1.5) == (live, True)
            status = await until_status(client, lambda status: status["last_10_minutes"]["requests"] == 1)
            assert (status["last_10_minutes"]["late"], status["last_10_minutes"]["errors"]) == (0, 0)
            assert status["last_10_minutes"]["p99_ms"] > 1_400

    async def test_the_store_is_asked_once_and_stages_are_those_of_who_ranks(self, tmp_path, ads, monkeypatch):
        asked, get_user = [], ads.get_user

        async def counting(user_id):
            asked.append(user_id)
            return await get_user(user_id)

        monkeypatch.setattr(ads, "get_user", counting)
        async with challenged(tmp_path / "models", ads, "canary", 1.0, CanaryBounds(min_requests=1000)) as (client, live, _):

            def failing(_):
                time.sleep(0.05)
                raise at_work.ScoringError("as told")

            client.app.state.service.ranker.challenges["din"].model.scorer.run = failing
            answer = await client.rank("u1", CANDIDATES)
            assert (answer["model"]["version"], asked) == (live, ["u1"])
            assert answer["timings_ms"]["inference"] < 45 < answer["timings_ms"]["queue"]

    async def test_one_that_is_stopped_while_the_store_is_asked_does_not_rank(self, tmp_path, ads, monkeypatch):
        async with challenged(tmp_path / "models", ads) as (client, live, _):
            arrived, go_on, get_user = asyncio.Event(), asyncio.Event(), ads.get_user

            async def waiting(user_id):
                arrived.set()
                await go_on.wait()
                return await get_user(user_id)

            monkeypatch.setattr(ads, "get_user", waiting)
            asking = asyncio.create_task(client.rank("u1", CANDIDATES))
            await arrived.wait()
            client.app.state.service.ranker.challenges["din"].stop(CanaryDecision("p99", "slow"))
            go_on.set()
            assert (await asking)["model"]["version"] == live

    async def test_its_failures_are_ranked_by_the_live_version(self, tmp_path, ads, caplog):
        async with challenged(tmp_path / "models", ads) as (client, live, _):
            spoil(client)
            answers = [await client.rank(f"u{i}", CANDIDATES) for i in range(4)]
            assert {answer["model"]["version"] for answer in answers} == {live}
            assert all(len(answer["ads"]) == len(CANDIDATES) and answer["degraded"] == [] for answer in answers)
            assert await client.metric('adrank_challenger_requests_total{mode="canary",model="din",outcome="error"}') == 4
            assert await client.metric('adrank_requests_total{model="din",outcome="ok",route="/rank"}') == 4
            assert caplog.text.count("failed on a request, and may on more") == 1

    async def test_a_caller_whose_request_is_wrong_is_told_so_and_it_is_not_counted(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads) as (client, _, _):
            for _ in range(5):
                answer = await client.post("/rank", json={"user": {"id": "u", "features": {"agee": "25"}}, "candidates": ["a1"]})
                assert answer.status_code == 422, answer.text
            assert (await until_status(client, there))["last_10_minutes"]["requests"] == 0

    async def test_where_it_gives_no_number_the_live_version_ranks(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads) as (client, live, _):
            spoil(client, lambda scores: scores * np.float32("nan"))
            assert (await client.rank("u1", CANDIDATES))["model"]["version"] == live
            assert (await until_status(client, there))["last_10_minutes"]["errors"] == 1


class TestNamed:
    """A request that asks for a version."""

    @pytest.mark.parametrize(("mode", "mixed"), [("canary", False), ("shadow", False), ("canary", True)])
    async def test_each_version_ranks_whoever_asks_and_is_no_evidence(self, tmp_path, ads, mode, mixed):
        await filled(ads)
        async with challenged(tmp_path / "models", ads, mode, 1.0, CanaryBounds(p_click_ratio=(0, 100)), words=2) as (client, live, other):
            for version in (live, other, live):
                answer = await client.rank("u1", CANDIDATES, options={"version": version, "explain": True, "top_k": 7})
                assert answer["model"]["version"] == version
                assert {ad["ad_id"]: ad["p_click"] for ad in answer["ads"]} == pytest.approx(client.expected[version]["u1"], abs=2e-6)
            none = {"candidates": "all", "filters": {"genre": ["none such"]}, "options": {"version": other, "top_k": 1}}
            assert (await client.rank("u1", **none))["model"]["version"] == other
            if mixed:  # what a share chose is counted as ever
                await client.rank("u1", CANDIDATES)
            seen = (await until_status(client, there))["last_10_minutes"]
            assert (seen["requests"], seen["live"]["requests"]) == (mixed, 0)
            assert await client.metric(f'adrank_challenger_requests_total{{mode="{mode}",model="din",outcome="ok"}}') == mixed
            assert await client.metric('adrank_served_log_total{result="version_named"}') == 4

    @pytest.mark.parametrize(("act", "error"), [("fails", (500, "scoring_failed")), ("is slow", (504, "deadline"))])
    async def test_no_other_ranks_in_its_place_and_what_goes_wrong_is_no_evidence(self, tmp_path, ads, act, error):
        async with challenged(tmp_path / "models", ads, bounds=CanaryBounds(max_seconds=0.1)) as (client, _, other):
            spoil(client) if act == "fails" else slow_down(client, 0.3)
            answer = await client.post("/rank", json={"user": {"id": "u1"}, "candidates": ["a1"], "options": {"version": other}})
            assert (answer.status_code, answer.json()["code"]) == error
            seen = (await until_status(client, there))["last_10_minutes"]
            assert (seen["requests"], seen["errors"], seen["late"]) == (0, 0, 0)

    async def test_one_that_is_not_loaded_is_told_with_those_that_are(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads) as (client, live, other):

            async def refusal(version):
                answer = await client.post("/rank", json={"user": {"id": "u1"}, "candidates": ["a1"], "options": {"version": version}})
                return answer.status_code, answer.json()["code"], answer.json()["detail"]

            told = "no such version of din is loaded; there are: "
            assert await refusal("1") == (404, "unknown_model", f"{told}{live}, {other}")
            client.app.state.service.ranker.challenges["din"].stop()
            assert await refusal(other) == (404, "unknown_model", told + live)

    def test_a_challenger_is_not_asked_for_more_than_the_click(self):
        live, other = (SimpleNamespace(name="din", bundle=SimpleNamespace(version=version)) for version in (1, 2))
        query, challenge = Query(user_id="u1", ad_ids=["a1"], version="2"), SimpleNamespace(model=other)
        assert of_version(query, live, challenge) == (other, challenge)
        query.weights = {"conversion": 20.0}
        with pytest.raises(InvalidError, match="gives p\\(click\\) alone, and the request needs conversion"):
            of_version(query, live, challenge)


def spoil(client, act=None):
    """Let the challenger's scorer fail, or change what it gives."""
    scorer = client.app.state.service.ranker.challenges["din"].model.scorer
    run = scorer.run

    def spoilt(feeds):
        if act is None:
            raise at_work.ScoringError("as told")
        return act(run(feeds))

    scorer.run = spoilt


def slow_down(client, seconds):
    """Let each run of the challenger's scorer take so long."""
    spoil(client, lambda scores: time.sleep(seconds) or scores)


async def ask(client, count, **more):
    for i in range(count):
        await client.rank(f"u{i}", CANDIDATES, **more)


class TestShadow:
    @pytest.mark.parametrize("words", [0, 2])
    async def test_its_differences_are_exact_and_nobody_sees_it(self, tmp_path, ads, words):
        await filled(ads)
        async with challenged(tmp_path / "models", ads, "shadow", None, CanaryBounds(p_click_ratio=(0, 100)), words=words) as (
            client,
            live,
            other,
        ):
            facts = read_challenger(tmp_path / "models" / "din")
            differences = []
            for i in USERS:
                user = f"u{i}"
                assert (await client.rank(user, CANDIDATES))["model"]["version"] == live
                if facts.takes("din", user):
                    differences += [abs(client.expected[other][user][ad] - client.expected[live][user][ad]) for ad in CANDIDATES]
                    scored = len(differences) / len(CANDIDATES)
                    await client.until_metric('adrank_challenger_requests_total{mode="shadow",model="din",outcome="ok"}', scored)
            assert 0 < len(differences) < len(CANDIDATES) * len(USERS)
            assert await client.metric('adrank_shadow_difference_count{model="din"}') == len(differences)
            assert await client.metric('adrank_shadow_difference_sum{model="din"}') == pytest.approx(
                sum(differences), abs=1e-5 * len(differences)
            )
            for bound in (0.05, 0.1, 0.2):
                below = sum(difference <= bound for difference in differences)
                assert await client.metric(f'adrank_shadow_difference_bucket{{le="{bound}",model="din"}}') == below

    async def test_one_at_a_time_and_the_rest_is_dropped(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads, "shadow") as (client, _, _):
            await asyncio.gather(*(client.rank(f"u{i}", CANDIDATES) for i in range(8)))
            count = 'adrank_challenger_requests_total{{mode="shadow",model="din",outcome="{}"}}'.format
            await client.until_metric(count("ok"), 1)
            assert await client.metric(count("ok")) + await client.metric(count("dropped")) == 8
            assert await client.metric(count("dropped")) >= 5


class TestStop:
    """Each of the bounds, by a real service in this process and a real model that leaves it."""

    async def stops(self, client, reason, models, live):
        async with asyncio.timeout(90):
            while not stopped(status := await until_status(client, there)):
                await ask(client, 10)
        assert status["verdict"]["reason"] == reason
        assert await client.metric(f'adrank_challenger_rollback_total{{model="din",reason="{reason}"}}') == 1
        assert {(await client.rank(f"u{i}"))["model"]["version"] for i in range(20)} == {live}
        await until((models / "din" / VERDICT).exists)
        await until_one_is_loaded(client)
        return status["verdict"]["detail"]

    @pytest.mark.parametrize(("mode", "share"), [("canary", 0.5), ("shadow", 1.0)])
    async def test_a_model_that_fails(self, tmp_path, ads, caplog, mode, share):
        async with challenged(tmp_path / "models", ads, mode, share) as (client, live, other):
            spoil(client)
            detail = await self.stops(client, "errors", tmp_path / "models", live)
            assert re.search(r"^of its first \d+ requests \d+ failed, 0 took over 0\.25 s", detail)
            assert f"challenger din {other} is stopped: {detail}" in caplog.text

    @pytest.mark.parametrize(("mode", "bias"), [("canary", 4.0), ("shadow", -3.0)])
    async def test_a_model_whose_p_click_is_off(self, tmp_path, ads, mode, bias):
        bounds = CanaryBounds(min_requests=20, p99_ratio=1000.0, p_click_ratio=(0.5, 1.25))
        async with challenged(tmp_path / "models", ads, mode, 0.5 if mode == "canary" else 1.0, bounds, bias=bias) as (client, live, _):
            detail = await self.stops(client, "p_click", tmp_path / "models", live)
            assert re.search(r"^mean p\(click\) 0\.\d+ against 0\.\d+, 0\.5 to 1\.25 times is allowed, over \d+ requests", detail)

    async def test_a_shadow_that_is_slow(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads, "shadow", 1.0, CanaryBounds(max_seconds=0.05), bias=0.0) as (client, live, _):
            slow_down(client, 0.2)
            await self.stops(client, "late", tmp_path / "models", live)

    async def test_the_same_version_goes_on(self, tmp_path, ads):
        async with challenged(tmp_path / "models", ads, "canary", 0.5, CanaryBounds(min_requests=20, p99_ratio=50.0), bias=0.0) as (
            client,
            _,
            _,
        ):
            await ask(client, 200)
            await asyncio.sleep(0.1)
            assert (await until_status(client, there))["state"] == "running"
            assert (await until_status(client, there))["last_10_minutes"]["requests"] > 60

    async def test_what_was_stopped_stays_so_until_it_is_announced_again(self, tmp_path, ads):
        models = tmp_path / "models"
        live, other, _ = two(models)
        publish(models)
        bundles.set_current(models, "din", int(live))
        challenge(models, "din", facts := Challenger(int(other), "canary", 1.0, FEW))
        write_decision(models / "din", facts, CanaryDecision("p99", "slow"))
        async with running(Settings(models=models, redis="memory://"), ads) as client:  # as after a restart
            status = await until_status(client, stopped)
            assert status["verdict"] == {"reason": "p99", "detail": "slow"}
            assert (await client.rank())["model"]["version"] == live
            challenge(models, "din", Challenger(int(other), "canary", 1.0, FEW))
            await until_version(client, other)

    async def test_who_waits_for_a_canary_that_is_stopped_is_ranked_by_the_live_version(self, tmp_path, ads):
        bounds = CanaryBounds(min_requests=1_000, max_seconds=30.0)
        async with challenged(tmp_path / "models", ads, "canary", 1.0, bounds) as (client, live, _):
            challenge, go = client.app.state.service.ranker.challenges["din"], threading.Event()
            spoil(client, lambda scores: go.wait(90) and scores)
            asked = [asyncio.create_task(client.rank(f"u{i}", CANDIDATES)) for i in range(3)]
            await until(lambda: len(challenge._runs) >= 3)
            challenge.stop()
            go.set()
            answers = await asyncio.gather(*asked)  # none of them is cancelled with what it waited for
        assert [answer["model"]["version"] for answer in answers[1:]] == [live, live]

    async def test_a_repository_that_cannot_be_written_is_said(self, tmp_path, ads, monkeypatch, caplog):
        def full(*_):
            raise OSError("read-only")

        monkeypatch.setattr(reload, "write_decision", full)
        async with challenged(tmp_path / "models", ads) as (client, live, _):
            spoil(client)
            await ask(client, 30)
            await until_status(client, stopped)
            assert (await client.rank())["model"]["version"] == live
            await until(lambda: "each will judge for itself: read-only" in caplog.text)


async def test_a_challenger_that_is_bad_is_refused(tmp_path, ads):
    models = tmp_path / "models"
    live, other, _ = two(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        challenge(models, "din", Challenger(int(other), "canary", 1.0))
        with locked(models / "din"):
            (models / "din" / CHALLENGER).write_text("{}")
        said = await client.until("/v1/models", lambda said: said["refused"])
        assert said["refused"]["din, challenger"].startswith("challenger: what is announced as its challenger is none")
        damaged = bundles.publish(models, bias=2.0, make_current=False)
        challenge(models, "din", Challenger(int(damaged.name), "canary", 1.0))
        (damaged / MODEL).write_bytes(b"other")
        await client.until("/v1/models", lambda said: "damaged: " in said["refused"].get("din, challenger", ""))
        assert {(await client.rank(f"u{i}"))["model"]["version"] for i in range(5)} == {live}


async def test_a_challenger_that_is_promoted_is_not_loaded_again(tmp_path, ads):
    models = tmp_path / "models"
    async with challenged(models, ads, "shadow", words=2) as (client, _, other):
        ranker = client.app.state.service.ranker
        model = ranker.challenges["din"].model
        promote(models, "din")
        await until_version(client, other)
        assert ranker.models.loaded["din"] is model
        await until_status(client, lambda status: status is None)
        assert (await client.get("/metrics")).text.count("adrank_model_info{") == 1


async def test_one_worker_s_decision_stops_it_in_all(tmp_path, server):
    models = tmp_path / "models"
    await fill(server.url)
    live, other, _ = two(models, bias=-5.0)
    async with serving(models, server.url, workers=2) as client:
        challenge(models, "din", Challenger(int(other), "canary", 0.5, CanaryBounds(min_requests=20, p99_ratio=1000.0)))
        async with asyncio.timeout(90):
            while not (models / "din" / VERDICT).exists():
                await asyncio.gather(*(client.rank(f"u{i}", CANDIDATES) for i in USERS))
            while len(re.findall(r"challenger din \d+ is stopped", client.log.read_text())) < 2:
                await asyncio.sleep(0.05)
        for _ in range(5):
            answers = await asyncio.gather(*(client.rank(f"u{i}", CANDIDATES) for i in USERS))
            assert {answer["model"]["version"] for answer in answers} == {live}
        await until_one_is_loaded(client)
        assert "Traceback" not in client.log.read_text()


class TestJudge:
    """What is judged, by numbers."""

    def window(self):
        self.now = 0.0
        return EvidenceWindow(lambda: self.now)

    def filled(self, live=(1000, 0.001, 0.1), own=(1000, 0.001, 0.1), errors=0):
        window = self.window()
        for side, (count, seconds, p_click) in ((LIVE, live), (CHALLENGING, own)):
            for i in range(count):
                window.scored(side, seconds * (1 + 0.1 * (i % 7)), p_click * (0.5 + (i % 11) / 10))
        for _ in range(errors):
            window.failed()
        return window.all()

    def test_the_same_is_not_stopped(self):
        assert judge(self.filled(), CanaryBounds()) is None

    @pytest.mark.parametrize(
        ("own", "errors", "reason"),
        [
            ((1000, 0.001, 0.1), 10, None),  # 1 %
            ((1000, 0.001, 0.1), 17, None),  # chance
            ((1000, 0.001, 0.1), 40, "errors"),
            ((0, 0.001, 0.1), 200, "errors"),
            ((0, 0.001, 0.1), 199, None),  # too few
            ((1000, 0.0014, 0.1), 0, None),
            ((1000, 0.0017, 0.1), 0, "p99"),
            ((199, 0.1, 0.1), 0, None),
            ((1000, 0.001, 0.19), 0, None),
            ((1000, 0.001, 0.22), 0, "p_click"),
            ((1000, 0.001, 0.052), 0, None),
            ((1000, 0.001, 0.045), 0, "p_click"),
            ((200, 0.001, 0.201), 0, None),  # chance
        ],
    )
    def test_each_bound(self, own, errors, reason):
        decision = judge(self.filled(own=own, errors=errors), CanaryBounds())
        assert (decision and decision.reason) == reason, decision

    def test_without_requests_of_the_live_version_only_errors_count(self):
        assert judge(self.filled((0, 0.001, 0.1), (1000, 1.0, 0.9)), CanaryBounds()) is None
        assert hopeless(self.filled((0, 0.001, 0.1), (1000, 1.0, 0.9)), CanaryBounds()) is None
        assert judge(self.filled((0, 0.001, 0.1), (0, 1.0, 0.9), 1000), CanaryBounds()).reason == "errors"

    def test_percentiles_are_right_to_a_bin(self):
        random = np.random.default_rng(1)
        window, times = self.window(), random.lognormal(-6, 1, 5000)
        for seconds in times:
            window.scored(LIVE, float(seconds), 0.1)
        assert window.all().p99(LIVE) == pytest.approx(np.quantile(times, 0.99), rel=0.06)
        for seconds in (0.0, 1e9):
            window.scored(LIVE, seconds, 0.1)
        assert window.all().mean(LIVE) == pytest.approx(0.1)

    def test_what_is_older_than_the_window_is_forgotten(self):
        window = self.window()
        for step in range(3 * SLOTS):
            self.now = step * SLOT_SECONDS
            window.scored(LIVE, 0.001, 0.1)
            assert window.all().scored(LIVE) == min(step + 1, SLOTS)
        self.now += SLOTS * SLOT_SECONDS * 10
        assert window.all().scored(LIVE) == 0

    def test_a_fault_that_begins_late_is_seen_soon(self):
        window = self.window()
        for step in range(60):
            self.now = step * SLOT_SECONDS
            for i in range(1000):
                window.scored(i % 2, 0.001, 0.1 if step < 59 or i % 2 == LIVE else 0.3)
        assert judge(window.all(), CanaryBounds()) is None
        assert judge(window.newest(200), CanaryBounds()).reason == "p_click"

    @pytest.mark.parametrize(
        ("own", "errors", "late", "reason"),
        [
            ((0, 0.001, 0.1), 0, 4, None),
            ((0, 0.001, 0.1), 0, 5, "late"),
            ((0, 0.001, 0.1), 5, 0, "errors"),
            ((0, 0.001, 0.1), 2, 3, "late"),
            ((5, 0.01, 0.1), 0, 0, "p99"),
            ((4, 0.01, 0.1), 0, 0, None),
            ((20, 0.003, 0.1), 0, 0, None),  # slower, and that is for `judge` to say
            ((50, 0.001, 0.1), 0, 10, None),  # chance
            ((500, 0.001, 0.1), 0, 50, None),  # not nearly all of it
        ],
    )
    def test_what_is_hopeless_need_not_be_counted_to_the_end(self, own, errors, late, reason):
        window = self.window()
        for side, (count, seconds, p_click) in ((LIVE, (30, 0.001, 0.1)), (CHALLENGING, own)):
            for _ in range(count):
                window.scored(side, seconds, p_click)
        for what, count in ((at_work.ERRORS, errors), (LATE, late)):
            for _ in range(count):
                window.failed(what)
        assert (found := hopeless(window.all(), CanaryBounds())) is None or found.reason == reason, found
        assert (found is None) == (reason is None)

    def test_late_ones_have_a_bound_of_their_own(self):
        window = self.window()
        for i in range(400):
            window.scored(LIVE, 0.001, 0.1)
            window.failed(LATE) if i % 20 == 0 else window.scored(CHALLENGING, 0.001, 0.1)
        assert hopeless(window.all(), CanaryBounds()) is None
        assert judge(window.all(), CanaryBounds()).detail == "20 of 400 requests took over 0.25 s, a share of 0.01 is allowed"

    def test_workers_see_what_the_others_saw(self, tmp_path):
        self.now = 1000.0
        windows = [EvidenceWindow(lambda: self.now, tmp_path, "din.7.x") for _ in range(3)]
        other = EvidenceWindow(lambda: self.now, tmp_path, "din.7.y")
        assert all(path.stat().st_blocks * 512 >= path.stat().st_size for path in tmp_path.iterdir()), "a disk that fills would end all"
        for window in (*windows, other):
            for _ in range(10):
                window.scored(LIVE, 0.001, 0.2)
                window.failed(LATE)
        for window in windows:
            assert (window.all().scored(LIVE), window.all().count(CHALLENGING, LATE)) == (30, 30)
            assert window.newest(5).scored(LIVE) == 30
        assert other.all().scored(LIVE) == 10
        self.now += SLOT_SECONDS
        windows[0].scored(LIVE, 0.001, 0.2)
        assert windows[1].all().scored(LIVE) == 31
        windows[2].close()
        assert not list(tmp_path.glob("din.7.x.*"))[2:]
        self.now += SLOTS * SLOT_SECONDS
        assert windows[1].all().scored(LIVE) == 0

    def test_a_folder_that_cannot_be_written_leaves_each_to_itself(self, tmp_path):
        window = EvidenceWindow(folder=tmp_path / "none", key="x")
        window.failed()
        assert window.all().count(CHALLENGING, at_work.ERRORS) == 1
        (tmp_path / "x.1.1.evidence").write_bytes(b"half")
        window = EvidenceWindow(folder=tmp_path, key="x")
        window.failed()
        assert window.all().count(CHALLENGING, at_work.ERRORS) == 1

    def test_chance_stops_none(self):
        """A hundred challengers that are at the bound of errors, not over it, each judged a hundred times."""
        random, stopped = np.random.default_rng(3), 0
        for _ in range(100):
            errors = (random.random(20_000) < 0.01).cumsum()
            stopped += any(at_least(float(errors[n]), n + 1) > 0.01 for n in range(199, 20_000, 199))
        assert stopped <= 1
        assert at_least(8, 200) > 0.01 > at_least(7, 200)
