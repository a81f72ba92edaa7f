"""What `adrank doctor` asks of Redis or Valkey. Reads, and sends commands that cannot change anything; never changes anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError, ResponseError

from features.streams import EVENTS, SERVED, STREAMS

from .store import CHANGES, HASHES, PROBE, answering, connect
from .store_errors import NO_PERMISSION
from .streams import GROUP

CONNECT_SECONDS = 3.0
SECONDS = 15.0
"""For all questions together."""
NOWHERE = "adrank:seen:probe"
NOBODY = "adrank-doctor"
HARMLESS: Mapping[str, Sequence[Sequence[str]]] = {
    "adrank serve": (
        ("GET", PROBE),
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
    client = connect(url, 2)
    try:
        async with answering(CONNECT_SECONDS):
            try:
                await client.ping()
            except ResponseError as error:
                if not _denied(error):
                    raise
        async with answering(SECONDS):
            return await look_with(client, clock)
    finally:
        await client.aclose()


async def look_with(client: Any, clock: Callable[[], float]) -> Looked:
    """Ask with a client that is connected."""
    nodes = [await _node(client, clock, *place) for place in _places(client)]
    denied, unwritable = await _probe(client)
    return Looked(nodes, await _ads(client), await _queues(client), denied, unwritable)


def _places(client: Any) -> list[tuple[str, dict[str, Any]]]:
    """Each server by name, and the options that send it a command."""
    if isinstance(client, RedisCluster):
        return [(node.name, {"target_nodes": node}) for node in client.get_primaries()]
    return [("", {})]


async def _node(client: Any, clock: Callable[[], float], name: str, options: Mapping[str, Any]) -> Node:
    try:
        began = clock()
        seconds, microseconds = await client.execute_command("TIME", **options)
        ahead: float | None = int(seconds) + int(microseconds) / 1e6 - (began + clock()) / 2
    except ResponseError:
        ahead = None
    try:
        return Node(name, await client.execute_command("INFO", **options), ahead)
    except ResponseError:
        return Node(name, None, ahead)


async def _ads(client: Any) -> int | None:
    try:
        async with client.pipeline(transaction=False) as pipe:
            for n in range(HASHES):
                pipe.hlen(f"adrank:ads:{{{n}}}")
            counts: list[int] = await pipe.execute()
            return sum(counts)
    except ResponseError:
        return None


async def _queues(client: Any) -> Mapping[str, Queue] | None:
    try:
        return {name: await _queue(client, name) for name in (*STREAMS, CHANGES)}
    except ResponseError:
        return None


async def _queue(client: Any, name: str) -> Queue:
    length = await client.xlen(name)
    first = await client.xrange(name, count=1)
    oldest = time() - int(first[0][0].partition(b"-")[0]) / 1000 if first else None
    try:
        groups = [group for group in await client.xinfo_groups(name) if group["name"] == GROUP.encode()]
        consumers = await client.xinfo_consumers(name, GROUP) if groups else []
    except ResponseError as error:
        if _denied(error):
            raise
        return Queue(length, oldest)  # there is no such stream
    idle = min((consumer["idle"] / 1000 for consumer in consumers), default=None)
    return Queue(length, oldest, bool(groups), idle)


async def _probe(client: Any) -> tuple[dict[str, list[str]], str | None]:
    """What may not be done, by part of adrank; and why nothing can be written: it is a replica, full, or its disk is."""
    denied: dict[str, list[str]] = {}
    unwritable = None
    for part, commands in HARMLESS.items():
        for command in commands:
            try:
                await client.execute_command(*command)
            except ResponseError as error:
                if _denied(error):
                    denied.setdefault(part, []).append(f"{command[0]} {_key(command)}".strip())
                elif command[0] == "SET":
                    unwritable = str(error)
            except (IndexError, KeyError, TypeError):  # redis-py could not make sense of an empty answer
                continue
    return denied, unwritable


def _key(command: Sequence[str]) -> str:
    return next((word for word in command[1:] if word.startswith("adrank:")), "")


def _denied(error: RedisError) -> bool:
    return any(sign.lower() in str(error).lower() for sign in NO_PERMISSION)
