"""Keys of the store that are not what adrank writes there: a wrong type, a value that is too large or cannot be read.

Every key that begins with `adrank:` is adrank's own. One of a wrong type holds nothing of ours, and no command of ours can be carried
out on it: whoever writes takes it away first, whoever only reads goes without. Each is counted, and the log says which.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from .client import Client
from .server import Command

CLEAR = b"""
if redis.call('TYPE', KEYS[1])['ok'] == ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
TYPES = {b"GETRANGE": b"string", b"ZMSCORE": b"zset", b"XLEN": b"stream", b"XADD": b"stream"}
"""Of the key that a command is about; all others are about hashes."""
TELL_SECONDS = 10.0
"""A line about what is met by every request comes as often as that at most."""

log = logging.getLogger(__name__)


def is_wrong_type(reply: object) -> bool:
    """Whether it is the refusal of a command that does not fit the type of its key."""
    return isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply)  # within a script it comes after other words


class Damage:
    """Tells of damaged keys, and takes away those that nothing can be written to."""

    def __init__(self) -> None:
        self.on_replaced: Callable[[], None] = lambda: None
        """Called for each key that had a wrong type and was taken away."""
        self._last_line, self._unlogged = float("-inf"), 0

    def tell(self, key: str | bytes, why: str) -> None:
        """Log a key that is done without; not each time where there are many."""
        now = time.monotonic()
        if now - self._last_line < TELL_SECONDS:
            self._unlogged += 1
            return
        more = f"; so were {self._unlogged} more since the last such line" if self._unlogged else ""
        self._last_line, self._unlogged = now, 0
        log.warning("the store's key %s is done without: %s%s", _text(key), why, more)

    async def clear(self, client: Client, key: str | bytes, kind: bytes) -> None:
        """Take a key away unless it is of that type.

        Raises:
            OSError, RedisError: the server did not answer, or refused.
        """
        if await client.ask(b"EVAL", CLEAR, b"1", key, kind):
            log.warning("the store's key %s was no %s, so adrank could not use it: it was taken away", _text(key), kind.decode())
            self.on_replaced()

    async def ask_all(self, client: Client, commands: Sequence[Command]) -> tuple[list[Any], set[str | bytes]]:
        """The replies as `Client.ask_all` gives them, where keys of a wrong type are taken away first; and which those were.

        Raises:
            OSError, RedisError: the server did not answer, or a key could not be taken away.
        """
        replies = await client.ask_all(commands)
        which = [i for i, reply in enumerate(replies) if is_wrong_type(reply)]
        if not which:
            return replies, set()
        wrong = {_key(commands[i]): TYPES.get(bytes(commands[i][0]), b"hash") for i in which}  # type: ignore[arg-type]  # names are bytes
        for key, kind in wrong.items():
            await self.clear(client, key, kind)
        for i, reply in zip(which, await client.ask_all([commands[i] for i in which]), strict=True):
            replies[i] = reply
        return replies, set(wrong)


def _key(command: Command) -> str | bytes:
    return command[3 if command[0] == b"EVAL" else 1]


def _text(key: str | bytes) -> str:
    """A key for a log: without line ends, and not longer than a person reads."""
    text = key if isinstance(key, str) else key.decode("utf-8", "replace")
    return ascii(text if len(text) <= 200 else f"{text[:200]}…")
