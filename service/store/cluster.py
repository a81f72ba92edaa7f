"""A Redis Cluster over redis-py's map of slots and its pools to the nodes.

Its `RedisCluster` is not used: a pipeline of it never learns that a node was replaced, a failed node makes each command read the whole
map and the list of all commands again, and `ASKING` may go over another connection than the command that it is for.
"""

import asyncio
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio.cluster import ClusterNode, NodesManager, PipelineCommand
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisClusterException, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from .server import MOST_CONNECTIONS, Command, Server, TlsConnection, options_of
from .url import StoreUrl

SLOTS = 16_384
LEARN_SECONDS = 2.0
LEARN_AGAIN_SECONDS = 0.25
"""The least time between two attempts to learn which node has what, whatever fails."""
REDIRECTIONS = 12
"""How often a command may be sent on: while slots move, some have to wait for the rest of their keys."""
AT_ONCE = 3
"""How often without a pause, which grows: nodes may also disagree for good, and send each other what none of them takes."""
PAUSE_SECONDS = 0.02
Groups = dict[tuple[ClusterNode, bool], list[int]]
"""Commands by their places among all, by node, and whether their slot is still on its way to it."""
KEY_AT = {b"EVAL": 3, b"EVALSHA": 3, b"XINFO": 2, b"XGROUP": 2}


def key_of(command: Command) -> bytes:
    """The key, or the first of several, of a command that names it as an upper-case word of bytes."""
    name = command[0]
    at = command.index(b"STREAMS") + 1 if name in (b"XREAD", b"XREADGROUP") else KEY_AT.get(name, 1)  # type: ignore[arg-type]  # as said
    key = command[at]
    return key if isinstance(key, bytes) else key.encode()


@dataclass(frozen=True, slots=True)
class ClusterServer:
    """One of the servers."""

    node: ClusterNode

    @property
    def name(self) -> str:
        """See `Server`."""
        return str(self.node.name)

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """See `Server`."""
        sent = [PipelineCommand(i, *command) for i, command in enumerate(commands)]
        await self.node.execute_pipeline(sent)
        for command in sent:
            if isinstance(command.result, Exception) and not isinstance(command.result, ResponseError):
                raise command.result
        return [command.result for command in sent]


class Cluster:
    """The `Servers` of a cluster. Which has which slot is learned when first needed, and again when a node fails or sends a command on."""

    def __init__(self, url: StoreUrl) -> None:
        kind = {"connection_class": TlsConnection} if url.tls else {}
        options = {**options_of(url.login, url.tls), "max_connections": MOST_CONNECTIONS, **kind}
        seeds = [ClusterNode(*place, **options) for place in url.places]
        self.name = seeds[0].name
        self._seeds: Mapping[str, ClusterNode] = {node.name: node for node in seeds}
        self._nodes = NodesManager(seeds, require_full_coverage=False, connection_kwargs=options)
        self._learning: asyncio.Task[None] | None = None
        self._refusal, self._not_before = "", 0.0

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """See `Server`. Where several nodes are asked, and one fails, the others may have done their part."""
        await self._known()
        replies: list[Any] = [None] * len(commands)
        groups: Groups = defaultdict(list)
        for i, command in enumerate(commands):
            groups[self._owner(command), False].append(i)
        for attempt in range(REDIRECTIONS):
            await self._ask(groups, commands, replies)
            elsewhere = [i for i, reply in enumerate(replies) if isinstance(reply, AskError | TryAgainError)]
            if not elsewhere:
                return replies
            if attempt >= AT_ONCE or any(isinstance(replies[i], TryAgainError) for i in elsewhere):
                await asyncio.sleep(PAUSE_SECONDS * (attempt + 1))
            groups = await self._redirected(elsewhere, commands, replies)
        raise RedisConnectionError(f"the cluster sent a command on {REDIRECTIONS} times: {replies[elsewhere[0]]}")

    async def primaries(self) -> Sequence[Server]:
        """See `Server`.

        Raises:
            RedisConnectionError: it is not known which they are.
        """
        await self._known()
        if len(self._nodes.slots_cache) < SLOTS:
            raise RedisConnectionError("a part of the cluster's slots has no node")
        return [ClusterServer(node) for node in self._nodes.get_nodes_by_server_type("primary")]

    def owner(self, key: str) -> Hashable:
        """See `Server`."""
        nodes = self._nodes.slots_cache.get(key_slot(key.encode()))
        return nodes[0].name if nodes else None

    async def close(self) -> None:
        """See `Server`."""
        if self._learning is not None:
            self._learning.cancel()
        for nodes in ("nodes_cache", "startup_nodes"):
            await self._nodes.aclose(nodes)

    def _owner(self, command: Command) -> ClusterNode:
        slot = key_slot(key_of(command))
        nodes = self._nodes.slots_cache.get(slot)
        if not nodes:
            self._doubt()
            raise RedisConnectionError(f"no node of the cluster has slot {slot}")
        return nodes[0]

    async def _ask(self, groups: Groups, commands: Sequence[Command], replies: list[Any]) -> None:
        """Put the replies of all nodes where they belong; raises what the first node did that failed, once all are through."""
        asking = [self._ask_node(*to, [commands[i] for i in which]) for to, which in groups.items()]
        done = await asyncio.gather(*asking, return_exceptions=True)
        for which, answers in zip(groups.values(), done, strict=True):
            if isinstance(answers, BaseException):
                raise answers
            for i, answer in zip(which, answers, strict=True):
                replies[i] = answer

    async def _ask_node(self, node: ClusterNode, asking: bool, commands: Sequence[Command]) -> list[Any]:
        try:
            if not asking:
                return await ClusterServer(node).send(commands)
            return (await ClusterServer(node).send([word for command in commands for word in ((b"ASKING",), command)]))[1::2]
        except BaseException:  # one that is silent is noticed by who stops waiting for it
            self._doubt(node.name)
            raise

    async def _redirected(self, elsewhere: Sequence[int], commands: Sequence[Command], replies: Sequence[Any]) -> Groups:
        groups: Groups = defaultdict(list)
        for i in elsewhere:
            node, error = self._owner(commands[i]), replies[i]
            if isinstance(error, AskError):
                error.host = node.host if error.host in ("", "?") else error.host  # a node may not know its own name
                to = self._nodes.get_node(error.host, error.port)
                if isinstance(error, MovedError) or to is None:
                    await self._nodes.move_slot(error)
                    to = self._nodes.get_node(error.host, error.port)
                node = to or node
            groups[node, isinstance(error, AskError) and not isinstance(error, MovedError)].append(i)
        return groups

    async def _known(self) -> None:
        """Return once it is known which node has what; raises RedisConnectionError where none tells."""
        if self._nodes.slots_cache:
            return
        if self._learning is None or not self._learning.done() or asyncio.get_running_loop().time() >= self._not_before:
            await asyncio.shield(self._doubt())
        if not self._nodes.slots_cache:
            raise RedisConnectionError(self._refusal)

    def _doubt(self, failed: str | None = None) -> "asyncio.Task[None]":
        """Learn again which node has what: soon, and never twice at a time."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.get_running_loop().create_task(self._learn(failed))
        return self._learning

    async def _learn(self, failed: str | None) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._not_before - loop.time())
        self._not_before = loop.time() + LEARN_AGAIN_SECONDS
        try:
            async with asyncio.timeout(LEARN_SECONDS):
                await self._nodes.initialize(last_failed_node_name=failed)
        except (OSError, RedisError, RedisClusterException) as error:
            why = error.__cause__ or error or f"no answer within {LEARN_SECONDS:g} s"
            self._refusal = f"no node of the cluster tells which has what: {why}"
            self._nodes.startup_nodes = {**self._nodes.startup_nodes, **self._seeds}
