"""One connection to Redis for all the requests of a process: commands go out as they come, replies are handed out in order.

A pool lends a connection to each command, which costs more than all the rest of an empty request. Knows RESP2 (hiredis),
and nothing of users or ads.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis

CONNECT_SECONDS = 5.0
FIND_SECONDS = 2.0
"""The same where others say which server it is, since they may know a better one soon."""
REFUSED_SECONDS = 0.1
"""How long after a failed attempt to connect nobody tries again: a store that is down is not to be asked once a request."""
SILENT_SECONDS = 1.0
"""A connection that owes replies and has been silent for so long is given up, since it may be half open."""
MOST_WAITING = 10_000
NOT_SERVING = ("LOADING", "NOAUTH", "WRONGPASS", "MASTERDOWN", "CLUSTERDOWN", "ERR max number of clients reached")
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
    tls: Callable[[], ssl.SSLContext] | None = None
    greeting: Sequence[Command] = ()
    primary: bool = False
    """Whether only a primary will do: a connection to one that becomes a replica is given up."""

    @property
    def name(self) -> str:
        """Of the server, for people."""
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


Find = Callable[[], Awaitable[Address]]


class Line:
    """Asks one server. Connects when first asked and again whenever the connection is lost."""

    def __init__(self, address: Address | Find, timeout: float) -> None:
        """The server, or who knows it whenever a connection is opened, and the seconds that one command may take."""
        self._address, self._timeout = address, timeout
        self.to: Address | None = None
        """The server of the connection, or of the last one."""
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
        return unrefused(await self.ask_all(commands, once=True))

    async def ask_all(self, commands: Sequence[Command], once: bool = False) -> list[Any]:
        """The replies to commands that go out together, each as for `ask`; a refusal stands among them as its `ReplyError`.

        With `once` they are never sent twice.

        Raises:
            TimeoutError: one did not come in time.
            ConnectionError: the server cannot be reached, or does not serve.
        """
        until = asyncio.get_running_loop().time() + self._timeout
        try:
            return await _all(*(self._connection or await self._connected(until)).ask_all(commands, until))
        except LostError:
            if once:
                raise
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
        seconds = CONNECT_SECONDS if isinstance(self._address, Address) else FIND_SECONDS
        try:
            async with asyncio.timeout(seconds):
                self.to = None
                self.to = self._address if isinstance(self._address, Address) else await self._address()
                self._connection = await self._connect(self.to)
        except TimeoutError:
            self._refuse(f"no answer within {seconds:g} s")
        except (OSError, hiredis.ReplyError) as error:
            self._refuse(str(error))
        finally:
            self._opening = None

    def _refuse(self, why: str) -> None:
        self._refusal = f"{self.to.name}: {why}" if self.to else why
        self._refused_until = asyncio.get_running_loop().time() + REFUSED_SECONDS

    async def _connect(self, address: Address) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = _Connection(loop, self._timeout, address.primary, self._drop)
        try:
            if address.path is not None:
                await loop.create_unix_connection(lambda: connection, address.path)
            else:
                tls = address.tls() if address.tls else None
                await loop.create_connection(lambda: connection, address.host, address.port, ssl=tls)
            for command in address.greeting:
                await connection.ask(command, loop.time() + CONNECT_SECONDS)
            if address.primary and (await connection.ask((b"ROLE",), loop.time() + CONNECT_SECONDS))[0] != b"master":
                raise ConnectionError("it is no primary")
        except hiredis.ReplyError as error:  # a server that knows no AUTH would quote what came with it
            connection.close()
            raise ConnectionError(_without(str(error), address.greeting)) from None
        except BaseException:
            connection.close()
            raise
        connection.greeted()
        return connection

    def _drop(self, connection: "_Connection") -> None:
        if connection is self._connection:
            self._connection = None

    def leave(self) -> None:
        """Give the connection up, if there is one: the server is elsewhere now. Who waits for a reply fails or asks again."""
        if self._connection is not None:
            self._connection.close()

    async def lines(self) -> "Sequence[Line]":
        """Itself: the lines to all the servers that it may ask."""
        return [self]

    def close(self) -> None:
        """Let go of the connection."""
        if self._opening is not None:
            self._opening.cancel()
        if self._connection is not None:
            self._connection.close()


class _Connection(asyncio.Protocol):
    """The replies that are awaited, in the order of their commands. One that nobody awaits any more is read and dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, primary: bool, on_lost: "Callable[[_Connection], None]") -> None:
        self._loop, self._silence, self._primary, self._on_lost = loop, max(SILENT_SECONDS, timeout), primary, on_lost
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

    def greeted(self) -> None:
        """The greeting, which may take long, is over: what is asked from now on sets a timer of its own."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
                if isinstance(reply, hiredis.ReplyError):
                    self._refused(future, reply)
                elif not future.done():
                    future.set_result(reply)
        except (hiredis.ProtocolError, IndexError):  # nothing that follows can be told apart
            self.close()

    def _refused(self, future: asyncio.Future[Any], reply: hiredis.ReplyError) -> None:
        text = str(reply)
        demoted = self._primary and text.startswith("READONLY")
        if not future.done():
            future.set_exception(ConnectionError(text) if demoted or text.startswith(NOT_SERVING) else reply)
        if demoted:
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


def _without(text: str, greeting: Sequence[Command]) -> str:
    for word in (word for command in greeting for word in command[1:]):
        text = text.replace(f"'{word!s}'", "…")
    return text


def unrefused(replies: list[Any]) -> list[Any]:
    """The replies, if none is a refusal.

    Raises:
        hiredis.ReplyError: the first of them.
    """
    for reply in replies:
        if isinstance(reply, hiredis.ReplyError):
            raise reply
    return replies


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
