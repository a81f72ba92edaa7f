"""One connection to Redis for all the requests of a process: commands go out as they come, replies are handed out in order.

A pool lends a connection to each command, which costs more than all the rest of an empty request. Knows RESP2 (hiredis),
and nothing of users or ads.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis

CONNECT_SECONDS = 5.0
REFUSED_SECONDS = 0.1
"""How long after a failed attempt to connect nobody tries again: a store that is down is not to be asked once a request."""
SILENT_SECONDS = 1.0
"""A connection that owes replies and has been silent for so long is given up, since it may be half open."""
MOST_WAITING = 10_000
NOT_SERVING = ("LOADING", "NOAUTH", "WRONGPASS", "ERR max number of clients reached")
_INCOMPLETE = object()

Command = tuple[str | bytes, ...]
ReplyError = hiredis.ReplyError


class LostError(ConnectionError):
    """The connection went away while a reply was awaited."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, a `path` for a Unix socket, and the commands that open a conversation, such as AUTH."""

    host: str
    port: int
    path: str | None = None
    tls: ssl.SSLContext | None = None
    greeting: Sequence[Command] = ()


class Line:
    """Asks one server. Connects when first asked and again whenever the connection is lost."""

    def __init__(self, address: Address, timeout: float) -> None:
        """The server, and the seconds that one command may take."""
        self._address, self._timeout = address, timeout
        self._connection: _Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._refusal, self._refused_until = "", 0.0

    async def ask(self, *command: str | bytes) -> Any:
        """The reply to a command, which must be one that may be sent twice: a connection that was closed while idle is mended.

        Raises:
            TimeoutError: it did not come in time.
            ConnectionError: the server cannot be reached, or does not serve.
            hiredis.ReplyError: the server refused the command.
        """
        until = asyncio.get_running_loop().time() + self._timeout
        try:
            return await (self._connection or await self._connected(until)).ask(command, until)
        except LostError:
            return await (await self._connected(until)).ask(command, until)

    async def ask_once(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands that are sent together, and never twice: where it fails, some may have been carried out.

        Raises:
            TimeoutError, ConnectionError, hiredis.ReplyError: as `ask` does; the first of them.
        """
        until = asyncio.get_running_loop().time() + self._timeout
        connection = self._connection or await self._connected(until)
        replies = await _all(*connection.ask_all(commands, until))
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise reply
        return replies

    async def ask_all(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands that go out together, each as for `ask`; a refusal stands among them as its `ReplyError`.

        Raises:
            TimeoutError: one did not come in time.
            ConnectionError: the server cannot be reached, or does not serve.
        """
        until = asyncio.get_running_loop().time() + self._timeout
        try:
            return await _all(*(self._connection or await self._connected(until)).ask_all(commands, until))
        except LostError:
            return await _all(*(await self._connected(until)).ask_all(commands, until))

    async def _connected(self, until: float) -> "_Connection":
        """The connection, opened by whoever needs it first; all others wait for the same attempt."""
        loop = asyncio.get_running_loop()
        if self._connection is None and loop.time() >= self._refused_until:
            self._opening = self._opening or loop.create_task(self._open())
            async with asyncio.timeout_at(until):
                await asyncio.shield(self._opening)
        if self._connection is None:
            raise ConnectionError(self._refusal)
        return self._connection

    async def _open(self) -> None:
        loop, address = asyncio.get_running_loop(), self._address
        connection = _Connection(loop, self._timeout, self._drop)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: connection, address.path)
                else:
                    await loop.create_connection(lambda: connection, address.host, address.port, ssl=address.tls)
                for command in address.greeting:
                    await connection.ask(command, loop.time() + CONNECT_SECONDS)
            self._connection = connection
        except (OSError, hiredis.ReplyError) as error:
            connection.close()
            self._refusal, self._refused_until = str(error) or f"no answer within {CONNECT_SECONDS:g} s", loop.time() + REFUSED_SECONDS
        finally:
            self._opening = None

    def _drop(self, connection: "_Connection") -> None:
        if connection is self._connection:
            self._connection = None

    def close(self) -> None:
        """Let go of the connection."""
        if self._opening is not None:
            self._opening.cancel()
        if self._connection is not None:
            self._connection.close()


class _Connection(asyncio.Protocol):
    """The replies that are awaited, in the order of their commands. One that nobody awaits any more is read and dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, on_lost: "Callable[[_Connection], None]") -> None:
        self._loop, self._silence, self._on_lost = loop, max(SILENT_SECONDS, timeout), on_lost
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._transport: Any = None  # uvloop's is no asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._heard = loop.time()

    def ask(self, command: Command, until: float) -> asyncio.Future[Any]:
        """The reply to be; TimeoutError at the time `until`, of the loop's clock."""
        (future,) = self.ask_all([command], until)
        return future

    def ask_all(self, commands: Sequence[Command], until: float) -> "list[asyncio.Future[Any]]":
        """The replies to be, of commands that go out together."""
        futures: list[asyncio.Future[Any]] = [self._loop.create_future() for _ in commands]
        if self._transport is None or self._transport.is_closing():
            return _failed(futures, LostError("the connection is closed"))
        if len(self._waiting) + len(commands) > MOST_WAITING:
            return _failed(futures, ConnectionError(f"it owes {len(self._waiting)} replies already"))
        if not self._waiting:
            self._heard = self._loop.time()  # it owed nothing, so its silence begins now
        self._waiting.extend((future, until) for future in futures)
        self._transport.write(b"".join(map(hiredis.pack_command, commands)))  # type: ignore[arg-type]  # its stub wants one word
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._give_up, until)
        return futures

    def connection_made(self, transport: Any) -> None:
        """Asyncio says that the connection is open."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are whole."""
        self._heard = self._loop.time()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                future, _ = self._waiting.popleft()
                if not future.done():
                    _settle(future, reply)
        except (hiredis.ProtocolError, IndexError):  # nothing that follows can be told apart
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody gets a reply any more."""
        self._on_lost(self)
        if self._timer is not None:
            self._timer.cancel()
        for future, _ in self._waiting:
            if not future.done():
                future.set_exception(LostError(f"the connection was lost: {exc or 'the server closed it'}"))
        self._waiting.clear()

    def _give_up(self, overdue: float) -> None:
        """Time is up for those who wait until `overdue`. Asyncio and uvloop both read their sockets before they run timers, so a
        reply that came while a model kept the event loop is not blamed on the store; `asyncio.timeout` would drop it.
        """
        for future, until in self._waiting:
            if until <= overdue and not future.done():
                future.set_exception(TimeoutError())
        following = min((until for future, until in self._waiting if not future.done()), default=None)
        self._timer = None if following is None else self._loop.call_at(following, self._give_up, following)
        if self._waiting and self._loop.time() - self._heard > self._silence:
            self.close()

    def close(self) -> None:
        """End the connection; who still waits gets a `LostError`."""
        if self._transport is not None:
            self._on_lost(self)
            self._transport.abort()


def _settle(future: asyncio.Future[Any], reply: Any) -> None:
    if not isinstance(reply, hiredis.ReplyError):
        future.set_result(reply)
    elif str(reply).startswith(NOT_SERVING):
        future.set_exception(ConnectionError(str(reply)))
    else:
        future.set_exception(reply)


def _failed(futures: "list[asyncio.Future[Any]]", error: Exception) -> "list[asyncio.Future[Any]]":
    for future in futures:
        future.set_exception(error)
    return futures


async def _all(*futures: "asyncio.Future[Any]") -> list[Any]:
    """Their results, once all are there, so that none is left whose failure nobody hears of."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ReplyError):
            raise result
    return results
