"""One server, asked over a pool of connections of redis-py. Knows nothing of users or ads.

redis-py's own retries are off, since some commands must not be sent twice; so are its timeouts, since they drop a reply that came while a
model kept the event loop; replies are as RESP2 has them.
"""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import hiredis
from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError, ResponseError

from .url import Login, StoreUrl, Tls

CONNECT_SECONDS = 5.0
REFUSED_SECONDS = 0.1
"""How long after a failed attempt to connect nobody tries again: a store that is down is not to be asked once a request."""
MOST_CONNECTIONS = 1_000
"""To one server; those of one `Client` are far fewer."""

Command = tuple[str | bytes, ...]


class Server(Protocol):
    """Whoever answers commands."""

    @property
    def name(self) -> str:
        """For people."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands that go out together; a refusal stands among them as its `ResponseError`.

        Raises:
            OSError, RedisError: there was no reply. Some commands may have been carried out.
        """


class Servers(Server, Protocol):
    """All servers of a store."""

    async def primaries(self) -> Sequence[Server]:
        """Those that have keys, one by one."""

    def owner(self, key: str) -> Hashable:
        """Something that is the same for keys of one server."""

    async def close(self) -> None:
        """Let go of all connections."""


class TlsConnection(SSLConnection):
    """Reads its certificates whenever it connects, and believes no other authority than that of the URL; redis-py adds the system's."""

    def __init__(self, tls: Tls, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context = tls  # type: ignore[assignment]  # it is asked for `get()` alone


class Single:
    """One server. Connects when first asked, and again whenever a connection is lost."""

    def __init__(self, pool: ConnectionPool, name: str) -> None:
        self.pool, self.name = pool, name
        self._refusal, self._refused_until = RedisError(), 0.0

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """See `Server`."""
        connection = await self._connection()
        try:
            await connection.send_packed_command(b"".join(map(hiredis.pack_command, commands)))  # type: ignore[arg-type]  # its stub wants one word
            return [await _reply(connection) for _ in commands]
        finally:
            await self.pool.release(connection)

    async def _connection(self) -> AbstractConnection:
        loop = asyncio.get_running_loop()
        if loop.time() < self._refused_until:
            raise self._refusal.with_traceback(None)
        try:
            connection: AbstractConnection = await self.pool.get_connection()
        except RedisError as error:
            self._refusal, self._refused_until = error, loop.time() + REFUSED_SECONDS
            raise
        return connection

    async def primaries(self) -> Sequence[Server]:
        """See `Servers`."""
        return [self]

    def owner(self, _key: str) -> Hashable:
        """See `Servers`."""
        return None

    async def close(self) -> None:
        """See `Servers`."""
        await self.pool.aclose()


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def alone(url: StoreUrl) -> Single:
    """The server of a URL."""
    kind = UnixDomainSocketConnection if url.path else TlsConnection if url.tls else Connection
    place = {"path": url.path} if url.path else {"host": url.places[0].host, "port": url.places[0].port}
    pool = ConnectionPool(kind, MOST_CONNECTIONS, **place, **options_of(url.login, url.tls), db=url.db)
    return Single(pool, url.path or str(url.places[0]))


def options_of(login: Login, tls: Tls | None) -> dict[str, Any]:
    """What a connection is to be like. `driver_info` would be told to the server, whose user may lack that right."""
    options = {"username": login.user or None, "password": login.password or None, **({"tls": tls} if tls else {})}
    return {**options, "protocol": 2, "driver_info": None, "socket_timeout": None, "socket_connect_timeout": CONNECT_SECONDS}


def unrefused(replies: list[Any]) -> list[Any]:
    """The replies, if none is a refusal.

    Raises:
        ResponseError: the first of them.
    """
    for reply in replies:
        if isinstance(reply, ResponseError):
            raise reply
    return replies
