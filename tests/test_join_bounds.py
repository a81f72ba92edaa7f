"""What bounds a sink: its memory by bytes, one log by a lease, its files to their readers, and servers that it cannot use."""

import os
import random
import signal

import pytest
from joining import T0, Joining, Writer, click, join_process, ranking, raw
from redis_servers import eventually

from features.events import pack_event
from features.served import pack_served
from features.state import StoreError
from features.streams import BATCH_BYTES, EVENTS, SERVED, Owner
from service.store import streams as streams_module
from service.store.streams import OWNER, RedisStreams
from training.join.log import JoinError

pytestmark = pytest.mark.anyio
MB = 2**20


def explored(number: int, candidates: int = 400, **more):
    """A ranking of about 100 bytes a candidate."""
    chance = random.Random(number)
    names = [f"{chance.getrandbits(300):0100d}" for _ in range(candidates)]
    return ranking(f"r{number}", T0 + number, candidates=names, policy="plackett_luce 1", **more)


async def test_a_read_is_bounded_in_bytes_and_so_is_a_claim(streams, server):
    reader = RedisStreams(server.url)
    await reader.begin(SERVED)
    streams.add(*((SERVED, os.urandom(3 * MB)) for _ in range(7)), *((SERVED, b"small") for _ in range(5)))
    batches = []
    while not batches or not batches[-1].drained:
        batches.append(await reader.read(SERVED, 500))
    other, claimed = RedisStreams(server.url), []
    while not claimed or claimed[-1]:
        claimed.append(await other.claim(SERVED, 500, 0))
        await other.acknowledge(SERVED, [entry.id for entry in claimed[-1]])
    for found in ([batch.entries for batch in batches], claimed):
        sizes = [[len(entry.value) for entry in entries] for entries in found]
        assert all(sum(each[:-1]) < BATCH_BYTES for each in sizes)
        assert sizes[0] == [3 * MB] * 3
        assert sum(map(len, found)) == 12
    await reader.close()
    await other.close()


async def test_what_is_held_is_bounded_in_bytes_and_one_record_may_be_larger(streams, joining, monkeypatch):
    monkeypatch.setattr("training.join.sink.READ", 2)
    joining.sizes, most = {"bytes_per_file": 100_000}, []
    streams.add(*(explored(i) for i in range(6)), explored(6, 4000), *(ranking(f"s{i}", T0 + 10 + i) for i in range(20)))
    async with joining.joiner() as sink:
        took = sink._take_from

        async def takes(*args):
            found = await took(*args)
            most.append(sink._size)
            return found

        sink._take_from = takes
        await sink.drain(True)
    one = len(pack_served(explored(0)))
    assert max(most) < 100_000 + 2 * len(pack_served(explored(6, 4000)))
    assert sum(each > 100_000 + 2 * one for each in most) <= 2  # while it holds the one that is larger
    assert len(list(joining.folder.glob("raw/impressions/*/*/*"))) == 3
    assert joining.rows().height == 27 * 3
    assert sorted(joining.rows()["candidates"].drop_nulls().list.len()) == [400] * 6 + [4000]


async def test_another_logs_joiner_is_refused_while_one_is_at_work(streams, joining, server, tmp_path, repository):
    other = Joining(server.url, tmp_path / "other", repository, at=T0 + 10_000)
    streams.add(ranking())
    async with joining.joiner() as joiner:
        await joiner._step()
        async with other.joiner() as refused, joining.joiner() as second:
            await second._step()  # several of one log share the work
            with pytest.raises(JoinError, match=rf"joined into another log, {joining.folder} on .*say --take-over"):
                await refused._step()
            assert (await refused._streams.own(Owner("x", "y"))).place.startswith(str(joining.folder))
            refused.take_over = True
            await refused._step()
        assert other.counts["other_log"] == 1
        joiner._owned = float("-inf")
        with pytest.raises(JoinError, match="joined into another log"):
            await joiner._step()
    streams.redis.delete(OWNER)


async def test_after_a_joiner_has_ended_another_log_may_follow_and_is_told(streams, joining, server, tmp_path, repository, caplog):
    await joining.once()
    await joining.once()
    assert "other_log" not in joining.counts
    other = Joining(server.url, tmp_path / "other", repository, at=T0 + 10_000)
    await other.once()
    assert other.counts["other_log"] == 1
    assert f"were joined into another log before, {joining.folder}" in caplog.text


async def test_a_redis_that_is_full_is_joined_all_the_same(streams, joining):
    streams.add(*(explored(i) for i in range(20)))
    streams.redis.config_set("maxmemory", 1)
    await joining.once()
    assert streams.lengths() == (0, 0)
    assert raw(joining.folder, "impressions").height == 20


def test_a_second_log_is_refused_with_a_sentence(server, tmp_path, repository):
    first = join_process(server.url, tmp_path / "log", repository)
    with Writer(server.url) as writer:
        eventually(lambda: writer.redis.exists(OWNER))
    second = join_process(server.url, tmp_path / "other", repository)
    _, err = second.communicate(timeout=90)
    assert second.returncode == 2
    assert f"Error: the streams are joined into another log, {tmp_path / 'log'} on " in err.decode()
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=90)
    third = join_process(server.url, tmp_path / "other", repository, "--once")
    out, err = third.communicate(timeout=90)
    assert third.returncode == 0, err
    assert b"1 other_log" in out


@pytest.mark.parametrize("lacking", ["entries-added", "a stream"])
async def test_a_server_that_will_not_do_ends_the_joiner(streams, joining, monkeypatch, lacking):
    if lacking == "a stream":
        streams.redis.set(EVENTS, "text")
        wanted = "adrank:events is no stream there; somebody else wrote that key"
    else:
        wanted = "Redis 7 or later is needed, or Valkey: this server's XINFO STREAM adrank:served tells no entries-added"
        script = streams_module.EXTENT.replace(b"entries-added'] then", b"entries-added'] or true then")
        monkeypatch.setattr(streams_module, "EXTENT", script)
    async with joining.joiner() as joiner:
        with pytest.raises(StoreError, match=wanted):
            await joiner.run()


def test_files_are_not_for_everybody(server, tmp_path, repository):
    old = os.umask(0)
    try:
        with Writer(server.url) as writer:
            writer.add(ranking(), click(), (EVENTS, pack_event(click("other"))))
        process = join_process(server.url, tmp_path / "log", repository, "--drain")
        assert process.wait(60) == 0
        process.communicate()
    finally:
        os.umask(old)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in (tmp_path / "log").rglob("*")}
    assert {mode for path, mode in modes.items() if ".join" not in path.parts} == {0o640, 0o750}
    assert {mode & 0o077 for path, mode in modes.items() if ".join" in path.parts} <= {0, 0o040}
    assert not any(mode & 0o007 for mode in modes.values())
