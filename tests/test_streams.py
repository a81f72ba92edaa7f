"""Reading the streams as a group, on each kind of server: every entry once, what was abandoned is claimed, and what is gone is noticed."""

import time

import pytest
from conftest import ARRANGEMENTS
from joining import Writer, click

from features.state import StoreError
from features.streams import EVENTS, SERVED, Batch, StreamLostError
from service.store.streams import RedisStreams

pytestmark = pytest.mark.anyio


@pytest.fixture(params=ARRANGEMENTS)
def url(request, arrangements):
    return arrangements(request.param)


@pytest.fixture
def writer(url):
    with Writer(url) as writer:
        yield writer


@pytest.fixture
async def streams(url, writer):
    streams = RedisStreams(url)
    yield streams
    await streams.close()


async def test_what_was_there_before_the_group_is_read_too(streams, writer):
    writer.add((EVENTS, b"first"), at=1_763_800_000.5)
    assert await streams.begin(EVENTS)
    assert not await streams.begin(EVENTS)
    batch = await streams.read(EVENTS, 10)
    assert [entry.value for entry in batch.entries] == [b"first"]
    assert batch.drained
    assert batch.entries[0].ts == 1_763_800_000.5


async def test_entries_come_once_to_one_of_several_and_leave_when_they_are_acknowledged(streams, writer, url):
    other = RedisStreams(url)
    await streams.begin(EVENTS)
    assert not await other.begin(EVENTS)
    writer.add(*((EVENTS, b"%d" % i) for i in range(5)))
    first = await streams.read(EVENTS, 2)
    second = await other.read(EVENTS, 10)
    assert ([e.value for e in first.entries], first.drained) == ([b"0", b"1"], False)
    assert ([e.value for e in second.entries], second.drained) == ([b"2", b"3", b"4"], True)
    assert await streams.read(EVENTS, 10) == Batch([], True)
    await streams.acknowledge(EVENTS, [entry.id for entry in first.entries])
    assert writer.redis.xlen(EVENTS) == await streams.pending(EVENTS) == 3
    assert (await streams.extent(EVENTS)).oldest == second.entries[0].ts
    await streams.acknowledge(EVENTS, [])
    await other.acknowledge(EVENTS, [entry.id for entry in second.entries])
    extent = await streams.extent(EVENTS)
    assert (extent.length, extent.oldest, extent.trimmed) == (0, None, 0)
    assert abs(extent.kept - time.time()) < 60
    await other.close()


async def test_what_another_holds_is_claimed_once_it_is_idle_and_trimmed_ones_are_told_of_once(streams, writer, url):
    await streams.begin(EVENTS)
    writer.add(*((EVENTS, b"%d" % i) for i in range(5)))
    await streams.read(EVENTS, 4)
    other = RedisStreams(url)
    assert await other.claim(EVENTS, 9, 60) == []
    assert [entry.value for entry in await other.claim(EVENTS, 3, 0)] == [b"0", b"1", b"2"]
    assert (await other.extent(EVENTS)).trimmed == 0
    writer.redis.xtrim(EVENTS, maxlen=2, approximate=False)
    assert [entry.value for entry in await other.claim(EVENTS, 9, 0)] == [b"3"]
    assert await other.pending(EVENTS) == 1
    assert [(await reader.extent(EVENTS)).trimmed for reader in (other, streams)] == [3, 0]
    await other.close()


async def test_an_entry_without_the_field_has_an_empty_value(streams, writer):
    await streams.begin(SERVED)
    writer.redis.xadd(SERVED, {"w": "x"})
    assert [entry.value for entry in (await streams.read(SERVED, 5)).entries] == [b""]


async def test_a_stream_or_group_that_is_gone_is_told_apart(streams, writer):
    for use in (streams.read(EVENTS, 5), streams.claim(EVENTS, 5, 0), streams.pending(EVENTS), streams.extent(EVENTS)):
        with pytest.raises(StreamLostError):
            await use
    await streams.begin(EVENTS)
    assert (await streams.extent(EVENTS)).length == 0
    await streams.read(EVENTS, 5)
    writer.redis.flushall()
    writer.add(click())
    with pytest.raises(StreamLostError):
        await streams.read(EVENTS, 5)
    await streams.begin(EVENTS)
    assert len((await streams.read(EVENTS, 5)).entries) == 1


async def test_a_server_that_is_away_and_a_key_of_another_kind_are_store_errors(streams, writer, server):
    away = RedisStreams(server.url)
    server.stop()
    for use in (away.begin(EVENTS), away.read(EVENTS, 5), away.acknowledge(EVENTS, ["1-1"]), away.extent(EVENTS)):
        with pytest.raises(StoreError):
            await use
    await away.close()
    writer.redis.set(EVENTS, "no stream")
    with pytest.raises(StoreError, match="refused"):
        await streams.read(EVENTS, 5)
