"""The load generator against servers that answer, stall, close, refuse and mislead; and `adrank bench` from the outside."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Server, free_port
from rich.console import Console

from adrank_bench import bench
from adrank_bench.load import LoadError, Target, ask, measure
from adrank_bench.measured import LoadPlan, Measured, percentile
from adrank_bench.traffic import Entities, bodies, draw
from features.state import Ad, StoreError, UserState
from service.settings import load_settings
from service.store.redis import RedisStore
from tests.test_cli import refused, run
from tests.test_datasets import ROOT

OK = b'{"ads":[],"omitted":[],"degraded":[],"timings_ms":{"total":1.0}}'
Answer = Callable[[int], bytes]


def http(status: str = "200 OK", body: bytes = OK, head: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ndate: now\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Tiny(asyncio.Protocol):
    """Answers request n, counted over all connections, with `answer(n)`; closes where that is empty. May stall all at once."""

    def __init__(self, server: "Tinies", answer: Answer, stall: Callable[[], None]) -> None:
        self.server, self.seen, self.answer, self.stall, self.data = server, server.seen, answer, stall, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.server.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
            return
        self.seen.append(self.data)
        self.data = b""
        self.stall()
        answer = self.answer(len(self.seen) - 1)
        self.transport.write(answer)
        if not answer or b"connection: close" in answer.lower():
            self.transport.close()


class Tinies:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.target, self.seen, self.transports = Target("127.0.0.1", port), list[bytes](), list[Any]()


@contextmanager
def answering(answer: Answer = lambda _: http(), stall: Callable[[], None] = lambda: None) -> Iterator[Tinies]:
    """A server in a thread of its own."""
    loop, server = asyncio.new_event_loop(), Tinies(free_port())
    made = loop.run_until_complete(loop.create_server(lambda: Tiny(server, answer, stall), "127.0.0.1", server.target.port, backlog=1_000))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(asyncio.sleep(0.01))  # what was accepted last gets its transport
        made.close()
        for transport in server.transports:
            transport.abort()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def asked(server: Tinies, plan: LoadPlan, tick: Callable[[float], None] = lambda _: None) -> Measured:
    return measure(server.target, [server.target.request(b'{"n":%d}' % n) for n in range(7)], plan, tick)


def test_requests_are_sent_in_turn_and_counted() -> None:
    with answering() as server:
        measured = asked(server, LoadPlan(None, 0.3, 0.1, 1))
    assert measured.statuses == {"200": len(measured.latencies)}
    assert 0 < len(measured.latencies) < len(server.seen)  # those of the warm-up do not count
    assert measured.requests_per_second == pytest.approx(len(measured.latencies) / 0.3)
    assert (measured.errors, measured.degraded, measured.interrupted) == (0, 0, False)
    assert measured.cpu > 0
    assert measured.answered == len(server.seen)  # the last one is waited for
    first = server.seen[0]
    assert (
        first
        == (
            f"POST /rank HTTP/1.1\r\nHost: 127.0.0.1:{server.target.port}\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n"
        ).encode()
        + b'{"n":0}'
    )
    assert [text[-2:-1] for text in server.seen[:9]] == [b"%d" % (n % 7) for n in range(9)]


def test_an_open_loop_sends_at_its_rate_and_then_waits_for_the_answers() -> None:
    with answering() as server:
        measured = asked(server, LoadPlan(400, 0.5, 0.25, 2))
    assert len(server.seen) == 300
    assert measured.statuses == {"200": 200}
    assert len(measured.delays) == 200
    assert measured.delays.min() >= 0
    assert measured.requests_per_second == 400


class Stall:
    """Sleeps once every `each` seconds, whoever asks then."""

    def __init__(self, seconds: float, each: float) -> None:
        self.seconds, self.each, self.next = seconds, each, time.monotonic() + each / 2

    def __call__(self) -> None:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.each
            time.sleep(self.seconds)


def test_an_open_loop_shows_a_stall_that_a_closed_loop_hides() -> None:
    with answering(stall=Stall(0.2, 1.0)) as server:
        closed = asked(server, LoadPlan(None, 2, 0, 8))
        opened = asked(server, LoadPlan(300, 2, 0, 8))
    # 8 requests of each stall are late in a closed loop, since no more are sent; in the open one a tenth of all.
    assert 0 < np.count_nonzero(closed.latencies > 0.15) <= 8 * 4
    assert percentile(closed.latencies, 90) < 0.1
    assert np.count_nonzero(opened.latencies > 0.1) > 0.05 * len(opened.latencies)
    assert percentile(opened.latencies, 99) > 0.15
    assert len(opened.latencies) == 600
    # Due while the server slept, they waited in turn: their latencies fall evenly from 200 ms.
    waited = np.sort(opened.latencies)[::-1][:40] - (opened.latencies.max() - 0.2)
    assert np.abs(np.diff(waited)).max() < 0.1


def test_a_request_that_waits_for_a_connection_counts_from_when_it_was_due() -> None:
    with answering(stall=lambda: time.sleep(0.05)) as server:  # 20 a second, while 60 are asked for, on one connection
        measured = asked(server, LoadPlan(60, 0.5, 0, 1))
    assert len(measured.latencies) == len(server.seen) == 30
    growth = np.diff(measured.latencies)
    assert growth.min() > 0  # each waits longer than the one before, by 50 - 17 ms and more
    assert measured.latencies[-1] > 29 * (0.05 - 1 / 60)
    assert percentile(measured.delays, 50) == 0  # it is the service's doing, not the generator's


def test_a_generator_that_is_late_says_so() -> None:
    with answering() as server:
        measured = asked(server, LoadPlan(500, 2.2, 0, 2), tick=lambda _: time.sleep(0.3))
    assert measured.late
    assert percentile(measured.delays, 99.9) > 0.08
    assert percentile(measured.latencies, 99.9) > 0.08
    load = bench.Load(target=server.target, candidates=1)
    assert "the generator was late itself" in shown(load, [measured])


def measured_as(**changed: Any) -> Measured:
    plan = LoadPlan(100, 1, 0, 1)
    whole: dict[str, Any] = {
        "latencies": np.array([0.01] * 100),
        "statuses": Counter({"200": 100}),
        "degraded": 0,
        "broken": 0,
        "unanswered": 0,
        "answered": 100,
        "window": 1.0,
        "delays": np.array([0.0001] * 100),
        "cpu": 0.0,
        "interrupted": False,
    }
    return Measured(plan, **{**whole, **changed})


@pytest.mark.parametrize(("delay", "latency", "late"), [(0.0001, 0.0002, False), (0.002, 0.01, True), (0.002, 0.1, False)])
def test_what_counts_as_late(delay: float, latency: float, late: bool) -> None:
    assert measured_as(delays=np.array([delay] * 100), latencies=np.array([latency] * 100)).late is late


@pytest.mark.parametrize(("p", "value"), [(50, 50), (90, 90), (99, 99), (99.9, 100), (0.5, 1), (100, 100)])
def test_percentiles_are_values_that_were_seen(p: float, value: int) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    assert percentile(values, p) == value


def test_the_percentile_of_nothing_is_0() -> None:
    empty = measured_as(latencies=np.array([]), statuses=Counter(), window=0.0, delays=np.array([]))
    assert (empty.as_dict()["p99_ms"], empty.as_dict()["max_ms"], empty.requests_per_second, empty.late) == (0, 0, 0, False)


def test_statuses_and_degraded_answers_are_counted() -> None:
    degraded = http(body=OK.replace(b'[],"tim', b'[{"stage":"history","reason":"store_timeout","fallback":"x"}],"tim'))
    answers = [http(), degraded, http("503 Service Unavailable", b"{}"), http("429 Too Many Requests", b"")]
    with answering(lambda n: answers[n % 4]) as server:
        measured = asked(server, LoadPlan(400, 0.5, 0, 1))
    assert measured.statuses == {"200": 100, "503": 50, "429": 50}
    assert (measured.degraded, measured.errors, len(measured.latencies)) == (50, 100, 100)
    text = shown(bench.Load(target=server.target, candidates=1), [measured])
    assert "not ranked: 50 x 429, 50 x 503" in text


def test_an_answer_in_many_pieces_is_one_answer() -> None:
    big = http(body=b'{"ads":[' + b" " * 400_000 + b'],"degraded":[]}')
    with answering(lambda _: big) as server:
        for seconds in (0.5, 5.0, 30.0):  # as long as it takes on a machine that is busy with other work
            measured = measure(server.target, [server.target.request(b" " * 5_000_000)], LoadPlan(None, seconds, 0, 2))
            if measured.statuses["200"] > 3:
                break
        assert ask(server.target, server.target.request(b"{}")) == (200, big.partition(b"\r\n\r\n")[2])
    assert measured.statuses["200"] > 3
    assert {len(text) for text in server.seen[:3]} == {len(server.target.request(b" " * 5_000_000))}
    assert measured.errors == 0


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_that_closes_connections_is_asked_on_new_ones(says_so: bool) -> None:
    def answer(n: int) -> bytes:
        return (http(head="Connection: close\r\n") if says_so else b"") if n % 10 == 9 else http()

    with answering(answer) as server:
        measured = asked(server, LoadPlan(400, 0.5, 0, 4))
    assert (measured.statuses["200"], measured.broken) == ((200, 0) if says_so else (180, 20))
    assert measured.errors == measured.broken
    assert len(server.seen) == 200


def test_requests_that_are_never_answered_count_with_the_time_they_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adrank_bench.load.DRAIN_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        target = Target(*silent.getsockname()[:2])
        measured = measure(target, [target.request(b"{}")], LoadPlan(100, 0.5, 0, 3))
    assert (measured.unanswered, measured.errors, measured.statuses) == (50, 50, {})
    assert len(measured.latencies) == 50
    assert measured.latencies.min() >= 0.3
    assert measured.latencies.max() >= 0.8


def test_a_service_that_goes_away_is_a_sentence() -> None:
    with answering(lambda _: b"") as server:
        target, request = server.target, server.target.request(b"{}")
        with pytest.raises(LoadError, match="closed the connection without an answer"):
            ask(target, request)
    for call in (lambda: ask(target, request), lambda: measure(target, [request], LoadPlan(None, 1, 0, 1))):
        with pytest.raises(LoadError, match=rf"^no service can be reached at 127\.0\.0\.1 port {target.port}: Connection refused"):
            call()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"+PONG\r\n\r\n"])
def test_a_service_that_is_none_is_a_sentence(answer: bytes) -> None:
    with answering(lambda _: answer) as server, pytest.raises(LoadError, match="does not answer as adrank does"):
        asked(server, LoadPlan(None, 1, 0, 1))


def test_an_interruption_leaves_what_was_measured() -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with answering() as server:
        measured = asked(server, LoadPlan(200, 60, 0.5, 2), stop)
        loops = bench.loops(bench.Load(target=server.target, candidates=3, rate=9.0, seconds=60), [b""], Quiet(stop))
    assert measured.interrupted
    assert 0.5 <= measured.window < 30
    assert measured.requests_per_second > 0
    assert [m.interrupted for m in loops] == [True]


class Quiet:
    """A progress bar whose update is what is given."""

    def __init__(self, update: Callable[[float], None]) -> None:
        self._update = update

    def add_task(self, _what: str, total: float) -> int:
        return 0

    def update(self, _task: int, completed: float, refresh: bool) -> None:
        self._update(completed)


def shown(load: bench.Load, measured: list[Measured]) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    bench.show(load, measured, console)
    console.file.close()
    return console.export_text()


def test_half_is_half_of_what_the_closed_loop_reached() -> None:
    with answering(stall=lambda: time.sleep(0.002)) as server:
        requests = [server.target.request(b"{}")]
        load = bench.Load(target=server.target, candidates=3, rate="half", seconds=0.5, warm_up=0, connections=2)
        closed, opened = bench.loops(load, requests, Quiet(lambda _: None))
        (alone,) = bench.loops(
            bench.Load(target=server.target, candidates=3, rate=50.0, seconds=0.2, warm_up=0), requests, Quiet(lambda _: None)
        )
    assert (closed.plan.rate, alone.plan.rate) == (None, 50)
    assert opened.plan.rate == closed.requests_per_second / 2
    document = bench.as_dict(load, [closed, opened])
    assert [loop["loop"] for loop in document["loops"]] == ["closed", "open"]
    assert document["loops"][0]["candidates_per_s"] == round(closed.requests_per_second * 3)
    assert json.loads(json.dumps(document)) == document


FORMS = [("ids", ["a", "b"]), ("columns", {"ad_id": ["a", "b"]}), ("rows", [{"ad_id": "a"}, {"ad_id": "b"}])]


@pytest.mark.parametrize(("form", "candidates"), FORMS)
def test_bodies_are_different_random_requests_in_each_form(form: str, candidates: object) -> None:
    entities = Entities(["u1"], ["a", "b"])
    made = [json.loads(body) for body in bodies(entities, 2, form)[:30]]
    swapped = json.loads(json.dumps(candidates).replace('"a"', '"x"').replace('"b"', '"a"').replace('"x"', '"b"'))
    assert all(one["user"] == {"id": "u1"} and one["candidates"] in (candidates, swapped) for one in made)
    many = Entities([f"u{i}" for i in range(50)], [f"a{i}" for i in range(100)])
    drawn = [json.loads(body) for body in bodies(many, 20)]
    assert all(len(set(one["candidates"])) == 20 for one in drawn)
    assert len({one["user"]["id"] for one in drawn}) == 50
    assert len({ad for one in drawn for ad in one["candidates"]}) == 100
    assert bodies(many, 20, seed=1) == bodies(many, 20, seed=1) != bodies(many, 20, seed=2)


async def filled(url: str, users: int = 5, ads: int = 40) -> None:
    store = RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None)
    await store.put_users((f"u{{{i}}}", UserState()) for i in range(users))
    await store.put_ads(Ad(f"a{i}", {}, active=i != 3) for i in range(ads))
    await store.close()


def test_users_and_active_ads_are_drawn_from_the_store(server: Server) -> None:
    asyncio.run(filled(server.url))
    entities = draw(load_settings({"redis": server.url}), 39)
    assert sorted(entities.user_ids) == [f"u{{{i}}}" for i in range(5)]
    assert sorted(entities.ad_ids) == sorted(f"a{i}" for i in range(40) if i != 3)
    with pytest.raises(LoadError, match=r"has 39 ads, fewer than 1,000 candidates$"):
        draw(load_settings({"redis": server.url}), 1_000)


def test_an_empty_store_and_one_that_is_down_are_sentences(server: Server) -> None:
    settings = load_settings({"redis": server.url.replace("//", "//:secret@")}), load_settings({"redis": server.url})
    with pytest.raises(LoadError, match=rf"^the store {server.url} has no users: fill it with adrank load"):
        draw(settings[1], 1)
    asyncio.run(filled(server.url, users=1, ads=0))
    with pytest.raises(LoadError, match="has no ads"):
        draw(settings[1], 1)
    server.stop()
    with pytest.raises(StoreError, match=rf"^the store {server.url} cannot be read") as caught:
        draw(settings[0], 1)
    assert "secret" not in str(caught.value)
    with pytest.raises(LoadError, match="memory:// is none"):
        draw(load_settings({"redis": "memory://"}), 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rate", "fast"], "--rate fast: expected requests a second"),
        (["--rate", "-1"], "--rate -1: expected requests a second"),
        (["--rate", "nan"], "--rate nan: expected"),
        (["--url", "ftp://x"], "'ftp://x' is not the address of a service"),
        (["--url", "http://h:99999"], "is not the address of a service"),
        (["--candidates", "0"], "--candidates"),
        (["--redis", "redis:/x"], "setting ADRANK_REDIS"),
        (["--redis", "redis://127.0.0.1:1/0"], "the store redis://127.0.0.1:1/0 cannot be read: .*Connect"),
    ],
)
def test_bad_words_are_one_sentence(words: list[str], sentence: str) -> None:
    refused(run("bench", *words), sentence)


@pytest.fixture
def store(server: Server) -> Server:
    asyncio.run(filled(server.url))
    return server


def test_the_command_measures_and_says_what_it_saw(store: Server, tmp_path: Path) -> None:
    quick = ["--redis", store.url, "--candidates", 3, "--seconds", 0.3, "--warm-up", 0, "--connections", 2]
    with answering() as server:
        url = f"http://127.0.0.1:{server.target.port}"
        code, out, _ = run("bench", "--url", url, "--rate", "half", "--json", tmp_path / "new" / "b.json", *quick)
        assert code == 0
        assert "3 candidates, 2 connections" in out
        document = json.loads((tmp_path / "new" / "b.json").read_text())
        assert [loop["loop"] for loop in document["loops"]] == ["closed", "open"]
        code, out, _ = run("bench", "--url", url, "--rate", 100, "--json", "-", *quick)
        assert (code, json.loads(out)["loops"][0]["answers"]) == (0, 30)
        refused(run("bench", "--url", url, "--rate", 100, "--json", tmp_path, *quick), "cannot write .*: Is a directory")
        assert json.loads(server.seen[0].partition(b"\r\n\r\n")[2])["user"]["id"].startswith("u{")
    refused(
        run("bench", "--url", url, *quick),
        r"no service can be reached at 127\.0\.0\.1 port .*: Connection refused; start it, or name another$",
    )
    problem = json.dumps({"detail": "3 candidates; at most 2 are ranked in one request"}).encode()
    for body, said in ((problem, "3 candidates; at most 2 are ranked in one request"), (b"<html>", "<html>")):
        with answering(lambda _, body=body: http("422 Unprocessable", body)) as server:
            refused(run("bench", "--url", f"http://127.0.0.1:{server.target.port}", *quick), f"answers with status 422: {said}$")


def test_ctrl_c_prints_what_was_measured_until_then(store: Server) -> None:
    with answering() as server:
        words = ["bench", "--url", f"http://127.0.0.1:{server.target.port}", "--redis", store.url, "--candidates", 3, "--seconds", 600]
        command = [sys.executable, "-m", "adrank", *map(str, words), "--rate", "half", "--json", "-", "--warm-up", "0"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while len(server.seen) < 100 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, complaint = process.communicate(timeout=90)
    assert process.returncode == 130, complaint
    assert "Traceback" not in complaint
    (loop,) = json.loads(out)["loops"]
    assert loop["interrupted"] is True
    assert loop["answers"] > 0
