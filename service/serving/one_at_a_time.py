"""uvicorn's protocol for httptools, given one request at a time: the next head is parsed when the request before it has been answered.

httptools parses, and strictly; what is here decides what it is given, and answers for what it does not take. uvicorn alone parses all
that comes, without a limit on a head, takes an `Upgrade` for made, and closes without the answer when something wrong follows a request
(docs/decisions/2026-11-28-connections.md).
"""

import contextvars
import logging
import math
import os
import re

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .. import errors
from ..errors import Kind
from ..settings import Settings
from ..telemetry.logs import RateLimitFilter

HEAD_END = b"\r\n\r\n"
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
NO_REQUEST = contextvars.Context()
"""Where lines of the log belong to no request: what follows an answer is of another."""
ENDED_EARLY = "the connection ended before the request did"

log = logging.getLogger(__name__)
log.addFilter(RateLimitFilter(10, 1.0))


class RefusedError(Exception):
    """A request is not taken, for a reason of HTTP's."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class UpgradeError(Exception):
    """The parser takes an upgrade for made, and the body for something else. One that is not made is ignored (RFC 9110, 7.8)."""


class OneAtATime(HttpToolsProtocol):
    """What has come and is not parsed waits in `waiting`; `refused`: nothing more is parsed, since the last answer has been given."""

    settings: Settings

    def begin(self) -> None:
        """Wait for the first head."""
        self.waiting, self.refused, self.half_closed = bytearray(), False, False
        self.body: float | None = None
        """Bytes of the body that are to come, infinite where they are chunked; None: a head is next."""
        self._searched = self._framing = 0
        self._kept = True

    def data_received(self, data: bytes) -> None:
        """Take it, and parse what is due."""
        if not self.refused:
            self.waiting += data
            self.advance()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio asks for it: whether the connection stays open for what is written
        """Answer what came whole: a client may close its half of a connection and read the other."""
        self.half_closed = True
        self.advance()
        self._answer_what_is_whole()
        return True

    def _answer_what_is_whole(self) -> None:
        """After a client's last byte."""
        cycle = self.cycle
        if self.body is not None:
            self.refuse(errors.MALFORMED, ENDED_EARLY)
        elif cycle is None or cycle.response_complete or self.refused:
            self.transport.close()  # not left to the loop, which knows of no answer that waits to be joined
        else:
            self.scope["state"]["half_closed"] = True
            cycle.keep_alive = cycle.keep_alive and bool(self.waiting)

    def advance(self) -> None:
        """Parse what is due of what waits."""
        while self.waiting and not self.refused and not self.transport.is_closing():
            if self.body is not None:
                self._feed_body(self.body)
            elif self.cycle is not None and not self.cycle.response_complete:
                if len(self.waiting) > self.settings.max_head_bytes:
                    self.transport.pause_reading()
                return
            elif not self._feed_head():
                return

    def _feed_head(self) -> bool:
        waiting, most = self.waiting, self.settings.max_head_bytes
        self._unset_keepalive_if_required()
        while waiting.startswith(b"\r\n"):  # RFC 9112, 2.2
            del waiting[:2]
        end = waiting.find(HEAD_END, self._searched)
        if max(end, len(waiting) if end < 0 else 0) > most:
            self.refuse(errors.HEAD_TOO_LARGE, f"the head of the request is over the limit of {most} bytes")
        elif end < 0 and self.half_closed:
            self.refuse(errors.MALFORMED, ENDED_EARLY)
        elif end < 0 and waiting and (not waiting[:1].isupper() or waiting.find(b"\n\n", self._searched) >= 0):
            self.refuse(errors.MALFORMED, "this is no HTTP/1.1: it has another beginning, or other ends of lines")  # TLS, for one
        if end < 0 or self.refused:
            self._searched = max(0, len(waiting) - 3)
            return False
        head, self._searched = bytes(waiting[: end + 4]), 0
        del waiting[: end + 4]
        self._feed(head)
        return True

    def _feed_body(self, left: float) -> None:
        """Parse what has come of a body, and nothing behind it: a chunked one ends with an empty line, as a head does."""
        if left == math.inf:
            end = self.waiting.find(HEAD_END)
            size = len(self.waiting) if end < 0 else end + 4
            self._framing += size
        else:
            size = min(int(left), len(self.waiting))
            self.body = left - size
        piece = bytes(self.waiting[:size])
        del self.waiting[:size]
        self._feed(piece)
        if self.body is not None and self._framing > self.settings.max_head_bytes:
            self.refuse(errors.HEAD_TOO_LARGE, "there is more around the chunks of the body than a head may have")

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserError as error:
            why = error.__context__
            if isinstance(why, UpgradeError):
                self.parser = httptools.HttpRequestParser(self)
                self._feed(UPGRADE.sub(b"\r\nnot-upgraded:", piece))
            elif isinstance(why, RefusedError):
                self.refuse(why.kind, why.detail)
            else:
                self.refuse(errors.MALFORMED, f"this is no HTTP/1.1: {error}")

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self.body is not None:
            raise RefusedError(errors.MALFORMED, "something follows a chunked body that is no part of it")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Take the request, or refuse it."""
        version, settings = self.parser.get_http_version(), self.settings
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise RefusedError(errors.NOT_IMPLEMENTED, "this is no proxy")
            raise UpgradeError
        if version not in ("1.1", "1.0"):
            raise RefusedError(errors.WRONG_VERSION, "HTTP/1.1 and HTTP/1.0 are spoken here")
        if len(self.url) > settings.max_url_bytes:
            raise RefusedError(errors.URL_TOO_LONG, f"the URL is over the limit of {settings.max_url_bytes} bytes")
        if len(self.headers) > settings.max_headers:
            raise RefusedError(errors.HEAD_TOO_LARGE, f"more than {settings.max_headers} headers")
        self.body, self._framing = self._length(version), 0
        self.expect_100_continue = self.expect_100_continue and version == "1.1" and self.body > 0
        super().on_headers_complete()
        self.headers = []  # the request has its own; what stands behind its body is none of them
        if self.expect_100_continue:  # answered before the body was asked for, nobody knows whether it comes
            self._kept, self.cycle.keep_alive = self.cycle.keep_alive, False

    def _length(self, version: str) -> float:
        """How long the body is; what the parser leaves open about that is refused."""
        hosts, length = 0, 0.0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                length = math.inf
                if value.lower() != b"chunked":
                    raise RefusedError(errors.NOT_IMPLEMENTED, "of transfer codings, only chunked is read")
        if hosts > 1 or (not hosts and version == "1.1"):
            raise RefusedError(errors.MALFORMED, "send one Host header")
        if length == math.inf and version == "1.0":
            raise RefusedError(errors.MALFORMED, "HTTP/1.0 has no chunks")
        return length

    def on_body(self, body: bytes) -> None:
        """Pass it on."""
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Be ready for the next head."""
        self.body = None
        if self.expect_100_continue and not self.cycle.response_started:
            self.cycle.keep_alive = self._kept
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile."""
        super().on_response_complete()
        if self.waiting or self.half_closed:
            self.loop.call_soon(self._resume, context=NO_REQUEST)

    def _resume(self) -> None:
        self.advance()
        if self.refused or self.transport.is_closing():
            return
        if len(self.waiting) <= self.settings.max_head_bytes and not self.flow.read_paused:
            self.transport.resume_reading()
        if self.half_closed:
            self._answer_what_is_whole()

    def refuse(self, kind: Kind, detail: str) -> None:
        """Answer for the application, unless it has begun to, and read no more requests."""
        if self.refused:
            return
        log.warning("a request or a connection was refused: %s", detail)
        self.refused, cycle = True, self.cycle
        self.waiting.clear()
        if cycle is None or not cycle.response_started or cycle.response_complete:
            self.transport.write(_answer(kind, detail))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.end(kind)

    def end(self, kind: Kind) -> None:  # noqa: ARG002  # for whom it makes a difference
        """Close a connection whose last answer has been written."""
        self.transport.close()


def _answer(kind: Kind, detail: str) -> bytes:
    request_id = os.urandom(16).hex()
    body = errors.document(kind, detail, request_id)
    headers = {"content-type": "application/problem+json", "content-length": len(body), "x-request-id": request_id, "connection": "close"}
    if kind.retry_after:
        headers["retry-after"] = kind.retry_after
    return STATUS_LINE[kind.status] + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n" + body
