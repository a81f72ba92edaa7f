"""Traces of requests, by OpenTelemetry: the only module that knows it. It is an extra: where nothing is traced, this is not loaded.

A request that is traced pays for two random numbers before its answer. Its spans are made after the answer has gone out, from the times
that its stages took anyway, and are sent by a thread of the SDK's; what the bounded queue has no room for is dropped. They hold sizes
and names of ours: no user, no ad, no feature.
"""

import asyncio
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..settings import SettingsError
from .logs import RateLimitFilter
from .metrics import RequestTimings

CHILDREN = ("features", "queue", "inference")
"""The stages that become spans. Each span costs a request in a hundred more than its stage tells: parsing and sorting are short."""
SHORT_SECONDS = 20e-6
"""A stage's later stretches that are shorter are left out, and so are those beyond `MOST_SPANS`: a request of many slices has many."""
MOST_SPANS = 32
BATCH_SIZE, BATCH_SPANS = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 256
"""Spans that are sent together by default: each sending costs 2 ms."""
SWITCH_SECONDS = 0.001
"""How long a request waits at most for the thread that encodes spans, which takes 20 µs each; Python's own bound is five times that."""
HEADER_BYTES = 128
FLUSH_SECONDS = 2.0
TELL_SECONDS = 60.0
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
LOW_BITS = 2**64 - 1
SCOPE = InstrumentationScope("adrank")
NOISY = (trace_exporter.__name__, "opentelemetry.sdk._shared_internal")
"""Loggers that tell of each batch that could not be sent, and of each span that was dropped."""

log = logging.getLogger(__name__)
_few = RateLimitFilter(2, TELL_SECONDS)
_propagator = TraceContextTextMapPropagator()


class Trace(NamedTuple):
    """The trace that a request belongs to, the span that called it, and whether it is recorded."""

    context: SpanContext
    parent: SpanContext | None

    @property
    def id(self) -> str:
        """As in headers and logs."""
        return otel.format_trace_id(self.context.trace_id)

    @property
    def recorded(self) -> bool:
        """Whether spans are made."""
        return self.context.trace_flags.sampled

    @property
    def response(self) -> bytes:
        """The value of the header `traceresponse`."""
        return f"00-{self.id}-{otel.format_span_id(self.context.span_id)}-01".encode()


class Answered(NamedTuple):
    """What is told of a request besides its stages."""

    request_id: str
    scheme: str
    status: int | None


class Tracer:
    """Decides which requests are traced, and makes their spans."""

    def __init__(self, share: float, processor: BatchSpanProcessor, resource: Resource) -> None:
        """`share` of the requests that come without a trace of their own."""
        self._bound, self._processor, self._resource = round(share * 2**64), processor, resource

    def begin(self, headers: Iterable[tuple[bytes, bytes]], stages: RequestTimings) -> Trace | None:
        """The trace of a request that begins, if it is in one. Whoever sent it has decided whether it is recorded, else its id does."""
        parent = caller(headers)
        if parent is not None and not parent.trace_flags.sampled:
            return Trace(parent, None)
        trace_id = parent.trace_id if parent else random.getrandbits(128) or 1
        if parent is None and trace_id & LOW_BITS >= self._bound:
            return None
        stages.stretches = []
        return Trace(_context(trace_id), parent)

    def end(self, trace: Trace, stages: RequestTimings, scope: Mapping[str, Any], status: int | None) -> None:
        """The request is over: make its spans in the loop's next turn but one, when the answer has been written to its socket.

        `scope` is ASGI's; `status` is None where the request was cut off before an answer began.
        """
        loop = asyncio.get_running_loop()
        answered = Answered(scope["state"]["request_id"], scope["scheme"], status)
        loop.call_soon(loop.call_soon, self._make, trace, stages, answered)

    def _make(self, trace: Trace, stages: RequestTimings, answered: Answered) -> None:
        clock = time.time_ns() - round(time.perf_counter() * 1e9)
        for stage, began, until in _spans(stages.stretches or ()):
            context = _context(trace.context.trace_id)
            self._span(stage, context, trace.context, clock, (began, until))
        failed = answered.status is None or answered.status >= 500 or stages.outcome == "cut_off"
        span = ReadableSpan(
            f"POST {stages.route}",
            trace.context,
            trace.parent,
            self._resource,
            _attributes(stages, answered, failed),
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
            start_time=clock + round(stages.began * 1e9),
            end_time=clock + round(stages.ended * 1e9),
            instrumentation_scope=SCOPE,
        )
        self._processor.on_end(span)

    def _span(self, name: str, context: SpanContext, parent: SpanContext, clock: int, times: tuple[float, float]) -> None:
        # Made by hand, which the SDK would rather do itself: its own way takes three times as long, and an id before the answer.
        start, end = (clock + round(seconds * 1e9) for seconds in times)
        span = ReadableSpan(name, context, parent, self._resource, start_time=start, end_time=end, instrumentation_scope=SCOPE)
        self._processor.on_end(span)

    def finish(self) -> None:
        """Send what waits, however long that takes, and no more."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Send what waits, for `FLUSH_SECONDS` at most."""
        # A thread that nobody waits for at the process's end: the SDK's own bound is 30 s, and a collector may be deaf.
        ending = threading.Thread(target=self.finish, name="traces", daemon=True)
        ending.start()
        until = time.monotonic() + FLUSH_SECONDS
        while ending.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if ending.is_alive():
            log.warning("the last traces could not be sent within %g s and are given up", FLUSH_SECONDS)


def caller(headers: Iterable[tuple[bytes, bytes]]) -> SpanContext | None:
    """The span that a request says it comes from; None where it says nothing, or nothing that W3C Trace Context allows."""
    found = [value for name, value in headers if name == b"traceparent"]
    if len(found) != 1 or len(found[0]) > HEADER_BYTES:
        return None
    context = otel.get_current_span(_propagator.extract({"traceparent": found[0].decode("latin-1")})).get_span_context()
    return context if context.is_valid else None


def open_tracer(share: float) -> Tracer | None:
    """What traces the requests of this process, as the variables `OTEL_*` say; None where they disable it.

    Raises:
        SettingsError: they ask for what there is not.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise SettingsError(f"{PROTOCOLS[1]} is {protocol!r}; traces are sent as http/protobuf only, to port 4318 as a rule")
    for name in NOISY:
        logging.getLogger(name).addFilter(_few)
    try:
        together = None if os.environ.get(BATCH_SIZE) else BATCH_SPANS
        processor = BatchSpanProcessor(trace_exporter.OTLPSpanExporter(), max_export_batch_size=together)
    except (ValueError, OSError) as error:
        raise SettingsError(f"the variables OTEL_* cannot be used: {error}") from error
    sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
    own = Resource.create({"service.name": "adrank", "process.pid": os.getpid()})
    return Tracer(share, processor, own.merge(OTELResourceDetector().detect()))


def check() -> None:
    """Find out whether requests can be traced, before any process starts.

    Raises:
        SettingsError: as `open_tracer`.
    """
    if tracer := open_tracer(1.0):
        tracer.finish()


def _context(trace_id: int) -> SpanContext:
    return SpanContext(trace_id, random.getrandbits(64) or 1, is_remote=False, trace_flags=SAMPLED)


def _spans(stretches: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    spans, before = list[tuple[str, float, float]](), set[str]()
    for stretch in stretches:
        stage, began, until = stretch
        if stage in CHILDREN and len(spans) < MOST_SPANS and (until - began >= SHORT_SECONDS or stage not in before):
            before.add(stage)
            spans.append(stretch)
    return spans


def _attributes(stages: RequestTimings, answered: Answered, failed: bool) -> dict[str, str | int | list[str]]:
    attributes: dict[str, str | int | list[str]] = {
        "http.request.method": "POST",
        "http.route": stages.route,
        "url.path": stages.route,
        "url.scheme": answered.scheme,
        "adrank.request_id": answered.request_id,
        "adrank.outcome": stages.outcome,
    }
    if answered.status is not None:
        attributes["http.response.status_code"] = answered.status
    if failed:
        attributes["error.type"] = stages.outcome
    if stages.model != "none":
        attributes["adrank.model.name"] = stages.model
    if stages.candidates is not None:
        attributes |= {
            "adrank.model.version": str(stages.version),
            "adrank.candidates": stages.candidates,
            "adrank.history_length": stages.behaviours,
        }
    if stages.degraded:
        attributes["adrank.degraded"] = [f"{stage}: {reason}" for stage, reason in stages.degraded]
    return attributes
