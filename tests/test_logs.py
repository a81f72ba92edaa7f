"""Lines of the log: whole, one for each record, and with nothing of users in them."""

import asyncio
import io
import json
import logging
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import datetime

import pytest
import redis
from conftest import Server, until
from joining import JOIN, Writer, click, ranking
from processes import ROOT, environment, fill, serving

from features.events import pack_event
from features.served import pack_served
from features.state import Ad, StoreError, UserState
from features.streams import EVENTS, SERVED
from service.settings import Settings
from service.store.redis import RedisStore, user_key
from service.telemetry import logs
from service.telemetry.logs import REQUEST, JsonLines, RateLimitFilter, RequestFilter, TextLines, where
from tests.test_api import check

pytestmark = pytest.mark.anyio
FORGED = "fine\n2026-11-22 10:00:00,000 ERROR 1 service: forged\r\x1b[2J\u2028\ud800{}"


@pytest.fixture
def lines():
    """A logger of its own, and the lines that it has written with a formatter."""

    def logger(formatter):
        out, made = io.StringIO(), logging.Logger("service.made")
        handler = logging.StreamHandler(out)
        handler.setFormatter(formatter)
        handler.addFilter(RequestFilter())
        made.addHandler(handler)
        return made, lambda: out.getvalue().removesuffix("\n").split("\n")

    return logger


@pytest.fixture
def request_at_hand():
    token = REQUEST.set({"request_id": "r1", "trace_id": "t1", "observed": None})
    yield
    REQUEST.reset(token)


def fail(message="MARK"):
    try:
        try:
            raise KeyError(message)
        except KeyError as error:
            raise ExceptionGroup("MARK", [ValueError(message), OSError(28, "No space left on device")]) from error
    except ExceptionGroup as error:
        return error


def test_a_json_line_says_when_where_and_for_which_request(lines, request_at_hand):
    logger, written = lines(JsonLines(None))
    logger.warning("%d of %s", 3, "x", extra={"route": "/rank", "status": 503, "color_message": "no"})
    (line,) = map(json.loads, written())
    at = line.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at)
    assert abs(datetime.fromisoformat(at).timestamp() - time.time()) < 60
    assert line.pop("process") > 0
    shared = {"level": "warning", "logger": "service.made", "message": "3 of x"}
    assert line == {**shared, "route": "/rank", "status": 503, "request_id": "r1", "trace_id": "t1"}


def test_outside_of_requests_there_is_no_request(lines):
    logger, written = lines(JsonLines(None))
    logger.info("x")
    assert set(json.loads(written()[0])) == {"time", "level", "logger", "process", "message"}


@pytest.mark.parametrize("formatter", [TextLines, JsonLines])
def test_nobody_forges_a_line(lines, formatter):
    logger, written = lines(formatter(False))
    logger.info("%s", FORGED)
    logger.error("x", exc_info=fail(FORGED), extra={"detail": FORGED})
    records = written() if formatter is JsonLines else [line for line in written() if not line.startswith("    ")]
    assert len(records) == 2
    for line in written():
        assert line.isprintable() or formatter is JsonLines
    for line in records:
        assert "forged" in line
        assert formatter is TextLines or json.loads(line)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO \d+ service\.made: fine\\n2026", written()[0]) or formatter is JsonLines


@pytest.mark.parametrize(
    ("private", "within", "says_all"), [(None, True, False), (None, False, True), (True, False, False), (False, True, True)]
)
@pytest.mark.parametrize("formatter", [TextLines, JsonLines])
def test_what_an_exception_says_stays_out_of_requests(lines, formatter, private, within, says_all):
    logger, written = lines(formatter(private))
    token = REQUEST.set({"request_id": "r1"} if within else None)
    logger.error("it failed", exc_info=fail())
    REQUEST.reset(token)
    text = "\n".join(written())
    assert ("MARK" in text) == says_all
    for word in ("KeyError", "ValueError", "ExceptionGroup", "test_logs.py", "No space left on device"):
        assert word in text
    if formatter is JsonLines:
        assert isinstance(json.loads(text)["exception"], str)


def test_an_exception_that_is_its_own_cause_ends():
    error = fail()
    error.__cause__.__context__ = error
    assert where(error).startswith("ExceptionGroup at ")
    record = logging.LogRecord("x", logging.ERROR, "", 1, "m", None, (type(error), error, error.__traceback__))
    assert json.loads(JsonLines(True).format(record))["exception"].count("KeyError") == 1


def test_few_records_pass_and_the_next_tells_of_the_others(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    logger, written = lines(JsonLines(None))
    logger.addFilter(RateLimitFilter(2, 10.0))
    for second in (100, 101, 102, 109, 110, 111, 125):
        now[0] = second
        logger.info("%d", second)
    passed = [(line["message"], line.get("left_out_before")) for line in map(json.loads, written())]
    assert passed == [("100", None), ("101", None), ("110", 2), ("111", None), ("125", None)]


@pytest.mark.parametrize(
    ("crash", "private"),
    [
        ("raise KeyError('MARK')", True),
        ("raise KeyError('MARK')", False),
        ("import threading; t = threading.Thread(target={}.pop, args=('MARK',)); t.start(); t.join()", True),
    ],
)
def test_what_ends_a_process_is_a_line_too_and_so_is_a_warning(crash, private):
    begin = "import warnings; from service import settings; from service.telemetry import logs"
    code = f"{begin}; logs.start(settings.load_settings(), {private}); warnings.warn('beware'); {crash}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(log_format="json"), capture_output=True, text=True, check=False
    )
    warned, ended = map(json.loads, done.stderr.splitlines())
    assert (warned["level"], warned["logger"]) == ("warning", "py.warnings")
    assert "beware" in warned["message"]
    assert (ended["level"], "KeyError" in ended["exception"], "MARK" in ended["exception"]) == ("critical", True, not private)


async def test_an_exception_nobody_foresaw_is_told_by_place_and_request(run, ads, monkeypatch):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines(None))

    async def rank(*_args):
        raise KeyError("MARKuser")

    async with run(ads) as client:
        monkeypatch.setattr(client.app.state.service.ranker, "rank", rank)
        logging.getLogger("service").addHandler(handler)
        try:
            for _ in range(40):
                answer = await client.post("/rank", json={"request_id": "mine", "user": {"id": "MARKuser"}, "candidates": ["a1"]})
                check(answer, 500, "unexpected")
                assert not {"Traceback", "KeyError", "MARKuser"} & set(re.findall(r"\w+", answer.text))
        finally:
            logging.getLogger("service").removeHandler(handler)
        assert await client.metric('adrank_requests_total{model="din",outcome="unexpected",route="/rank"}') == 40
    written = [json.loads(line) for line in out.getvalue().splitlines()]
    assert {name: written[0][name] for name in ("level", "request_id", "route", "status", "code")} == {
        "level": "error",
        "request_id": "mine",
        "route": "/rank",
        "status": 500,
        "code": "unexpected",
    }
    assert "KeyError" in written[0]["exception"]
    assert "MARK" not in out.getvalue()
    assert 10 <= len(written) < 40  # ten a second


async def test_a_store_that_is_full_is_told_so():
    server = Server("valkey", "--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    store = RedisStore(server.url, timeout=2, ttl=1000, on_damaged=lambda: None)
    try:
        with pytest.raises(StoreError, match="it is full: raise its maxmemory"):
            await store.put_ads([Ad(f"a{n}", {"title": "x" * 10_000}) for n in range(200)])
    finally:
        await store.close()
        server.stop()


async def test_a_store_that_lacks_a_command_quotes_no_record():
    server = Server("valkey", "--rename-command", "XADD", "")
    store = RedisStore(server.url, timeout=2, ttl=1000, on_damaged=lambda: None)
    try:
        with pytest.raises(StoreError, match="unknown command 'XADD'") as refused:
            await store.append_served([b"MARKuser"])
        assert "MARK" not in str(refused.value)
    finally:
        await store.close()
        server.stop()


def whole(text):
    """The lines of a log in JSON."""
    return [json.loads(line) for line in text.splitlines()]


async def odd_requests(client, now):
    """What callers may send, right and wrong, with marks in all that is about users; the answers' statuses."""
    good = {
        "request_id": "r-good",
        "user": {"id": "MARKuser", "features": {"age": "MARKage"}, "history": [{"ad_id": "MARKhistory"}]},
        "context": {"slot": "MARKslot"},
        "candidates": [{"ad_id": "MARKad", "features": {"genre": "MARKgenre"}}, {"ad_id": "a1"}],
    }
    event = {"type": "click", "event_id": "MARKevent", "ts": now, "user_id": "MARKuser", "ad_id": "MARKad"}
    written = {"type": "user", "event_id": "MARKtold", "ts": now, "user_id": "MARKuser", "features": {"age": "MARKage"}}
    sent = [
        ("/rank", json.dumps(good)),
        ("/rank", '{"user": {"id": "MARKuser"'),
        ("/rank", json.dumps({**good, "request_id": "MARK\nid"})),
        ("/rank", json.dumps({**good, "user": {"id": "MARKuser", "features": {"income": "MARKincome"}}})),
        ("/rank", json.dumps({**good, "user": {"id": "damaged"}})),
        ("/rank", json.dumps({**good, "user": {"id": "mistyped"}})),
        ("/rank", json.dumps({**good, "options": {"model": "MARKmodel", "deadline_ms": 50}})),
        ("/rank?MARKquery", json.dumps(good)),
        ("/MARKpath", json.dumps(good)),
        ("/v1/events", json.dumps({"events": [event, written, {**event, "type": "MARKtype"}, {**event, "ts": 1e12}, {"MARK": 1}]})),
        ("/v1/events", json.dumps({"events": [{**written, "event_id": "MARKmore", "user_id": "damaged"}]})),
        ("/v1/events", "MARK"),
    ]
    return [(await client.post(path, content=body, headers={"content-type": "application/json"})).status_code for path, body in sent]


async def test_no_line_at_the_default_level_tells_of_a_user(repository, server, monkeypatch):
    await fill(server.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    now, trace = round(time.time()), "4bf92f3577b34da6a3ce929d0e0e4736"
    async with serving(repository, server.url, workers=2, log_format="json", trace_share=1e-9, log_tensors_share=1) as client:
        with redis.Redis.from_url(server.url) as raw:
            raw.set(user_key("damaged"), b"\x93MARKdamaged")
        store = RedisStore(server.url, timeout=2, ttl=1000, on_damaged=lambda: None)
        await store.put_users([("mistyped", UserState({"income": "MARKincome"}, ["MARKhistory"], [1]))])
        await store.put_ads([Ad("ad-mistyped", {"price": "MARKprice"})])
        await store.close()
        statuses = await odd_requests(client, now)
        assert statuses[:4] == [200, 400, 422, 422]
        assert {200, 202, 404} < set(statuses)
        # until both workers have met the ad
        await until(lambda: len(set(re.findall(r'"process": (\d+), "message": "[^"]*ad-mistyped', client.log.read_text()))) >= 2)
        await asyncio.to_thread(server.stop)
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        written = {"type": "user", "event_id": "MARK", "ts": now, "user_id": "MARKuser", "features": {}}
        down = await client.post("/v1/events", json={"events": [written]}, headers=headers)
        assert down.status_code == 503
        assert (await client.post("/rank", json={"user": {"id": "MARKuser"}, "candidates": ["a1"]})).status_code == 200
        client.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(client.process.wait, 20)
        text = client.log.read_text()
        lines = whole(text)
        assert re.findall(r"[^\"]*MARK[^\"]*", text) == []
        assert {"time", "level", "logger", "process", "message"} <= set.intersection(*map(set, lines))
        (failed,) = [line for line in lines if line.get("status")]
        assert (failed["request_id"], failed["trace_id"], failed["level"]) == (down.json()["request_id"], trace, "warning")
        assert (failed["route"], failed["status"], failed["code"]) == ("/v1/events", 503, "store_down")
        assert {line["logger"] for line in lines if line.get("request_id") == "r-good"} <= {"service.store.damage"}  # of the damaged user
        assert {line["logger"] for line in lines} >= {
            "uvicorn.error",
            "service.serving.workers",
            "service.catalogue.catalogue",
            "service.models.watcher",
            "service.feedback.ingest",
        }
        assert len({line["process"] for line in lines}) == 3


def test_the_joiner_logs_alike(server, repository, tmp_path):
    streams = Writer(server.url)
    odd = ranking(
        "r2", user_id="MARKuser", user={"age": "MARKage", "income": "MARKincome"}, ad_ids=["MARKad", "a1"], history=["MARKhistory"]
    )
    streams.add(odd, (SERVED, b"MARKdamaged"), (SERVED, pack_served(odd)[:-3]), (EVENTS, b"\x91MARK"), (EVENTS, pack_event(click())[:-2]))
    streams.add(click("MARKrequest", "MARKad"), click("r2", "MARKad"), click("r2", "MARKother", ts=1.0))
    command = [*JOIN, "--redis", server.url, "--log", tmp_path / "log", "--models", repository, "--name", "din", "--drain"]
    done = subprocess.run(command, cwd=ROOT, env=environment(log_format="json"), capture_output=True, text=True, check=True)
    assert {line["logger"] for line in whole(done.stderr)} <= {"training.join.sink", "training.join.quality"}
    assert "damaged" in done.stdout
    assert "MARK" not in done.stderr + done.stdout
    assert list((tmp_path / "log").rglob("*.parquet"))


def test_the_level_is_a_setting():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (Settings().log_level, Settings().log_format, Settings().trace_share) == ("info", "text", 0)
    done = subprocess.run(
        [sys.executable, "-m", "adrank", "serve"], cwd=ROOT, env=environment(log_level="loud"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "setting ADRANK_LOG_LEVEL: " in done.stderr
