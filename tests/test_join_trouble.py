"""What goes wrong around a joiner: a counted, named outcome for each, and nothing lost that was acknowledged."""

import asyncio
import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter

import bundles
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joining import (
    T0,
    Joining,
    Time,
    Writer,
    click,
    conversion,
    eventually,
    impression,
    join_once,
    join_process,
    ranking,
    rows,
    table,
)

from features.events import pack_event
from features.served import pack_served
from features.state import StoreError
from features.streams import EVENTS, SERVED
from service.store.streams import RedisStreams
from training.join import run as join_module
from training.join import write as join_write
from training.join.state import NoRoomError, State

pytestmark = pytest.mark.anyio


@pytest.fixture
def streams(server):
    return Writer(server.url)


@pytest.fixture
def joining(server, tmp_path, repository):
    return Joining(server.url, tmp_path / "log", repository, at=T0 + 10_000)


async def until(true, seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


class Killed(BaseException):
    """Ends a joiner as SIGKILL would: nothing of it runs after this."""


WHERE = ("taken", "acknowledged", "planned", "ads", "rows", "unjoined", "before done", "done")


def killing(monkeypatch, where: str) -> None:
    """Kill the joiner when it first gets there."""

    def dies(*_args, **_more):
        raise Killed

    def after(owner, name, when=lambda *_args: True):
        whole = getattr(owner, name)

        def wrapped(*args, **more):
            result = whole(*args, **more)
            if when(*args):
                raise Killed
            return result

        monkeypatch.setattr(owner, name, wrapped)

    if where == "taken":
        monkeypatch.setattr(RedisStreams, "acknowledge", dies)
    elif where == "acknowledged":
        monkeypatch.setattr(join_module.Joiner, "_plan", dies)
    elif where == "planned":
        monkeypatch.setattr(join_module.Joiner, "_write", dies)
    elif where == "before done":
        monkeypatch.setattr(State, "done", dies)
    elif where == "done":
        after(State, "done")
    else:
        folder = {"ads": "ads", "rows": "hour=08", "unjoined": "unjoined"}[where]
        after(join_write, "write_parquet", lambda path, *_rest: path.name == folder)


@pytest.mark.parametrize("where", WHERE)
async def test_killed_between_any_two_steps_the_next_joiner_writes_each_row_once(streams, joining, where):
    streams.add(ranking(), ranking("r2", T0 + 1), click(), click("r2", ad_id="a9"), conversion("r2", "a1"))
    with pytest.MonkeyPatch.context() as patched:
        killing(patched, where)
        with pytest.raises(Killed):
            await joining.once(everything=True)
    await joining.once(everything=True)
    found = rows(joining.folder)
    assert found.select("request_id", "ad_id").rows() == [(r, a) for r in ("r1", "r2") for a in ("a1", "a2", "a3")]
    assert found["label"].to_list() == [1, 0, 0, 0, 0, 0]
    assert found["value"].sum() == 2.5
    assert table(joining.folder, "unjoined")["outcome"].to_list() == ["not_shown"]
    assert table(joining.folder, "ads").select("ad_id").is_unique().all()
    assert streams.lengths() == (0, 0)


async def test_entries_whose_acknowledgement_failed_are_not_taken_again_after_they_are_written(streams, joining, monkeypatch):
    streams.add(ranking(), click())
    failed = itertools.count()

    async def fails(_self, _stream, _ids):
        next(failed)
        raise StoreError("store_unreachable", "gone")

    async with joining.joiner() as joiner:
        with monkeypatch.context() as patched:
            patched.setattr(RedisStreams, "acknowledge", fails)
            with pytest.raises(StoreError):
                await joiner.drain(True)
    assert next(failed) == 1
    async with joining.joiner() as joiner:  # the state has the ranking; write it before the stream is asked again
        joiner._write(joiner._plan(True, True))
        streams.add(click(ad_id="a2"))
        await joiner.drain(True)
    assert rows(joining.folder)["ad_id"].to_list() == ["a1", "a2", "a3"]
    assert streams.lengths() == (0, 0)
    streams.add(*(ranking(f"more{i}") for i in range(3)))
    streams.redis.xtrim(SERVED, maxlen=1, approximate=False)
    await joining.once()
    assert joining.counts["trimmed"] == 2  # an entry that was read twice counts as taken once


async def test_an_emptied_redis_is_noticed_and_what_was_taken_is_kept(streams, joining, server):
    joining.time.wall = T0 + 10
    streams.add(ranking())
    async with joining.joiner() as joiner:
        await joiner._step()
        server.stop()
        with pytest.raises(StoreError):
            await joiner._step()
        server.start()
        streams.add(click(), ranking("r2"))
        for _ in range(3):
            await joiner._step()
        await joiner.drain(True)
    assert rows(joining.folder)["request_id"].to_list() == ["r1"] * 3 + ["r2"] * 3
    assert rows(joining.folder)["label"].sum() == 1
    assert joining.counts["stream_lost"] == 2
    assert streams.lengths() == (0, 0)
    await joining.once()
    assert joining.counts["stream_lost"] == 2


async def test_a_new_stream_whose_clock_is_behind_is_read_and_one_that_is_restored_is_not_written_twice(streams, joining):
    served = ranking()
    entry = streams.redis.xadd(SERVED, {"v": pack_served(served)})
    await joining.once(everything=True)
    streams.redis.delete(SERVED)
    streams.redis.xadd(SERVED, {"v": pack_served(ranking("early"))}, id="5-0")
    streams.redis.xadd(SERVED, {"v": pack_served(served)}, id=entry)
    await joining.once(everything=True)
    assert joining.counts["stream_lost"] == 1
    assert Counter(rows(joining.folder)["request_id"]) == {"r1": 3, "early": 3}


async def test_a_joiner_waits_for_a_redis_that_is_away(streams, joining, server):
    server.stop()
    async with joining.joiner() as joiner:
        running = asyncio.create_task(joiner.run())
        await until(lambda: joining.counts.get("unreachable"))
        server.start()
        streams.add(ranking(ts=T0 - 400))
        joining.time.forward(600)
        await until(lambda: joining.counts.get("rankings din"))
        joiner.stop()
        await running
    assert len(rows(joining.folder)) == 3


@pytest.mark.parametrize("kind", ["redis-server", "valkey"])
async def test_entries_that_were_trimmed_are_counted_exactly(servers, kind, tmp_path, repository):
    url = servers(kind).url
    streams, joining = Writer(url), Joining(url, tmp_path / "log", repository)
    streams.redis.flushall()
    streams.add(*(ranking(f"before{i}") for i in range(3)))
    streams.redis.xtrim(SERVED, maxlen=1, approximate=False)  # before there was a joiner: nobody can tell whether another one had them
    await joining.once()
    assert "trimmed" not in joining.counts
    streams.add(*(ranking(f"r{i}") for i in range(9)))
    streams.redis.xtrim(SERVED, maxlen=4, approximate=False)
    await joining.once()
    await joining.once()
    assert joining.counts["trimmed"] == 5
    streams.add(*(ranking(f"s{i}") for i in range(4)))
    async with joining.joiner() as joiner:
        await joiner._streams.read(SERVED, 10)  # delivered, and trimmed before it was taken
        streams.redis.xtrim(SERVED, maxlen=1, approximate=False)
        joiner._streams.rewind(SERVED)
        await joiner.drain(False)
    assert joining.counts["trimmed"] == 8
    assert streams.redis.xpending(SERVED, "join")["pending"] == 0
    await joining.once(everything=True)
    assert joining.counts["rankings din"] == 6


FULL = [
    ("write_parquet", lambda: OSError(errno.ENOSPC, "No space left on device")),
    ("_advance", lambda: sqlite_error("database or disk is full", sqlite3.SQLITE_FULL)),
    ("done", lambda: NoRoomError("the disk is full")),
]


def sqlite_error(text: str, code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(("step", "error"), FULL, ids=[step for step, _ in FULL])
async def test_a_full_disk_is_waited_for(streams, joining, monkeypatch, step, error):
    owner = join_write if step == "write_parquet" else State
    whole, full = getattr(owner, step), [True]

    def maybe(*args, **more):
        if full[0]:
            raise error()
        return whole(*args, **more)

    monkeypatch.setattr(owner, step, maybe)
    streams.add(ranking(ts=T0 - 400), click(ts=T0 - 390))
    async with joining.joiner() as joiner:
        running = asyncio.create_task(joiner.run())
        await until(lambda: joining.counts.get("disk_full", 0) >= 2)
        assert not list(joining.folder.glob("day=*/*/*.parquet")) or step == "done"
        assert (streams.lengths() == (1, 1)) == (step == "_advance")  # nothing is acknowledged that is not held
        full[0] = False
        await until(lambda: joining.counts.get("rankings din"))
        joiner.stop()
        await running
    assert rows(joining.folder)["label"].to_list() == [1, 0, 0]
    assert streams.lengths() == (0, 0)
    assert not list(joining.folder.rglob("*.tmp"))


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


def test_a_really_full_disk_loses_nothing(streams, server, small_disk, repository, tmp_path):
    names = [f"r{i}" for i in range(600)]
    log, filler = small_disk / "log", small_disk / "filler"
    join_once(server.url, log, repository, "--once")
    filler.write_bytes(b"x" * 1_300_000)
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
    moved = tmp_path / "log"
    shutil.copytree(log, moved)  # what is held fits, but the files of the log beside it may not
    join_once(server.url, moved, repository, "--drain")
    found = rows(moved)
    assert Counter(found["request_id"]) == Counter(dict.fromkeys(names, 3))
    assert found["label"].sum() == len(names)


def iter_until(lines, word: bytes):
    for line in lines:
        yield line
        if word in line:
            return


def test_files_that_may_not_grow_are_a_full_disk(streams, server, repository, tmp_path):
    """What a quota does: SQLite and the files of the log are refused beyond a size."""
    streams.add(*(ranking(f"r{i}", user={"age": os.urandom(500).hex()}) for i in range(500)))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = join_process(server.url, tmp_path / "log", repository, "--drain", preexec_fn=limit)
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err.count(b"Traceback")) == (2, 0), err
    assert b"Error: the disk is full" in err
    join_once(server.url, tmp_path / "log", repository, "--drain")
    assert Counter(rows(tmp_path / "log")["request_id"]) == Counter({f"r{i}": 3 for i in range(500)})


def test_the_clock_never_runs_ahead_of_the_time_that_passed():
    time = Time(T0)
    clock = time.clock()
    time.forward(10)
    assert (clock.now(), clock.jumped()) == (T0 + 10, 0.0)
    time.wall += 3600
    assert (clock.now(), clock.jumped(), clock.jumped()) == (T0 + 10, 3600, 0.0)
    time.forward(5)
    assert clock.now() == T0 + 15
    time.wall -= 7200
    assert (clock.now(), clock.jumped()) == (T0 + 15 - 3600, -7200)
    time.wall += 3600
    assert (clock.now(), clock.jumped(), clock.jumped()) == (T0 + 15, 3600, 0.0)


async def test_a_clock_that_jumps_ahead_closes_no_window(streams, joining):
    joining.time.wall = T0 + 10
    streams.add(ranking())
    async with joining.joiner() as joiner:
        await joiner._step()
        joining.time.wall += 86_400
        for _ in range(3):
            joining.time.forward(6)
            await joiner._step()
        assert not list(joining.folder.glob("day=*"))
        assert joining.counts["clock_jumped"] == 1
        joining.time.forward(1900)
        streams.add(click(ts=T0 + 1000))
        await joiner.drain(False)
    assert rows(joining.folder)["label"].to_list() == [1, 0, 0]


async def test_a_ranking_from_the_future_waits_from_when_it_was_taken(streams, joining):
    joining.time.wall = T0
    streams.add(ranking(ts=T0 + 1e7), click(ts=T0 + 3))
    await joining.once()
    joining.time.forward(1861)
    await joining.once()
    assert rows(joining.folder)["label"].to_list() == [1, 0, 0]
    assert joining.counts["clock_jumped"] == 1


def test_a_second_joiner_of_a_log_refuses(server, tmp_path, repository):
    first = join_process(server.url, tmp_path / "log", repository)
    assert first.stderr
    assert b"joining into" in first.stderr.readline()
    second = join_process(server.url, tmp_path / "log", repository)
    _, err = second.communicate(timeout=90)
    assert (second.returncode, err.decode().splitlines()[-1]) == (
        2,
        f"Error: another joiner writes to {tmp_path / 'log'}; one log has one joiner, so stop that one first",
    )
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=90)
    assert first.returncode == 0, err
    assert out == b"nothing yet; holds no ranking and 0 events, and waits for rankings that the service logs\n"


def test_a_model_that_is_not_there_yet_is_waited_for(server, tmp_path):
    process = join_process(server.url, tmp_path / "log", tmp_path / "models", "--name", "m")
    assert process.stderr
    assert b"waiting for it" in process.stderr.readline()
    bundles.publish(tmp_path / "models", "m")
    assert b"joining into" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--redis", "memory://"], "a store in memory has no streams to join; name a Redis with --redis"),
        (["--redis", "redis://127.0.0.1:1/0", "--once"], "the store cannot be reached"),
        (["--name", "absent", "--once"], "has no live version of absent to take the log's schema from"),
        (["--models", "/nowhere", "--drain"], "nowhere has no live version of any model to take the log's schema from"),
        (["--window", "-1"], "Invalid value for '--window'"),
        (["--log", "/proc/no"], "/proc/no cannot be used as a log"),
    ],
)
def test_what_a_person_can_mend_is_a_sentence(server, tmp_path, repository, options, sentence):
    process = join_process(server.url, tmp_path / "log", repository, *([] if "--models" not in options else ["--name", ""]), *options)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2
    assert sentence in err.decode()
    assert b"Traceback" not in err


async def test_a_state_that_is_no_state_is_refused(joining):
    state = joining.folder / ".join" / "state.db"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"this is no database" * 100)
    with pytest.raises(RuntimeError, match=r"state\.db cannot be used: file is not a database"):
        await joining.once()


async def test_a_log_whose_state_was_lost_goes_on_with_new_numbers(streams, joining):
    streams.add(ranking())
    await joining.once()
    for file in (joining.folder / ".join").iterdir():
        file.unlink()
    streams.add(ranking("r2"))
    await joining.once()
    assert rows(joining.folder)["request_id"].to_list() == ["r1"] * 3 + ["r2"] * 3


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(["age", "price", "a1"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutated(packed: bytes):
    """A record with some of its parts replaced."""
    whole = msgpack.unpackb(packed)
    keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))

    def replaced(changes):
        for key, value in changes.items():
            whole[key] = value
        return msgpack.packb(whole)

    return st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2).map(replaced)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_entry_stops_the_joiner(server, repository, tmp_path_factory, data):
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
        assert set(rows(joining.folder).filter(request_id="r1", user_id="u1")["ad_id"]) >= {"a1", "a2", "a3"}
    assert streams.lengths() == (0, 0)
    kinds = ("click", "impression", "conversion", "user", "ad", "damaged", "rankings")
    assert sum(count for name, count in joining.counts.items() if name.split()[0] in kinds) == len(odd) + len(records)
