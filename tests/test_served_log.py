"""The log of what was served: that a record says what the model saw, and that logging never delays or fails a request."""

import asyncio
import dataclasses
import itertools
import json
import time
from collections import Counter

import bundles
import numpy as np
import pytest
import redis.asyncio
from conftest import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import fill, serving, workers_of
from redis_servers import client_of

from features.policy import EpsilonGreedy, PlackettLuce
from features.served import pack_served, unpack_served
from features.state import Ad, MemoryStore, StoreError, StoreRoom, UserState, unpack_features
from features.streams import SERVED
from service.catalogue.catalogue import Catalogue
from service.feedback import impression_log as module
from service.feedback.impression_log import ServedLog, served
from service.ranking.executor import Inline
from service.ranking.query import Query
from service.ranking.ranker import Ranker
from service.settings import Settings
from service.store.redis import RedisStore
from service.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio
LEFT = {"left": {"genre": "news", "price": 7.0}, "deleted": {"genre": "drama"}}
"""Ads that left: one by an event, one deleted outright after it was known."""
ODD = ["left", "deleted", "never known", "misfit", "late misfit", "new", "ünknown", "é\u0000"]
AD_IDS = st.sampled_from([*list(bundles.ADS)[:12], *ODD])
AD_FEATURES = st.fixed_dictionaries(
    {},
    optional={
        "genre": st.sampled_from(["news", "?", 7, None]),
        "tags": st.none() | st.lists(st.sampled_from(["x", "y", 3]), max_size=4),
        "price": st.none() | st.integers(0, 99) | st.floats(0, 1e6) | st.just(bundles.TOO_DEAR),
    },
)
USER_FEATURES = st.fixed_dictionaries(
    {},
    optional={
        "age": st.sampled_from(["25", 35, None]),
        "interests": st.lists(st.sampled_from(["news", "?"]), max_size=5),
        "income": st.none() | st.integers(0, 9) | st.floats(0, 1e6),
    },
)
STORED = USER_FEATURES.map(lambda features: {**features, "unheard_of": 1}) | st.just({"age": 2.5, "income": 3.5})
POLICIES = st.none() | st.just(EpsilonGreedy(0.5)) | st.just(PlackettLuce(2.0))
QUERIES = st.fixed_dictionaries(
    {"ad_ids": st.lists(AD_IDS, min_size=1, max_size=20), "sent": st.dictionaries(st.integers(0, 19), AD_FEATURES, max_size=4)},
    optional={
        "user": USER_FEATURES,
        "context": st.fixed_dictionaries({}, optional={"slot": st.sampled_from(["feed", "?", 1, None])}),
        "history": st.lists(AD_IDS, max_size=12),
        "top_k": st.integers(1, 20),
        "policy": POLICIES,
    },
).map(lambda query: {**query, "sent": {row: sent for row, sent in query["sent"].items() if row < len(query["ad_ids"])}})
LAW = settings(max_examples=75, suppress_health_check=list(HealthCheck))


class Stored(MemoryStore):
    """A store in memory that fails as it is told, and hangs while it is told to."""

    def __init__(self):
        super().__init__()
        self.failure, self.answers, self.kept, self.lengths, self.asked = None, asyncio.Event(), 0, [], 0
        self.room = None
        self.answers.set()

    async def get_user(self, user_id):
        if self.failure:
            raise StoreError("store_timeout", "as told")
        return await super().get_user(user_id)

    async def append_served(self, records):
        self.asked += 1
        self.lengths.append(len(records))
        await self.answers.wait()
        if self.failure:
            raise self.failure
        return self.kept + await super().append_served(records)

    async def served_room(self):
        return self.room or await super().served_room()


class World:
    """A ranker on a store in memory, with ads that changed and left, and all that it made."""

    def __init__(self, repository, scoring=None):
        self.metrics, self.store = Metrics(), Stored()
        self.models = bundles.loaded(Settings(models=repository))
        self.ranker = Ranker(self.store, self.metrics, scoring or Inline(), np.random.default_rng(1))
        self.encoder = self.models.loaded["din"].bundle.encoder
        self.catalogue = Catalogue(self.store, {self.models.loaded["din"].bundle.fingerprint: self.encoder}, self.metrics)
        self.ranker.use(self.models, self.catalogue)

    async def load(self):
        known = {**bundles.ADS, **LEFT, "late misfit": {"price": 3.0}}
        await self.store.put_ads([*(Ad(ad_id, features) for ad_id, features in known.items()), Ad("misfit", {"price": "dear"})])
        self.cursor = await self.catalogue.load()
        await self.change(
            Ad("left", LEFT["left"], active=False),
            Ad("deleted", {}, active=False),
            Ad("never known", {}, active=False),
            Ad("late misfit", {"price": "dear"}),
        )
        return self

    async def change(self, *ads):
        await self.store.put_ads(ads)
        self.cursor = await self.catalogue._step(self.cursor)

    async def rank(self, **query):
        """A ranking and what it was made of."""
        asked = Query(**{"user_id": "u1", "ad_ids": ["a1", "a2"], "request_id": "r1", **query})
        made = await self.ranker.rank(asked, self.metrics.begin("/rank"))
        assert made.query is asked
        return made

    def check(self, made, most=100):
        """The record, packed and unpacked: it encodes to the tensors that the model was given."""
        record = unpack_served(pack_served(served(made, 5.5, most, with_tensors=True)))
        given, ad_ids = made.encoded.feeds, made.encoded.request.candidates
        for wanted in (record.ad_ids, record.candidates):
            rows = [ad_ids.index(ad_id) for ad_id in wanted]
            if rows:
                feeds = record.feeds(self.encoder, wanted)
                assert feeds.keys() == given.keys()
                for name, tensor in feeds.items():
                    assert np.array_equal(tensor, given[name][:, rows] if name.startswith("ad_") else given[name]), name
        for name, tensor in record.feeds(self.encoder).items():
            assert record.tensors[name] == tensor.tobytes()
        return record


@pytest.fixture(scope="session")
def world(repository):
    return asyncio.run(World(repository).load())


@LAW
@given(QUERIES, st.none() | st.tuples(STORED, st.lists(AD_IDS, max_size=9)), st.booleans(), st.integers(1, 30))
def test_a_record_encodes_to_what_the_model_saw(world, query, state, failing, most):
    async def rank():
        world.store._users.clear()
        if state:
            await world.store.put_users([("u1", UserState(state[0], state[1], range(len(state[1]))))])
        world.store.failure = failing
        try:
            return await world.rank(**query)
        finally:
            world.store.failure = None

    made = asyncio.run(rank())
    record, ranking = world.check(made, most), made
    assert (record.request_id, record.ts, record.model, record.user_id) == ("r1", 5.5, "din", "u1")
    assert (record.ad_ids, record.p_click) == (ranking.ad_ids[:most], ranking.p_click[:most])
    assert len(record.history) <= 5
    assert str(record.version) == ranking.model.facts()["version"]
    known = ranking.known or [True] * len(ranking.ad_ids)
    assert {ad_id for ad_id, is_known in zip(record.ad_ids, known, strict=False) if not is_known} == set(record.unknown) & set(
        record.ad_ids
    )
    named = set(record.candidates or record.ad_ids)
    assert set(record.unknown) | set(record.sent) <= named
    assert set(record.ads) <= named | set(record.history)
    if query.get("policy"):
        unscored = {ad_id for ad_id, reason in ranking.omitted if reason == "not_scored"}
        assert record.candidates == [ad_id for ad_id in dict.fromkeys(query["ad_ids"]) if ad_id not in unscored]
        assert (record.policy, record.propensity) == (str(query["policy"]), ranking.propensity[:most])
    else:
        assert (record.candidates, record.policy, set(record.propensity)) == ([], "greedy", {1.0} if record.ad_ids else set())


class Meddling(Inline):
    """Lets something happen between encoding and scoring."""

    async def score(self, *request):
        await self.meanwhile()
        return await super().score(*request)


@pytest.mark.parametrize("policy", [None, EpsilonGreedy(1.0)])
async def test_ads_that_change_while_they_are_scored_are_logged_as_they_were(repository, policy):
    scoring = Meddling()
    world = await World(repository, scoring).load()

    async def meanwhile():
        await world.change(Ad("a1", {"price": 99.0}), Ad("a2", {"genre": "news"}, active=False), Ad("a3", {"price": "dear"}))
        await world.change(Ad("a1", {"price": 98.0}), Ad("new", {"genre": "news"}), Ad("left", {"genre": "drama"}))
        await world.catalogue.load()
        await world.change(Ad("misfit", {"genre": "news"}), Ad("late misfit", {"genre": "news"}))

    scoring.meanwhile = meanwhile
    ad_ids = ["a1", "a2", "a3", "a4", "new", "left", "misfit", "late misfit"]
    record = world.check(await world.rank(ad_ids=ad_ids, history=ad_ids, policy=policy))
    assert unpack_features(record.ads["a1"]) == bundles.ADS["a1"]
    assert set(record.unknown) == {"new", "left", "misfit"}
    scoring.meanwhile = lambda: asyncio.sleep(0)
    record = world.check(await world.rank(ad_ids=ad_ids, history=ad_ids, policy=policy))
    assert unpack_features(record.ads["a1"]) == {"price": 98.0}
    assert set(record.unknown) == {"a2", "a3"}


async def test_ads_that_change_while_the_user_is_fetched_are_logged_as_they_are_then(world):
    store, changes = world.store, [Ad("a5", {"price": 99.0}), Ad("fresh", {"genre": "news"})]
    asked = store.get_user

    async def get_user(user_id):
        await world.change(*changes)
        return await asked(user_id)

    store.get_user = get_user
    try:
        record = world.check(await world.rank(ad_ids=["a5", "fresh"], history=["a5"]))
    finally:
        del store.get_user
    assert unpack_features(record.ads["a5"]) == {"price": 99.0}
    assert (record.unknown, len(record.ads)) == ([], 2)


async def test_a_model_without_its_ads_is_logged_too(repository):
    world = World(repository)
    record = world.check(await world.rank(history=["a3"]))
    assert (record.ads, sorted(record.unknown)) == ({}, ["a1", "a2"])


class Log:
    """A log on a store that can be told to fail, fed with one ranking again and again."""

    def __init__(self, world, made, chance=lambda: 0.0, **more):
        self.store, self.metrics, self.made = Stored(), Metrics(), made
        self.log = ServedLog(self.store, self.metrics, Settings(**more), chance)
        self.log.start()

    def put(self, count=1):
        for _ in range(count):
            self.log.put(self.made)

    async def until(self, **counts):
        """Wait until every ranking is counted, and that way."""
        await until(lambda: self.counts == counts)

    async def until_asked(self, times=1):
        """Wait until the store was asked so often."""
        await until(lambda: self.store.asked >= times)

    async def until_made(self):
        """Wait until all records are made."""
        await until(lambda: not self.log._unlogged)

    @property
    def counts(self):
        return {result: count for result, count in self.metrics.served.items() if count}


@pytest.fixture
async def made(world):
    world.store._users.clear()  # what the tests before left
    return await world.rank()


@pytest.fixture
async def log(world, made, monkeypatch):
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", (0.001, 0.01))
    opened = []

    def open_log(**more):
        opened.append(Log(world, made, **more))
        return opened[-1]

    yield open_log
    for each in opened:
        each.store.answers.set()
        await each.log.close()


async def test_each_ranking_is_written_once_and_many_together(log):
    log = log()
    log.store.answers.clear()  # until all are made, which takes longer than is waited for more on a busy machine
    log.put(500)
    await log.until_made()
    log.store.answers.set()
    await log.until(written=500)
    assert len(log.store.served) == 500
    assert log.store.asked <= 4
    assert max(log.store.lengths) <= module.BATCH_RECORDS


async def test_a_batch_is_bounded_in_bytes(log, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    log = log()
    log.put(5)
    await log.until(written=5)
    assert log.store.lengths == [1] * 5


async def test_the_queue_is_bounded(log):
    log = log(log_queue=10)
    log.store.answers.clear()
    log.put(1)
    await log.until_asked()
    log.put(30)
    assert log.counts == {"dropped_queue": 20}
    assert log.metrics.served_waiting == 10
    await log.until_made()
    log.put(1)
    assert log.counts == {"dropped_queue": 21}
    log.store.answers.set()
    await log.until(dropped_queue=21, written=11)
    log.put(1)
    await log.until(dropped_queue=21, written=12)
    assert log.metrics.served_waiting == 0


@pytest.mark.parametrize("bound", ["QUEUE_BYTES", "UNMADE_ADS"])
async def test_the_queue_is_bounded_in_what_it_holds_too(log, monkeypatch, bound):
    monkeypatch.setattr(module, bound, 3)
    log = log()
    log.store.answers.clear()
    log.put(2)
    await log.until_asked()
    log.put(2)  # waits behind the two that are on their way
    await log.until_made()
    log.put(4)
    assert log.counts == {"dropped_queue": {"QUEUE_BYTES": 4, "UNMADE_ADS": 2}[bound]}


async def test_a_batch_that_may_have_been_written_is_never_written_again(log):
    log = log()
    log.store.failure = StoreError("store_timeout", "as told")
    log.put(3)
    await log.until(dropped_store=3)
    log.put(4)
    await log.until_made()
    await log.until_asked(4)
    assert log.counts == {"dropped_store": 3}, "nothing more is risked until the store answers"
    assert log.store.lengths[1:] == [0] * (log.store.asked - 1)
    log.store.failure = None
    await log.until(dropped_store=3, written=4)
    assert len(log.store.served) == 4


async def test_a_full_log_takes_no_more_until_someone_takes_from_it(log):
    log = log(log_kept=10)
    log.store.kept = 8
    log.put(2)
    await log.until(written=2)
    log.put(5)
    assert log.counts == {"written": 2, "dropped_backlog": 5}
    log.store.kept = 0
    await until(lambda: not log.log._full)
    log.put(1)
    await log.until(written=3, dropped_backlog=5)


@pytest.mark.parametrize(
    ("room", "result", "said"),
    [
        (StoreRoom(2**20), "dropped_backlog", "MB wait in adrank:served"),
        (StoreRoom(None, 900, 1000), "dropped_memory", "what is left is for events: raise maxmemory"),
        (StoreRoom(10, 800, 1000), "dropped_memory", "(maxmemory)"),
    ],
)
async def test_a_log_that_takes_too_much_of_the_store_is_full(log, room, result, said, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    log = log(log_kept_bytes=2**20, log_memory_share=0.8)
    assert log.log.status() == {"status": "open", "detail": None}
    log.store.room = room
    log.put(1)
    await log.until(written=1)
    while not log.log._full:
        await asyncio.sleep(0.005)
    log.put(2)
    assert log.counts == {"written": 1, result: 2}
    assert log.log.status()["status"] == "full"
    assert said in log.log.status()["detail"]
    log.store.room = StoreRoom(10, 700, 1000)
    await until(lambda: not log.log._full)
    log.put(1)
    await log.until(written=2, **{result: 2})


async def test_what_is_appended_between_two_looks_counts_and_a_store_that_does_not_say_is_estimated(log, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 1000.0)
    log = log(log_kept_bytes=2**20)
    log.store.room = StoreRoom(2**20 - 100)
    log.put(1)
    await log.until(written=1)
    assert log.log.status()["status"] == "open"
    log.put(1)
    await log.until(written=2)
    await log.until_made()
    while not log.log._full:
        await asyncio.sleep(0.005)
    blind = log.log
    blind._room, blind._since = StoreRoom(), 0
    size = blind._appended / blind._appended_records
    await blind._see_room(int(2**20 / size) - 1)
    assert not blind._full
    await blind._see_room(int(2**20 / size) + 1)
    assert blind._full == "dropped_backlog"


async def test_what_nobody_foresaw_is_counted_and_told_now_and_then(log, caplog, made):
    log = log()
    log.store.failure = ZeroDivisionError("as told")
    log.put(2)
    await log.until(failed=2)
    log.store.failure = None
    good, log.made = log.made, dataclasses.replace(made, encoded=made.encoded._replace(model=None))
    log.put(3)
    await log.until(failed=5)
    log.made = good
    log.put(1)
    await log.until(failed=5, written=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ZeroDivisionError" in caplog.text


async def test_shares_are_drawn(log):
    draws = itertools.cycle([0.1, 0.9, 0.5])
    log = log(chance=lambda: next(draws), log_share=0.5, log_tensors_share=0.0)
    log.put(9)
    await log.until(written=3, sampled_out=6)
    assert not any(unpack_served(record).tensors for record in log.store.served)


@pytest.mark.parametrize(("share", "with_tensors"), [(0.0, 0), (0.25, 5), (1.0, 20)])
async def test_some_carry_their_tensors(log, share, with_tensors):
    draws = itertools.cycle([0.2, 0.4, 0.6, 0.8])
    log = log(chance=lambda: next(draws), log_tensors_share=share)
    log.put(20)
    await log.until(written=20)
    assert sum(bool(unpack_served(record).tensors) for record in log.store.served) == with_tensors


async def test_nothing_is_logged_where_none_is_asked_for(log):
    log = log(log_share=0.0)
    log.put(3)
    assert log.counts == {"sampled_out": 3}


@pytest.mark.parametrize("slice_seconds", [module.SLICE_SECONDS, 0.0])
async def test_what_waits_is_written_at_the_end(log, monkeypatch, slice_seconds):
    monkeypatch.setattr(module, "SLICE_SECONDS", slice_seconds)
    log = log()
    log.put(20)
    await log.log.close()
    assert log.counts == {"written": 20}
    log.put(1)
    assert log.counts == {"written": 20, "dropped_queue": 1}


async def test_the_end_does_not_wait_for_a_store_that_hangs(log, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
    log = log()
    log.store.answers.clear()
    log.put(3)
    await log.until_asked()
    log.put(3)
    async with asyncio.timeout(90):
        await log.log.close()
    assert log.counts == {"dropped_store": 6}


async def records_of(url):
    """All records of a store's stream, oldest first."""
    async with redis.asyncio.Redis.from_url(url, protocol=2) as client:
        return [unpack_served(entry[b"v"]) for _, entry in await client.xrange(SERVED)]


async def until_logged(client, count, result="written"):
    await client.until_metric(f'adrank_served_log_total{{result="{result}"}}', count)


class TestService:
    """The whole service, on a real server."""

    async def test_a_ranking_is_a_record(self, run, server):
        await fill(server.url)
        async with run(redis=server.url, log_tensors_share=0.0, log_shown=2) as client:
            began = time.time()
            request = {
                "request_id": "r1",
                "user": {"id": "u1", "features": {"income": 9}},
                "context": {"slot": "feed"},
                "candidates": [{"ad_id": "a1"}, {"ad_id": "new", "features": {"genre": "news"}}, {"ad_id": "a3"}, {"ad_id": "a1"}],
            }
            answer = (await client.post("/rank", json=request)).json()
            await client.rank("u2", ["a1"])
            await until_logged(client, 2)
        first, second = await records_of(server.url)
        assert (first.request_id, first.model, first.user_id, first.policy) == ("r1", "din", "u1", "greedy")
        assert began <= first.ts <= time.time()
        assert str(first.version) == answer["model"]["version"]
        assert first.user == {"age": "35", "income": 9.0}
        assert (first.context, first.history) == ({"slot": "feed"}, ["a1"])
        assert first.ad_ids == [ad["ad_id"] for ad in answer["ads"][:2]]
        assert first.p_click == [ad["p_click"] for ad in answer["ads"][:2]]
        assert (first.propensity, first.candidates, first.tensors) == ([1.0, 1.0], [], {})
        assert {ad_id: unpack_features(packed) for ad_id, packed in first.ads.items()} == {
            ad_id: bundles.ADS[ad_id] for ad_id in {"a1", *first.ad_ids} & bundles.ADS.keys()
        }
        assert len(second.request_id) == 32

    @pytest.mark.parametrize(
        ("options", "shown"),
        [({}, 0), ({"top_k": 2}, 2), ({"shown": 1}, 1), ({"top_k": 3, "shown": 0}, 0), ({"top_k": 2, "shown": 9}, 2), ({"shown": 9}, 3)],
    )
    async def test_a_record_tells_what_the_caller_said_that_it_shows(self, run, server, options, shown):
        async with run(redis=server.url, log_shown=3) as client:
            answer = await client.rank(candidates=list(bundles.ADS)[:6], options=options)
            await until_logged(client, 1)
        (record,) = await records_of(server.url)
        assert record.shown == shown
        assert record.ad_ids == [ad["ad_id"] for ad in answer["ads"][:3]]

    async def test_a_ranking_whose_caller_has_left_is_counted_and_not_logged(self, run, server):
        body = json.dumps({"user": {"id": "u1"}, "candidates": ["a1"], "options": {"top_k": 1}}).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/rank", "headers": headers, "query_string": b""}

        async def ask(client, then):
            """A connection that has sent its request, and on which there is nothing more to read or, once answered, `then`."""
            messages, sent = [{"type": "http.request", "body": body}], []

            async def receive():
                if not messages and then is None:
                    await asyncio.Event().wait()
                return messages.pop() if messages else {"type": then}

            async def send(message):
                sent.append(message)

            await client.app({**scope}, receive, send)
            assert sent[0]["status"] == 200

        async with run(redis=server.url) as client:
            for then in ("http.disconnect", None, "http.disconnect"):
                await ask(client, then)
            await until_logged(client, 2, "caller_left")
            await until_logged(client, 1)
        assert len(await records_of(server.url)) == 1

    async def test_cancelled_requests_are_no_impressions(self, repository, server):
        """Callers that close their connection while the store is silent, which takes a ranking a while."""
        body = json.dumps({"user": {"id": "u1"}, "candidates": ["a1", "a2"], "options": {"top_k": 2}}).encode()
        head = b"POST /rank HTTP/1.1\r\nhost: adrank\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        await fill(server.url)
        async with serving(repository, server.url, store_timeout_ms=300) as client:
            await client.rank()
            await until_logged(client, 1)
            server.pause()
            for _ in range(5):
                _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
                writer.write(head + body)
                await writer.drain()
                writer.close()
            await until_logged(client, 5, "caller_left")
            server.resume()
        assert len(await records_of(server.url)) == 1

    async def test_an_explored_answer_is_logged_as_it_was_told(self, run, server):
        await fill(server.url)
        explore = {"policy": "plackett_luce", "temperature": 3}
        async with run(redis=server.url) as client:
            answer = await client.rank(candidates=list(bundles.ADS), options={"explore": explore, "top_k": 4}, request_id="r1")
            await until_logged(client, 1)
        (record,) = await records_of(server.url)
        assert record.policy == "plackett_luce 3.0"
        assert (record.ad_ids, record.candidates) == ([ad["ad_id"] for ad in answer["ads"]], list(bundles.ADS))
        assert record.propensity == [ad["propensity"] for ad in answer["ads"]]
        assert set(record.ads) >= bundles.ADS.keys()

    @pytest.mark.parametrize("way", ["pause", "stop"])
    async def test_a_store_that_fails_costs_no_answer(self, run, server, way, monkeypatch):
        monkeypatch.setattr("service.store.redis.APPEND_SECONDS", 0.2)
        await fill(server.url)
        async with run(redis=server.url, log_queue=5, store_timeout_ms=20) as client:
            await client.rank()
            await until_logged(client, 1)
            getattr(server, way)()
            for _ in range(40):
                answer = await client.rank()
                assert [entry["stage"] for entry in answer["degraded"]] == ["history", "user"]
            await until_logged(client, 20, "dropped_queue")
            {"pause": server.resume, "stop": server.start}[way]()
            async with asyncio.timeout(90):
                while (await client.rank())["degraded"]:
                    await asyncio.sleep(0.05)
            await client.rank(request_id="last")
            async with asyncio.timeout(90):
                while "last" not in [record.request_id for record in await records_of(server.url)]:
                    await client.rank(request_id="last")
                    await asyncio.sleep(0.05)
            kept = Counter(record.request_id for record in await records_of(server.url) if record.request_id != "last")
            assert set(kept.values()) == {1}

    async def test_rankings_leave_room_for_events_in_a_redis_that_fills(self, run, server):
        """Explored rankings until the store's memory is nearly used: then none is logged, `/readyz` says so, and events are taken."""
        await fill(server.url)
        with client_of(server.url) as redis_:
            redis_.config_set("maxmemory", redis_.info("memory")["used_memory"] + 4 * 2**20)
            big = {"candidates": [f"{i:0200d}" for i in range(2000)], "options": {"explore": {"policy": "plackett_luce", "temperature": 1}}}
            async with run(redis=server.url) as client:
                while not await client.metric('adrank_served_log_total{result="dropped_memory"}'):
                    await client.rank(**big)
                report = (await client.get("/readyz")).json()
                assert (report["status"], report["served_log"]["status"]) == ("degraded", "full")
                assert "raise maxmemory" in report["served_log"]["detail"]
                event = {"type": "click", "ts": time.time(), "user_id": "u1", "ad_id": "a1"}
                for i in range(100):
                    answer = await client.post("/v1/events", json={"events": [{**event, "event_id": f"e{i}"}]})
                    assert answer.status_code == 202

    async def test_a_stream_that_is_something_else_is_an_error_and_no_more(self, run, server):
        async with redis.asyncio.Redis.from_url(server.url, protocol=2) as other:
            await other.set(SERVED, "text")
        async with run(redis=server.url) as client:
            await client.rank()
            await until_logged(client, 1, "dropped_store")
            assert (await client.rank())["degraded"] == []

    async def test_several_workers_log_every_ranking_and_flush_at_the_end(self, repository, server):
        await fill(server.url)
        async with serving(repository, server.url, workers=2) as client:
            await until(lambda: len(workers_of(client)) >= 2)
            answers = await asyncio.gather(*(client.rank(f"u{i}", request_id=f"r{i}") for i in range(40)))
        assert len(answers) == 40
        records = await records_of(server.url)
        assert sorted(record.request_id for record in records) == sorted(f"r{i}" for i in range(40))
        assert len({f"{record.request_id}{record.user_id}" for record in records}) == 40


async def test_a_store_in_redis_tells_how_many_it_holds(server):
    store = RedisStore(server.url, timeout=1, ttl=100, on_damaged=lambda: None)
    assert await store.append_served([]) == 0
    assert await store.append_served([b"one", b"two"]) == 2
    assert await store.append_served([b"x" * 5_000_000]) == 3
    server.stop()
    with pytest.raises(StoreError):
        await store.append_served([b"lost"])
    await store.close()


async def test_a_store_in_memory_keeps_the_newest():
    store = MemoryStore()
    await store.append_served(f"{i}".encode() for i in range(5_000))
    assert (len(store.served), store.served[-1]) == (1_000, b"4999")
