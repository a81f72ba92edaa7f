"""A cluster of three primaries: slots that move under load, and a node that is killed, with and without a replica of its own."""

import asyncio
import signal
import time

import pytest
from conftest import Server, free_port, until_ready
from joining import Joining, rows
from processes import fill
from redis_load import kept, load
from redis_servers import Nodes

from features.entity_updates import by_entity
from features.events import Event
from features.state import Ad, StoreError, UserState
from features.streams import EVENTS, SERVED
from service.store.cluster import Cluster, key_of
from service.store.redis import CHANGES, RedisStore, ads_key, user_key
from service.store.streams import RedisStreams

pytestmark = pytest.mark.anyio
USERS = [f"u{i}" for i in range(60)]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("cluster"))
    yield nodes
    nodes.stop()


@pytest.fixture
def nodes(started):
    """A cluster whose slots are put back where they were at first."""
    started.flush()
    yield started
    for slot, to in started.moved.items():
        started.move(slot, to, started.first_owner(slot))
    started.moved.clear()


@pytest.fixture
async def store(nodes):
    store = store_at(nodes.url)
    yield store
    await store.close()


def store_at(url, timeout=2.0):
    return RedisStore(url, timeout=timeout, ttl=1000, on_damaged=lambda: None)


def click(event_id, user_id="u1"):
    return Event("click", event_id, round(time.time(), 3), user_id=user_id, ad_id="a1", request_id="r1")


@pytest.mark.parametrize(
    "command",
    [
        (b"GET", "k"),
        (b"EVAL", b"return 1", b"1", "k", "x"),
        (b"XREAD", b"COUNT", b"1", b"STREAMS", "k", b"0"),
        (b"XREADGROUP", b"GROUP", b"g", b"c", b"STREAMS", "k", b">"),
        (b"XINFO", b"STREAM", "k"),
        (b"XGROUP", b"CREATE", "k", b"g", b"0"),
        (b"SET", "k", b"v", b"EX", b"1"),
    ],
)
def test_keys_are_found_where_the_server_finds_them(nodes, command):
    (key,) = nodes.clients[0].command_getkeys(*command)
    assert key_of(command).decode() == key == "k"


class TestMovingSlots:
    """What a client is told while a slot moves, one step after the other."""

    async def test_a_user_who_moves_is_found_at_each_step(self, nodes, store):
        await store.put_users([("u1", UserState({"n": 1}))])
        slot, source, target = nodes.where(user_key("u1"))
        nodes.begin_to_move(slot, source, target)
        assert (await store.get_user("u1")).features == {"n": 1}
        nodes.move_keys(slot, source, target)
        for _ in range(2):
            assert (await store.get_user("u1")).features == {"n": 1}  # ASK
        assert await store.get_user("{u1}x") is None
        nodes.finish_moving(slot, source, target)
        assert (await store.get_user("u1")).features == {"n": 1}  # MOVED
        await store.put_users([("u1", UserState({"n": 2}))])
        assert (await store.get_user("u1")).features == {"n": 2}

    async def test_events_of_a_user_half_of_whose_keys_have_moved_wait(self, nodes, store):
        assert await outcomes(store, click("e1")) == ["accepted"]
        slot, source, target = nodes.where(user_key("u1"))
        nodes.begin_to_move(slot, source, target)
        keys = nodes.clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10)
        assert len(keys) == 2
        nodes.clients[source].execute_command("MIGRATE", "127.0.0.1", nodes.nodes[target].port, keys[0], 0, 5000)
        sending = asyncio.create_task(outcomes(store, click("e1"), click("e2")))
        await asyncio.sleep(0.1)
        assert not sending.done()
        nodes.move_keys(slot, source, target)
        nodes.finish_moving(slot, source, target)
        assert await sending == ["duplicate", "accepted"]
        assert (await store.get_user("u1")).ad_ids == ["a1", "a1"]

    async def test_what_is_never_sent_twice_arrives_once(self, nodes, store):
        slot, source, target = nodes.where(SERVED)
        assert await store.append_served([b"0"]) == 1
        nodes.begin_to_move(slot, source, target)
        assert await store.append_served([b"1"]) == 2
        nodes.move_keys(slot, source, target)
        assert await store.append_served([b"2", b"3"]) == 4
        nodes.finish_moving(slot, source, target)
        assert await store.append_served([b"4", b"5"]) == 6
        streams = RedisStreams(nodes.url)
        await streams.begin(SERVED)
        assert [entry.value for entry in (await streams.read(SERVED, 10)).entries] == [b"%d" % i for i in range(6)]
        await streams.close()

    async def test_who_waits_for_changes_is_sent_on(self, nodes, store):
        cursor = await store.cursor()
        slot, source, target = nodes.where(CHANGES)
        waiting = asyncio.create_task(store.changed_ads(cursor, 5))
        await asyncio.sleep(0.1)
        nodes.move(slot, source, target)
        await store.put_ads([Ad("a1", {"n": 1})])
        assert (await waiting)[0] == [Ad("a1", {"n": 1})]

    async def test_a_cluster_that_sends_on_for_ever_is_given_up(self, nodes):
        """A slot that is on its way to a node which is on its way to forget it."""
        store = store_at(nodes.url, timeout=10)
        slot, source, target = nodes.where(user_key("u1"))
        nodes.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", nodes.ids[target])
        try:
            with pytest.raises(StoreError, match="the cluster sent a command on"):
                await store.get_user("u1")
        finally:
            nodes.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "STABLE")
        assert await store.get_user("u1") is None
        await store.close()


async def outcomes(store, *events):
    subjects = by_entity(events)
    return [outcome.status for each in await store.apply(subjects) for outcome in each]


class TestMaps:
    async def test_seeds_that_are_gone_or_no_node_are_passed_over(self, nodes):
        alone = Server("valkey")
        try:
            hosts = f"127.0.0.1:{free_port()},127.0.0.1:{alone.port}"
            store = store_at(nodes.url.replace("://", f"://{hosts},"))
            await store.ping()
            await store.close()
            store = store_at(f"redis+cluster://{hosts}")
            with pytest.raises(StoreError, match=r"no node of the cluster tells.*(Connect call failed|not enabled)") as caught:
                await store.get_user("u1")
            assert caught.value.reason == "store_unreachable"
            await store.close()
        finally:
            alone.stop()

    async def test_a_node_asked_as_if_it_were_alone_says_how_to_name_it(self, nodes):
        store = store_at(f"redis://127.0.0.1:{nodes.nodes[0].port}/0")
        with pytest.raises(StoreError, match=r"whose URL begins with redis\+cluster://"):
            await asyncio.gather(*(store.get_user(user) for user in USERS))
        await store.close()


async def test_a_cluster_that_is_resharded_under_load_loses_and_refuses_nothing(nodes, run, repository, tmp_path):
    await fill(nodes.url)
    keys = [*map(user_key, USERS), *(ads_key(f"a{i}") for i in range(30)), SERVED, EVENTS, CHANGES]
    slots = dict.fromkeys(map(nodes.where, keys))
    replies_by_kind = {"ASK": 0, "MOVED": 0}

    async def count(cluster, elsewhere, commands, replies):
        for i in elsewhere:
            replies_by_kind[replies[i].status_code] = replies_by_kind.get(replies[i].status_code, 0) + 1
        return await redirected(cluster, elsewhere, commands, replies)

    redirected = Cluster._redirected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "_redirected", count)
        async with run(redis=nodes.url, store_timeout_ms=2_000) as client, load(client, USERS) as made:  # a busy machine is no refusal
            await made.until(events=50)
            await asyncio.to_thread(slowly, nodes, slots)
            await made.until(events=50)
            assert (await client.get("/readyz")).json()["status"] == "ready"
    assert {each.status for each in made.ranked} == {200}
    assert made.degraded() == made.refused == []
    assert min(replies_by_kind["ASK"], replies_by_kind["MOVED"]) > 0, replies_by_kind
    assert made.acknowledged.keys() <= kept(nodes.url)
    joining = Joining(nodes.url, tmp_path / "log", repository, time.time())
    await joining.once(everything=True)
    assert rows(tmp_path / "log")["request_id"].n_unique() == len(made.ranked)


def slowly(nodes, slots):
    """Move the slots, with time for requests between the steps."""
    for slot, source, target in slots:
        nodes.begin_to_move(slot, source, target)
        nodes.move_keys(slot, source, target)
        time.sleep(0.01)
        nodes.finish_moving(slot, source, target)


async def test_lost_nodes_with_a_replica_and_without(tmp_path, run):
    nodes = Nodes(tmp_path, replicas_of=(1,))
    try:
        await fill(nodes.url)
        async with run(redis=nodes.url, store_timeout_ms=2000) as client, load(client, USERS) as made:
            await made.until(events=50)
            assert made.degraded() == []
            killed = kill(nodes, 1)
            recovered = killed + await made.recovered(killed)
            await until_ready(client, "ready")
            alone = kill(nodes, 0)
            while time.monotonic() < alone + 2:  # the others need a second to say that it has failed
                await asyncio.sleep(0.05)
            ready = (await client.get("/readyz")).json()
        found = kept(f"redis+cluster://127.0.0.1:{nodes.nodes[2].port}")
    finally:
        nodes.stop()
    assert {each.status for each in made.ranked} == {200}
    assert {(status, code) for _, status, code in made.refused} == {(503, "store_down")}
    of = [{user for user in USERS if nodes.owner(user_key(user)) == n} for n in range(3)]
    assert set() < {each.user for each in made.degraded() if each.at < recovered} <= of[1]
    assert set() < {each.user for each in made.degraded(recovered)} <= of[0]
    assert all(each.degraded for each in made.ranked if each.at > alone + 0.3 and each.user in of[0])
    assert (ready["status"], ready["catalogue"]["ads"]) == ("degraded", 30)
    # What a node acknowledged in its last moment may not have reached its replica.
    assert {event for event, at in made.acknowledged.items() if not killed - 1 < at < killed + 0.1} <= found


def kill(nodes, n):
    nodes.nodes[n].signal(signal.SIGKILL)
    return time.monotonic()
