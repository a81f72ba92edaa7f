"""Reading the streams as a group, on each kind of server: every entry once, what is pending first, and what is gone is noticed."""

import time

import pytest
from conftest import ARRANGEMENTS
from joining import Writer, click, ranking

from features.state import StoreError
from features.streams import EVENTS, SERVED, Batch, Entry, Extent, StreamLostError
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
    writer.add((EVENTS, b"first"))
    assert await streams.begin(EVENTS)
    assert not await streams.begin(EVENTS)
    batch = await streams.read(EVENTS, 10)
    assert [entry.value for entry in batch.entries] == [b"first"]
    assert batch.drained
    assert abs(batch.entries[0].ts - time.time()) < 60


async def test_entries_come_once_and_in_order_and_leave_when_they_are_acknowledged(streams, writer):
    await streams.begin(EVENTS)
    writer.add(*((EVENTS, b"%d" % i) for i in range(5)))
    first = await streams.read(EVENTS, 2)
    second = await streams.read(EVENTS, 10)
    assert ([e.value for e in first.entries], first.drained) == ([b"0", b"1"], False)
    assert ([e.value for e in second.entries], second.drained) == ([b"2", b"3", b"4"], True)
    assert await streams.read(EVENTS, 10) == Batch([], True)
    await streams.acknowledge(EVENTS, [entry.id for entry in first.entries])
    assert writer.redis.xlen(EVENTS) == 3
    assert writer.redis.xpending(EVENTS, "join")["pending"] == 3
    await streams.acknowledge(EVENTS, [])
    assert (await streams.extent(EVENTS)).added == 5


async def test_another_life_reads_what_is_pending_first(streams, writer, url):
    await streams.begin(EVENTS)
    writer.add(*((EVENTS, b"%d" % i) for i in range(5)))
    await streams.read(EVENTS, 4)
    again = RedisStreams(url)
    pages = [await again.read(EVENTS, 3) for _ in range(4)]
    assert [[entry.value for entry in page.entries] for page in pages] == [[b"0", b"1", b"2"], [b"3"], [b"4"], []]
    assert [page.drained for page in pages] == [False, False, True, True]
    await again.close()


async def test_rewinding_reads_what_is_pending_again(streams, writer):
    await streams.begin(EVENTS)
    writer.add((EVENTS, b"0"), (EVENTS, b"1"))
    first = await streams.read(EVENTS, 1)
    streams.rewind(EVENTS)
    assert (await streams.read(EVENTS, 5)).entries == first.entries


async def test_an_entry_that_was_trimmed_while_pending_has_no_value(streams, writer):
    await streams.begin(SERVED)
    writer.add(ranking())
    batch = await streams.read(SERVED, 5)
    writer.redis.xtrim(SERVED, maxlen=0, approximate=False)
    streams.rewind(SERVED)
    assert (await streams.read(SERVED, 5)).entries == [Entry(batch.entries[0].id, None)]
    await streams.acknowledge(SERVED, [batch.entries[0].id])
    streams.rewind(SERVED)
    assert (await streams.read(SERVED, 5)).entries == []


async def test_an_entry_without_the_field_has_an_empty_value(streams, writer):
    await streams.begin(SERVED)
    writer.redis.xadd(SERVED, {"w": "x"})
    assert [entry.value for entry in (await streams.read(SERVED, 5)).entries] == [b""]


async def test_a_stream_or_group_that_is_gone_is_told_apart(streams, writer):
    for use in (streams.read(EVENTS, 5), streams.extent(EVENTS)):
        with pytest.raises(StreamLostError):
            await use
    await streams.begin(EVENTS)
    assert await streams.extent(EVENTS) == Extent(0, 0, None)
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
