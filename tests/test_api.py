"""The service over HTTP: what it answers, and that no input makes it fail or leaves it changed."""

import asyncio
import json
import logging
import math
from dataclasses import asdict

import bundles
import httpx
import numpy as np
import pytest
from conftest import until_ready
from hypothesis import given
from hypothesis import strategies as st

from features import bundle
from features.state import Ad, MemoryStore, UserState
from service import errors
from service.api.console import CONSOLE
from service.api.docs import DOCS
from service.api.edge import ROUTES
from service.api.event_wire import EventsAnswer
from service.api.requests import parse_request, to_query
from service.api.wire import Problem, RankAnswer

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}
TYPE = (b"content-type", b"application/json")
GOOD = {"user": {"id": "u1"}, "candidates": ["a1", "a2", "a3"]}


def check(answer, status, code, *pointers):
    """The answer is a problem of that kind which points there."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert (problem.status, problem.code, problem.type) == (status, code, f"urn:adrank:problem:{code}")
    assert answer.headers["x-request-id"] == problem.request_id
    assert [error.pointer for error in problem.errors] == list(pointers)
    assert all(error.detail for error in problem.errors)
    assert len(answer.content) < 20_000
    return problem


class TestRank:
    async def test_an_answer_has_the_documented_form(self, client):
        await client.store.put_users([("u1", UserState({"age": "25"}, ["a9"], [1]))])
        request = {
            "request_id": "r1",
            "user": {"id": "u1", "features": {"age": "35"}, "history": [{"ad_id": "a9", "ts": 1763800000}]},
            "context": {"slot": "feed"},
            "candidates": [
                {"ad_id": "a1", "bid": 0.4, "features": {}},
                {"ad_id": "a2", "bid": 0.1},
                {"ad_id": "new", "bid": 0},
                {"ad_id": "a1"},
            ],
            "options": {"model": "other", "top_k": 2, "objective": "pctr", "explain": False, "deadline_ms": 5000},
        }
        answer = await client.post("/v1/rank", json=request)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "r1"
        document = answer.json()
        RankAnswer.model_validate_json(answer.content)
        assert list(document) == ["request_id", "model", "ads", "omitted", "degraded", "timings_ms"]
        assert document["model"]["name"] == "other"
        assert [ad["rank"] for ad in document["ads"]] == [1, 2]
        assert {entry["reason"] for entry in document["omitted"]} == {"duplicate", "top_k"}
        assert list(document["timings_ms"]) == ["parse", "features", "queue", "inference", "total"]
        assert document["timings_ms"]["total"] >= document["timings_ms"]["inference"] > 0

    async def test_an_unknown_user_is_ranked_with_an_empty_profile(self, client):
        assert (await client.rank("nobody"))["degraded"] == []
        assert await client.metric('adrank_feature_lookups_total{group="user",result="miss"}') == 1

    async def test_unknown_ads_may_be_omitted(self, client):
        candidates = {"ad_id": ["a1", "new", "told"], "features": [None, {}, {"price": 3.0}]}
        answer = await client.post("/rank", json={**GOOD, "candidates": candidates, "options": {"unknown_ads": "omit"}})
        RankAnswer.model_validate_json(answer.content)
        assert {ad["ad_id"]: ad.get("known") for ad in answer.json()["ads"]} == {"a1": None, "told": False}
        assert answer.json()["omitted"] == [{"ad_id": "new", "reason": "unknown_ad"}]
        ranked = await client.rank(candidates=["a1", "new"], options={"unknown_ads": "rank"})
        assert (len(ranked["ads"]), ranked["omitted"]) == (2, [])
        check(await client.post("/rank", json={**GOOD, "options": {"unknown_ads": "drop"}}), 422, "invalid", "/options/unknown_ads")

    async def test_a_user_that_sends_a_history_out_of_order_is_understood(self, client):
        one, two = ([{"ad_id": f"a{i}", "ts": i} for i in order] for order in (range(8), reversed(range(8))))
        answers = [await client.rank({"id": "u1", "history": history}) for history in (one, two)]
        assert answers[0]["ads"] == answers[1]["ads"]

    async def test_one_ad_or_user_spelt_twice_is_one_and_comes_back_as_it_was_spelt(self, client):
        await client.store.put_users([("7", UserState({"age": "25"}, ["8", "9"], [1, 2]))])
        candidates = ["7.0", "a1", "7", "8.00", "a1", "7.0"]
        rows = {"ad_id": candidates, "bid": [1.0] * 6}
        for sent in (candidates, rows, [{"ad_id": ad_id} for ad_id in candidates]):
            answer = await client.rank("7.0", sent, options={"top_k": 2})
            returned = [entry["ad_id"] for entry in (*answer["ads"], *answer["omitted"])]
            assert sorted(returned) == sorted(candidates)
            assert sorted(each["ad_id"] for each in answer["omitted"] if each["reason"] == "duplicate") == ["7", "7.0", "a1"]
        one, other = [await client.rank(user, ["a1", "a2", "a3"], options={"explain": True}) for user in ("7", "7.0")]
        assert (one["ads"], one["explain"]) == (other["ads"], other["explain"])
        assert len(one["explain"]["history"]) == 2
        sent = [await client.rank({"id": "u", "history": [{"ad_id": ad_id}]}, options={"explain": True}) for ad_id in ("8", "8.0")]
        assert sent[0]["explain"] == sent[1]["explain"]

    async def test_numbers_and_truths_are_their_texts(self, client):
        returned = [
            await client.rank({"id": "u1", "features": {"age": age}}, options={"explain": True}) for age in ("25", "25.0", 25, 25.0, 2.5e1)
        ]
        assert all((each["ads"], each["explain"]) == (returned[0]["ads"], returned[0]["explain"]) for each in returned)
        assert (await client.rank(context={"slot": True}))["ads"]

    @pytest.mark.parametrize("odd", ["😀", "\u202eabc", "e\u0301", "a\u0000b", "\u200d", "}{", " ", "\ufeff", "x" * 256])
    async def test_odd_text_is_text(self, client, odd):
        await client.store.put_users([(odd, UserState({"age": "25"}, [odd], [1]))])
        await client.store.put_ads([Ad(odd, {"genre": odd})])
        answer = await client.rank(odd, [odd, {"ad_id": "a1"}["ad_id"]], context={"slot": odd})
        assert odd in [ad["ad_id"] for ad in answer["ads"]]

    async def test_10_000_candidates_are_ranked(self, client):
        assert len((await client.rank(candidates=[f"a{i}" for i in range(10_000)]))["ads"]) == 10_000


LONG = "x" * 1_000_000
BAD = {
    "wrong types": ({"user": {"id": 1}, "candidates": "a1"}, ["/user/id", "/candidates"]),
    "no user": ({"candidates": ["a1"]}, ["/user"]),
    "no user id": ({"user": {}, "candidates": ["a1"]}, ["/user/id"]),
    "a null user": ({"user": None, "candidates": ["a1"]}, ["/user"]),
    "no candidates": ({"user": {"id": "u1"}}, ["/candidates"]),
    "empty candidates": ({**GOOD, "candidates": []}, ["/candidates"]),
    "null candidates": ({**GOOD, "candidates": None}, ["/candidates"]),
    "empty columns": ({**GOOD, "candidates": {"ad_id": []}}, ["/candidates/ad_id"]),
    "columns without ids": ({**GOOD, "candidates": {"bid": [1]}}, ["/candidates/ad_id"]),
    "uneven bids": ({**GOOD, "candidates": {"ad_id": ["a1", "a2"], "bid": [1]}}, ["/candidates/bid"]),
    "uneven features": ({**GOOD, "candidates": {"ad_id": ["a1"], "features": [{}, {}]}}, ["/candidates/features"]),
    "10,001 candidates": ({**GOOD, "candidates": [f"a{i}" for i in range(10_001)]}, ["/candidates"]),
    "10,001 columns": ({**GOOD, "candidates": {"ad_id": [f"a{i}" for i in range(10_001)]}}, ["/candidates"]),
    "mixed candidates": ({**GOOD, "candidates": ["a1", {"ad_id": "a2"}]}, ["/candidates/1"]),
    "mixed rows": ({**GOOD, "candidates": [{"ad_id": "a2"}, "a1"]}, ["/candidates/1"]),
    "a candidate without id": ({**GOOD, "candidates": [{"bid": 1}]}, ["/candidates/0/ad_id"]),
    "a bid as text": ({**GOOD, "candidates": [{"ad_id": "a"}, {"ad_id": "b", "bid": "1"}]}, ["/candidates/1/bid"]),
    "a negative bid": ({**GOOD, "candidates": {"ad_id": ["a", "b"], "bid": [1, -1]}}, ["/candidates/bid/1"]),
    "ecpm without a bid": (
        {**GOOD, "candidates": [{"ad_id": "a", "bid": 1}, {"ad_id": "b"}], "options": {"objective": "ecpm"}},
        ["/candidates/1/bid"],
    ),
    "ecpm without a bid in columns": (
        {**GOOD, "candidates": {"ad_id": ["a", "b"], "bid": [1, None]}, "options": {"objective": "ecpm"}},
        ["/candidates/bid/1"],
    ),
    "ecpm without bids": ({**GOOD, "options": {"objective": "ecpm"}}, ["/candidates/0", "/candidates/1", "/candidates/2"]),
    "an id of 1 MB": ({"user": {"id": LONG}, "candidates": ["a1", LONG]}, ["/user/id", "/candidates/1"]),
    "an empty id": ({"user": {"id": ""}, "candidates": [""]}, ["/user/id", "/candidates/0"]),
    "an id of 257": ({**GOOD, "candidates": ["x" * 257]}, ["/candidates/0"]),
    "unknown fields": ({**GOOD, "candidats": 1, "user": {"id": "u", "nmae": 1}}, ["/user/nmae", "/candidats"]),
    "an unknown field of 1 MB": ({**GOOD, LONG: 1}, ["/" + "x" * 128 + "…"]),
    "an unknown field to escape": ({**GOOD, "a/b~c": 1}, ["/a~1b~0c"]),
    "an unknown user feature": ({**GOOD, "user": {"id": "u", "features": {"agee": "1"}}}, ["/user/features/agee"]),
    "an unknown context feature": ({**GOOD, "context": {"slott": "feed"}}, ["/context/slott"]),
    "an unknown ad feature": (
        {**GOOD, "candidates": [{"ad_id": "a"}] * 3 + [{"ad_id": "b", "features": {"x": 1}}]},
        ["/candidates/3/features/x"],
    ),
    "an unknown ad feature in columns": (
        {**GOOD, "candidates": {"ad_id": ["a", "b"], "features": [None, {"x": 1}]}},
        ["/candidates/features/1/x"],
    ),
    "a feature of the wrong type": ({**GOOD, "user": {"id": "u", "features": {"income": "much"}}}, ["/user/features/income"]),
    "a number beyond float32": ({**GOOD, "user": {"id": "u", "features": {"income": 1e300}}}, ["/user/features/income"]),
    "a list that is a text": ({**GOOD, "user": {"id": "u", "features": {"interests": "news"}}}, ["/user/features/interests"]),
    "an id as a feature": ({**GOOD, "user": {"id": "u", "features": {"user_id": "u2"}}}, ["/user/features/user_id"]),
    "a category that is a list": (
        {**GOOD, "candidates": [{"ad_id": "a"}, {"ad_id": "b", "features": {"genre": ["drama"]}}]},
        ["/candidates/1/features/genre"],
    ),
    "an ad's id as a feature": (
        {**GOOD, "candidates": [{"ad_id": "a", "features": {"price": 1.0}}, {"ad_id": "b", "features": {"ad_id": "a9"}}]},
        ["/candidates/1/features/ad_id"],
    ),
    "a feature of features": ({**GOOD, "user": {"id": "u", "features": {"age": {"a": 1}}}}, ["/user/features/age"]),
    "a float that merges ids": ({**GOOD, "context": {"slot": 2.0**53}}, ["/context/slot"]),
    "a long feature": ({**GOOD, "context": {"slot": "x" * 1_025}}, ["/context/slot"]),
    "a long list": ({**GOOD, "user": {"id": "u", "features": {"interests": ["x"] * 1_001}}}, ["/user/features/interests"]),
    "a list of lists": ({**GOOD, "user": {"id": "u", "features": {"interests": [["x"]]}}}, ["/user/features/interests"]),
    "an unnamed feature": ({**GOOD, "context": {"": "feed"}}, ["/context/"]),
    "many features": ({**GOOD, "context": {f"f{i}": 1 for i in range(257)}}, ["/context"]),
    "a huge whole number": ({**GOOD, "context": {"slot": 10**30}}, ["/context/slot"]),
    "a long history": ({**GOOD, "user": {"id": "u", "history": [{"ad_id": "a"}] * 1_001}}, ["/user/history"]),
    "a history of ids": ({**GOOD, "user": {"id": "u", "history": ["a1"]}}, ["/user/history/0"]),
    "some times": ({**GOOD, "user": {"id": "u", "history": [{"ad_id": "a", "ts": 1}, {"ad_id": "b"}]}}, ["/user/history/1/ts"]),
    "milliseconds": ({**GOOD, "user": {"id": "u", "history": [{"ad_id": "a", "ts": 1_763_800_000_000}]}}, ["/user/history/0/ts"]),
    "a time with a fraction": ({**GOOD, "user": {"id": "u", "history": [{"ad_id": "a", "ts": 1.5}]}}, ["/user/history/0/ts"]),
    "a top_k of 0": ({**GOOD, "options": {"top_k": 0}}, ["/options/top_k"]),
    "another objective": ({**GOOD, "options": {"objective": "money"}}, ["/options/objective"]),
    "an unknown option": ({**GOOD, "options": {"topk": 1}}, ["/options/topk"]),
    "a deadline of 0": ({**GOOD, "options": {"deadline_ms": 0}}, ["/options/deadline_ms"]),
    "a request_id with a line break": ({**GOOD, "request_id": "a\r\nSet-Cookie: b"}, ["/request_id"]),
    "a request_id of 129": ({**GOOD, "request_id": "a" * 129}, ["/request_id"]),
    "a list": ([], [""]),
    "a number": (1, [""]),
}


class TestBadInput:
    """Each gives a problem that names the field, and leaves the service as it was."""

    @pytest.fixture(autouse=True)
    async def unchanged(self, client):
        await client.store.put_users([("u1", UserState({"age": "25"}, ["a9"], [1]))])
        before = await client.rank()
        yield
        after = await client.rank()
        assert after["ads"] == before["ads"]
        assert after["degraded"] == []
        assert (await client.get("/readyz")).json()["status"] == "ready"
        assert await client.metric("adrank_inflight_requests") == 0

    @pytest.mark.parametrize("name", BAD)
    async def test_invalid(self, client, name):
        document, pointers = BAD[name]
        check(await client.post("/rank", json=document), 422, "invalid", *pointers)
        assert await client.metric('adrank_requests_total{model="none",outcome="invalid",route="/rank"}') in (0, 1)
        assert await client.metric('adrank_request_duration_seconds_count{outcome="invalid",route="/rank"}') == 1

    @pytest.mark.parametrize(
        "body", [b"", b"nonsense", b"{", b'{"user": }', b"\xff\xfe", b'{"user": "\xff"}', b'{"user": "\\ud800"}', b"[" * 100_000]
    )
    async def test_not_json(self, client, body):
        check(await client.post("/rank", content=body, headers=JSON), 400, "not_json")

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
    @pytest.mark.parametrize(
        ("body", "pointer"),
        [
            (b'{"user": {"id": "u"}, "candidates": [{"ad_id": "a", "bid": %s}]}', "/candidates/0/bid"),
            (b'{"user": {"id": "u"}, "candidates": {"ad_id": ["a"], "bid": [%s]}}', "/candidates/bid/0"),
            (b'{"user": {"id": "u", "features": {"income": %s}}, "candidates": ["a"]}', "/user/features/income"),
            (b'{"user": {"id": "u"}, "candidates": ["a"], "options": {"deadline_ms": %s}}', "/options/deadline_ms"),
        ],
    )
    async def test_numbers_that_are_not_finite(self, client, body, pointer, number):
        check(await client.post("/rank", content=body % number, headers=JSON), 422, "invalid", pointer)

    async def test_a_body_over_the_limit(self, client):
        body = b'{"user": "' + b"x" * (4 * 2**20) + b'"}'
        check(await client.post("/rank", content=body, headers=JSON), 413, "too_large")

        sent = 0

        async def chunks():
            nonlocal sent
            for _ in range(1_000):
                sent += 1
                yield b"x" * 65_536

        check(await client.post("/rank", content=chunks(), headers=JSON), 413, "too_large")
        assert await client.metric('adrank_requests_total{model="none",outcome="too_large",route="/rank"}') == 2

    @pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"])
    async def test_json_types(self, client, kind):
        assert (await client.post("/rank", content=json.dumps(GOOD), headers={"content-type": kind})).status_code == 200

    async def test_an_unknown_model(self, client):
        check(await client.post("/rank", json={**GOOD, "options": {"model": "nope"}}), 404, "unknown_model")
        assert await client.metric('adrank_requests_total{model="none",outcome="unknown_model",route="/rank"}') == 1

    async def test_the_request_id_comes_back_though_the_rest_is_wrong(self, client):
        for wrong in (
            {"candidates": []},
            {"candidates": {"ad_id": ["a"], "bid": []}},
            {"context": {"slott": 1}},
            {"options": {"model": "x"}},
        ):
            answer = await client.post("/rank", json={"request_id": "r7", **GOOD, **wrong})
            assert answer.json()["request_id"] == answer.headers["x-request-id"] == "r7"

    async def test_very_many_mistakes_are_not_listed(self, client):
        many = b",".join(b'"%d":[[]]' % i for i in range(50_000))
        body = b'{"user": {"id": "u"}, "candidates": ["a"], "context": {%s}}' % many
        check(await client.post("/rank", content=body, headers=JSON), 422, "invalid", "/context")
        body = b'{"user": {"id": "u"}, "candidates": ["a"], %s}' % many
        assert "50000 things are wrong" in check(await client.post("/rank", content=body, headers=JSON), 422, "invalid").detail
        body = b'{"user": {"id": "u"}, "candidates": [%s1]}' % (b"1," * 300_000)
        check(await client.post("/rank", content=body, headers=JSON), 422, "invalid", "/candidates/0")

    async def test_a_deadline_that_cannot_be_met(self, client):
        check(await client.post("/rank", json={**GOOD, "options": {"deadline_ms": 1e-6}}), 504, "deadline")
        assert await client.metric('adrank_requests_total{model="din",outcome="deadline",route="/rank"}') == 1

    async def test_pages_that_are_not_there(self, client):
        check(await client.get("/nope"), 404, "not_found")
        check(await client.get("/rank/"), 404, "not_found")
        answer = await client.get("/rank")
        check(answer, 405, "wrong_method")
        assert "POST" in answer.headers["allow"]
        assert await client.metric('adrank_requests_total{model="none",outcome="not_found",route="other"}') == 2


def slow_body():
    async def chunks():
        yield b'{"user":'
        await asyncio.sleep(30)

    return chunks()


class Held(MemoryStore):
    """A store that answers for users when it is let go."""

    def __init__(self):
        super().__init__()
        self.go = asyncio.Event()

    async def get_user(self, user_id):
        await self.go.wait()
        return await super().get_user(user_id)


class TestLimits:
    async def test_over_the_limit_of_requests(self, run):
        store = Held()
        async with run(store, max_inflight=2) as client:
            held = [asyncio.create_task(client.rank()) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert await client.metric("adrank_inflight_requests") == 2
            answer = await client.post("/rank", json=GOOD)
            check(answer, 429, "over_limit")
            assert answer.headers["retry-after"] == "1"
            assert (await client.get("/livez")).status_code == 200
            store.go.set()
            assert [len((await each)["ads"]) for each in held] == [2, 2]
            assert len((await client.rank())["ads"]) == 2
            assert await client.metric('adrank_shed_total{reason="over_limit"}') == 1

    async def test_bodies_that_come_slowly_hold_no_place(self, run, ads):
        async with run(ads, max_inflight=1, body_timeout_ms=500) as client:
            slow = [asyncio.create_task(client.post("/rank", content=slow_body(), headers=JSON)) for _ in range(5)]
            await asyncio.sleep(0.1)
            assert len((await client.rank())["ads"]) == 2
            for each in slow:
                check(await each, 408, "slow_body")

    async def test_one_address_has_its_share_of_the_places(self, run):
        store = Held()
        async with run(store, max_inflight=4, peer_inflight_share=0.5) as client:
            held = [asyncio.create_task(client.rank()) for _ in range(2)]
            await asyncio.sleep(0.1)
            check(await client.post("/rank", json=GOOD), 429, "over_limit")
            elsewhere = httpx.ASGITransport(client.app, client=("192.0.2.1", 1))
            async with httpx.AsyncClient(transport=elsewhere, base_url="http://adrank") as other:
                held.append(asyncio.create_task(other.post("/rank", json=GOOD)))
                await asyncio.sleep(0.05)
                store.go.set()
                assert (await held.pop()).status_code == 200
            await asyncio.gather(*held)

    async def test_a_caller_that_leaves_before_its_body_is_whole(self, client):
        for _ in range(3):
            left = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
            assert await self.by_hand(client, [TYPE], left) == 499
        assert len((await client.rank())["ads"]) == 2
        assert await client.metric('adrank_requests_total{model="none",outcome="caller_left",route="/rank"}') == 3

    async def test_a_body_that_says_it_is_too_large_is_not_read(self, client):
        assert await self.by_hand(client, [TYPE, (b"content-length", b"99999999")], []) == 413

    async def by_hand(self, client, headers, incoming):
        """The status of an answer to messages as a server would pass them; a message too many to ask for is an error."""
        scope = {"type": "http", "method": "POST", "path": "/rank", "headers": headers, "query_string": b"", "http_version": "1.1"}
        messages, sent = iter(incoming), []

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        await client.app(scope, receive, send)
        return sent[0]["status"]


class TestReadiness:
    async def test_ready(self, client):
        report = (await client.get("/readyz")).json()
        assert report["status"] == "ready"
        assert report["store"] == {"kind": "memory", "status": "up"}
        assert report["models"] == {"default": "din", "loaded": ["din", "other"], "refused": {}, "notice": None}
        assert report["catalogue"]["ads"] == 30

    async def test_models_and_schema(self, client):
        models = (await client.get("/v1/models")).json()["models"]
        assert [(model["name"], model["default"], model["provider"]) for model in models] == [
            ("din", True, "CPUExecutionProvider"),
            ("other", False, "CPUExecutionProvider"),
        ]
        ((fingerprint, schema),) = (await client.get("/v1/schema")).json()["schemas"].items()
        assert fingerprint == models[0]["schema"] == (await client.rank())["model"]["schema"]
        assert schema["models"] == ["din", "other"]
        assert {field["name"] for field in schema["fields"]} >= {"age", "slot", "price"}
        line = f'adrank_model_info{{model="din",provider="CPUExecutionProvider",schema="{fingerprint}",version="{models[0]["version"]}"}}'
        assert await client.metric(line) == 1

    async def test_without_a_model_it_waits_and_says_so(self, run, tmp_path, ads):
        async with run(ads, models=tmp_path / "models", ready=False) as client:
            await asyncio.sleep(0.1)
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert "waiting for one to be published" in answer.json()["reasons"][0]
            problem = await client.post("/rank", json=GOOD)
            check(problem, 503, "not_ready")
            assert problem.headers["retry-after"]
            assert (await client.get("/livez")).status_code == 200
            bundles.publish(tmp_path / "models", "late")
            await until_ready(client)
            assert (await client.rank())["model"]["name"] == "late"

    async def test_a_bundle_that_is_refused_is_told(self, run, tmp_path, ads, caplog):
        """What is wrong with a bundle, one by one: `test_swap.BAD`."""
        bundles.publish(tmp_path, "bad", files={bundle.GOLDENS: b'[{"user": 1}]'})
        async with run(ads, models=tmp_path, ready=False) as client:
            report = await client.until("/readyz", lambda said: said["models"]["refused"])
            assert report["status"] == "unready"
            assert report["models"]["refused"]["bad"].startswith("goldens: ")
            assert str(tmp_path) not in str(report)
            assert "goldens.json cannot be read" in caplog.text
            assert "Traceback" not in caplog.text
            check(await client.post("/rank", json=GOOD), 503, "not_ready")

    async def test_a_file_that_changed_is_refused_and_the_other_model_ranks(self, run, tmp_path, ads):
        bundles.publish(tmp_path, "good")
        path = bundles.publish(tmp_path, "bad")
        (path / bundle.MODEL).write_bytes(bundles.model(bias=1e-3))
        async with run(ads, models=tmp_path, model="good") as client:
            report = (await client.get("/readyz")).json()
            assert report["status"] == "degraded"
            assert "damaged: " in report["models"]["refused"]["bad"]
            assert (await client.rank())["model"]["name"] == "good"
            check(await client.post("/rank", json={**GOOD, "options": {"model": "bad"}}), 404, "unknown_model")

    @pytest.mark.parametrize(
        ("setting", "reason"), [({"model": "absent"}, "model absent is not usable"), ({"device": "cuda"}, "din: device: ")]
    )
    async def test_a_model_or_a_device_that_is_not_there(self, run, ads, setting, reason):
        async with run(ads, ready=False, **setting) as client:
            await client.until("/readyz", lambda said: reason in " ".join(said["reasons"]))
            assert (await client.get("/readyz")).status_code == 503


class TestMetrics:
    async def test_every_metric_that_has_a_source_is_there(self, client):
        await client.rank(candidates=["a1", "new"])
        text = (await client.get("/metrics")).text
        for line in (
            'adrank_requests_total{model="din",outcome="ok",route="/rank"} 1.0',
            'adrank_request_duration_seconds_count{outcome="ok",route="/rank"} 1.0',
            *(
                f'adrank_stage_duration_seconds_count{{stage="{stage}"}} 1.0'
                for stage in ("parse", "features", "queue", "inference", "post")
            ),
            'adrank_candidates_bucket{le="2.0"} 1.0',
            'adrank_feature_lookups_total{group="ad",result="hit"} 1.0',
            'adrank_feature_lookups_total{group="ad",result="miss"} 1.0',
            'adrank_history_length_bucket{le="0.0"} 1.0',
            "adrank_catalogue_ads 30.0",
            "adrank_inflight_requests 0.0",
            'adrank_p_click_count{model="din"} 2.0',
        ):
            assert line in text, line
        assert "adrank_catalogue_lag_seconds" in text
        assert "adrank_model_loaded_timestamp_seconds" in text
        assert 'le="0.0075"' in text

    async def test_no_label_is_the_callers(self, client):
        for path in ("/secret-path", "/rank"):
            await client.post(
                path, json={**GOOD, "user": {"id": "secret-user"}, "options": {"model": "secret-model"}, "request_id": "secret-id"}
            )
        await client.request("SECRET", "/rank")
        assert "secret" not in (await client.get("/metrics")).text.lower()

    def test_every_error_has_its_row(self):
        assert set(errors.KINDS) == set(errors.ServiceError.__subclasses__())
        assert len({kind.code for kind in errors.KINDS.values()}) == len(errors.KINDS)


async def test_routes_are_those_documented(client):
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) | {"/openapi.json", *DOCS, *CONSOLE} == ROUTES
    for path, kind in zip(DOCS, ("text/html", "text/javascript", "text/javascript", "text/css"), strict=True):
        page = await client.get(path)
        assert (page.status_code, page.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert "script-src" not in page.headers["content-security-policy"]  # default-src 'self': none inline, none from elsewhere
    described = document["paths"]["/v1/rank"]["post"]
    assert set(described["responses"]) == {"200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert "candidates" in document["components"]["schemas"]["RankRequest"]["required"]


async def test_every_route_has_an_example_that_is_as_described(client):
    document = (await client.get("/openapi.json")).json()
    kinds = {"RankAnswer": RankAnswer, "EventsAnswer": EventsAnswer}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation["requestBody"]["content"]["application/json"]["example"] if "requestBody" in operation else None
            answer = await client.request(method, path, json=body)
            assert answer.status_code in (200, 202), (path, answer.text)
            (described,) = operation["responses"][str(answer.status_code)]["content"].values()
            name = described.get("schema", {}).get("$ref", "").rpartition("/")[2]
            if kind := kinds.get(name):
                kind.model_validate_json(json.dumps(described["example"]))
            if answer.headers["content-type"] == "application/json":
                assert set(described["example"]) == set(answer.json())


async def test_nothing_of_a_user_is_logged(client, caplog):
    caplog.set_level(logging.INFO)
    await client.rank("secret-user", context={"slot": "secret-slot"})
    await client.post("/rank", json={**GOOD, "user": {"id": "secret-user", "features": {"income": "secret"}}})
    assert "secret" not in caplog.text


MICROS = st.integers(0, 10**15).map(lambda micros: micros / 1e6)
SENT = st.none() | st.dictionaries(st.sampled_from(["genre", "price"]), st.just(1), max_size=2)


def same(one, two):
    one, two = asdict(one), asdict(two)
    np.testing.assert_equal(one.pop("bids"), two.pop("bids"))
    return one == two


class TestForms:
    @given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), st.none() | MICROS, SENT), min_size=1))
    def test_rows_and_columns_are_the_same_request(self, candidates):
        rows = [{"ad_id": ad_id, "bid": bid, "features": sent} for ad_id, bid, sent in candidates]
        columns = {name: [row[name] for row in rows] for name in ("ad_id", "bid", "features")}
        one, two = (to_query(parse_request(json.dumps({**GOOD, "candidates": form}).encode()), 10_000) for form in (rows, columns))
        assert same(one, two)
        bids = [-1] * len(candidates) if one.bids is None else one.bids.bid.tolist()
        assert [None if bid < 0 else bid / 1e6 for bid in bids] == [c[1] for c in candidates]
        assert list(one.names or one.ad_ids) == [c[0] for c in candidates]

    @given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), min_size=1))
    def test_ids_are_rows_without_more(self, ad_ids):
        forms = (ad_ids, [{"ad_id": ad_id} for ad_id in ad_ids], {"ad_id": ad_ids})
        one, two, three = (to_query(parse_request(json.dumps({**GOOD, "candidates": form}).encode()), 10_000) for form in forms)
        assert same(one, two)
        assert same(two, three)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    )
    def test_anything_else_is_refused_in_our_own_words(self, anything):
        body = json.dumps({**GOOD, "candidates": anything, "context": anything}, default=str).encode("utf-8", "surrogatepass")
        try:
            query = to_query(parse_request(body), 10_000)
        except errors.ServiceError as error:
            pointers = [mistake.pointer for mistake in error.mistakes]
        else:
            pointers = []
            assert all(isinstance(value, str | int | list | None) or math.isfinite(value) for value in query.context.values())
        assert all(pointer.startswith(("/candidates", "/context")) for pointer in pointers)
