"""Sentinels: a primary that is killed under load, one that is replaced in peace, and one that does not know that it is none any more."""

import asyncio
import contextlib
import signal
import socket
import time

import hiredis
import pytest
from conftest import Server, free_port
from processes import fill
from redis_load import kept, load
from redis_servers import Sentinels, eventually, start_sentinel

from features.state import StoreError
from service.store import sentinel as redis_sentinel
from service.store.redis import RedisStore

pytestmark = pytest.mark.anyio
USERS = [f"u{i}" for i in range(60)]


@pytest.fixture
def sentinels(tmp_path):
    sentinels = Sentinels(tmp_path)
    yield sentinels
    sentinels.stop()


def store_at(url):
    return RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None)


async def test_a_primary_that_is_killed_under_load(sentinels, run):
    await fill(sentinels.url)
    async with run(redis=sentinels.url, store_timeout_ms=1000) as client, load(client, USERS) as made:
        await made.until(events=100)
        assert not made.degraded()
        killed = time.monotonic()
        sentinels.primary.signal(signal.SIGKILL)
        await made.recovered(killed)
        assert made.degraded(killed)
    assert {each.status for each in made.ranked} == {200}
    assert {reason for each in made.ranked for reason in each.degraded} <= {"store_unreachable", "store_timeout"}
    assert {(status, code) for _, status, code in made.refused} == {(503, "store_down")}
    # Replication runs behind, so what was acknowledged in the last moment before may be lost; nothing else may.
    safe = {event for event, at in made.acknowledged.items() if not killed - 1 < at < killed + 0.1}
    assert safe <= kept(sentinels.url)


async def test_a_fail_over_in_peace_and_a_sentinel_that_is_gone(sentinels):
    store = store_at(sentinels.url.replace("://", f"://127.0.0.1:{free_port()},"))
    await store.append_served([b"before"])
    before = sentinels.named()
    await asyncio.to_thread(sentinels.fail_over)
    assert sentinels.named() != before
    async with asyncio.timeout(90):
        while True:
            try:
                assert await store.append_served([b"after"]) == 2
                break
            except StoreError:
                await asyncio.sleep(0.02)
    await store.close()


class Oracle:
    """A sentinel that says what it is told to."""

    def __init__(self) -> None:
        self.port, self.to, self.epoch, self._writers = free_port(), 0, 1, []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0.01)

    async def _serve(self, reader, writer):
        self._writers.append(writer)
        parser = hiredis.Reader()
        while data := await reader.read(65_536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                port, epoch = str(self.to), str(self.epoch)
                if command[1] == b"GET-MASTER-ADDR-BY-NAME":
                    writer.write(f"*2\r\n$9\r\n127.0.0.1\r\n${len(port)}\r\n{port}\r\n".encode())
                else:
                    writer.write(f"*2\r\n$12\r\nconfig-epoch\r\n${len(epoch)}\r\n{epoch}\r\n".encode())


@pytest.fixture
async def two():
    servers = [Server("valkey"), Server("valkey")]
    yield servers
    for server in servers:
        server.stop()


async def test_the_newest_word_counts_and_a_primary_that_was_replaced_is_left_though_it_answers(two):
    async with Oracle() as old, Oracle() as new:
        old.to = new.to = two[0].port
        store = store_at(f"redis+sentinel://127.0.0.1:{old.port},127.0.0.1:{new.port}/m")
        assert await store.append_served([b"x"]) == 1
        new.to, new.epoch = two[1].port, 2
        async with asyncio.timeout(90):
            there = 1
            while there != 0:
                with contextlib.suppress(StoreError):  # it is between the two
                    there = await store.append_served([])
                await asyncio.sleep(0.05)
        await store.close()


async def test_a_sentinel_that_is_silent_is_not_waited_for(two, monkeypatch):
    monkeypatch.setattr(redis_sentinel, "SENTINEL_SECONDS", 30)
    silent = Server("valkey")
    silent.pause()
    try:
        async with Oracle() as one, Oracle() as other:
            one.to = other.to = two[0].port
            store = store_at(f"redis+sentinel://127.0.0.1:{silent.port},127.0.0.1:{one.port},127.0.0.1:{other.port}/m")
            await store.ping()
            await store.close()
    finally:
        silent.resume()
        silent.stop()


async def test_a_replica_is_no_primary_whoever_says_so(two):
    async with Oracle() as oracle:
        oracle.to = two[0].port
        store = store_at(f"redis+sentinel://127.0.0.1:{oracle.port}/m")
        assert await store.append_served([b"x"]) == 1
        await make_replica(two[0], two[1].port)
        with pytest.raises(StoreError, match="previous master is now a slave"):
            await store.append_served([b"x"])
        with pytest.raises(StoreError, match=f"127.0.0.1:{two[0].port}: it is no primary"):
            await store.append_served([b"x"])
        await store.close()


async def make_replica(server, of):
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"REPLICAOF 127.0.0.1 {of}\r\n".encode())
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()


async def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(redis_sentinel, "SENTINEL_SECONDS", 10)
    store = store_at(f"redis+sentinel://127.0.0.1:{free_port()}/m")
    with pytest.raises(StoreError, match=r"cannot be reached: no sentinel names a primary m: 127.0.0.1:\d+: .*Connect") as caught:
        await store.ping()
    assert caught.value.reason == "store_unreachable"
    await store.close()
    ports = free_port(), free_port()
    servers = [start_sentinel(tmp_path, port=ports[0]), start_sentinel(tmp_path, "requirepass secret", port=ports[1])]
    await asyncio.to_thread(eventually, lambda: all(socket.create_connection(("127.0.0.1", port)).close() is None for port in ports))
    try:
        for port, sentence in zip(ports, ("No such master", "Authentication required.*option sentinel_password is theirs"), strict=True):
            store = store_at(f"redis+sentinel://:hush@127.0.0.1:{port}/m")
            with pytest.raises(StoreError, match=sentence) as caught:
                await store.ping()
            await store.close()
            assert "hush" not in str(caught.value)
        store = store_at(f"redis+sentinel://127.0.0.1:{ports[1]}/m?sentinel_password=secret")
        with pytest.raises(StoreError, match="No such master"):
            await store.ping()
        await store.close()
    finally:
        for process in servers:
            process.kill()
            process.wait()
