"""The primary that sentinels name. They are asked when a connection is opened, and four times a second, since a primary that is cut off
from the others goes on to answer.

redis-py asks one sentinel after the other for its whole state, and believes the first: one that has not heard of a fail-over yet, or
that is waited for in vain. Its pool is given an answer that is made of all of theirs.
"""

import asyncio
import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from .server import MOST_CONNECTIONS, Command, Single, TlsConnection, alone, options_of, unrefused
from .url import HostPort, StoreUrl

SENTINEL_SECONDS = 1.0
"""How long a sentinel may take. All are asked at once, and when most have answered nobody waits for the others: one often goes down
together with the primary, on the same host.
"""
WATCH_SECONDS = 0.25


class Primary(Single):
    """The primary of that name. A connection to a server that is none any more is given up."""

    def __init__(self, url: StoreUrl) -> None:
        self._sentinels = [alone(StoreUrl("alone", (place,), login=url.sentinel_login, tls=url.tls)) for place in url.places]
        self._connections = weakref.WeakSet[SentinelManagedConnection]()
        self._asking: asyncio.Task[HostPort] | None = None
        self._watching: asyncio.Task[None] | None = None
        kind = _TlsConnection if url.tls else SentinelManagedConnection
        options = {**options_of(url.login, url.tls), "db": url.db, "connection_class": kind, "redis_connect_func": self._greet}
        pool = SentinelConnectionPool(url.name, self, max_connections=MOST_CONNECTIONS, **options)
        super().__init__(pool, url.name)

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """See `Server`."""
        self._watching = self._watching or asyncio.get_running_loop().create_task(self._watch())
        return await super().send(commands)

    async def close(self) -> None:
        """See `Server`."""
        for task in (self._watching, self._asking):
            if task is not None:
                task.cancel()
        await super().close()
        for sentinel in self._sentinels:
            await sentinel.close()

    async def discover_master(self, _name: str) -> HostPort:
        """The pool asks for it: the primary by the sentinel that knows of the latest fail-over.

        Raises:
            RedisConnectionError: none knows it.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # all who asked may have left
        return await asyncio.shield(self._asking)

    async def _ask(self) -> HostPort:
        asking = [asyncio.create_task(_named(sentinel, self.name)) for sentinel in self._sentinels]
        known, complaints = list[tuple[int, HostPort]](), list[str]()
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    known.append(await answered)
                except RedisConnectionError as error:
                    complaints.append(str(error))
                if len(known) > len(asking) // 2:
                    break
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if known:
            return max(known)[1]
        raise RedisConnectionError(f"no sentinel names a primary {self.name}: " + "; ".join(complaints))

    async def _greet(self, connection: SentinelManagedConnection) -> None:
        await connection.on_connect()
        await connection.send_command(b"ROLE")
        if (await connection.read_response())[0] != b"master":
            raise RedisConnectionError(f"{connection.host}:{connection.port}: it is no primary")
        self._connections.add(connection)

    async def _watch(self) -> None:
        """Leave a server that is not the primary any more, even if it does not know that."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with contextlib.suppress(OSError, RedisError):
                primary = await self.discover_master(self.name)
                for connection in tuple(self._connections):
                    if (connection.host, connection.port) != primary:
                        await connection.disconnect(nowait=True)


class _TlsConnection(SentinelManagedConnection, TlsConnection):
    """Both."""


async def _named(sentinel: Single, name: str) -> tuple[int, HostPort]:
    """How many fail-overs a sentinel knows of, and the primary since then."""
    # The first tells of a new primary sooner.
    questions: list[Command] = [(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name), (b"SENTINEL", b"MASTER", name)]
    try:
        async with asyncio.timeout(SENTINEL_SECONDS):
            place, state = unrefused(await sentinel.send(questions))
    except TimeoutError:
        raise RedisConnectionError(f"{sentinel.name}: no answer within {SENTINEL_SECONDS:g} s") from None
    except RedisError as error:
        hint = "; the URL's option sentinel_password is theirs" if isinstance(error, AuthenticationError) else ""
        raise RedisConnectionError(f"{sentinel.name}: {error}{hint}") from error
    if place is None:
        raise RedisConnectionError(f"{sentinel.name}: it knows none of that name")
    said = dict(zip(state[::2], state[1::2], strict=True))
    return int(said.get(b"config-epoch", 0)), HostPort(place[0].decode(), int(place[1]))
