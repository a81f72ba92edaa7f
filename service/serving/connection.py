"""uvicorn's connection for httptools, given one request at a time, within limits of time and memory, and ended gently.

httptools parses, and strictly; what is here decides what it is given, and answers for what it does not take. uvicorn alone parses all
that comes, without a limit on a head or a time, takes an `Upgrade` for made, and closes without the answer when something wrong follows a
request (docs/decisions/2026-11-28-connections.md). Knows nothing of what is served.
"""

import contextvars
import logging
import math
import os
import re
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .. import errors
from ..errors import Kind
from ..telemetry.logs import RateLimitFilter
from .limits import ConnectionState

LINGER_SECONDS = 2.0
"""How long what a refused client still sends is read and dropped: closed before, it would be reset, and its answer lost."""
HEAD_END = b"\r\n\r\n"
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
ENDED_EARLY = "the connection ended before the request did"

log = logging.getLogger(__name__)
log.addFilter(RateLimitFilter(10, 1.0))


class NotTakenError(Exception):
    """A request is not taken, for a reason of HTTP's."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Connection(HttpToolsProtocol):
    """What has come and is not parsed is in `waiting`; of a body, `left` bytes are to come, infinite where it is chunked.

    `refused`: nothing more is parsed, since the last answer has been given.
    """

    server_state: ConnectionState

    def __init__(self, config: Any, server_state: ConnectionState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.settings, self.waiting = server_state.settings, bytearray()
        self.refused = self.half_closed = self.counted = False
        self.left, self.framing = 0.0, 0
        self.deadline = self.stalled_until = math.inf

    @property
    def answering(self) -> bool:
        """Whether a request has begun, and its answer has not ended."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def unsent(self) -> int:
        """Bytes that it holds while its client does not read."""
        return int(self.transport.get_write_buffer_size()) + len(self.waiting)

    def connection_made(self, transport: Any) -> None:
        """Refuse one connection too many."""
        super().connection_made(transport)
        self.peer = self.client[0] if self.client else None
        self.counted = self.server_state.places.take(self.peer)
        self._arm(self.settings.head_timeout_ms)
        if not self.counted:
            self.refuse(errors.FULL, "there are as many connections as the service takes, in all or from one address; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.refused = True
        self.waiting.clear()
        if self.counted:
            self.server_state.places.give_back(self.peer)
        self.server_state.on_closed()

    def data_received(self, data: bytes) -> None:
        """Take it, and parse what is due: what is behind a request waits until that has been answered."""
        if self.refused:
            return
        self.waiting += data
        while self.waiting and not self.refused and not self.transport.is_closing():
            if self.answering and not self.left:
                if len(self.waiting) > self.settings.max_head_bytes:
                    self.transport.pause_reading()
                return
            try:
                piece = self._piece_of_body() if self.left else self._head()
                if not piece:
                    return
                self.parser.feed_data(piece)
                if self.left and self.framing > self.settings.max_head_bytes:
                    raise NotTakenError(errors.HEAD_TOO_LARGE, "there is more around the chunks of the body than a head may have")
            except NotTakenError as error:
                self.refuse(error.kind, str(error))
            except httptools.HttpParserError as error:
                why = error.__context__
                known = why if isinstance(why, NotTakenError) else NotTakenError(errors.MALFORMED, f"this is no HTTP/1.1: {error}")
                self.refuse(known.kind, str(known))

    def _head(self) -> bytes:
        """A whole head, or nothing where none has come."""
        waiting, most = self.waiting, self.settings.max_head_bytes
        self._unset_keepalive_if_required()
        if self.deadline == math.inf:
            self._arm(self.settings.head_timeout_ms)
        while waiting.startswith(b"\r\n"):  # RFC 9112, 2.2
            del waiting[:2]
        end = waiting.find(HEAD_END)
        if max(end, len(waiting) if end < 0 else 0) > most:
            raise NotTakenError(errors.HEAD_TOO_LARGE, f"the head of the request is over the limit of {most} bytes")
        if end < 0 and self.half_closed:
            raise NotTakenError(errors.MALFORMED, ENDED_EARLY)
        if end < 0 and waiting and (not waiting[:1].isupper() or b"\n\n" in waiting):
            raise NotTakenError(errors.MALFORMED, "this is no HTTP/1.1: it has another beginning, or other ends of lines")  # TLS, for one
        if end < 0:
            return b""
        head = UPGRADE.sub(b"\r\nnot-upgraded:", waiting[: end + 4])  # one that is not made is ignored (RFC 9110, 7.8)
        del waiting[: end + 4]
        return bytes(head)

    def _piece_of_body(self) -> bytes:
        """What has come of a body, and nothing behind it: a chunked one ends with an empty line, as a head does."""
        if self.left == math.inf:
            end = self.waiting.find(HEAD_END)
            begun = next((n for n in (3, 2, 1) if self.waiting.endswith(HEAD_END[:n])), 0)  # may be the beginning of that line
            size = len(self.waiting) - begun if end < 0 else end + 4
            self.framing += size
        else:
            size = min(int(self.left), len(self.waiting))
        piece = bytes(self.waiting[:size])
        del self.waiting[:size]
        return piece

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self.left:
            raise NotTakenError(errors.MALFORMED, "something follows a chunked body that is no part of it")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Take the request and give it its time, or refuse it; decide whether its answer is the connection's last."""
        version = self.parser.get_http_version()
        self.left, self.framing = self._length(version), 0
        self.expect_100_continue = self.expect_100_continue and version == "1.1" and self.left > 0
        super().on_headers_complete()
        self.headers = []  # the request has its own; what stands behind its body is none of them
        self._arm(self.settings.request_timeout_ms)
        if self.server_state.surplus > 0 and self.cycle.keep_alive:
            self.server_state.surplus -= 1
            self.cycle.keep_alive = False
        if self.expect_100_continue:  # answered before the body was asked for, nobody knows whether it comes
            self.kept, self.cycle.keep_alive = self.cycle.keep_alive, False

    def _length(self, version: str) -> float:
        """How long the body of a request is that is taken; what the parser leaves open is refused."""
        names = (b"host", b"transfer-encoding", b"content-length")
        hosts, codings, lengths = ([value for each, value in self.headers if each == name] for name in names)
        settings = self.settings
        if self.parser.get_method() == b"CONNECT":
            raise NotTakenError(errors.NOT_IMPLEMENTED, "this is no proxy")
        if version not in ("1.1", "1.0"):
            raise NotTakenError(errors.WRONG_VERSION, "HTTP/1.1 and HTTP/1.0 are spoken here")
        if len(self.url) > settings.max_url_bytes:
            raise NotTakenError(errors.URL_TOO_LONG, f"the URL is over the limit of {settings.max_url_bytes} bytes")
        if len(self.headers) > settings.max_headers:
            raise NotTakenError(errors.HEAD_TOO_LARGE, f"more than {settings.max_headers} headers")
        if any(coding.lower() != b"chunked" for coding in codings):
            raise NotTakenError(errors.NOT_IMPLEMENTED, "of transfer codings, only chunked is read")
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise NotTakenError(errors.MALFORMED, "send one Host header")
        if codings and version == "1.0":
            raise NotTakenError(errors.MALFORMED, "HTTP/1.0 has no chunks")
        return math.inf if codings else int(lengths[0]) if lengths else 0

    def on_body(self, body: bytes) -> None:
        """Pass it on."""
        self.left -= len(body)
        self.framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Be ready for the next head."""
        self.left = 0
        if self.expect_100_continue and not self.cycle.response_started:
            self.cycle.keep_alive = self.kept
        if self.cycle.response_complete:
            self.deadline = math.inf
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile: what is logged of that belongs to no request before."""
        super().on_response_complete()
        if not self.left:
            self.deadline = math.inf
        if self.waiting or self.half_closed:
            self.loop.call_soon(self._go_on, context=contextvars.Context())

    def _go_on(self) -> None:
        self.data_received(b"")
        if not self.refused and len(self.waiting) <= self.settings.max_head_bytes and not self.flow.read_paused:
            self.transport.resume_reading()
        if self.half_closed:
            self._finish()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio asks for it: whether the connection stays open
        """Answer what came whole: a client may close its half of a connection and read the other."""
        self.half_closed = True
        self.data_received(b"")
        self._finish()
        return True

    def _finish(self) -> None:
        if self.left:
            self.refuse(errors.MALFORMED, ENDED_EARLY)
        elif self.answering and not self.refused:
            self.scope["state"]["half_closed"] = True
            self.cycle.keep_alive = self.cycle.keep_alive and bool(self.waiting)
        else:
            self.transport.close()

    def refuse(self, kind: Kind, detail: str) -> None:
        """Answer for the application, unless it has begun to, and read no more requests."""
        if self.refused:
            return
        log.warning("a request or a connection was refused: %s", detail)
        self.refused = True
        self.waiting.clear()
        if not self.answering or not self.cycle.response_started:
            self.transport.write(_answer(kind, detail))
        if self.answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.half_closed or kind is errors.FULL:
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self._arm(LINGER_SECONDS * 1000)

    def abort(self, why: str) -> None:
        """Close at once, whatever is not sent."""
        log.warning("a connection was closed: %s", why)
        self.transport.abort()

    def pause_writing(self) -> None:
        """Not too much may wait to be read."""
        super().pause_writing()
        self.server_state.look(self.loop.time())

    def look(self, now: float) -> None:
        """End what has had its time."""
        if not self.transport.get_write_buffer_size():
            self.stalled_until = math.inf
        elif self.stalled_until == math.inf:
            self.stalled_until = now + self.settings.answer_timeout_ms / 1000
        if now >= self.stalled_until:
            self.abort("its client did not read its answer in time")
        elif now < self.deadline:
            return
        elif self.refused:
            self.transport.abort()
        elif self.left:
            self.refuse(errors.KINDS[errors.SlowBodyError], "the body did not arrive in time")
        elif self.answering:
            self.refuse(errors.KINDS[errors.DeadlineError], "the answer was not ready in time")
        else:
            self.transport.close()

    def _arm(self, milliseconds: float) -> None:
        self.deadline = self.loop.time() + milliseconds / 1000


def _answer(kind: Kind, detail: str) -> bytes:
    request_id = os.urandom(16).hex()
    body = errors.document(kind, detail, request_id)
    headers = {"content-type": "application/problem+json", "content-length": len(body), "x-request-id": request_id, "connection": "close"}
    if kind.retry_after:
        headers["retry-after"] = kind.retry_after
    return STATUS_LINE[kind.status] + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n" + body
