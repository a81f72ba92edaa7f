"""The HTTP server of one process: uvicorn, with connections that end gently, and those that another process accepted.

Knows nothing about what is served.
"""

import asyncio
import contextlib
import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

TICK_SECONDS = 0.02
BEAT_TICKS = 5
"""Of uvicorn's, ten of which are a second."""


class State(ServerState):
    """What the connections of a server share. `surplus` of them are to end, each with its next answer."""

    def __init__(self) -> None:
        super().__init__()
        self.surplus: float = 0
        self.on_closed: Callable[[], None] = lambda: None


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

    def _send(self) -> None:
        together = b"".join(self._pieces)
        self._pieces.clear()
        if together and not self._transport.is_closing():  # its client may have left since
            self._transport.write(together)


class Connection(HttpToolsProtocol):
    """A connection that tells its client `Connection: close` when there are too many, so that no request meets a closed socket."""

    server_state: State

    def connection_made(self, transport: Any) -> None:
        """Join what is written."""
        super().connection_made(cast("asyncio.Transport", Joined(transport, self.loop)))

    def on_headers_complete(self) -> None:
        """Decide with each request whether its answer is the connection's last."""
        super().on_headers_complete()
        if self.server_state.surplus > 0 and self.cycle is not None and self.cycle.keep_alive:
            self.server_state.surplus -= 1
            self.cycle.keep_alive = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it."""
        super().connection_lost(exc)
        self.server_state.on_closed()


class Server(uvicorn.Server):
    """A server that answers what is on its way when it is told to end.

    For `farewell` seconds clients that keep their connection may still send a request then: its answer says that it is the last.
    """

    def __init__(self, config: uvicorn.Config, farewell: float) -> None:
        super().__init__(config)
        self._farewell = farewell
        self.server_state: State = State()
        self._adopting: set[asyncio.Task[None]] = set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take what has connected by now, bid every client farewell, then close what is idle and wait for the rest, as uvicorn does."""
        self.server_state.surplus = math.inf
        for listener in sockets or []:
            with contextlib.suppress(OSError):
                while True:
                    self._adopt(listener.accept()[0])
        for server in self.servers:
            server.close()
        until = time.monotonic() + self._farewell
        await asyncio.gather(asyncio.sleep(TICK_SECONDS), *self._adopting)
        while self.server_state.connections and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(TICK_SECONDS)
        await super().shutdown(sockets)

    def _adopt(self, connection: socket.socket) -> None:
        task = asyncio.ensure_future(self._connect(connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connection, connection)
        except OSError:  # its client has left already
            connection.close()
            self.server_state.on_closed()

    def _connection(self) -> asyncio.Protocol:
        return Connection(self.config, self.server_state, self.lifespan.state)


class Member(Server):
    """A server whose connections come from another process, over a pair of `SOCK_SEQPACKET` sockets.

    What comes is a socket, or a number: of connections to end. What goes are two numbers: of connections that were closed, and 1 where
    the application's lifespan says that this process is `able` to do its work. The first goes when the server is ready, then one goes
    whenever there is news, and each half second. Each side ends with its `shutdown`; when the other process dies, this one ends as if
    told to.
    """

    def __init__(self, config: uvicorn.Config, farewell: float, pair: socket.socket) -> None:
        super().__init__(config, farewell)
        self.server_state.on_closed = self._count_closed
        self._pair = pair
        self._closed = 0
        self._told: bool | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without a socket to listen on, and say so."""
        await super().startup(sockets or [])
        self._pair.setblocking(False)
        asyncio.get_running_loop().add_reader(self._pair, self._hear)
        self._report()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Ask the other process for no more connections; it then says when those on their way have all come."""
        if sig == signal.SIGTERM:
            with contextlib.suppress(OSError):
                self._pair.shutdown(socket.SHUT_WR)

    async def on_tick(self, counter: int) -> bool:
        """Report what there was no room for before, whether this process has become able, and now and then that it is there."""
        if self._closed or self._able() != self._told or not counter % BEAT_TICKS:
            self._report()
        return await super().on_tick(counter)

    def _hear(self) -> None:
        while True:
            try:
                message, handles, flags, _ = socket.recv_fds(self._pair, 32, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:  # the other process died; what it had sent is still to be read
                continue
            if handles:
                self._adopt(socket.socket(fileno=handles[0]))
            elif flags & socket.MSG_CTRUNC:  # there was no file descriptor left for the connection, which the kernel has closed
                self._count_closed()
            elif message:
                self.server_state.surplus = int(message)
            else:
                asyncio.get_running_loop().remove_reader(self._pair)
                self.should_exit = True
                return

    def _count_closed(self) -> None:
        self._closed += 1
        self._report()

    def _able(self) -> bool:
        able: Callable[[], bool] = self.lifespan.state.get("able", lambda: True)
        return able()

    def _report(self) -> None:
        able = self._able()
        with contextlib.suppress(OSError):  # no room now, or the other process died, which is heard of elsewhere
            self._pair.send(b"%d %d" % (self._closed, able))
            self._closed, self._told = 0, able
