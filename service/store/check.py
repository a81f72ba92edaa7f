"""What `adrank doctor` asks of Redis or Valkey. Reads, and sends commands that cannot change anything; never changes anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from redis.exceptions import ResponseError

from features.streams import EVENTS, SERVED, STREAMS

from .client import Client, open_servers
from .errors import lacks_permission
from .redis import CHANGES, HASHES, PROBE, answering, fields_of
from .streams import GROUP

CONNECT_SECONDS = 3.0
SECONDS = 15.0
"""For all questions together."""
NOWHERE = "adrank:seen:probe"
NOBODY = "adrank-doctor"
HARMLESS: Mapping[str, Sequence[Sequence[str]]] = {
    "adrank serve": (
        ("GETRANGE", PROBE, "0", "0"),
        ("HSCAN", "adrank:ads:{0}", "0", "COUNT", "1"),
        ("HMGET", "adrank:ads:{0}", ""),
        ("XREAD", "COUNT", "1", "STREAMS", CHANGES, "$"),
        ("XRANGE", CHANGES, "0-1", "0-1", "COUNT", "1"),
        ("XINFO", "STREAM", CHANGES),
        ("XLEN", SERVED),
        ("XADD", SERVED, "0-0", "v", ""),
    ),
    "POST /v1/events": (
        ("HGET", "adrank:ads:{0}", ""),
        ("HSTRLEN", "adrank:ads:{0}", ""),
        ("EVAL", "return 0", "1", NOWHERE),
        ("TYPE", NOWHERE),
        ("DEL", NOWHERE),
        ("ZMSCORE", NOWHERE, ""),
        ("EVALSHA", "0" * 40, "1", NOWHERE),
        ("SET", PROBE, "", "XX"),
        ("HSET", "adrank:ads:{0}", "a", "b", "c"),
        ("ZADD", NOWHERE, "XX", "0", ""),
        ("ZCARD", NOWHERE),
        ("ZRANGE", NOWHERE, "0", "0"),
        ("ZREMRANGEBYSCORE", NOWHERE, "1", "0"),
        ("ZREMRANGEBYRANK", NOWHERE, "1", "0"),
        ("EXPIREAT", NOWHERE, "1"),
        ("TIME",),
        ("XADD", EVENTS, "0-0", "v", ""),
        ("XADD", CHANGES, "0-0", "v", ""),
    ),
    "adrank load": (("HDEL", "adrank:ads:{0}", ""),),
    "adrank join": (
        ("XGROUP", "CREATE", SERVED, NOBODY, "none"),
        ("XREADGROUP", "GROUP", NOBODY, NOBODY, "COUNT", "1", "STREAMS", SERVED, ">"),
        ("XACK", SERVED, NOBODY, "0-0"),
        ("XDEL", SERVED, "0-0"),
        ("XINFO", "STREAM", SERVED),
    ),
}
"""Commands of each part of adrank, in a form that changes nothing: an id that no entry can have, a key that is nowhere."""


@dataclass(frozen=True, slots=True)
class Node:
    """One server: what INFO says, None where it may not be asked, and how many seconds its clock is ahead of ours."""

    name: str
    facts: Mapping[str, Any] | None
    ahead: float | None


@dataclass(frozen=True, slots=True)
class Queue:
    """A stream: its entries, seconds since the oldest was appended, whether a joiner has ever read, and seconds since it last did."""

    length: int = 0
    oldest: float | None = None
    has_joiner: bool = False
    idle: float | None = None


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found. `ads` and `queues` are None where they may not be read."""

    nodes: Sequence[Node]
    ads: int | None
    queues: Mapping[str, Queue] | None
    denied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By part of adrank the commands that the store's user may not give."""
    unwritable: str | None = None
    """Why nothing can be written at all."""


async def look(url: str, clock: Callable[[], float] = time) -> Looked:
    """Ask the store that the URL names, in a cluster each of its primaries; `clock` is this machine's.

    Raises:
        StoreError: it cannot be reached, does not answer in time, or refuses the password.
    """
    servers = open_servers(url)
    client = Client(servers, CONNECT_SECONDS)
    try:
        async with answering(CONNECT_SECONDS):
            primaries = [(server.name, Client(server, CONNECT_SECONDS)) for server in await servers.primaries()]
            for _, primary in primaries:
                try:
                    await primary.ask(b"PING")
                except ResponseError as error:
                    if not lacks_permission(error):
                        raise
        async with answering(SECONDS):
            denied, unwritable = await _probe(client, primaries[0][1])
            nodes = [await _node(name if len(primaries) > 1 else "", primary, clock) for name, primary in primaries]
            return Looked(nodes, await _ads(client), await _queues(client), denied, unwritable)
    finally:
        await servers.close()


async def _node(name: str, server: Client, clock: Callable[[], float]) -> Node:
    try:
        began = clock()
        seconds, microseconds = await server.ask(b"TIME")
        ahead: float | None = int(seconds) + int(microseconds) / 1e6 - (began + clock()) / 2
    except ResponseError:
        ahead = None
    try:
        return Node(name, _facts(await server.ask(b"INFO")), ahead)
    except ResponseError:
        return Node(name, None, ahead)


def _facts(info: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


async def _ads(client: Client) -> int | None:
    try:
        return sum([int(await client.ask(b"HLEN", f"adrank:ads:{{{n}}}")) for n in range(HASHES)])
    except ResponseError:
        return None


async def _queues(client: Client) -> Mapping[str, Queue] | None:
    try:
        return {name: await _queue(client, name) for name in (*STREAMS, CHANGES)}
    except ResponseError:
        return None


async def _queue(client: Client, name: str) -> Queue:
    length = int(await client.ask(b"XLEN", name))
    first = await client.ask(b"XRANGE", name, b"-", b"+", b"COUNT", b"1")
    oldest = time() - int(first[0][0].partition(b"-")[0]) / 1000 if first else None
    try:
        groups = [fields_of(group) for group in await client.ask(b"XINFO", b"GROUPS", name)]
        has_joiner = any(group[b"name"] == GROUP.encode() for group in groups)
        consumers = await client.ask(b"XINFO", b"CONSUMERS", name, GROUP) if has_joiner else []
    except ResponseError as error:
        if lacks_permission(error):
            raise
        return Queue(length, oldest)  # there is no such stream
    idle = min((int(fields_of(consumer)[b"idle"]) / 1000 for consumer in consumers), default=None)
    return Queue(length, oldest, has_joiner, idle)


async def _probe(client: Client, any_server: Client) -> tuple[dict[str, list[str]], str | None]:
    """What may not be done, by part of adrank; and why nothing can be written: it is a replica, full, or its disk is."""
    denied: dict[str, list[str]] = {}
    unwritable = None
    for part, commands in HARMLESS.items():
        for command in commands:
            try:
                await (client if _key(command) else any_server).ask(*map(str.encode, command))
            except ResponseError as error:
                if lacks_permission(error):
                    denied.setdefault(part, []).append(f"{command[0]} {_key(command)}".strip())
                elif command[0] == "SET":
                    unwritable = str(error)
    return denied, unwritable


def _key(command: Sequence[str]) -> str:
    return next((word for word in command[1:] if word.startswith("adrank:")), "")
