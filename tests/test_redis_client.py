"""What the store asks its servers with: whose reply a reply is, however many are cancelled; how long is waited; forms of address."""

import asyncio
import contextlib
import os
import random
import time

import pytest
import redis
import uvloop
from conftest import Server, free_port
from redis.asyncio.cluster import ClusterNode, NodesManager, PipelineCommand
from redis.asyncio.connection import RedisSSLContext

from service.store import server as redis_server
from service.store.client import Client, Reads, open_servers
from service.store.redis import RedisStore
from service.store.url import Tls

pytestmark = pytest.mark.anyio
CLIENTS = 64
REQUESTS = int(os.environ.get("CANCELLED_REQUESTS", "1500"))
"""Of each of the tests below; 50,000 and more are tried by hand."""
MOST = 1_000


@contextlib.asynccontextmanager
async def reads(server):
    """Closed before the server, to which what nobody waits for any more would connect again."""
    asked = Reads(server, 5.0, MOST)
    yield asked.read
    await asked.close()


@contextlib.asynccontextmanager
async def commands(server):
    client = Client(server, 5.0)
    yield lambda key: client.ask(b"GETRANGE", key, b"0", str(MOST))


@pytest.mark.parametrize("ways", [reads, commands])
@pytest.mark.parametrize("kind", ["valkey", "cluster"])
async def test_no_reply_is_anothers_whoever_is_cancelled(arrangements, kind, ways):
    """redis-py left replies to commands that were cancelled to whoever came next, CVE-2023-28859."""
    server = open_servers(arrangements(kind))
    keys = [f"{{k{i}}}" for i in range(200)]
    client = Client(server, 5)
    await client.ask_all([(b"SET", key, f"value of {key}") for key in keys])
    left, outcomes = iter(range(REQUESTS)), {"own": 0, "cancelled": 0, "timeout": 0}

    async def ask(read, key, patience):
        async with asyncio.timeout(patience):
            return await read(key)

    async def one(read, chance):
        for _ in left:
            key = chance.choice(keys)
            asking = asyncio.create_task(ask(read, key, chance.choice((0.0005, 0.002, 10))))
            if chance.random() < 0.4:
                await asyncio.sleep(chance.choice((0, 0, chance.uniform(0, 0.003))))
                asking.cancel()
            try:
                assert (await asking).decode() == f"value of {key}"
                outcomes["own"] += 1
            except asyncio.CancelledError:
                outcomes["cancelled"] += 1
            except TimeoutError:
                outcomes["timeout"] += 1

    async with ways(server) as read:
        await asyncio.gather(*(one(read, random.Random(n)) for n in range(CLIENTS)))
    await server.close()
    assert sum(outcomes.values()) == REQUESTS
    assert min(outcomes.values()) > REQUESTS / 100, outcomes


async def test_those_who_ask_at_once_share_a_round_trip_and_none_loses_the_connection(server):
    asked = open_servers(server.url)
    client = Client(asked, 5)
    async with reads(asked) as read:
        for _ in range(3):
            waiting = [asyncio.ensure_future(read(f"k{i}")) for i in range(200)]
            await asyncio.sleep(0)
            for each in waiting[::2]:
                each.cancel()
            assert await asyncio.gather(*waiting[1::2]) == [b""] * 100
    clients = (await client.ask(b"INFO", b"stats")).decode()
    assert "total_connections_received:2\r\n" in clients, "one was the test's own, to see that the server is up"
    await asked.close()


@pytest.mark.parametrize("reply", [None, 7, [b"a"], {b"a": b"b"}, "text", True])
async def test_what_is_no_value_is_a_failure_of_the_store(reply):
    """No Redis answers so; what else speaks its protocol may."""

    class Odd:
        def owner(self, _key):
            return None

        async def send(self, commands):
            return [reply for _ in commands]

    async with reads(Odd()) as read:
        with pytest.raises(redis.ResponseError, match="it answers GETRANGE by"):
            await read("k")


async def test_a_store_that_is_down_is_not_asked_once_a_request(monkeypatch):
    loop, attempts = asyncio.get_running_loop(), []
    connect = loop.create_connection

    async def counted(*words, **more):
        attempts.append(words)
        return await connect(*words, **more)

    monkeypatch.setattr(loop, "create_connection", counted)
    monkeypatch.setattr(redis_server, "REFUSED_SECONDS", 60)
    url = f"redis://127.0.0.1:{free_port()}"
    server = open_servers(url)
    read = Reads(server, 1, MOST).read
    for _ in range(20):
        answers = await asyncio.gather(*(read("k") for _ in range(20)), return_exceptions=True)
        assert {str(answer).partition(".")[0] for answer in answers} == {"Error 111 connecting to 127"}
    assert len(attempts) == 1
    monkeypatch.setattr(redis_server, "REFUSED_SECONDS", 0)
    other = open_servers(url)
    for _ in range(3):
        await asyncio.gather(Client(other, 1, once=True).ask(b"PING"), return_exceptions=True)
    assert len(attempts) == 4
    await server.close()
    await other.close()


@pytest.mark.parametrize(("once", "sent"), [(True, 1), (False, 2)])
async def test_what_a_lost_connection_may_have_swallowed_is_sent_again_only_where_it_may(once, sent):
    taken = []

    async def hang_up(reader, writer):
        taken.append(await reader.read(1000))
        writer.close()

    listening = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    servers = open_servers(f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    with pytest.raises(redis.ConnectionError):
        await Client(servers, 5, once).ask(b"XADD", "k", b"*", b"f", b"v")
    assert [b"XADD" in each for each in taken] == [True] * sent
    await servers.close()
    listening.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reply_that_came_while_the_loop_was_busy_is_no_timeout(new_loop):
    started = Server("valkey")

    async def block(seconds):
        time.sleep(seconds)  # as a model does that runs on the event loop

    async def ask():
        server = open_servers(started.url)
        reads = Reads(server, 0.15, MOST)
        read = reads.read
        await Client(server, 5).ask(b"SET", b"k", b"v")
        for busy in (0.2, 0.3):
            for turns in range(6):  # before it is sent, and after
                asking = asyncio.ensure_future(read("k"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                blocking = asyncio.create_task(block(busy))
                assert await asking == b"v"
                await blocking
        started.pause()
        with pytest.raises(TimeoutError):  # the guard does not wait for ever
            await read("k")
        started.resume()
        await reads.close()  # or it connects again, and uvloop waits for ever for what a warning that is an error kept it from closing
        await server.close()

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(ask())
    finally:
        started.resume()
        started.stop()


async def test_a_user_a_password_a_database_and_a_unix_socket(tmp_path):
    server = Server("valkey", "--requirepass", "a:b c", "--unixsocket", str(tmp_path / "s"))
    try:
        for url in ("redis://:{}@{}/3", "redis://default:{}@{}/3", "unix://:{}@{}?db=2"):
            place = tmp_path / "s" if url.startswith("unix") else f"127.0.0.1:{server.port}"
            store = RedisStore(url.format("a%3Ab%20c", place), timeout=2, ttl=100, on_damaged=lambda: None)
            await store.ping()
            await store.close()
    finally:
        server.stop()


def test_what_is_used_of_redis_py_beside_its_clients_is_there():
    """A later release may move these; `pyproject.toml` bounds it."""
    assert {"initialize", "move_slot", "get_node", "get_nodes_by_server_type", "aclose"} <= set(dir(NodesManager))
    assert {"execute_pipeline", "disconnect", "name"} <= set(dir(ClusterNode))
    assert PipelineCommand(0, b"GET", b"k").result is None
    assert callable(RedisSSLContext.get)
    assert callable(Tls.get)
