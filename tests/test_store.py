"""The contract of `features.state.Store`, against memory and real servers; then what only Redis can get wrong."""

import asyncio
import random
import time

import pytest
from conftest import redis_store
from msgspec import msgpack

from features.counters import CountedPart
from features.entity_updates import by_entity
from features.events import Event
from features.state import HISTORY_LIMIT, SEEN_LIMIT, Ad, ChangesLostError, StoreError, UserState, pack_ad, pack_user
from service.store.redis import CHANGES, ads_key, place, user_key
from service.store.server import REFUSED_SECONDS

pytestmark = pytest.mark.anyio
ODD = ["u", "u}{", "}", "{x}", "\\", "\\}", "{}", "}{a}", "ü😀\u202e", "a\u0000b", "e\u0301", " ", "x" * 256]


async def everything(store):
    return {ad.ad_id: ad async for batch in store.all_ads() for ad in batch}


NOW = round(time.time())


def click(event_id, ts=0.0, ad_id="a1", user_id="u1"):
    return Event("click", event_id, NOW + ts, user_id=user_id, ad_id=ad_id, request_id="r1")


def shown(event_id, request_id="r1", ts=0.0, kind="impression", user_id=""):
    return Event(kind, event_id, NOW + ts, user_id=user_id, request_id=request_id, ad_id="a1")


def user(event_id, features, ts=0.0, user_id="u1"):
    return Event("user", event_id, NOW + ts, user_id=user_id, features=features)


def ad(event_id, features, ts=0.0, ad_id="a1", active=None):
    return Event("ad", event_id, NOW + ts, ad_id=ad_id, features=features, active=active)


async def applied(store, *events):
    """What became of the events, by their ids."""
    subjects = by_entity(events)
    outcomes = await store.apply(subjects)
    pairs = [pair for subject, each in zip(subjects, outcomes, strict=True) for pair in zip(subject.events, each, strict=True)]
    return {event.event_id: outcome.reason or outcome.status for event, outcome in pairs}


class TestEvents:
    """The contract of `apply`."""

    async def test_events_are_counted_once_with_their_user_and_with_an_ad_that_is_there(self, store):
        def counting(event):
            return [CountedPart(f"{event.type}@60", event.ad_id, 60.0)], [CountedPart(f"{event.type}@60", "", 60.0)]

        await store.put_ads([Ad("a1", {"genre": "news"})])
        events = [click("c"), shown("i", user_id="u1"), click("n", ad_id="none"), shown("v", kind="conversion", user_id="u1")]
        for _ in range(2):
            entities = by_entity(events, counting=counting)
            await asyncio.gather(*(store.apply(entities[i:]) for i in range(3)))
        once = (1.0, NOW)
        known = {"impression@60": {"a1": once}, "conversion@60": {"a1": once}, "click@60": {"a1": once, "none": once}}
        assert (await store.get_user("u1")).counts == known
        assert await everything(store) == {"a1": Ad("a1", {"genre": "news"}, counts={f"{e.type}@60": {"": once} for e in events})}

    async def test_each_kind_does_its_own_and_once(self, store):
        events = [click("c"), shown("i"), shown("v", kind="conversion"), user("u", {"age": "25"}), ad("a", {"genre": "news"})]
        assert await applied(store, *events) == dict.fromkeys("civua", "accepted")
        state, ads = await store.get_user("u1"), await everything(store)
        for _ in range(3):
            assert await applied(store, *reversed(events)) == dict.fromkeys("civua", "duplicate")
        assert await store.get_user("u1") == state == UserState({"age": "25"}, ["a1"], [NOW], {"age": NOW})
        assert await everything(store) == ads == {"a1": Ad("a1", {"genre": "news"}, True, {"genre": NOW})}

    async def test_old_and_new_ones_may_come_together(self, store):
        await applied(store, click("c1"), user("u1", {"age": "25"}))
        assert await applied(store, click("c2", 1), click("c1"), user("u1", {"age": "35"})) == {
            "c2": "accepted",
            "c1": "duplicate",
            "u1": "duplicate",
        }
        state = await store.get_user("u1")
        assert (state.ts, state.features) == ([NOW, NOW + 1], {"age": "25"})

    async def test_a_late_event_lands_in_its_place_by_time(self, store):
        await store.put_users([("u1", UserState({}, ["old"], [NOW - 1000]))])
        await applied(store, click("c3", -10, "a3"), user("t2", {"age": "35"}, -5))
        await applied(store, click("c1", -30, "a1"), click("c2", -20, "a2"), user("t1", {"age": "25", "income": 1.5}, -50))
        state = await store.get_user("u1")
        assert state.ad_ids == ["old", "a1", "a2", "a3"]
        assert state.features == {"age": "35", "income": 1.5}

    async def test_subjects_of_the_same_name_are_not_mixed_up(self, store):
        name = "same"
        events = [click("e", user_id=name), shown("e", request_id=name), ad("e", {"genre": "news"}, ad_id=name)]
        for event in events:
            assert await applied(store, event) == {"e": "accepted"}
        for event in events:
            assert await applied(store, event) == {"e": "duplicate"}

    async def test_odd_names_are_names(self, store):
        for name in ODD:
            events = [click(name, user_id=name), shown(f"{name}i", name), ad(f"{name}a", {"which": name}, ad_id=name)]
            assert set((await applied(store, *events)).values()) == {"accepted"}
            assert set((await applied(store, *events)).values()) == {"duplicate"}
        assert [(await store.get_user(name)).ts for name in ODD] == [[NOW]] * len(ODD)
        assert {ad_id: each.features["which"] for ad_id, each in (await everything(store)).items()} == {each: each for each in ODD}

    async def test_history_is_bounded_and_what_is_too_old_for_it_is_still_done_once(self, store):
        await applied(store, *(click(f"c{i}", i, f"a{i}") for i in range(-HISTORY_LIMIT - 20, 0)))
        state = await store.get_user("u1")
        assert (len(state.ts), state.ts[0], state.ad_ids[-1]) == (HISTORY_LIMIT, NOW - HISTORY_LIMIT, "a-1")
        late = click("late", -HISTORY_LIMIT - 1000)
        assert await applied(store, late) == {"late": "accepted"}
        assert await applied(store, late) == {"late": "duplicate"}
        assert await store.get_user("u1") == state

    async def test_ids_are_bounded_and_what_was_forgotten_is_never_done_again(self, store):
        events = [shown(f"e{i}", ts=i - SEEN_LIMIT) for i in range(SEEN_LIMIT + 300)]
        for start in range(0, len(events), 1000):
            await applied(store, *events[start : start + 1000])
        assert set((await applied(store, *events[:300])).values()) == {"too_old"}
        assert set((await applied(store, *events[300:330], *events[-30:])).values()) == {"duplicate"}
        assert await applied(store, shown("new", ts=500)) == {"new": "accepted"}

    async def test_what_is_older_than_what_is_remembered_is_refused(self, store):
        week = 8 * 24 * 3600
        assert await applied(store, click("old", -week - 60), click("new")) == {"old": "too_old", "new": "accepted"}
        assert await applied(store, click("old", -week - 60), click("younger", -week + 12 * 3600)) == {
            "old": "too_old",
            "younger": "accepted",
        }
        assert len((await store.get_user("u1")).ts) == 2

    async def test_too_many_features_are_refused_and_may_come_again(self, store):
        many = {f"f{i}": "x" for i in range(250)}
        assert await applied(store, user("e1", many), ad("e2", many)) == {"e1": "accepted", "e2": "accepted"}
        more = {f"g{i}": "x" for i in range(10)}
        refused = {"e3": "too_many_features", "e4": "too_many_features", "e5": "accepted"}
        assert await applied(store, user("e3", more, 1), ad("e4", more, 1), click("e5")) == refused
        assert await applied(store, user("e3", {"f1": None, "one": "y"}, 1)) == {"e3": "accepted"}
        assert len((await store.get_user("u1")).features) == 250
        large = {f"h{i}": ["x" * 1000] * 100 for i in range(3)}
        assert await applied(store, user("e6", large, user_id="u2")) == {"e6": "too_many_features"}
        assert await store.get_user("u2") is None

    async def test_an_ad_leaves_and_comes_back_as_told(self, store):
        cursor = await store.cursor()
        await store.put_ads([Ad("a1", {"genre": "news"})])
        await applied(store, ad("e2", {}, 10, active=False), ad("e1", {"genre": "drama"}, 5, active=True))
        stored = (await everything(store))["a1"]
        assert (stored.active, stored.features) == (False, {"genre": "drama"})
        ads, after = await store.changed_ads(cursor, 0.01)
        assert ads == [stored]
        assert await applied(store, ad("e1", {}, 5)) == {"e1": "duplicate"}
        assert (await store.changed_ads(after, 0.01))[0] == [stored], "whoever did it first may not have lived to announce it"

    async def test_many_at_once_are_each_done_once(self, store):
        events = [click(f"c{i}", i, f"a{i}", user_id=f"u{i % 7}") for i in range(-140, 0)]
        events += [ad(f"a{i}", {"n": i}, i, ad_id=f"a{i % 3}") for i in range(-30, 0)]
        outcomes = await asyncio.gather(*(applied(store, *random.Random(n).sample(events, len(events))) for n in range(8)))
        for event in events:
            assert sorted(each[event.event_id] for each in outcomes) == ["accepted", *["duplicate"] * 7]
        for n in range(7):
            state = await store.get_user(f"u{n}")
            assert list(state.ts) == [event.ts for event in events if event.user_id == f"u{n}"]
        assert {ad_id: each.features["n"] for ad_id, each in (await everything(store)).items()} == {"a0": -3, "a1": -2, "a2": -1}

    async def test_different_clicks_at_once_of_one_user_all_get_through(self, store):
        await asyncio.gather(*(applied(store, click(f"c{i}", -i, f"a{i}")) for i in range(100)))
        assert (await store.get_user("u1")).ad_ids == [f"a{i}" for i in range(99, -1, -1)]


class TestContract:
    async def test_a_user_comes_back_as_put(self, store):
        state = UserState({"age": "25", "interests": ["x"], "income": 1.5, "n": None}, ["a1", "a2"], [1, 2])
        await store.put_users([("u1", state), ("u2", UserState())])
        assert await store.get_user("u1") == state
        assert await store.get_user("u2") == UserState({}, [], [])
        assert await store.get_user("u3") is None
        await store.put_users([("u1", UserState({}, ["a1"], [1]))])
        assert await store.get_user("u1") == UserState({}, ["a1"], [1])

    async def test_odd_ids_are_ids(self, store):
        await store.put_users((user, UserState({"who": user})) for user in ODD)
        await store.put_ads(Ad(ad_id, {"which": ad_id}) for ad_id in ODD)
        for user in ODD:
            assert (await store.get_user(user)).features == {"who": user}
        assert {ad_id: ad.features["which"] for ad_id, ad in (await everything(store)).items()} == {each: each for each in ODD}

    async def test_all_ads_are_read_and_the_last_write_counts(self, store):
        await store.put_ads(Ad(f"a{i}", {"n": i}) for i in range(1_203))
        await store.put_ads([Ad("a7", {"n": -7}), Ad("a8", {"n": 8}, active=False)])
        ads = await everything(store)
        assert len(ads) == 1_203
        assert ads["a7"] == Ad("a7", {"n": -7})
        assert not ads["a8"].active

    async def test_changes_after_a_cursor_come_once_and_as_they_are_now(self, store):
        await store.put_ads([Ad("before", {})])
        cursor = await store.cursor()
        await store.put_ads([Ad("a1", {"n": 1}), Ad("a2", {})])
        await store.put_ads([Ad("a1", {"n": 2}, active=False)])
        ads, after = await store.changed_ads(cursor, 0.01)
        assert sorted(ads, key=lambda ad: ad.ad_id) == [Ad("a1", {"n": 2}, active=False), Ad("a2", {})]
        assert await store.changed_ads(after, 0.01) == ([], after)
        await store.put_ads([Ad("a3", {})])
        assert [ad.ad_id for ad in (await store.changed_ads(after, 0.01))[0]] == ["a3"]

    async def test_many_changes_come_in_the_end(self, store):
        cursor, seen = await store.cursor(), set()
        await store.put_ads(Ad(f"a{i}", {}) for i in range(6_001))
        for _ in range(10):
            ads, cursor = await store.changed_ads(cursor, 0.01)
            seen |= {ad.ad_id for ad in ads}
        assert len(seen) == 6_001

    async def test_a_change_wakes_who_waits(self, store):
        waiting = asyncio.create_task(store.changed_ads(await store.cursor(), 10))
        await asyncio.sleep(0.05)
        await store.put_ads([Ad("a1", {})])
        ads, _ = await asyncio.wait_for(waiting, 2)
        assert ads == [Ad("a1", {})]

    async def test_waiting_ends(self, store):
        began = time.monotonic()
        assert (await store.changed_ads(await store.cursor(), 0.1))[0] == []
        assert 0.05 < time.monotonic() - began < 2


class TestRedis:
    def test_odd_names_have_places_of_their_own(self):
        assert len({place(entity) for name in ODD for entity in by_entity([click("c", user_id=name)])}) == len(ODD)

    async def test_one_round_trip_a_user(self, redis_only, raw):
        await redis_only.put_users([("u1", UserState())])
        await redis_only.get_user("u1")  # connects
        await raw.config_resetstat()
        for _ in range(20):
            await redis_only.get_user("u1")
        commands = await raw.info("commandstats")
        assert {name: each["calls"] for name, each in commands.items() if name != "cmdstat_config|resetstat"} == {"cmdstat_getrange": 20}

    async def test_keys_have_a_ttl_or_a_bound(self, redis_only, raw):
        await redis_only.put_users([("u1", UserState())])
        await redis_only.put_ads([Ad("a1", {})])
        assert 0 < await raw.ttl(user_key("u1")) <= 100
        assert sorted(await raw.keys()) == sorted([b"adrank:user:{u1}", ads_key("a1").encode(), CHANGES.encode()])

    @pytest.mark.parametrize("value", [b"nonsense", b"\xc1", msgpack.encode([1, "u1", {}, [], []])[:-1], pack_user("u2", UserState())])
    async def test_a_damaged_or_foreign_value_is_never_ranked_with(self, redis_only, raw, value):
        await raw.set(user_key("u1"), value)
        with pytest.raises(StoreError) as caught:
            await redis_only.get_user("u1")
        assert caught.value.reason == "store_corrupt"

    async def test_damaged_ads_are_left_out_and_counted(self, raw, shared_server):
        damaged = []
        store = redis_store(shared_server.url, damaged=lambda: damaged.append(1))
        cursor = await store.cursor()
        await store.put_ads([Ad("good", {}), Ad("bad", {})])
        await raw.hset(ads_key("bad"), "bad", b"nonsense")
        await raw.hset(ads_key("good"), b"\xff\xfe", pack_ad(Ad("x", {})))
        assert set(await everything(store)) == {"good"}
        assert len(damaged) == 2
        assert (await store.changed_ads(cursor, 0.01))[0] == [Ad("good", {})]
        assert len(damaged) == 3
        await store.close()

    async def test_an_ad_that_was_deleted_has_left(self, redis_only, raw):
        cursor = await redis_only.cursor()
        await redis_only.put_ads([Ad("a1", {"n": 1})])
        await raw.hdel(ads_key("a1"), "a1")
        assert (await redis_only.changed_ads(cursor, 0.01))[0] == [Ad("a1", {}, active=False)]


class TestLostChanges:
    """A cursor is good as long as no change after it has gone, and not a moment longer."""

    async def put(self, store, *numbers):
        for n in numbers:
            await store.put_ads([Ad(f"a{n}", {})])

    @pytest.mark.parametrize("before", [(1,), ()])
    async def test_trimmed_past_the_cursor(self, redis_only, raw, before):
        await self.put(redis_only, *before)
        cursor = await redis_only.cursor()
        await self.put(redis_only, 2, 3)
        await raw.xtrim(CHANGES, maxlen=1, approximate=False)
        with pytest.raises(ChangesLostError):
            await redis_only.changed_ads(cursor, 0.01)

    async def test_trimmed_up_to_the_cursor(self, redis_only, raw):
        await self.put(redis_only, 1, 2)
        cursor = await redis_only.cursor()
        await self.put(redis_only, 3)
        await raw.xtrim(CHANGES, maxlen=1, approximate=False)
        ads, after = await redis_only.changed_ads(cursor, 0.01)
        assert [ad.ad_id for ad in ads] == ["a3"]
        await raw.xtrim(CHANGES, maxlen=0, approximate=False)
        assert await redis_only.changed_ads(after, 0.01) == ([], after)
        fresh = await redis_only.cursor()
        await self.put(redis_only, 4)
        assert [ad.ad_id for ad in (await redis_only.changed_ads(fresh, 0.01))[0]] == ["a4"]

    async def test_trimmed_while_reading_batch_after_batch(self, redis_only, raw):
        cursor, seen = await redis_only.cursor(), []
        await self.put(redis_only, *range(20))
        for keep in (12, 4, 1):
            ads, cursor = await redis_only.changed_ads(cursor, 0.01)
            seen += [ad.ad_id for ad in ads]
            await raw.xtrim(CHANGES, maxlen=keep, approximate=False)
        assert seen == [f"a{n}" for n in range(20)]

    @pytest.mark.parametrize("more", [0, 1, 2, 3, 5])
    async def test_emptied_and_filled_again(self, redis_only, raw, more):
        await self.put(redis_only, 1, 2)
        cursor = await redis_only.cursor()
        await asyncio.sleep(0.002)  # ids are milliseconds: an emptying within the same one could go unnoticed
        await raw.flushall()
        await self.put(redis_only, *range(more))
        with pytest.raises(ChangesLostError):
            await redis_only.changed_ads(cursor, 0.01)

    async def test_emptied_under_a_cursor_of_an_empty_stream(self, redis_only, raw):
        cursor = await redis_only.cursor()
        await self.put(redis_only, 1)
        await raw.flushall()
        await self.put(redis_only, 2)
        assert [ad.ad_id for ad in (await redis_only.changed_ads(cursor, 0.01))[0]] == ["a2"]

    async def test_failed_over_to_a_server_that_is_behind(self, redis_only, raw):
        await self.put(redis_only, 1)
        cursor = await redis_only.cursor()
        await raw.delete(CHANGES)
        await raw.xadd(CHANGES, {"ads": msgpack.encode(["old"])}, id="1-1")
        with pytest.raises(ChangesLostError):
            await redis_only.changed_ads(cursor, 0.01)

    @pytest.mark.parametrize("entry", [{"ads": b"\xc1"}, {"ads": msgpack.encode([1])}, {"other": b""}])
    async def test_a_damaged_entry(self, redis_only, raw, entry):
        cursor = await redis_only.cursor()
        await raw.xadd(CHANGES, entry)
        with pytest.raises(ChangesLostError):
            await redis_only.changed_ads(cursor, 0.01)


class TestOutage:
    async def reason(self, store):
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            await store.get_user("u1")
        return caught.value.reason, time.monotonic() - began

    async def test_down_then_up(self, server):
        store = redis_store(server.url, timeout=0.5)
        await store.put_users([("u1", UserState())])
        assert await store.get_user("u1")
        server.stop()
        for _ in range(3):
            reason, seconds = await self.reason(store)
            assert reason == "store_unreachable"
            assert seconds < 0.5
        server.start()
        await asyncio.sleep(REFUSED_SECONDS)
        assert await store.get_user("u1") is None
        await store.close()

    async def test_paused_then_resumed(self, server):
        store = redis_store(server.url, timeout=0.05)
        await store.put_users([("u1", UserState())])
        await store.get_user("u1")
        server.pause()
        for _ in range(3):
            reason, seconds = await self.reason(store)
            assert reason == "store_timeout"
            assert 0.04 < seconds < 0.3
        server.resume()
        await asyncio.sleep(0.1)
        assert await store.get_user("u1") == UserState({}, [], [])
        await store.close()
