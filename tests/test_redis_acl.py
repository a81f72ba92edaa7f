"""The rights that docs/redis.md gives a user: enough for everything that is done, and none that is not used."""

import re
import time

import pytest
from processes import ROOT
from redis_servers import client_of

from features.entity_updates import by_entity
from features.events import Event
from features.merging import ForgetAd, MergeAd
from features.state import ACTIVE, Ad, StoreError, UserState
from features.streams import STREAMS
from service.store.redis import CHANGES, RedisStore
from service.store.streams import RedisStreams

pytestmark = pytest.mark.anyio
ARRANGED = ("valkey", "sentinel", "cluster")


@pytest.fixture(scope="module")
def rights():
    text = re.search(r"^ACL SETUSER adrank (.*?)^```", (ROOT / "docs/redis.md").read_text(), re.DOTALL | re.MULTILINE)
    assert text
    return text[1].split()


async def everything(url):
    """All that a service, a load, a bench and a joiner ask."""
    store, streams, now = RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None), RedisStreams(url), round(time.time())
    try:
        await store.ping()
        cursor = await store.cursor()
        await store.put_users([("u1", UserState())])
        await store.put_ads([Ad("a1", {"n": 1})])
        for _ in range(2):
            events = [
                Event("click", "c", now, user_id="u1", ad_id="a1", request_id="r1"),
                Event("ad", "a", now, ad_id="a2", features={"n": 2}),
            ]
            await store.apply(by_entity(events))
        assert (await store.get_user("u1")).ad_ids == ["a1"]
        ads, cursor = await store.changed_ads(cursor, 0.01)
        assert {ad.ad_id for ad in ads} == {ad.ad_id async for batch in store.all_ads() for ad in batch} == {"a1", "a2"}
        assert (await store.changed_ads(cursor, 0.01))[0] == []
        assert await store.user_ids(10) == ["u1"]
        await store.rewrite("ad", [MergeAd(Ad("a3", {}, False, {ACTIVE: 1}), 1)])
        await store.rewrite("ad", [ForgetAd("a3", 5)])
        await store.append_served([b"x"])
        await streams.tell(b"[]")
        assert await streams.figures() == await store.figures() == b"[]"
        room = await store.served_room()
        assert room.stream
        assert room.used
        for stream in STREAMS:
            await streams.begin(stream)
            batch = await streams.read(stream, 10)
            assert len(batch.entries) == await streams.pending(stream) == 1
            await streams.claim(stream, 10, 0)
            await streams.acknowledge(stream, [entry.id for entry in batch.entries])
            assert (await streams.extent(stream)).length == 0
            await streams.claim(stream, 10, 0)
            await streams.begin(stream)
    finally:
        await store.close()
        await streams.close()


async def test_they_are_enough_and_all_are_needed(arrangements, rights):
    used = set()
    for kind in ARRANGED:
        url = arrangements(kind)
        to_all = {"target_nodes": "all"} if kind == "cluster" else {}
        with client_of(url) as client:
            client.execute_command("ACL SETUSER", "adrank", *rights, **to_all)
            client.script_flush()
            client.config_resetstat(**to_all)
            client.lpush(CHANGES, "no stream")  # is taken away
            await everything(url.replace("://", "://adrank:password@").replace("/0", "/1"))
            stats = client.info("commandstats", **to_all)
            used |= {name for each in (stats.values() if to_all else [stats]) for name in each}
            client.execute_command("ACL DELUSER", "adrank", **to_all)
    granted = {right[1:] for right in rights if right.startswith("+")}
    assert {right for right in granted if f"cmdstat_{right.lower()}" not in used} <= {"asking"}  # test_cluster.py has slots that move


async def test_a_right_that_is_missing_is_said(arrangements, rights):
    url = arrangements("valkey")
    with client_of(url) as client:
        client.execute_command("ACL SETUSER", "adrank", *rights, "-getrange")
        store = RedisStore(url.replace("://", "://adrank:password@"), timeout=5, ttl=100, on_damaged=lambda: None)
        with pytest.raises(StoreError, match=r"lacks a permission: .*get") as caught:
            await store.get_user("u1")
        await store.close()
        client.execute_command("ACL DELUSER", "adrank")
    assert "password" not in str(caught.value)
