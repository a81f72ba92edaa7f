"""A Redis Cluster: which node has which slot, learned from the nodes and from their redirections.

Of the commands that are asked here it needs to know where their keys stand, and nothing else about them.
"""

import asyncio
import random
from binascii import crc_hqx
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .line import Address, Command, Line, ReplyError, unrefused
from .store_url import Place

SLOTS = 16_384
LEARN_SECONDS = 1.0
"""How long a node may take to say which node has what, before another is asked."""
LEARN_AGAIN_SECONDS = 0.25
"""The least time between two attempts to learn that, whatever fails."""
REDIRECTIONS = 12
"""How often a command may be sent on: while slots move, some have to wait for the rest of their keys."""
AT_ONCE = 3
"""How often without a pause, which grows: nodes may also disagree for good, and send each other what none of them takes."""
PAUSE_SECONDS = 0.02
KEY_AT = {b"EVAL": 3, b"EVALSHA": 3, b"XINFO": 2, b"XGROUP": 2}
ELSEWHERE = ("MOVED ", "ASK ", "TRYAGAIN")


def key_of(command: Command) -> bytes:
    """The key, or the first of several, of a command that names it as an upper-case word of bytes."""
    name = command[0]
    at = command.index(b"STREAMS") + 1 if name in (b"XREAD", b"XREADGROUP") else KEY_AT.get(name, 1)  # type: ignore[arg-type]  # as said
    key = command[at]
    return key if isinstance(key, bytes) else key.encode()


def slot_of(key: bytes) -> int:
    """The slot of a key: of what is in its first braces, where they hold something."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return crc_hqx(key[start + 1 : end] if end > start + 1 else key, 0) % SLOTS


class Cluster:
    """Who has which slot. Learned when first needed, and again when a node fails or sends a command on."""

    def __init__(self, seeds: Sequence[Address]) -> None:
        """Some of the nodes. How they are greeted is how all are."""
        self._seeds = list(seeds)
        self.owners: list[Place | None] = []
        """By slot; empty before they are known."""
        self._routes: list[ClusterRoute] = []
        self._learning: asyncio.Task[None] | None = None
        self._refusal, self._not_before = "", 0.0

    def route(self, timeout: float) -> "ClusterRoute":
        """See `topology.Servers`."""
        self._routes.append(ClusterRoute(self, timeout))
        return self._routes[-1]

    def close(self) -> None:
        """See `topology.Servers`."""
        if self._learning is not None:
            self._learning.cancel()
        for route in self._routes:
            route.close()

    def address(self, place: Place) -> Address:
        """Of a node."""
        return replace(self._seeds[0], host=place.host, port=place.port)

    async def known(self) -> None:
        """Return once the owners are known.

        Raises:
            ConnectionError: no node tells.
        """
        busy = self._learning is not None and not self._learning.done()
        if not self.owners and (busy or asyncio.get_running_loop().time() >= self._not_before):
            await asyncio.shield(self.doubt())
        if not self.owners:
            raise ConnectionError(self._refusal)

    def doubt(self) -> "asyncio.Task[None]":
        """Learn again who has what: soon, and never twice at a time."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.get_running_loop().create_task(self._learn())
        return self._learning

    def moved(self, slot: int, to: Place) -> None:
        """A node said that another has a slot now."""
        self.owners[slot] = to
        self.doubt()

    async def _learn(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._not_before - loop.time())
        self._not_before = loop.time() + LEARN_AGAIN_SECONDS
        nodes = [self.address(place) for place in dict.fromkeys(self.owners) if place]
        random.shuffle(nodes)
        failures = []
        for address in dict.fromkeys([*nodes, *self._seeds]):
            try:
                self._take(await _slots(address))
            except (OSError, ReplyError) as error:
                failures.append(str(error) or f"{address.name}: no answer within {LEARN_SECONDS:g} s")
            else:
                return
        self._refusal = f"no node of the cluster tells which has what: {'; '.join(failures)}"

    def _take(self, owners: list[Place | None]) -> None:
        self.owners = owners
        for route in self._routes:
            route.keep({place for place in owners if place})


async def _slots(address: Address) -> list[Place | None]:
    """The owners of all slots as a node sees them, over a connection that is closed again."""
    line = Line(address, LEARN_SECONDS)
    try:
        ranges = await line.ask(b"CLUSTER", b"SLOTS")
    except ReplyError as error:
        raise ConnectionError(f"{address.name}: {error}") from None
    finally:
        line.close()
    owners: list[Place | None] = [None] * SLOTS
    for first, last, (host, port, *_), *_ in ranges:
        owners[first : last + 1] = [Place(host.decode() if host else address.host, port)] * (last + 1 - first)
    if not any(owners):
        raise ConnectionError(f"{address.name}: no slot has a node; the cluster has not been made yet")
    return owners


class _Turn(NamedTuple):
    """Commands for one node, by their places among all; `asking` for those whose slot is still on its way to it."""

    place: Place
    which: list[int]
    asking: bool = False


class ClusterRoute:
    """A `topology.Route`, with a line to each node."""

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._cluster, self._timeout = cluster, timeout
        self._lines: dict[Place, Line] = {}

    async def ask(self, *command: str | bytes) -> Any:
        """See `topology.Route`."""
        if not self._cluster.owners:
            await self._known()
        try:
            return await self._line(self._owner(command)).ask(*command)
        except ReplyError as error:
            if not str(error).startswith(ELSEWHERE):
                raise
            (reply,) = unrefused(await self._sent_on([command], [error], once=False))
            return reply
        except OSError:
            self._cluster.doubt()
            raise

    async def ask_once(self, commands: Sequence[Command]) -> list[Any]:
        """See `topology.Route`."""
        return unrefused(await self.ask_all(commands, once=True))

    async def ask_all(self, commands: Sequence[Command], once: bool = False) -> list[Any]:
        """See `topology.Route`. Where several nodes are asked, and one fails, the others may have done their part."""
        if not self._cluster.owners:
            await self._known()
        replies: list[Any] = [None] * len(commands)
        await self._take_turns(self._turns(commands, range(len(commands))), commands, replies, once)
        return await self._sent_on(commands, replies, once)

    async def lines(self) -> Sequence[Line]:
        """See `topology.Route`."""
        await self._known()
        if None in self._cluster.owners:
            raise ConnectionError("a part of the cluster's slots has no node")
        return [self._line(place) for place in dict.fromkeys(self._cluster.owners) if place]

    def keep(self, places: set[Place]) -> None:
        """Close the lines to nodes that have no slot any more, once nobody can wait for their replies."""
        for place in self._lines.keys() - places:
            asyncio.get_running_loop().call_later(self._timeout + 1, self._lines.pop(place).close)

    def close(self) -> None:
        """See `topology.Route`."""
        for line in self._lines.values():
            line.close()

    async def _known(self) -> None:
        async with asyncio.timeout(self._timeout):
            await self._cluster.known()

    def _line(self, place: Place) -> Line:
        line = self._lines.get(place)
        if line is None:
            line = self._lines[place] = Line(self._cluster.address(place), self._timeout)
        return line

    def _owner(self, command: Command) -> Place:
        slot = slot_of(key_of(command))
        owner = self._cluster.owners[slot]
        if owner is None:
            self._cluster.doubt()
            raise ConnectionError(f"no node of the cluster has slot {slot}")
        return owner

    def _turns(self, commands: Sequence[Command], which: Sequence[int]) -> list[_Turn]:
        turns: dict[Place, _Turn] = {}
        for i in which:
            place = self._owner(commands[i])
            turns.setdefault(place, _Turn(place, [])).which.append(i)
        return list(turns.values())

    async def _take_turns(self, turns: Sequence[_Turn], commands: Sequence[Command], replies: list[Any], once: bool) -> None:
        """Put the replies of all nodes where they belong.

        Raises:
            TimeoutError, ConnectionError: of the first node that failed, once all are through.
        """
        done = await asyncio.gather(*(self._turn(turn, commands, once) for turn in turns), return_exceptions=True)
        for turn, answers in zip(turns, done, strict=True):
            if isinstance(answers, BaseException):
                self._cluster.doubt()
                raise answers
            for i, answer in zip(turn.which, answers, strict=True):
                replies[i] = answer

    async def _turn(self, turn: _Turn, commands: Sequence[Command], once: bool) -> list[Any]:
        line = self._line(turn.place)
        if not turn.asking:
            return await line.ask_all([commands[i] for i in turn.which], once)
        answers = await line.ask_all([word for i in turn.which for word in ((b"ASKING",), commands[i])], once)
        return answers[1::2]

    async def _sent_on(self, commands: Sequence[Command], replies: list[Any], once: bool) -> list[Any]:
        """The replies, those commands asked again that a node said were not its own: it has certainly not carried them out."""
        elsewhere = _elsewhere(replies)
        if not elsewhere:
            return replies
        async with asyncio.timeout(self._timeout):
            for attempt in range(REDIRECTIONS):
                if attempt >= AT_ONCE or any(str(replies[i]).startswith("TRYAGAIN") for i in elsewhere):
                    await asyncio.sleep(PAUSE_SECONDS * (attempt + 1))
                await self._take_turns(self._redirected(commands, replies, elsewhere), commands, replies, once)
                elsewhere = _elsewhere(replies)
                if not elsewhere:
                    return replies
        raise ConnectionError(f"the cluster sent a command on {REDIRECTIONS} times: {replies[elsewhere[0]]}")

    def _redirected(self, commands: Sequence[Command], replies: Sequence[Any], which: Sequence[int]) -> list[_Turn]:
        turns: dict[tuple[Place, bool], _Turn] = {}
        for i in which:
            kind, *where = str(replies[i]).split()
            place = self._owner(commands[i])
            if kind != "TRYAGAIN":
                place = _place(where[1], place.host)
            if kind == "MOVED":
                self._cluster.moved(int(where[0]), place)
            turns.setdefault((place, kind == "ASK"), _Turn(place, [], kind == "ASK")).which.append(i)
        return list(turns.values())


def _elsewhere(replies: Sequence[Any]) -> list[int]:
    return [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError) and str(reply).startswith(ELSEWHERE)]


def _place(text: str, same: str) -> Place:
    """Of a redirection; a node that does not know its own name leaves the host out, or says "?"."""
    host, _, port = text.rpartition(":")
    return Place(same if host in ("", "?") else host.strip("[]"), int(port))
