"""What goes wrong around sinks: a counted, named outcome for each, and nothing lost that was acknowledged."""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import subprocess
from collections import Counter

import bundles
import pytest
from conftest import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joining import (
    T0,
    Joining,
    Writer,
    click,
    conversion,
    impression,
    join_once,
    join_process,
    ranking,
    raw,
    rows,
    table,
)
from msgspec import msgpack
from redis_servers import eventually

from features.events import pack_event
from features.served import pack_served
from features.state import StoreError
from features.streams import EVENTS, SERVED
from service.store.streams import RedisStreams
from training.join import sink as sink_module
from training.join.log import open_log
from training.join.sink import Sink

pytestmark = pytest.mark.anyio


class Killed(BaseException):
    """Ends a sink as SIGKILL would: nothing of it runs after this."""


def killing(monkeypatch, where: str) -> None:
    """Kill the sink when it first gets there."""

    def dies(*_args, **_more):
        raise Killed

    if where in ("read", "acknowledged"):
        owner, name = (RedisStreams, "acknowledge") if where == "acknowledged" else (Sink, "_flush")
        whole = getattr(owner, name)

        async def then_dies(*args):
            if where == "acknowledged":
                await whole(*args)
            raise Killed

        monkeypatch.setattr(owner, name, then_dies)
    elif where == "written":
        monkeypatch.setattr(RedisStreams, "acknowledge", dies)
    else:
        whole = sink_module.write_parquet

        def wrapped(folder, path, frame):
            if path.match(where):
                raise Killed
            whole(folder, path, frame)

        monkeypatch.setattr(sink_module, "write_parquet", wrapped)


@pytest.mark.parametrize("where", ["read", "ads/*", "impressions/*/*/*", "events/*/*/*", "aside/*", "written", "acknowledged"])
async def test_killed_between_any_two_steps_the_next_sink_goes_on(streams, joining, monkeypatch, where):
    monkeypatch.setattr(sink_module.SinkSettings, "claim", 0.01)
    streams.add(ranking(), ranking("r2", T0 + 1), click(), click("r2", ad_id="a9"), conversion("r2", "a1"), (EVENTS, b"damaged"))
    with pytest.MonkeyPatch.context() as patched:
        killing(patched, where)
        with pytest.raises(Killed):
            await joining.once(everything=True)
    await joining.once(everything=True)
    found = joining.rows()
    assert found.select("request_id", "ad_id").rows() == [(r, a) for r in ("r1", "r2") for a in ("a1", "a2", "a3")]
    assert found["label"].to_list() == [1, 0, 0, 0, 0, 0]
    assert found["value"].sum() == 2.5
    assert set(table(joining.folder, "raw/aside")["packed"]) == {b"damaged"}
    assert set(table(joining.folder, "ads")["ad_id"]) == {"a1", "a2", "a3", "a4", "a5"}
    assert streams.lengths() == (0, 0)


async def test_entries_whose_acknowledgement_failed_are_acknowledged_later(streams, joining, monkeypatch):
    streams.add(ranking(), click())

    async def fails(_self, _stream, _ids):
        raise StoreError("store_unreachable", "gone")

    async with joining.joiner() as sink:
        with monkeypatch.context() as patched:
            patched.setattr(RedisStreams, "acknowledge", fails)
            with pytest.raises(StoreError):
                await sink.drain(True)
        streams.add(click(ad_id="a2"))
        await sink.drain(True)
    assert streams.lengths() == (0, 0)
    assert joining.rows()["label"].to_list() == [1, 1, 0]
    assert len(raw(joining.folder, "impressions")) == 1  # the same sink does not write them again


async def test_an_emptied_redis_is_noticed_and_what_was_held_is_kept(streams, joining, server):
    streams.add(ranking())
    async with joining.joiner() as sink:
        await sink._take()
        server.stop()
        with pytest.raises(StoreError):
            await sink._step()
        server.start()
        streams.add(click(), ranking("r2"))
        for _ in range(3):
            await sink._take()
        await sink.drain(True)
    assert joining.rows()["request_id"].to_list() == ["r1"] * 3 + ["r2"] * 3
    assert joining.rows()["label"].sum() == 1
    assert joining.counts["stream_lost"] == 2
    assert "trimmed" not in joining.counts
    assert streams.lengths() == (0, 0)
    await joining.once()
    assert joining.counts["stream_lost"] == 2


async def test_a_stream_that_is_restored_is_not_read_twice(streams, joining):
    served = ranking()
    entry = streams.redis.xadd(SERVED, {"v": pack_served(served)})
    await joining.once(everything=True)
    streams.redis.delete(SERVED)
    streams.redis.xadd(SERVED, {"v": pack_served(ranking("early"))}, id="5-0")
    streams.redis.xadd(SERVED, {"v": pack_served(served)}, id=entry)
    await joining.once(everything=True)
    assert Counter(joining.rows()["request_id"]) == {"r1": 3, "early": 3}


async def test_a_sink_waits_for_a_redis_that_is_away(streams, joining, server):
    server.stop()
    async with joining.joiner() as sink:
        running = asyncio.create_task(sink.run())
        await until(lambda: joining.counts.get("unreachable"))
        server.start()
        streams.add(ranking(ts=T0 - 400))
        await until(lambda: sink._held[SERVED])
        sink.stop()
        await running
    assert raw(joining.folder, "impressions")["request_id"].to_list() == ["r1"]
    assert streams.lengths() == (0, 0)


@pytest.mark.parametrize("kind", ["redis-server", "valkey"])
async def test_entries_that_were_trimmed_are_counted_exactly_and_once(servers, kind, tmp_path, repository):
    url = servers(kind).url
    streams, joining = Writer(url), Joining(url, tmp_path / "log", repository)
    streams.redis.flushall()
    streams.add(*(ranking(f"before{i}") for i in range(3)))
    streams.redis.xtrim(SERVED, maxlen=1, approximate=False)  # before there was a sink: nobody can tell whether another one had them
    await joining.once()
    assert "trimmed" not in joining.counts
    streams.add(*(ranking(f"r{i}") for i in range(9)))
    streams.redis.xtrim(SERVED, maxlen=4, approximate=False)
    await joining.once()
    await joining.once()
    assert joining.counts["trimmed"] == 5
    streams.add(*(ranking(f"s{i}") for i in range(4)))
    async with joining.joiner() as sink:
        await sink._take()  # what a sink holds already is not lost
        streams.redis.xtrim(SERVED, maxlen=1, approximate=False)
        await sink.drain(False)
    assert joining.counts["trimmed"] == 5
    streams.add(*(ranking(f"t{i}") for i in range(4)))
    async with joining.joiner() as sink:
        await sink._streams.read(SERVED, 10)  # given to a sink that ended, and trimmed before another one claimed it
        streams.redis.xtrim(SERVED, maxlen=1, approximate=False)
        await sink._streams.claim(SERVED, 10, 0)
        await sink._look()
    assert joining.counts["trimmed"] == 8
    assert joining.counts["rankings din"] == 9


async def test_sinks_share_the_work_and_one_takes_what_another_left(streams, joining, monkeypatch):
    monkeypatch.setattr(sink_module.SinkSettings, "claim", 0.2)
    monkeypatch.setattr(sink_module, "READ", 10)
    streams.add(*(ranking(f"r{i}", T0 + i) for i in range(40)), *(click(f"r{i}", ts=T0 + i + 1) for i in range(40)))
    async with joining.joiner() as first, joining.joiner() as second, joining.joiner() as third:
        for sink in (first, second, first, second):
            await sink._take()
        held = [{entry.id for entry in sink._held[SERVED]} for sink in (first, second)]
        assert [len(each) for each in held] == [20, 20]
        assert not held[0] & held[1]
        await first._flush()
        await third._look()
        assert streams.lengths() == (20, 20)
        await third.drain(True)  # the second holds the rest, and says nothing any more
    assert streams.lengths() == (0, 0)
    assert joining.rows()["request_id"].n_unique() == 40
    assert joining.rows()["label"].sum() == 40
    assert len(raw(joining.folder, "impressions")) == 40


@pytest.mark.parametrize("place", ["ads", "impressions", "events", "watermark"])
async def test_a_full_disk_is_waited_for(streams, joining, monkeypatch, place):
    full, whole = [True], {name: getattr(sink_module, name) for name in ("write_parquet", "write_file")}

    def maybe(name, path_of):
        def writes(*args):
            if full[0] and place in path_of(args).parts:
                raise OSError(errno.ENOSPC, "No space left on device")
            whole[name](*args)

        return writes

    monkeypatch.setattr(sink_module, "write_parquet", maybe("write_parquet", lambda args: args[1]))
    monkeypatch.setattr(sink_module, "write_file", maybe("write_file", lambda args: args[0]))
    monkeypatch.setattr(sink_module.SinkSettings, "hold", 0.05)
    streams.add(ranking(ts=T0 - 400), click(ts=T0 - 390))
    async with joining.joiner() as sink:
        running = asyncio.create_task(sink.run())
        await until(lambda: joining.counts.get("disk_full", 0) >= 2)
        if place in ("ads", "impressions"):
            assert streams.lengths() == (1, 1)  # nothing is acknowledged that does not stand in the log
        full[0] = False
        await until(lambda: streams.lengths() == (0, 0))
        sink.stop()
        await running
    await joining.once(everything=True)
    assert joining.rows()["label"].to_list() == [1, 0, 0]
    assert not list(joining.folder.rglob("*.tmp"))


def test_a_first_sink_that_is_killed_leaves_its_file_where_it_is_cleared_up(tmp_path, monkeypatch):
    bundles.publish(tmp_path / "models")

    def link(*_):
        raise KeyboardInterrupt  # no OSError, so that nothing is tidied, as after SIGKILL

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path / "log", tmp_path / "models", None)
    monkeypatch.undo()
    (left,) = (tmp_path / "log").rglob("*.tmp")
    assert left.parent.name == ".join"
    os.utime(left, (0, 0))
    open_log(tmp_path / "log", tmp_path / "models", None)
    assert not list((tmp_path / "log").rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_loses_nothing(streams, server, small_disk, repository):
    names = [f"r{i}" for i in range(600)]
    log, filler = small_disk / "log", small_disk / "filler"
    join_once(server.url, log, repository, "--once")
    filler.write_bytes(b"x" * 2_600_000)
    streams.add(*(ranking(name, user={"age": os.urandom(1000).hex()}) for name in names), *(click(name) for name in names))
    process = join_process(server.url, log, repository, "--window", "1", "--lateness", "0")
    try:
        assert process.stderr
        assert b"waiting: the disk" in b"".join(iter_until(process.stderr, b"waiting"))
        assert sum(streams.lengths()) > 0  # what cannot be held stays where it is
        assert process.poll() is None
        filler.unlink()
        eventually(lambda: streams.lengths() == (0, 0))
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
    join_once(server.url, log, repository, "--drain")
    found = rows(log)
    assert Counter(found["request_id"]) == Counter(dict.fromkeys(names, 3))
    assert found["label"].sum() == len(names)


def iter_until(lines, word: bytes):
    for line in lines:
        yield line
        if word in line:
            return


def test_files_that_may_not_grow_are_a_full_disk(streams, server, repository, tmp_path):
    """What a quota does: files of the log are refused beyond a size."""
    streams.add(*(ranking(f"r{i}", user={"age": os.urandom(500).hex()}) for i in range(500)))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = join_process(server.url, tmp_path / "log", repository, "--drain", "--window", "1", "--lateness", "0", preexec_fn=limit)
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err.count(b"Traceback")) == (2, 0), err
    assert b"Error: the disk of" in err
    join_once(server.url, tmp_path / "log", repository, "--drain", "--window", "1", "--lateness", "0")
    assert Counter(rows(tmp_path / "log")["request_id"]) == Counter({f"r{i}": 3 for i in range(500)})


async def test_the_window_of_a_ranking_from_the_future_begins_when_it_was_received(streams, joining):
    streams.add(ranking(ts=T0 + 1e7), click(ts=T0 + 3), at=T0)
    joining.at = T0 + 1861
    await joining.once()
    assert joining.rows()["label"].to_list() == [1, 0, 0]


async def test_a_log_with_the_state_of_a_joiner_of_before_is_not_written_into(joining):
    state = joining.folder / ".join" / "state.db"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"state\.db is of the joiner of before.*let the adrank that wrote it write them .adrank join --drain"
    ):
        await joining.once()


def test_a_model_that_is_not_there_yet_is_waited_for(server, tmp_path):
    process = join_process(server.url, tmp_path / "log", tmp_path / "models", "--name", "m")
    assert process.stderr
    assert b"waiting for it" in process.stderr.readline()
    bundles.publish(tmp_path / "models", "m")
    assert b"joining into" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(["age", "price", "a1"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutated(packed: bytes):
    """A record with some of its parts replaced."""
    whole = msgpack.decode(packed)
    keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))

    def replaced(changes):
        for key, value in changes.items():
            whole[key] = value
        return msgpack.encode(whole)

    return st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2).map(replaced)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_entry_stops_a_sink(server, repository, tmp_path_factory, data):
    records = [
        ranking("r1", sent={"a1": {"price": 1}}, candidates=["a1"], positions=[3, 1, 2]),
        click(),
        impression(position=2),
        conversion(),
    ]
    packed = [(SERVED, pack_served(records[0])), *((EVENTS, pack_event(event)) for event in records[1:])]
    odd = [(stream, data.draw(mutated(value))) for stream, value in packed]
    odd += [(stream, data.draw(st.binary(max_size=20))) for stream in (SERVED, EVENTS)]
    streams, joining = Writer(server.url), Joining(server.url, tmp_path_factory.mktemp("log"), repository, at=T0 + 10_000)
    streams.redis.flushall()
    streams.add(*odd, *records)
    asyncio.run(joining.once(everything=True))
    with contextlib.suppress(ValueError):
        assert set(joining.rows().filter(request_id="r1", user_id="u1")["ad_id"]) >= {"a1", "a2", "a3"}
    assert streams.lengths() == (0, 0)
    kinds = ("click", "impression", "conversion", "foreign", "damaged", "rankings")
    assert sum(count for name, count in joining.counts.items() if name.split()[0] in kinds) == len(odd) + len(records)
