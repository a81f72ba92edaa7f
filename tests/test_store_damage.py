"""Keys of the store that are not what adrank writes: one of them delays and refuses nobody, is counted, and is named in the log."""

import asyncio
import logging
import time

import bundles
import pytest
from conftest import redis_store, running
from msgspec import msgpack

from features.events import unpack_event
from features.state import STATE_BYTES, Ad, StoreError, UserState, pack_ad, pack_user
from features.streams import EVENTS, SERVED
from service.settings import Settings
from service.store import damage as store_damage
from service.store.redis import CHANGES, HASHES, ads_key, user_key
from tests.test_store import ad, applied, click, everything, shown, user

pytestmark = pytest.mark.anyio
SEEN = "adrank:seen:user:{u1}"
HUGE = 50 * 2**20


@pytest.fixture(autouse=True)
def always_logged(monkeypatch):
    monkeypatch.setattr(store_damage, "TELL_SECONDS", 0.0)


def events():
    return [click("c"), user("u", {"age": "25"}), ad("a", {"genre": "news"}), shown("i")]


async def spoil(raw, key, kind):
    """Something of another type in a key's place."""
    await raw.delete(key)
    if kind == "list":
        await raw.lpush(key, "x", "y")
    elif kind == "string":
        await raw.set(key, "x")
    else:
        await raw.hset(key, "x", "y")


@pytest.mark.parametrize("kind", ["list", "string", "hash"])
@pytest.mark.parametrize("key", [user_key("u1"), ads_key("a1"), SEEN, "adrank:seen:request:{r1}", EVENTS, CHANGES])
async def test_events_are_taken_and_done_once_whatever_stood_in_a_key_s_place(redis_only, raw, caplog, key, kind):
    await spoil(raw, key, kind)
    if (key, kind) == (ads_key("a1"), "hash"):
        await raw.delete(key)  # it is right
    statuses = await applied(redis_only, *events())
    assert set(statuses) == set("cuai")
    assert set(statuses.values()) <= {"accepted", "state_replaced"}
    assert set((await applied(redis_only, *events())).values()) == {"duplicate"}
    state = await redis_only.get_user("u1")
    assert (state.ad_ids, state.features) == (["a1"], {"age": "25"})
    assert (await everything(redis_only))["a1"].features == {"genre": "news"}
    assert {unpack_event(entry[b"v"]).event_id for _, entry in await raw.xrange(EVENTS)} == {"c", "i"}
    if (key, kind) not in {(ads_key("a1"), "hash"), (user_key("u1"), "string")}:
        assert f"'{key}'" in caplog.text


async def test_those_that_were_replaced_are_counted(redis_only, raw):
    replaced = []
    redis_only.damage.on_replaced = lambda: replaced.append(1)
    await spoil(raw, user_key("u1"), "list")
    await spoil(raw, SEEN, "string")
    assert (await applied(redis_only, click("c")))["c"] == "state_replaced"
    assert len(replaced) == 2
    assert (await applied(redis_only, click("d", 1)))["d"] == "accepted"
    assert len(replaced) == 2


async def test_a_type_that_changes_between_reading_and_writing_is_seen_to(redis_only, raw, monkeypatch):
    write, spoilt = type(redis_only._events)._write, []

    async def late(self, turns):
        if not spoilt:
            spoilt.append(await spoil(raw, user_key("u1"), "list"))
        return await write(self, turns)

    monkeypatch.setattr(type(redis_only._events), "_write", late)
    assert (await applied(redis_only, click("c")))["c"] in {"accepted", "state_replaced"}
    assert (await redis_only.get_user("u1")).ad_ids == ["a1"]


async def test_a_user_of_a_wrong_type_is_ranked_without_its_state(redis_only, raw, caplog):
    await spoil(raw, user_key("u1"), "list")
    with pytest.raises(StoreError, match="another type") as caught:
        await redis_only.get_user("u1")
    assert caught.value.reason == "store_corrupt"
    assert f"'{user_key('u1')}'" in caplog.text
    await redis_only.put_users([("u1", UserState({"age": "25"}))])
    assert (await redis_only.get_user("u1")).features == {"age": "25"}


async def test_a_huge_state_is_not_read_and_delays_nobody(redis_only, raw):
    await raw.set(user_key("huge"), b"\0" * HUGE)
    await redis_only.put_users([("u1", UserState({"age": "25"}))])
    before = (await raw.info("stats"))["total_net_output_bytes"]
    for _ in range(5):
        huge, other = await asyncio.gather(redis_only.get_user("huge"), redis_only.get_user("u1"), return_exceptions=True)
        assert isinstance(huge, StoreError)
        assert (huge.reason, other.features) == ("store_corrupt", {"age": "25"})
    assert (await raw.info("stats"))["total_net_output_bytes"] - before < 6 * STATE_BYTES
    assert await applied(redis_only, click("c", user_id="huge"), click("d")) == {"c": "state_replaced", "d": "accepted"}
    assert (await redis_only.get_user("huge")).ad_ids == ["a1"]


async def test_a_huge_ad_is_left_out_and_gives_way_to_an_event(redis_only, raw):
    await redis_only.put_ads([Ad("a2", {})])
    await raw.hset(ads_key("a1"), "a1", b"\0" * HUGE)
    assert set(await everything(redis_only)) == {"a2"}
    before = (await raw.info("stats"))["total_net_output_bytes"]
    assert await applied(redis_only, ad("e", {"genre": "news"})) == {"e": "state_replaced"}
    assert (await raw.info("stats"))["total_net_output_bytes"] - before < STATE_BYTES
    assert (await everything(redis_only))["a1"].features == {"genre": "news"}


def test_no_state_that_adrank_writes_is_too_large():
    odd = "\U0001f600" * 256  # the longest id that a request may have
    features = {f"{odd[:60]}{i}": "x" * 900 for i in range(256)}  # 2**18 bytes at most
    state = UserState(features, [odd] * 5_000, range(5_000), dict.fromkeys(features, 1.5))
    assert len(pack_user(odd, state)) < STATE_BYTES


async def test_a_catalogue_with_a_hash_of_a_wrong_type_is_read_and_followed(redis_only, raw, shared_server, caplog):
    damaged = []
    store = redis_store(shared_server.url, damaged=lambda: damaged.append(1))
    await store.put_ads(Ad(f"a{i}", {}) for i in range(500))
    cursor = await store.cursor()
    there = set(await everything(store))
    lost = {ad_id for ad_id in there if ads_key(ad_id) == ads_key("a1")}
    await spoil(raw, ads_key("a1"), "string")
    assert set(await everything(store)) == there - lost
    assert len(damaged) == 1
    assert f"'{ads_key('a1')}'" in caplog.text
    await raw.xadd(CHANGES, {"ads": msgpack.encode(["a1", "a2"])})
    ads, cursor = await store.changed_ads(cursor, 0.01)
    assert {each.ad_id for each in ads} == {"a2"} - lost
    assert len(damaged) == 2
    await store.put_ads(Ad(ad_id, {}) for ad_id in lost)
    assert set(await everything(store)) == there
    await store.close()


async def test_a_catalogue_whose_hashes_are_all_of_a_wrong_type_keeps_no_service_from_being_ready(raw, shared_server, repository):
    for n in range(HASHES):
        await spoil(raw, f"adrank:ads:{{{n}}}", "list")
    for key in (CHANGES, SERVED, EVENTS, "adrank:user:probe", user_key("u1")):
        await spoil(raw, key, "string" if key != user_key("u1") else "list")
    now = round(time.time())
    async with running(Settings(models=repository, redis=shared_server.url)) as client:
        statuses = await client.until("/readyz", lambda statuses: statuses["status"] == "ready")
        assert (statuses["store"]["status"], statuses["catalogue"]["ads"]) == ("up", 0)
        ranked = await client.rank("u1")
        assert {entry["reason"] for entry in ranked["degraded"]} == {"store_corrupt"}
        sent = [
            {"type": "click", "event_id": "c", "ts": now, "user_id": "u1", "ad_id": "a1"},
            {"type": "ad", "event_id": "a", "ts": now, "ad_id": "a1", "features": bundles.ADS["a1"]},
        ]
        answer = await client.post("/v1/events", json={"events": sent})
        assert {event["reason"] for event in answer.json()["events"]} == {"state_replaced"}
        await client.until("/readyz", lambda statuses: statuses["catalogue"]["ads"] == 1)
        assert "degraded" not in await client.rank("u1") or not (await client.rank("u1"))["degraded"]
        assert await client.metric('adrank_degraded_total{reason="key_replaced",stage="store"}') >= 4
        assert await client.metric('adrank_degraded_total{reason="ad_damaged",stage="catalogue"}') >= HASHES
        assert await client.metric('adrank_degraded_total{reason="state_replaced",stage="events"}') == 2
        async with asyncio.timeout(90):
            while await raw.type(SERVED) != b"stream":
                await client.rank("u1")
                await asyncio.sleep(0.05)


async def test_lines_about_damage_are_not_forced_by_the_thousand(redis_only, raw, monkeypatch, caplog):
    monkeypatch.setattr(store_damage, "TELL_SECONDS", 3600.0)
    caplog.set_level(logging.WARNING)
    await spoil(raw, user_key("u\n1"), "list")
    for _ in range(50):
        with pytest.raises(StoreError):
            await redis_only.get_user("u\n1")
    assert caplog.text.count("done without") == 1
    monkeypatch.setattr(store_damage, "TELL_SECONDS", 0.0)
    with pytest.raises(StoreError):
        await redis_only.get_user("u\n1")
    assert "49 more" in caplog.text
    assert r"adrank:user:{u\n1}" in caplog.text


async def test_packed_ads_and_users_of_their_largest_are_read(redis_only):
    odd = "\U0001f600" * 256
    state = UserState({}, [odd] * 1_000, range(1_000))
    await redis_only.put_users([(odd, state)])
    assert len((await redis_only.get_user(odd)).ad_ids) == 1_000
    assert len(pack_ad(Ad(odd, {"x": ["y" * 1_000] * 250}))) < STATE_BYTES
