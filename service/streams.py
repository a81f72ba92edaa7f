"""The two streams of the loop, read from Redis 7 or later, or Valkey, as the group `join`. Knows nothing about what is in them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from features.streams import FIELD, Batch, Entry, Extent, Stream, StreamLostError

from .line import ReplyError
from .store import answering, fields_of
from .topology import open_servers

GROUP, CONSUMER = "join", "joiner"
SECONDS = 30.0
"""How long a step may take: a page of large rankings is megabytes."""
START, NEW = "0-0", ">"
ACKNOWLEDGED = 1_000
"""Entries of one call of the script below, whose language bounds how many words a call may have."""
ACKNOWLEDGE = b"""
redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2))
return redis.call('XDEL', KEYS[1], unpack(ARGV, 2))
"""


class RedisStreams:
    """A `features.streams.Streams`. Connects when first used.

    What was delivered and never acknowledged is read again after a start and after every failure: a reply that was lost on its
    way, or entries that a joiner which was killed had in hand.
    """

    def __init__(self, url: str) -> None:
        self._servers = open_servers(url)
        self._route = self._servers.route(SECONDS)
        self._from: dict[Stream, str] = {}
        """By stream the last entry of the pending ones that was read again, or `NEW` when there are none left."""

    async def begin(self, stream: Stream) -> bool:
        """See `Streams`."""
        async with self._asking(stream):
            try:
                await self._route.ask(b"XGROUP", b"CREATE", stream, GROUP, b"0", b"MKSTREAM")
            except ReplyError as error:
                if "BUSYGROUP" in str(error):
                    return False
                raise
            return True

    async def read(self, stream: Stream, count: int) -> Batch:
        """See `Streams`."""
        async with self._asking(stream):
            start = self._from.get(stream, START)
            entries = await self._page(stream, start, count)
            if not entries and start != NEW:
                start = NEW
                entries = await self._page(stream, start, count)
            self._from[stream] = NEW if start == NEW else entries[-1].id
        return Batch(entries, start == NEW and len(entries) < count)

    async def _page(self, stream: Stream, start: str, count: int) -> list[Entry]:
        # Once: entries whose reply is lost on its way are pending, and have to be read as such.
        command = (b"XREADGROUP", b"GROUP", GROUP, CONSUMER, b"COUNT", str(count), b"STREAMS", stream, start)
        (reply,) = await self._route.ask_once([command])
        found = reply[0][1] if reply else []
        return [Entry(entry_id.decode(), fields_of(words).get(FIELD, b"") if words else None) for entry_id, words in found]

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """See `Streams`. Both steps or neither: an entry that is acknowledged but not deleted would stay for ever."""
        async with self._asking(stream):
            for start in range(0, len(ids), ACKNOWLEDGED):
                await self._route.ask(b"EVAL", ACKNOWLEDGE, b"1", stream, GROUP, *ids[start : start + ACKNOWLEDGED])

    def rewind(self, stream: Stream) -> None:
        """See `Streams`."""
        self._from.pop(stream, None)

    async def extent(self, stream: Stream) -> Extent:
        """See `Streams`."""
        async with self._asking(stream):
            info = fields_of(await self._route.ask(b"XINFO", b"STREAM", stream))
        oldest = Entry(info[b"first-entry"][0].decode(), None).ts if info[b"first-entry"] else None
        return Extent(int(info[b"entries-added"]), int(info[b"length"]), oldest)

    async def close(self) -> None:
        """See `Streams`."""
        self._servers.close()
        await asyncio.sleep(0)  # the event loop closes their sockets in its next turn, if it has one

    @asynccontextmanager
    async def _asking(self, stream: Stream) -> AsyncIterator[None]:
        """Read what is pending again if this fails, and tell a stream that is gone from a Redis that does not answer."""
        try:
            async with answering(SECONDS):
                try:
                    yield
                except ReplyError as error:
                    if str(error).startswith("NOGROUP") or "no such key" in str(error):
                        raise StreamLostError(f"the stream {stream} or its group {GROUP} is not there") from error
                    raise
        except BaseException:
            self.rewind(stream)
            raise
