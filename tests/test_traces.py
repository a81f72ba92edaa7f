"""Traces, of real servers, as a real collector gets them: what is in them, what is not, and what they do to nobody."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from collector import collecting
from conftest import free_port, until
from processes import environment, fill, serving, workers_of

from service.settings import SettingsError
from service.telemetry.metrics import RequestTimings
from service.telemetry.tracing import FLUSH_SECONDS, Tracer, caller, open_tracer

pytestmark = pytest.mark.anyio
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE[:-1]}7-{SPAN}-00"
MALFORMED = [
    "",
    "nonsense",
    f"00-{TRACE}-{SPAN}",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01" + " " * 1_000,
    f"00-{TRACE}-{SPAN}-0\xff",
]
MARKS = ("MARKuser", "MARKad", "MARKfeature", "MARKhistory", "MARKcontext", "MARKevent")


@pytest.fixture
async def filled(server):
    await fill(server.url)
    return server


@pytest.fixture
def otel(monkeypatch):
    """Set the variables of OpenTelemetry; none but these are there."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)

    def given(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"OTEL_{name}", value)

    return given


def body(user_id="MARKuser"):
    return {
        "request_id": "r-1",
        "user": {"id": user_id, "features": {"age": "MARKfeature"}, "history": [{"ad_id": "MARKhistory"}]},
        "context": {"slot": "MARKcontext"},
        "candidates": ["a1", "a2", "MARKad"],
    }


async def test_a_request_is_a_span_with_its_stages_below_it_and_nothing_of_its_user(repository, filled, otel):
    with collecting() as collector:
        otel(EXPORTER_OTLP_ENDPOINT=collector.url, BSP_SCHEDULE_DELAY="100", SERVICE_NAME="ads", RESOURCE_ATTRIBUTES="deployment=test")
        async with serving(repository, filled.url, trace_share=1) as client:
            began = time.time_ns()
            answer = await client.post("/rank", json=body(), headers={"traceparent": SAMPLED, "tracestate": "MARKuser=1"})
            assert answer.status_code == 200
            click = {"type": "click", "event_id": "MARKevent", "ts": round(time.time()), "user_id": "MARKuser", "ad_id": "MARKad"}
            taken = await client.post("/v1/events", json={"events": [click]})
            wrong = await client.post("/v1/rank", json={**body(), "options": {"model": "MARKmodel"}})
            left = await client.post("/rank", json=body(), headers={"traceparent": UNSAMPLED})
            filled.stop()
            degraded = await client.post("/rank", json=body())
            down = await client.post("/v1/events", json={"events": [click]})
            assert (await client.get("/readyz", headers={"traceparent": SAMPLED})).status_code == 200
            collector.wait(5)
    ended = time.time_ns()
    assert collector.paths == {"/v1/traces"}
    assert len(collector.servers()) == 5
    assert UNSAMPLED[3:35] not in {span.trace_id for span in collector.spans}
    assert "traceresponse" not in left.headers

    request, below = collector.trace(TRACE)
    assert (request.name, request.parent_id, request.status) == ("POST /rank", SPAN, 0)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{request.span_id}-01"
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/rank",
        "url.path": "/rank",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "adrank.request_id": "r-1",
        "adrank.outcome": "ok",
        "adrank.model.name": "din",
        "adrank.model.version": answer.json()["model"]["version"],
        "adrank.candidates": 3,
        "adrank.history_length": 1,
    }
    assert (request.resource["service.name"], request.resource["deployment"]) == ("ads", "test")
    assert set(below) == {"features", "queue", "inference"}
    assert {span.parent_id for span in below.values()} == {request.span_id}
    assert began <= request.start <= below["features"].start <= below["features"].end <= below["queue"].start
    assert below["queue"].end <= below["inference"].start <= below["inference"].end <= request.end <= ended
    spent = answer.json()["timings_ms"]
    assert (below["inference"].end - below["inference"].start) / 1e6 == pytest.approx(spent["inference"], abs=0.01)
    assert (below["features"].end - below["features"].start) / 1e6 == pytest.approx(spent["features"], abs=0.01)

    def root_span(response):
        return collector.trace(response.headers["traceresponse"].split("-")[1])[0]

    assert (root_span(taken).name, root_span(taken).attributes["http.response.status_code"], root_span(taken).parent_id) == (
        "POST /v1/events",
        202,
        "",
    )
    assert (root_span(wrong).name, root_span(wrong).status) == ("POST /v1/rank", 0)
    assert (root_span(wrong).attributes["http.response.status_code"], root_span(wrong).attributes["adrank.outcome"]) == (
        404,
        "unknown_model",
    )
    assert root_span(degraded).attributes["adrank.degraded"] == ["user: store_unreachable"]
    assert (root_span(down).status, root_span(down).attributes["error.type"]) == (2, "store_down")
    payload = b"".join(collector.bodies)
    assert [mark for mark in (*MARKS, "MARK") if mark.encode() in payload] == []


async def test_each_worker_sends_its_own_and_what_waits_goes_out_at_the_end(repository, filled, otel):
    with collecting() as collector:
        otel(EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.url}/mine", BSP_SCHEDULE_DELAY="3600000", EXPORTER_OTLP_COMPRESSION="gzip")
        async with serving(repository, filled.url, trace_share=1, workers=2) as client:
            await until(lambda: client.log.read_text().count("Application startup complete") >= 2)
            for _ in range(8):  # a new connection each
                async with type(client)(base_url=client.base_url) as once:
                    await once.rank()
            workers = set(workers_of(client))
            assert collector.spans == []
            client.process.send_signal(signal.SIGTERM)
            client.process.wait(20)
        assert len(collector.servers()) == 8
    assert {span.resource["process.pid"] for span in collector.servers()} == workers
    assert len({span.resource["service.instance.id"] for span in collector.servers()}) == 2
    assert {span.resource["service.name"] for span in collector.servers()} == {"adrank"}
    assert collector.paths == {"/mine"}


async def test_a_collector_that_is_away_delays_nobody_and_fills_no_log_and_the_end_still_comes(otel, caplog):
    with socket.socket() as deaf, collecting(status=400) as refusing:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1)
        for url in (f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{deaf.getsockname()[1]}", refusing.url):
            otel(EXPORTER_OTLP_ENDPOINT=url, BSP_SCHEDULE_DELAY="1", BSP_MAX_QUEUE_SIZE="8", BSP_MAX_EXPORT_BATCH_SIZE="8")
            tracer, spent = open_tracer(1.0), 0.0
            for _ in range(100):
                began, stages = time.thread_time(), RequestTimings("/rank")
                tracer.end(tracer.begin((), stages), stages, {"state": {"request_id": "r"}, "scheme": "http"}, 200)
                spent += time.thread_time() - began
                await asyncio.sleep(0.002)
            assert spent < 0.5  # nobody sends while others wait
            async with asyncio.timeout(FLUSH_SECONDS + 5):
                await tracer.close()
    assert len(refusing.bodies) > 5
    assert 1 <= len(caplog.records) <= 6, caplog.text


def test_a_share_without_the_extra_is_refused_in_one_sentence():
    missing = "import sys; sys.modules['opentelemetry.sdk'] = None; import adrank; adrank.main(['serve'])"
    done = subprocess.run(
        [sys.executable, "-c", missing], env=environment(trace_share=0.1, port=free_port()), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: setting ADRANK_TRACE_SHARE: 0.1 needs OpenTelemetry, ")
    assert "pip install 'adrank[otel]'" in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; traces are sent as http/protobuf only"),
        ({"BSP_MAX_QUEUE_SIZE": "-1"}, "the variables OTEL_* cannot be used: max_queue_size"),
    ],
)
def test_variables_that_cannot_be_used_are_refused(otel, variables, said):
    otel(**variables)
    with pytest.raises(SettingsError, match=re.escape(said)):
        open_tracer(0.1)


@pytest.fixture
def tracer(otel):
    otel(BSP_SCHEDULE_DELAY="3600000")

    def of(share: float) -> Tracer:
        found = open_tracer(share)
        assert found
        made.append(found)
        return found

    made: list[Tracer] = []
    yield of
    for each in made:
        each.finish()


def test_the_variable_that_disables_it_does(otel):
    otel(SDK_DISABLED="true")
    assert open_tracer(1) is None


def header(value):
    return [(b"host", b"x"), (b"traceparent", value.encode("latin-1"))]


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_header_is_as_none(tracer, value):
    assert caller(header(value)) is None
    assert tracer(1.0).begin(header(value), RequestTimings("/rank")).parent is None


def test_two_headers_are_as_none():
    assert caller([*header(SAMPLED), *header(SAMPLED)]) is None


@pytest.mark.parametrize(
    ("value", "share", "recorded"),
    [(SAMPLED, 1e-9, True), (f"01-{TRACE}-{SPAN}-01-more", 1e-9, True), (f"00-{TRACE}-{SPAN}-03", 1e-9, True), (UNSAMPLED, 1.0, False)],
)
def test_a_caller_is_followed_whatever_the_share(tracer, value, share, recorded):
    stages = RequestTimings("/rank")
    trace = tracer(share).begin(header(value), stages)
    assert (trace.id, trace.recorded, stages.stretches) == (value[3:35], recorded, [] if recorded else None)
    assert not recorded or f"{trace.parent.span_id:016x}" == SPAN


def test_of_the_others_the_share_is_traced(tracer):
    drawn = [tracer(0.1).begin((), RequestTimings("/rank")) for _ in range(50)]
    assert len({trace.id for trace in drawn if trace}) == sum(trace is not None for trace in drawn)
    one = tracer(0.1)
    traced = sum(one.begin((), RequestTimings("/rank")) is not None for _ in range(20_000))
    assert 1_700 < traced < 2_300  # seven deviations
    assert tracer(1.0).begin((), RequestTimings("/rank")) is not None
