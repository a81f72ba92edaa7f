"""Which server has a key: one alone, the primary that sentinels name, or a node of a cluster. A route asks whoever has it.

Knows nothing of users or ads. A route is as a `Line`, which is the route to one server; what comes back is the same for all.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from .cluster import Cluster
from .line import Address, Command, Line, ReplyError, unrefused
from .store_url import Login, Place, StoreUrl, parse_store_url

SENTINEL_SECONDS = 1.0
"""How long a sentinel may take to answer. All are asked at the same time, and once most have answered nobody waits for the others:
one often goes down together with the primary, on the same host.
"""
WATCH_SECONDS = 0.25
"""How often sentinels are asked whether the primary is another one: one that is only cut off does not say so itself."""


class Route(Protocol):
    """Asks whichever server has a key, see `Line`. Not to be asked for keys of several slots in one command."""

    async def ask(self, *command: str | bytes) -> Any:
        """See `Line`."""

    async def ask_once(self, commands: Sequence[Command]) -> list[Any]:
        """See `Line`; each command is carried out once at most, and sent on where a server said that it was not its own."""

    async def ask_all(self, commands: Sequence[Command]) -> list[Any]:
        """See `Line`."""

    async def lines(self) -> Sequence[Line]:
        """Lines to all primaries, for what has no key.

        Raises:
            TimeoutError, ConnectionError: it is not known which they are.
        """

    def close(self) -> None:
        """Let go of connections."""


class Servers(Protocol):
    """The servers of a store; what is learned about them is shared by all routes."""

    def route(self, timeout: float) -> Route:
        """A route with connections of its own; a command may take `timeout` seconds."""

    def close(self) -> None:
        """Close all routes."""


def open_servers(url: str) -> Servers:
    """The servers of a URL. Nothing is connected yet.

    Raises:
        ValueError: it is no URL of a store on servers.
    """
    read = parse_store_url(url)
    if read.kind == "cluster":
        return Cluster([address_of(place, read) for place in read.places])
    if read.kind == "sentinel":
        return Sentinels(read)
    if read.kind == "alone":
        return Alone(address_of(read.places[0] if read.places else Place("", 0), read))
    raise ValueError("a store in memory has no servers")


def address_of(place: Place, url: StoreUrl) -> Address:
    """Of a server of the store, with what opens a conversation."""
    select: tuple[Command, ...] = (("SELECT", str(url.db)),) if url.db else ()
    tls = url.tls.context if url.tls else None
    return Address(*place, url.path or None, tls, _greeting(url.login) + select, url.kind == "sentinel")


def _greeting(login: Login) -> tuple[Command, ...]:
    return (("AUTH", *([login.user] if login.user else []), login.password),) if login.password else ()


class Alone:
    """One server."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lines: list[Line] = []

    def route(self, timeout: float) -> Route:
        """See `Servers`."""
        self._lines.append(Line(self._address, timeout))
        return self._lines[-1]

    def close(self) -> None:
        """See `Servers`."""
        for line in self._lines:
            line.close()


class Sentinels:
    """The primary that sentinels name. They are asked when a connection is opened, and four times a second, since a primary that is cut
    off from the others goes on to answer.
    """

    def __init__(self, url: StoreUrl) -> None:
        tls, greeting = url.tls.context if url.tls else None, _greeting(url.sentinel_login)
        self._url = url
        self._sentinels = [Line(Address(*place, None, tls, greeting), SENTINEL_SECONDS) for place in url.places]
        self._lines: list[Line] = []
        self._asking: asyncio.Task[Address] | None = None
        self._watching: asyncio.Task[None] | None = None

    def route(self, timeout: float) -> Route:
        """See `Servers`."""
        self._lines.append(Line(self.primary, timeout))
        return self._lines[-1]

    def close(self) -> None:
        """See `Servers`."""
        for task in (self._watching, self._asking):
            if task is not None:
                task.cancel()
        for line in (*self._lines, *self._sentinels):
            line.close()

    async def primary(self) -> Address:
        """The address of the primary, by the sentinel that knows of the latest fail-over.

        Raises:
            ConnectionError: none knows it.
        """
        loop = asyncio.get_running_loop()
        self._watching = self._watching or loop.create_task(self._watch())
        if self._asking is None or self._asking.done():
            self._asking = loop.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> Address:
        name = self._url.name
        # The first tells of a new primary sooner; the second tells how many fail-overs there have been.
        commands: list[Command] = [(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name), (b"SENTINEL", b"MASTER", name)]
        asking = [asyncio.create_task(line.ask_all(commands)) for line in self._sentinels]
        known, complaints = list[tuple[int, Place]](), list[str]()
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    known.append(_named(await answered))
                except (OSError, ReplyError) as error:
                    complaints.append(_why(error))
                if len(known) > len(asking) // 2:
                    break
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if known:
            return address_of(max(known)[1], self._url)
        raise ConnectionError(f"no sentinel names a primary {name}: " + "; ".join(complaints))

    async def _watch(self) -> None:
        """Leave a server that is not the primary any more, even if it does not know that."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with contextlib.suppress(OSError):
                primary = await self.primary()
                for line in self._lines:
                    if line.to is not None and line.to != primary:
                        line.leave()


def _named(answer: list[Any]) -> tuple[int, Place]:
    """How many fail-overs a sentinel knows of, and the primary since then."""
    place, state = unrefused(answer)
    if place is None:
        raise ConnectionError("it knows none of that name")
    said = dict(zip(state[::2], state[1::2], strict=True))
    return int(said.get(b"config-epoch", 0)), Place(place[0].decode(), int(place[1]))


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {SENTINEL_SECONDS:g} s"
    return f"{error}; the URL's option sentinel_password is theirs" if "NOAUTH" in str(error) else str(error)
