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

import uvicorn

from ..settings import Settings
from .connection import Connection
from .limits import ConnectionState
from .listen import unlisten

TICK_SECONDS = 0.02
BEAT_TICKS, LOOK_TICKS = 5, 2
"""Of uvicorn's, ten of which are a second."""


class WorkerServer(uvicorn.Server):
    """A server that answers what is on its way when it is told to end.

    For `farewell_seconds` clients that keep their connection may still send a request then: its answer says that it is the last.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._farewell = settings.farewell_seconds
        self.server_state: ConnectionState = ConnectionState(settings)
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
        if sockets:  # here, since uvicorn ends the process by the signal that it got
            unlisten(self.server_state.settings)

    async def on_tick(self, counter: int) -> bool:
        """Hold connections to their limits."""
        if not counter % LOOK_TICKS:
            self.server_state.look(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

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


class Member(WorkerServer):
    """A server whose connections come from another process, over a pair of `SOCK_SEQPACKET` sockets.

    What comes is a socket, or a number: of connections to end. What goes are two numbers: of connections that were closed, and 1 where
    the application's lifespan says that this process is `able` to do its work. The first goes when the server is ready, then one goes
    whenever there is news, and each half second. Each side ends with its `shutdown`; when the other process dies, this one ends as if
    told to.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings, pair: socket.socket) -> None:
        super().__init__(config, settings)
        self.server_state.on_closed = self._count_closed
        self._pair = pair
        self._closed = 0
        self._said_able: bool | None = None

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
        if self._closed or self._able() != self._said_able or not counter % BEAT_TICKS:
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
            self._closed, self._said_able = 0, able
