"""A connection of this service: so much time, so many of them, so much that waits to be read, and a gentle end.

Knows nothing of what is served.
"""

import asyncio
import math
import resource
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from .. import errors
from ..errors import Kind
from ..settings import Settings
from .one_at_a_time import OneAtATime, log
from .shares import Shares

LINGER_SECONDS = 2.0
"""How long what a refused client still sends is read and dropped: closed before, it would be reset, and its answer lost."""
TICK_SECONDS = 1.0
"""How late a limit on time may be."""
SPARE_FILES = 96
"""Open files of a process that are no connections."""


class ConnectionState(ServerState):
    """What the connections of a server share. `surplus` of them are to end, each with its next answer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.surplus: float = 0
        self.on_closed: Callable[[], None] = lambda: None
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = math.inf if files == resource.RLIM_INFINITY else max(16, files - SPARE_FILES)
        self.places = Shares(min(settings.max_connections, room), settings.peer_share)
        self.stalled: dict[Connection, None] = {}

    def let_go_of_the_slowest(self) -> None:
        """Close connections whose clients do not read, the longest stalled first, until what they hold is within its limit."""
        while sum(each.unsent for each in self.stalled) > self.settings.max_unsent_bytes:
            next(iter(self.stalled)).abort("the answers that clients do not read take too much memory")


class Joined:
    """A transport that sends together what is written in one go: uvicorn writes the head of an answer and its body apart."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it with what else is written until the loop's next turn."""
        if not self._pieces:
            self._loop.call_soon(self._send)
        self._pieces.append(data)

    def close(self) -> None:
        """Send what is left, and close."""
        self._send()
        self._transport.close()

    def write_eof(self) -> None:
        """Send what is left, and say that it was all."""
        self._send()
        if not self._transport.is_closing():
            self._transport.write_eof()

    def _send(self) -> None:
        together = b"".join(self._pieces)
        self._pieces.clear()
        if together and not self._transport.is_closing():  # its client may have left since
            self._transport.write(together)


class Connection(OneAtATime):
    """A connection that tells its client `Connection: close` when there are too many, so that no request meets a closed socket."""

    server_state: ConnectionState

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ConnectionState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.settings = server_state.settings
        self._deadline = self._stalled_until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.begin()

    @property
    def unsent(self) -> int:
        """Bytes that it holds while its client does not read."""
        return int(self.transport.get_write_buffer_size()) + len(self.waiting)

    def connection_made(self, transport: Any) -> None:
        """Join what is written, and refuse one connection too many."""
        super().connection_made(cast("asyncio.Transport", Joined(transport, self.loop)))
        self.transport.set_write_buffer_limits(0)  # what cannot be sent at once is not read fast enough: the clock runs
        self._arm(self.settings.head_timeout_ms)
        self._peer = self.client[0] if self.client else None
        self._counted = self.server_state.places.take(self._peer)
        if not self._counted:
            self.refuse(errors.FULL, "there are as many connections as the service takes, in all or from one address; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it."""
        super().connection_lost(exc)
        self.refused, state = True, self.server_state
        self.waiting.clear()
        self._unset_keepalive_if_required()
        if self._timer is not None:
            self._timer.cancel()
        state.stalled.pop(self, None)
        if self._counted:
            state.places.give_back(self._peer)
        state.on_closed()

    def data_received(self, data: bytes) -> None:
        """Give a head that is not whole its time."""
        super().data_received(data)
        if self.waiting and self._deadline == math.inf:
            self._arm(self.settings.head_timeout_ms)

    def on_headers_complete(self) -> None:
        """Give the request its time, and decide whether its answer is the connection's last."""
        super().on_headers_complete()
        self._arm(self.settings.request_timeout_ms)
        if self.server_state.surplus > 0 and self.cycle.keep_alive:
            self.server_state.surplus -= 1
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """End its time, if it is answered already."""
        super().on_message_complete()
        if self.cycle.response_complete:
            self._deadline = math.inf

    def on_response_complete(self) -> None:
        """End its time, if it has come whole."""
        if self.body is None:
            self._deadline = math.inf
            if self.waiting:
                self._arm(self.settings.head_timeout_ms)
        super().on_response_complete()

    def end(self, kind: Kind) -> None:
        """Close when the client has had time to read its answer, unless it is one too many."""
        if self.half_closed or kind is errors.FULL:
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self._arm(LINGER_SECONDS * 1000)

    def abort(self, why: str) -> None:
        """Close at once, whatever is not sent."""
        log.warning("a connection was closed: %s", why)
        self.server_state.stalled.pop(self, None)
        self.transport.abort()

    def pause_writing(self) -> None:
        """What was written is not read as fast: it has so long, and not too much of it may wait."""
        super().pause_writing()
        self.server_state.stalled[self] = None
        self._stalled_until = self.loop.time() + self.settings.answer_timeout_ms / 1000
        self._watch()
        self.server_state.let_go_of_the_slowest()

    def resume_writing(self) -> None:
        """It has been sent."""
        super().resume_writing()
        self.server_state.stalled.pop(self, None)
        self._stalled_until = math.inf

    def _arm(self, milliseconds: float) -> None:
        self._deadline = self.loop.time() + milliseconds / 1000
        self._watch()

    def _watch(self) -> None:
        """Look again in a while. One timer a connection, while there is something to wait for: one a request would cost more."""
        if self._timer is None:
            left = min(self._deadline, self._stalled_until) - self.loop.time()
            self._timer = self.loop.call_later(min(max(left, 0), TICK_SECONDS), self._look)

    def _look(self) -> None:
        self._timer, now = None, self.loop.time()
        if now >= self._stalled_until:
            self.abort("its client did not read its answer in time")
        elif now < self._deadline:
            if min(self._deadline, self._stalled_until) < math.inf:
                self._watch()
        elif self.refused:
            self.transport.abort()
        elif self.body is not None:
            self.refuse(errors.KINDS[errors.SlowBodyError], "the body did not arrive in time")
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.refuse(errors.KINDS[errors.DeadlineError], "the answer was not ready in time")
