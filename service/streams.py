"""The two streams of the loop, read from Redis 7 or later, or Valkey, as the group `join`. Knows nothing about what is in them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import ResponseError

from features.streams import FIELD, Batch, Entry, Extent, Stream, StreamLostError

from .store import answering, connect

GROUP, CONSUMER = "join", "joiner"
SECONDS = 30.0
"""How long a step may take: a page of large rankings is megabytes."""
START, NEW = "0-0", ">"


class RedisStreams:
    """A `features.streams.Streams`. Connects when first used.

    What was delivered and never acknowledged is read again after a start and after every failure: a reply that was lost on its
    way, or entries that a joiner which was killed had in hand.
    """

    def __init__(self, url: str) -> None:
        self._redis = connect(url, 4)
        self._from: dict[Stream, str] = {}
        """By stream the last entry of the pending ones that was read again, or `NEW` when there are none left."""

    async def begin(self, stream: Stream) -> bool:
        """See `Streams`."""
        async with self._asking(stream):
            try:
                await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
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
        reply = await self._redis.xreadgroup(GROUP, CONSUMER, {stream: start}, count=count)
        found = reply[0][1] if reply else []
        return [Entry(entry_id.decode(), fields.get(FIELD, b"") if fields else None) for entry_id, fields in found]

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """See `Streams`. Both steps or neither: an entry that is acknowledged but not deleted would stay for ever."""
        if not ids:
            return
        async with self._asking(stream), self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(stream, GROUP, *ids)
            pipe.xdel(stream, *ids)
            await pipe.execute()

    def rewind(self, stream: Stream) -> None:
        """See `Streams`."""
        self._from.pop(stream, None)

    async def extent(self, stream: Stream) -> Extent:
        """See `Streams`."""
        async with self._asking(stream):
            info: Any = await self._redis.xinfo_stream(stream)
        oldest = Entry(info["first-entry"][0].decode(), None).ts if info["first-entry"] else None
        return Extent(int(info["entries-added"]), int(info["length"]), oldest)

    async def close(self) -> None:
        """See `Streams`."""
        await self._redis.aclose()

    @asynccontextmanager
    async def _asking(self, stream: Stream) -> AsyncIterator[None]:
        """Read what is pending again if this fails, and tell a stream that is gone from a Redis that does not answer."""
        try:
            async with answering(SECONDS):
                try:
                    yield
                except ResponseError as error:
                    if str(error).startswith("NOGROUP") or "no such key" in str(error):
                        raise StreamLostError(f"the stream {stream} or its group {GROUP} is not there") from error
                    raise
        except BaseException:
            self.rewind(stream)
            raise
