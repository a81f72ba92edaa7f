"""A collector of traces: a real server that takes OTLP over HTTP and keeps what it was sent."""

import contextlib
import gzip
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Span:
    """A span as it was sent; ids in hexadecimal digits."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    kind: int
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


@dataclass
class Collector:
    """What was sent: whole bodies, and the spans in them."""

    url: str
    bodies: list[bytes] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def take(self, path: str, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.paths.add(path)
        self.bodies.append(body)
        for of_resource in request.resource_spans:
            resource = _attributes(of_resource.resource.attributes)
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                times = (span.start_time_unix_nano, span.end_time_unix_nano)
                self.spans.append(Span(span.name, *ids, *times, span.kind, span.status.code, _attributes(span.attributes), resource))

    def servers(self) -> list[Span]:
        """The spans of requests."""
        return [span for span in self.spans if span.kind == 2]

    def wait(self, traces: int, seconds: float = 90) -> None:
        """Wait until so many requests have been told of."""
        until = time.monotonic() + seconds
        while len(self.servers()) < traces and time.monotonic() < until:
            time.sleep(0.02)
        assert len(self.servers()) >= traces, [span.name for span in self.spans]

    def trace(self, trace_id: str) -> tuple[Span, dict[str, Span]]:
        """The span of a trace's only request here, and the first of each name below it."""
        (server,) = [span for span in self.servers() if span.trace_id == trace_id]
        below = [span for span in self.spans if span.trace_id == trace_id and span is not server]
        return server, {span.name: span for span in reversed(below)}


@contextlib.contextmanager
def collecting(status: int = 200) -> Iterator[Collector]:
    """A collector on a port of its own, and what it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
