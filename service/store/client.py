"""What the store asks its servers with: commands that may take so long, and the reads of users, of which one turn of the event loop makes
one round trip.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from .cluster import Cluster
from .sentinel import Primary
from .server import Command, Server, Servers, alone, unrefused
from .url import parse_store_url

AT_ONCE = 64
"""What one client has on its way at once, each on a connection of its own; more wait for their turn."""
BATCHES = 4
"""The same of reads, to one server: few, so that few connections have to be opened while requests wait, which takes long over TLS."""
SILENT_SECONDS = 1.0
"""How long replies are read that nobody waits for any more; then the connection is given up, since it may be half open."""


def open_servers(url: str) -> Servers:
    """The servers of a URL. Nothing is connected yet.

    Raises:
        ValueError: it is no URL of a store on servers.
    """
    read = parse_store_url(url)
    if read.kind == "memory":
        raise ValueError("a store in memory has no servers")
    if read.kind == "cluster":
        return Cluster(read)
    return Primary(read) if read.kind == "sentinel" else alone(read)


class Client:
    """Asks within so many seconds. With `once` nothing is sent twice; else what a lost connection may have swallowed is."""

    def __init__(self, server: Server, timeout: float, once: bool = False) -> None:
        self._server, self._timeout, self._once = server, timeout, once
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, *command: str | bytes) -> Any:
        """The reply to a command.

        Raises:
            OSError, RedisError: there is none in time, or the server refused.
        """
        (reply,) = unrefused(await self.ask_all([command]))
        return reply

    async def ask_all(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to commands that go out together; a refusal stands among them as its `ResponseError`.

        Raises:
            OSError, RedisError: there were none in time. Some commands may have been carried out.
        """
        async with asyncio.timeout(self._timeout), self._turns:
            return await (self._server.send(commands) if self._once else again(self._server, commands))


async def again(server: Server, commands: Sequence[Command]) -> list[Any]:
    """The replies; where the connection is lost, of a second attempt. Raises as `Server.send` does."""
    with suppress(RedisConnectionError):
        return await server.send(commands)
    return await server.send(commands)


Read = tuple[str, "asyncio.Future[bytes]"]


class Reads:
    """Reads begins of values. Those that are asked for in one turn of the event loop go out together, to each server in one round trip;
    so do those that had to wait since `BATCHES` were on their way to it.

    A batch belongs to nobody who asks: whoever is cancelled, or waits no longer, leaves it whole, so that no reply is ever another's.
    """

    def __init__(self, servers: Servers, timeout: float, most: int) -> None:
        """Whom to ask, how many seconds a read may take, and how many bytes of a value are read."""
        self._servers, self._timeout, self._end = servers, timeout, str(most).encode()
        self._turn = list[Read]()
        self._waiting, self._busy = defaultdict[Hashable, list[Read]](list), Counter[Hashable]()
        self._tasks = set[asyncio.Task[None]]()

    def read(self, key: str) -> "asyncio.Future[bytes]":
        """The value to be, empty where there is none.

        Raises:
            OSError, RedisError: there is none in time, or the server refused.
        """
        loop = asyncio.get_running_loop()
        if not self._turn:
            loop.call_soon(self._end_turn)
        future: asyncio.Future[bytes] = loop.create_future()
        self._turn.append((key, future))
        return future

    def _end_turn(self) -> None:
        loop, reads, half = asyncio.get_running_loop(), self._turn, self._timeout / 2
        self._turn = []
        # In two steps, and a turn of the loop later: a reply that came while a model kept the loop is not blamed on the store.
        loop.call_later(half, loop.call_later, half, loop.call_soon, _give_up, reads)
        for read in reads:
            self._waiting[self._servers.owner(read[0])].append(read)
        for owner in tuple(self._waiting):
            self._send(owner)

    def _send(self, owner: Hashable) -> None:
        if owner in self._waiting and self._busy[owner] < BATCHES:
            batch = [read for read in self._waiting.pop(owner) if not read[1].done()]
            self._busy[owner] += 1
            task = asyncio.get_running_loop().create_task(self._ask(owner, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            silence = asyncio.get_running_loop().call_later(max(self._timeout, SILENT_SECONDS), task.cancel)
            task.add_done_callback(lambda _: silence.cancel())

    async def _ask(self, owner: Hashable, batch: Sequence[Read]) -> None:
        replies: Sequence[Any]
        try:
            replies = await again(self._servers, [(b"GETRANGE", key, b"0", self._end) for key, _ in batch])
        except (OSError, RedisError) as error:
            replies = [error] * len(batch)
        finally:
            self._busy[owner] -= 1
        for (_, future), reply in zip(batch, replies, strict=True):
            if not future.done() and isinstance(reply, bytes):
                future.set_result(reply)
            elif not future.done():
                future.set_exception(reply if isinstance(reply, Exception) else ResponseError(f"it answers GETRANGE by {reply!r:.40}"))
        self._send(owner)

    async def close(self) -> None:
        """Wait for nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _give_up(reads: Sequence[Read]) -> None:
    for _, future in reads:
        if not future.done():
            future.set_exception(TimeoutError())
