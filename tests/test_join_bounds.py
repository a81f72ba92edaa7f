"""What bounds a joiner: its memory by bytes, one log by a lease, its files to their readers, and servers that it cannot use."""

import asyncio
import errno
import os
import random
import signal
import sqlite3

import pytest
from joining import T0, Joining, Writer, click, eventually, join_process, ranking, rows, table

from features.events import pack_event
from features.state import StoreError
from features.streams import BATCH_BYTES, EVENTS, SERVED, Owner
from service.store.streams import OWNER, RedisStreams
from training.join import log as join_log
from training.join import state as join_state
from training.join.log import JoinError

pytestmark = pytest.mark.anyio
MB = 2**20


@pytest.fixture
def streams(server):
    return Writer(server.url)


@pytest.fixture
def joining(server, tmp_path, repository):
    return Joining(server.url, tmp_path / "log", repository, at=T0 + 10_000)


def explored(number: int, candidates: int = 400, **more):
    """A ranking of about 100 bytes a candidate."""
    chance = random.Random(number)
    names = [f"{chance.getrandbits(300):0100d}" for _ in range(candidates)]
    return ranking(f"r{number}", T0 + number, candidates=names, policy="plackett_luce 1", **more)


async def test_a_read_is_bounded_in_bytes(streams, server):
    reader = RedisStreams(server.url)
    await reader.begin(SERVED)
    streams.add(*((SERVED, os.urandom(3 * MB)) for _ in range(7)), *((SERVED, b"small") for _ in range(5)))
    found = []
    for again in (False, True):
        batches = []
        while not batches or not batches[-1].drained:
            batches.append(await reader.read(SERVED, 500))
        sizes = [[len(entry.value) for entry in batch.entries] for batch in batches]
        assert all(sum(each[:-1]) < BATCH_BYTES for each in sizes)
        assert sizes[0] == [3 * MB] * 3
        found.append([entry.id for batch in batches for entry in batch.entries])
        if not again:
            reader.rewind(SERVED)  # what is pending is bounded in the same way
    assert found[0] == found[1]
    assert len(found[0]) == 12
    await reader.close()


async def test_a_file_is_bounded_by_the_bytes_behind_it_and_one_record_may_be_larger(streams, joining):
    joining.settings = type(joining.settings)(bytes_per_file=100_000)
    streams.add(*(explored(i) for i in range(6)), explored(6, 4000), *(ranking(f"s{i}", T0 + 10 + i) for i in range(20)))
    async with joining.joiner() as joiner:
        await joiner._take(SERVED)
        sizes = []
        while (part := joiner._plan(True, True)) is not None:
            sizes.append(sum(len(record) for _, record in joiner._state.rankings(part)))
            joiner._write(part)
    assert [size for size in sizes if size > 100_000] == sizes[3:4]
    assert len(sizes) == 5
    found = rows(joining.folder)
    assert found.height == 27 * 3
    assert sorted(found["candidates"].drop_nulls().list.len()) == [400] * 6 + [4000]


async def test_a_part_is_due_when_its_bytes_are_many(streams, joining):
    joining.settings = type(joining.settings)(bytes_per_file=100_000, click_window=100, lateness=10)
    joining.time.wall = T0 + 115
    streams.add(*(explored(i) for i in range(3)))
    async with joining.joiner() as joiner:
        await joiner._step()
    assert rows(joining.folder).height == 2 * 3


async def test_events_without_a_ranking_are_settled_some_at_a_time(streams, joining, monkeypatch):
    monkeypatch.setattr(join_state, "SWEPT_BYTES", 30_000)
    streams.add(*(click(f"gone{i}") for i in range(100)))
    for _ in range(2):
        await joining.once(everything=True)
        joining.time.forward(100)
    assert table(joining.folder, "unjoined").height == 100
    assert len(list((joining.folder / "unjoined").iterdir())) >= 3


async def test_the_state_of_the_version_before_is_read(streams, joining):
    streams.add(ranking(), click())
    async with joining.joiner() as joiner:
        await joiner._take_both()
    with sqlite3.connect(joining.folder / ".join/state.db") as db:
        db.executescript("DROP INDEX rankings_due; ALTER TABLE rankings DROP COLUMN bytes; PRAGMA user_version = 1")
    db.close()
    await joining.once(everything=True)
    assert rows(joining.folder)["label"].to_list() == [1, 0, 0]


async def test_another_logs_joiner_is_refused_while_one_is_at_work(streams, joining, server, tmp_path, repository):
    other = Joining(server.url, tmp_path / "other", repository, at=T0 + 10_000)
    streams.add(ranking())
    async with joining.joiner() as joiner:
        await joiner._step()
        async with other.joiner() as refused:
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
    assert rows(joining.folder)["request_id"].n_unique() == 20


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


async def test_the_joiner_says_what_it_holds_and_until_when(streams, joining, server):
    joining.time.wall = T0 + 5
    streams.add(ranking(), click())
    async with joining.joiner() as joiner:
        assert joiner.held() == "holds no ranking and 0 events, and waits for rankings that the service logs"
        await joiner.drain(False)
        assert joiner.held() == (
            "holds 1 rankings and 1 events; the first rows are written from 2025-11-22 09:01:00 UTC on, by 2025-11-22 09:06:00 UTC "
            "at the latest: window 1800 s, lateness 60 s, and up to 300 s for more of them"
        )


@pytest.mark.parametrize("lacking", ["entries-added", "a stream"])
async def test_a_server_that_will_not_do_ends_the_joiner(streams, joining, monkeypatch, lacking):
    if lacking == "a stream":
        streams.redis.set(EVENTS, "text")
        wanted = "adrank:events is no stream there; somebody else wrote that key"
    else:
        wanted = "Redis 7 or later is needed, or Valkey: this server's XINFO STREAM adrank:served tells no entries-added"
        monkeypatch.setattr(
            "service.store.streams.fields_of",
            lambda words: {k: v for k, v in zip(words[::2], words[1::2], strict=True) if k != b"entries-added"},
        )
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


async def test_a_new_log_on_a_full_disk_is_waited_for(streams, joining, monkeypatch):
    whole, full = join_log.write_file, [True]

    def maybe(path, data):
        if full[0] and path.name == "id":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, data)

    monkeypatch.setattr(join_log, "write_file", maybe)
    streams.add(ranking(ts=T0 - 400))
    async with joining.joiner() as joiner:
        running = asyncio.create_task(joiner.run())
        async with asyncio.timeout(90):
            while not joining.counts.get("disk_full"):
                await asyncio.sleep(0.01)
            full[0] = False
            while not joining.counts.get("rankings din"):
                await asyncio.sleep(0.01)
        joiner.stop()
        await running
