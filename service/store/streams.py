"""The two streams of the loop, read from Redis 7 or later, or Valkey, as the group `join`. Knows nothing about what is in them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from redis.exceptions import ResponseError

from features.state import StoreError
from features.streams import BATCH_BYTES, FIELD, TOO_OLD, WRONG_TYPE, Batch, Entry, Extent, Owner, Stream, StreamLostError

from .client import Client, open_servers
from .redis import answering, fields_of

GROUP, CONSUMER = "join", "joiner"
SECONDS = 30.0
"""How long a step may take: a page of large rankings is megabytes."""
START, NEW = "0-0", ">"
OWNER = "adrank:join:owner"
"""Which log the streams are joined into: its id, until when by Redis's clock its joiner is thought to be at work, and where it is."""
ACKNOWLEDGED = 1_000
"""Entries of one call of the script below, whose language bounds how many words a call may have."""
ACKNOWLEDGE = b"""
redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2))
return redis.call('XDEL', KEYS[1], unpack(ARGV, 2))
"""
BEGIN = b"""#!lua flags=allow-oom
-- A Redis that is full is joined too: that makes room.
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
"""
READ = b"""
-- KEYS: the stream; ARGV: group, consumer, where to begin, most entries, most bytes. One by one: COUNT knows no bytes.
local entries, size, start = {}, 0, ARGV[3]
while #entries < tonumber(ARGV[4]) and size < tonumber(ARGV[5]) do
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], start)
  local entry = reply and reply[1][2][1]
  if not entry then return {entries, 1} end
  entries[#entries + 1] = entry
  if start ~= '>' then start = entry[1] end
  for _, word in ipairs(entry[2] or {}) do size = size + #word end
end
return {entries, 0}
"""
OWN = b"""#!lua flags=allow-oom
-- KEYS: the owner; ARGV: id, place, seconds, whether to take over.
local now, held = tonumber(redis.call('TIME')[1]), redis.call('GET', KEYS[1])
local id, till, place = string.match(held or '', '^(%S+) (%d+) (.*)$')
local left = math.max(0, (tonumber(till) or 0) - now)
local other = id and id ~= ARGV[1]
if not (other and left > 0 and ARGV[4] == '0') then
  redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. string.format('%d', now + tonumber(ARGV[3])) .. ' ' .. ARGV[2])
end
return other and {id, place, left} or {}
"""


class RedisStreams:
    """A `features.streams.Streams`. Connects when first used.

    What was delivered and never acknowledged is read again after a start and after every failure: a reply that was lost on its
    way, or entries that a joiner which was killed had in hand.
    """

    def __init__(self, url: str) -> None:
        self._servers = open_servers(url)
        self._client = Client(self._servers, SECONDS, once=True)
        self._from: dict[Stream, str] = {}
        """By stream the last entry of the pending ones that was read again, or `NEW` when there are none left."""

    async def begin(self, stream: Stream) -> bool:
        """See `Streams`."""
        async with self._asking(stream):
            try:
                await self._client.ask(b"EVAL", BEGIN, b"1", stream, GROUP)
            except ResponseError as error:
                if "BUSYGROUP" in str(error):
                    return False
                raise
            return True

    async def read(self, stream: Stream, count: int) -> Batch:
        """See `Streams`."""
        async with self._asking(stream):
            start = self._from.get(stream, START)
            entries, ended = await self._page(stream, start, count)
            if not entries and start != NEW:
                start = NEW
                entries, ended = await self._page(stream, start, count)
            self._from[stream] = NEW if start == NEW else entries[-1].id
        return Batch(entries, start == NEW and ended)

    async def _page(self, stream: Stream, start: str, count: int) -> tuple[list[Entry], bool]:
        # Never twice: entries whose reply is lost on its way are pending, and have to be read as such.
        found, ended = await self._client.ask(b"EVAL", READ, b"1", stream, GROUP, CONSUMER, start, str(count), str(BATCH_BYTES))
        return [Entry(entry_id.decode(), fields_of(words).get(FIELD, b"") if words else None) for entry_id, words in found], bool(ended)

    async def own(self, log: Owner, take_over: bool = False) -> Owner | None:
        """See `Streams`."""
        async with answering(SECONDS):
            held = await self._client.ask(b"EVAL", OWN, b"1", OWNER, log.id, log.place, str(log.seconds), str(int(take_over)))
        return Owner(held[0].decode(), held[1].decode("utf-8", "replace"), int(held[2])) if held else None

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """See `Streams`. Both steps or neither: an entry that is acknowledged but not deleted would stay for ever."""
        async with self._asking(stream):
            for start in range(0, len(ids), ACKNOWLEDGED):
                await self._client.ask(b"EVAL", ACKNOWLEDGE, b"1", stream, GROUP, *ids[start : start + ACKNOWLEDGED])

    def rewind(self, stream: Stream) -> None:
        """See `Streams`."""
        self._from.pop(stream, None)

    async def extent(self, stream: Stream) -> Extent:
        """See `Streams`."""
        async with self._asking(stream):
            info = fields_of(await self._client.ask(b"XINFO", b"STREAM", stream))
        if b"entries-added" not in info:
            raise StoreError(TOO_OLD, f"Redis 7 or later is needed, or Valkey: this server's XINFO STREAM {stream} tells no entries-added")
        oldest = Entry(info[b"first-entry"][0].decode(), None).ts if info[b"first-entry"] else None
        return Extent(int(info[b"entries-added"]), int(info[b"length"]), oldest)

    async def close(self) -> None:
        """See `Streams`."""
        await self._servers.close()

    @asynccontextmanager
    async def _asking(self, stream: Stream) -> AsyncIterator[None]:
        """Read what is pending again if this fails, and tell a stream that is gone from a Redis that does not answer."""
        try:
            async with answering(SECONDS):
                try:
                    yield
                except ResponseError as error:
                    if "NOGROUP" in str(error) or "no such key" in str(error):
                        raise StreamLostError(f"the stream {stream} or its group {GROUP} is not there") from error
                    if "WRONGTYPE" in str(error):
                        said = f"the store refused: {stream} is no stream there; somebody else wrote that key: rename it, or delete it"
                        raise StoreError(WRONG_TYPE, said) from error
                    raise
        except BaseException:
            self.rewind(stream)
            raise
