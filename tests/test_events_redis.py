"""What only Redis can get wrong about events: keys, scripts, refusals."""

import asyncio
import contextlib
import time

import pytest
import redis
import redis.asyncio
from conftest import redis_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from features.entity_updates import by_entity
from features.events import unpack_event
from features.state import StoreError, UserState, pack_user
from features.streams import EVENTS
from service.store.events import Bounds, EventStore
from service.store.redis import CHANGES, ads_key, user_key
from tests.test_events import known_events, settled
from tests.test_store import NOW, ad, applied, click, shown, user

pytestmark = pytest.mark.anyio
WEEK = 7 * 24 * 3600.0


@pytest.fixture
def store(redis_only):
    return redis_only


async def waiting(raw):
    """The events that wait to be joined."""
    return [unpack_event(entry[b"v"]) for _, entry in await raw.xrange(EVENTS)]


class TestKeys:
    async def test_each_has_a_ttl_or_a_bound(self, store, raw):
        await applied(store, click("c"), shown("i"), shown("old", "r2", -WEEK), user("u", {"age": "25"}, user_id="u2"), ad("a", {}))
        left = {key.decode(): await raw.ttl(key) for key in await raw.keys()}
        assert {name for name, ttl in left.items() if ttl == -1} == {EVENTS, CHANGES, ads_key("a1")}
        assert 0 < left.pop(user_key("u1")) <= 100
        assert 0 < left.pop(user_key("u2")) <= 100
        seen = {name: ttl / 24 / 3600 for name, ttl in left.items() if name.startswith("adrank:seen:")}
        assert seen.pop("adrank:seen:request:{r2}") == pytest.approx(
            1, abs=0.1
        )  # until its only event is too old; NOW is when the tests were read
        number = ads_key("a1").removeprefix("adrank:ads:")
        others = ["user:{u1}", "user:{u2}", "request:{r1}", f"ad:{number}:a1"]
        assert seen == pytest.approx({f"adrank:seen:{name}": 8 for name in others}, abs=0.1)

    async def test_ids_go_once_they_are_too_old(self, raw, shared_server):
        store = redis_store(shared_server.url, bounds=Bounds(seen_seconds=20_000))
        await raw.zadd("adrank:seen:user:{u1}", {"gone": NOW - 30_000, "kept": NOW - 10_000})
        await applied(store, click("c"))
        assert await raw.zrange("adrank:seen:user:{u1}", 0, -1) == [b"kept", b"c"]
        await store.close()


class TestStream:
    async def test_what_is_joined_waits_there_and_the_rest_does_not(self, store, raw):
        events = [shown("i"), click("c"), shown("v", kind="conversion"), user("u", {"age": "25"}), ad("a", {"genre": "news"})]
        for _ in range(2):
            await applied(store, *events)
            assert sorted(await waiting(raw), key=lambda event: event.event_id) == [events[1], events[0], events[2]]

    async def test_when_it_is_full_nothing_is_taken_that_would_go_there(self, raw, shared_server):
        store = redis_store(shared_server.url, bounds=Bounds(waiting=3))
        await applied(store, shown("i1"), shown("i2"), shown("i3"))
        with pytest.raises(StoreError, match="3 events wait to be joined") as caught:
            await applied(store, click("c"), user("u", {"age": "25"}, user_id="u2"))
        assert caught.value.reason == "backlog"
        assert (await store.get_user("u1"), await store.get_user("u2"), len(await waiting(raw))) == (None, None, 3)
        assert await applied(store, user("u", {"age": "25"}), shown("i1")) == {"u": "accepted", "i1": "duplicate"}
        await raw.xtrim(EVENTS, maxlen=0, approximate=False)
        assert await applied(store, click("c")) == {"c": "accepted"}
        await store.close()

    async def test_their_bytes_are_bounded_too(self, raw, shared_server, monkeypatch):
        monkeypatch.setattr("service.store.events.LOOK_SECONDS", 0.0)
        store = redis_store(shared_server.url, bounds=Bounds(waiting_bytes=20_000))
        with contextlib.suppress(StoreError):
            for i in range(1000):
                await applied(store, shown(f"i{i}"))
        assert 10 < len(await waiting(raw)) < 500
        with pytest.raises(StoreError, match=r"events wait to be joined \(0 MB\)") as caught:
            await applied(store, shown("more"))
        assert caught.value.reason == "backlog"
        await raw.xtrim(EVENTS, maxlen=0, approximate=False)
        assert await applied(store, shown("last")) == {"last": "accepted"}
        await store.close()

    async def test_whoever_dies_after_it_leaves_an_event_that_can_come_again(self, store, raw, monkeypatch):
        async def die(*_):
            raise ConnectionResetError("gone")

        events = [click("c"), shown("i"), ad("a", {})]
        with monkeypatch.context() as patch:
            patch.setattr(EventStore, "_write", die)
            with pytest.raises(StoreError):
                await applied(store, *events)
        assert len(await waiting(raw)) == 2
        assert await store.get_user("u1") is None
        assert set((await applied(store, *events)).values()) == {"accepted"}
        assert sorted(event.event_id for event in await waiting(raw)) == ["c", "c", "i", "i"]  # the joiner takes each once
        assert (await store.get_user("u1")).ad_ids == ["a1"]


class TestServer:
    async def test_it_need_not_know_the_script(self, store, raw):
        assert await applied(store, click("c1"), shown("i1")) == {"c1": "accepted", "i1": "accepted"}
        await raw.script_flush()
        assert await applied(store, click("c2", 1), click("c1"), shown("i1"), ad("a", {})) == {
            **dict.fromkeys(["c1", "i1"], "duplicate"),
            **dict.fromkeys(["c2", "a"], "accepted"),
        }

    @pytest.mark.parametrize(
        "value",
        [
            b"nonsense",
            b"\xc1",
            pack_user("u2", UserState()),
            msgpack.encode([2, "u1", {}, ["a"], ["x"], {}]),
            msgpack.encode([2, "u1", {}, [], [], {"age": []}]),
        ],
    )
    async def test_a_state_that_cannot_be_read_gives_way(self, store, raw, value):
        await raw.set(user_key("u1"), value)
        await raw.hset(ads_key("a1"), "a1", value)
        statuses = await applied(store, click("c"), user("u", {"age": "25"}), ad("a", {"genre": "news"}))
        assert statuses == dict.fromkeys("cua", "state_replaced")
        state = await store.get_user("u1")
        assert (state.ad_ids, state.features) == (["a1"], {"age": "25"})
        assert await applied(store, click("c"), click("c2", 1)) == {"c": "duplicate", "c2": "accepted"}

    async def test_refusals_change_nothing_and_all_may_come_again(self, server):
        store, events = redis_store(server.url), [click("c"), shown("i"), user("u", {"age": "25"}), ad("a", {})]
        with redis.Redis.from_url(server.url) as raw:
            for refuse, accept in (("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"), ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE")):
                raw.execute_command(refuse)
                for _ in range(2):
                    with pytest.raises(StoreError) as caught:
                        await applied(store, *events)
                    assert caught.value.reason == "store_error"
                raw.execute_command(accept)
                assert not raw.exists(user_key("u1"), ads_key("a1"))
            assert set((await applied(store, *events)).values()) == {"accepted"}
        server.stop()
        with pytest.raises(StoreError) as caught:
            await applied(store, *events)
        assert caught.value.reason == "store_unreachable"
        await store.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_any_order_and_any_repetition_end_in_the_same_state(servers):
    raw = redis.Redis.from_url(servers("valkey").url)

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(st.lists(known_events, max_size=15).map(settled), st.randoms())
    def check(events, chance):
        states = []
        for sent in (
            sorted(events, key=lambda event: event.ts),
            [*chance.choices(events or [None], k=len(events)), *chance.sample(events, len(events))],
        ):
            raw.flushall()
            runner.run(apply(sent, chance))
            keys = [*(user_key(each) for each in "abcd")]
            states.append(
                ([normal(raw.get(key)) for key in keys], {k: normal(v) for each in "abcd" for k, v in raw.hgetall(ads_key(each)).items()})
            )
        assert states[0] == states[1]

    async def apply(events, chance):
        store = redis_store(servers("valkey").url, bounds=Bounds(seen_seconds=time.time() + 1_000))
        rest = list(events)
        while rest:
            some = {event.event_id: event for event in (rest.pop() for _ in range(min(len(rest), chance.randint(1, 9))))}
            await store.apply(by_entity(some.values()))
        await store.close()

    def normal(value):
        """The order in which features were told is of no matter."""
        return value and [sorted(part.items()) if isinstance(part, dict) else part for part in msgpack.decode(value)]

    with asyncio.Runner() as runner:  # one loop: a connection that is collected after its loop would warn in whatever test runs then
        check()
    raw.close()
