"""`POST /v1/events` over HTTP: what it answers, what it refuses and why, and that the next ranking knows."""

import asyncio
import json
import time

import pytest
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from features.entity_updates import KINDS
from features.events import TYPES, Event
from features.state import MemoryStore, StoreError
from service.api.event_wire import EventsAnswer
from service.feedback.ingest import Ages, Intake
from service.telemetry.metrics import Metrics
from tests.test_api import check
from tests.test_fuzz import Portal

pytestmark = pytest.mark.anyio
DAY = 24 * 3600.0


def click(event_id="c1", ts=None, **more):
    return {"type": "click", "event_id": event_id, "ts": time.time() if ts is None else ts, "user_id": "u1", "ad_id": "a1", **more}


async def take(client, *events):
    """The outcomes of a batch that must be taken."""
    answer = await client.post("/v1/events", json={"events": list(events)})
    assert answer.status_code == 202, answer.text
    answered = EventsAnswer.model_validate_json(answer.content)
    assert answer.headers["x-request-id"] == answered.request_id
    assert len(answered.events) == len(events)
    return answer.json()["events"]


async def results(client, *events):
    return [answered.get("reason", answered["status"]) for answered in await take(client, *events)]


class TestOutcomes:
    async def test_every_type_is_taken_once(self, client):
        now = time.time()
        events = [
            {"type": "impression", "event_id": "e1", "ts": now, "request_id": "r1", "ad_id": "a1", "position": 3},
            {"type": "click", "event_id": "e2", "ts": now, "user_id": "u1", "request_id": "r1", "ad_id": "a1"},
            {"type": "click", "event_id": "e3", "ts": int(now), "user_id": "u1", "ad_id": "a2", "request_id": None},
            {"type": "conversion", "event_id": "e4", "ts": now, "request_id": "r1", "ad_id": "a1", "value": 2},
            {"type": "user", "event_id": "e5", "ts": now, "user_id": "u1", "features": {"age": "35", "of no schema": [1, "x"]}},
            {"type": "ad", "event_id": "e6", "ts": now, "ad_id": "new", "features": {"genre": "news"}, "active": True},
            {"type": "ad", "event_id": "e7", "ts": now, "ad_id": "bare"},
        ]
        assert await take(client, *events) == [{"event_id": f"e{i}", "status": "accepted"} for i in range(1, 8)]
        assert await take(client, *events) == [{"event_id": f"e{i}", "status": "duplicate"} for i in range(1, 8)]
        state = await client.store.get_user("u1")
        assert (state.ad_ids, state.features) == (["a2", "a1"], {"age": "35", "of no schema": [1, "x"]})
        for kind, count in {"impression": 1, "click": 2, "conversion": 1, "user": 1, "ad": 2}.items():
            for result in ("accepted", "duplicate"):
                assert await client.metric(f'adrank_events_total{{result="{result}",type="{kind}"}}') == count
        assert await client.metric('adrank_requests_total{model="none",outcome="ok",route="/v1/events"}') == 2

    async def test_each_is_judged_alone(self, client):
        now = time.time()
        events = [
            click("good"),
            click("ahead", now + 400),
            click("milliseconds", now * 1000),
            click("within", now + 200),
            click("old", now - 8 * DAY),
            click("first", 0),
            {**click("bad"), "ts": "yesterday"},
            "no event at all",
            {"type": "user", "event_id": "kind", "ts": now, "user_id": "u1", "features": {"income": "much"}},
            {"type": "ad", "event_id": "id", "ts": now, "ad_id": "a1", "features": {"ad_id": "a2"}},
            click("good"),
            click("week", now - 6.9 * DAY),
        ]
        answered = await take(client, *events)
        reasons = [each.get("reason", each["status"]) for each in answered]
        late = ["accepted", "too_old", "too_old"]
        assert reasons == [
            *("accepted", "in_the_future", "in_the_future"),
            *late,
            *("malformed", "malformed", "mistyped", "mistyped", "duplicate", "accepted"),
        ]
        assert [each["event_id"] for each in answered][6:8] == ["bad", None]
        assert [each.get("pointer") for each in answered][5:9] == [None, "/events/6/ts", "/events/7", None]
        assert "milliseconds" in answered[2]["detail"]
        assert answered[8]["detail"].startswith("user.income: expected a finite number")
        assert all(each["detail"] for each in answered if each["status"] == "rejected")
        assert len((await client.store.get_user("u1")).ts) == 3
        counted = {"accepted": 3, "duplicate": 1, "in_the_future": 2, "too_old": 2, "malformed": 1}
        for result, count in counted.items():
            assert await client.metric(f'adrank_events_total{{result="{result}",type="click"}}') == count
        assert await client.metric('adrank_events_total{result="malformed",type="unknown"}') == 1
        assert await client.metric('adrank_events_total{result="mistyped",type="user"}') == 1

    @pytest.mark.parametrize(
        ("wrong", "pointer"),
        [
            ({"event_id": ""}, "/event_id"),
            ({"event_id": "x" * 257}, "/event_id"),
            ({"event_id": 7}, "/event_id"),
            ({"ts": True}, "/ts"),
            ({"ts": None}, "/ts"),
            ({"ts": 10**400}, "/ts"),
            ({"user_id": ""}, "/user_id"),
            ({"ad_id": ["a1"]}, "/ad_id"),
            ({"request_id": "a b"}, "/request_id"),
            ({"type": "view"}, "/type"),
            ({"type": "Click"}, "/type"),
            ({"type": {}}, "/type"),
            ({"colour": 1}, "/colour"),
            ({"a/b~c": 1}, "/a~1b~0c"),
            ({"features": {}}, "/features"),
        ],
    )
    async def test_what_is_malformed_is_said_where(self, client, wrong, pointer):
        (answered,) = await take(client, {**click(), **wrong})
        assert (answered["status"], answered["reason"], answered["pointer"]) == ("rejected", "malformed", "/events/0" + pointer)
        assert len(json.dumps(answered)) < 1000
        assert await client.store.get_user("u1") is None

    async def test_numbers_are_bounded(self, client):
        ranked = {"event_id": "e", "ts": time.time(), "request_id": "r1", "ad_id": "a1"}
        wrong = [{"type": "impression", "position": 0}, {"type": "impression", "position": 1.5}, {"type": "conversion", "value": 1e13}]
        answered = await take(client, *({**ranked, **each} for each in wrong))
        assert [each["pointer"] for each in answered] == ["/events/0/position", "/events/1/position", "/events/2/value"]

    async def test_a_repetition_of_what_was_refused_is_no_duplicate(self, client):
        now = time.time()
        assert await results(client, click("e", now + DAY), click("e", now), click("e", now)) == ["in_the_future", "accepted", "duplicate"]

    async def test_features_are_told_and_taken_away(self, client):
        def answered(event_id, features, ts):
            return {"type": "user", "event_id": event_id, "ts": time.time() + ts, "user_id": "u1", "features": features}

        assert (
            await results(client, answered("e1", {"age": "25", "interests": ["news"]}, -9), answered("e2", {"age": None}, -5))
            == ["accepted"] * 2
        )
        assert (await client.store.get_user("u1")).features == {"interests": ["news"]}
        assert await results(client, answered("e3", {f"f{i}": 1 for i in range(256)}, -1)) == ["too_many_features"]


class TestEnvelope:
    @pytest.mark.parametrize(
        ("body", "status", "code", "pointers"),
        [
            (b"", 400, "not_json", []),
            (b"{", 400, "not_json", []),
            (b'{"events": [\xff]}', 400, "not_json", []),
            (b"[]", 422, "invalid", [""]),
            (b"{}", 422, "invalid", ["/events"]),
            (b'{"events": []}', 422, "invalid", ["/events"]),
            (b'{"events": {"type": "click"}}', 422, "invalid", ["/events"]),
            (b'{"events": [1], "more": 1}', 422, "invalid", ["/more"]),
            (b'{"events": [' + b"1," * 1000 + b"1]}", 422, "invalid", ["/events"]),
            (b'{"events": [' + b"[" * 100_000, 400, "not_json", []),
            (b" " * 5_000_000, 413, "too_large", []),
        ],
    )
    async def test_what_is_no_batch_is_a_problem(self, client, body, status, code, pointers):
        answer = await client.post("/v1/events", content=body, headers={"content-type": "application/json"})
        check(answer, status, code, *pointers)

    async def test_so_many_batches_at_once_and_no_more(self, run, ads):
        class Slow(MemoryStore):
            async def apply(self, subjects):
                await asyncio.sleep(0.1)
                return await super().apply(subjects)

        async with run(Slow(), max_event_batches=2, ready=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/events", json={"events": [click(str(i))]}) for i in range(5)))
            assert sorted(answer.status_code for answer in answers) == [202, 202, 429, 429, 429]
            assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}
            assert await results(client, click("later")) == ["accepted"]

    async def test_it_is_described(self, client):
        document = (await client.get("/openapi.json")).json()
        described = document["paths"]["/v1/events"]["post"]
        assert set(described["responses"]) == {"202", "400", "408", "413", "415", "422", "429", "503"}
        assert {"EventBatch", "EventsAnswer", "Click", "Impression", "Conversion", "UserUpdate", "AdUpdate"} <= set(
            document["components"]["schemas"]
        )
        assert set(document["paths"]["/rank"]["post"]["responses"]) >= {"404", "500", "504"}


class TestRanking:
    async def test_the_next_ranking_knows_a_click_and_what_was_told(self, client):
        before = await client.rank("u1", ["a1", "a2", "a3"], options={"explain": True})
        assert before["explain"]["history"]["ad_id"] == []
        await take(
            client,
            click("e1", ad_id="a7"),
            {"type": "user", "event_id": "e2", "ts": time.time(), "user_id": "u1", "features": {"age": "35"}},
        )
        after = await client.rank("u1", ["a1", "a2", "a3"], options={"explain": True})
        sent = {"id": "u2", "features": {"age": "35"}, "history": [{"ad_id": "a7"}]}
        assert len(after["explain"]["history"]["ad_id"]) == 1
        assert [ad["p_click"] for ad in after["ads"]] != [ad["p_click"] for ad in before["ads"]]
        assert after["explain"]["history"] == (await client.rank(sent, ["a1"], options={"explain": True}))["explain"]["history"]

    async def test_an_ad_that_is_told_is_ranked_with_by_another_service(self, run, ads):
        async with run(ads) as first, run(ads) as second:
            answered = {"type": "ad", "event_id": "e1", "ts": time.time(), "ad_id": "new", "features": {"genre": "news", "price": 3.0}}
            assert (await second.rank(candidates=["new"]))["ads"][0]["known"] is False
            assert await results(first, answered) == ["accepted"]
            await until(lambda: known(second, "new"))
            sent = {"ad_id": "new", "features": {"genre": "news", "price": 3.0}}
            assert (await second.rank(candidates=["new"]))["ads"] == (await second.rank(candidates=[sent]))["ads"]
            assert await results(first, {**answered, "event_id": "e2", "features": {}, "active": False}) == ["accepted"]
            await until(lambda: unknown(second, "new"))


async def known(client, ad_id):
    return "known" not in (await client.rank(candidates=[ad_id]))["ads"][0]


async def unknown(client, ad_id):
    return not await known(client, ad_id)


class Failing(MemoryStore):
    reason = "store_timeout"

    async def apply(self, subjects):
        raise StoreError(self.reason, "it is away")


@pytest.mark.parametrize(("reason", "code"), [("store_timeout", "store_down"), ("contended", "store_down"), ("backlog", "backlog")])
async def test_a_store_that_is_away_is_a_503_that_is_counted(run, reason, code):
    store = Failing()
    store.reason = reason
    async with run(store, ready=False) as client:
        answer = await client.post("/v1/events", json={"events": [click(), click("c2"), {"type": "click"}]})
        check(answer, 503, code)
        assert int(answer.headers["retry-after"]) > 0
        assert await client.metric(f'adrank_events_total{{result="{reason}",type="click"}}') == 2
        assert await client.metric('adrank_events_total{result="malformed",type="click"}') == 1


async def test_a_batch_of_nothing_but_mistakes_needs_no_store(run):
    async with run(Failing(), ready=False) as client:
        assert await results(client, {}, click(ts=0)) == ["malformed", "too_old"]


class Clock:
    now = 1_763_800_000.0

    def __call__(self):
        return self.now


async def test_a_clock_that_jumps_does_nothing_twice_and_names_what_it_refuses():
    ours, stores = Clock(), Clock()  # Redis has a clock of its own, and so has the store in memory here
    store = MemoryStore(7 * DAY + 300, stores)
    intake = Intake(store, Metrics(), list, Ages(7 * DAY, 300), ours)

    async def take(event_id, ts):
        (outcome,) = await intake.take([Event("click", event_id, ts, user_id="u1", ad_id=event_id)])
        return outcome.reason or outcome.status

    start = ours.now
    assert await take("e1", start) == "accepted"
    for jump, now_sent, first_again in (
        (-30 * DAY, "in_the_future", "in_the_future"),
        (30 * DAY, "too_old", "too_old"),
        (DAY, "accepted", "duplicate"),
    ):
        ours.now = start + jump
        assert await take(f"at {jump}", start) == now_sent
        assert await take("e1", start) == first_again
    stores.now = ours.now = start + 10 * DAY
    assert await take("later", ours.now) == "accepted"
    ours.now = start  # what was taken then has been forgotten by now, and would be done twice if only our own clock were asked
    assert await take("e1", start) == "too_old"
    assert (await store.get_user("u1")).ad_ids == ["e1", "at 86400.0", "later"]


ids = st.sampled_from("abcd")
known_events = st.builds(
    Event,
    type=st.sampled_from(TYPES),
    event_id=st.text("xyz0123", min_size=1, max_size=3),
    ts=st.integers(0, 1000).map(float),
    user_id=ids,
    request_id=ids,
    ad_id=ids,
    features=st.dictionaries(st.sampled_from(["age", "genre", "other"]), st.sampled_from(["25", "35", None, 7]), max_size=3),
    active=st.none() | st.booleans(),
)


def settled(events):
    """Events whose order is decided: no two of one subject at the same time, no id twice."""
    by_id = {event.event_id: event for event in events}
    return list({(KINDS[event.type], event.entity_id, event.ts): event for event in by_id.values()}.values())


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
wild = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
near = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES) | wild, "event_id": words | wild, "ts": st.floats(-1e9, 1e11) | st.just(time.time()) | wild},
    optional={
        name: st.text(max_size=3) | wild for name in ("user_id", "ad_id", "request_id", "features", "active", "position", "value", "x")
    },
)


@pytest.fixture(scope="module")
def portal(repository):
    portal = Portal(repository)
    yield portal
    portal.close()


def test_whatever_is_sent_has_an_outcome(portal):
    @given(st.lists(near | wild, min_size=1, max_size=5))
    def ask(events):
        answer = portal.ask(method="POST", url="/v1/events", json={"events": events})
        assert answer.status_code == 202, answer.text
        assert len(EventsAnswer.model_validate_json(answer.content).events) == len(events)

    ask()
