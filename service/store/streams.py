"""The two streams of the loop, read from Redis 7 or later, or Valkey, as the group `join`. Knows nothing about what is in them."""

import os
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import ResponseError

from features.state import StoreError
from features.streams import BATCH_BYTES, FIELD, FIGURES, TOO_OLD, WRONG_TYPE, Batch, Entry, Extent, Owner, Stream, StreamLostError

from .client import Client, open_servers
from .redis import answering, fields_of, figures_of

GROUP = "join"
SECONDS = 30.0
"""How long a step may take: a page of large rankings is megabytes."""
OWNER = "adrank:join:owner"
"""Which log the streams are written into: its id, until when by Redis's clock its sinks are thought to be at work, and where it is."""
TAKEN = "adrank:join:taken:{%s}"
"""By stream, in its slot of a cluster: how many entries were acknowledged, and of how many that were trimmed somebody was told."""
ACKNOWLEDGED = 1_000
"""Entries of one call of the script below, whose language bounds how many words a call may have."""
ACKNOWLEDGE = b"""#!lua flags=allow-oom
redis.call('HINCRBY', KEYS[2], 'taken', redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 2)))
return redis.call('XDEL', KEYS[1], unpack(ARGV, 2))
"""
BEGIN = b"""#!lua flags=allow-oom
-- A Redis that is full is read too: that makes room.
local made = redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
redis.call('DEL', KEYS[2])
return made
"""
READ = b"""
-- KEYS: the stream; ARGV: group, consumer, most entries, most bytes. One by one: COUNT knows no bytes.
local entries, size = {}, 0
while #entries < tonumber(ARGV[3]) and size < tonumber(ARGV[4]) do
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], '>')
  local entry = reply and reply[1][2][1]
  if not entry then return {entries, 1} end
  entries[#entries + 1] = entry
  for _, word in ipairs(entry[2]) do size = size + #word end
end
return {entries, 0}
"""
CLAIM = b"""
-- KEYS: the stream; ARGV: group, consumer, most entries, most bytes, milliseconds. What was trimmed is pending no more. A consumer
-- that holds nothing and asks for nothing is forgotten; one that lives is made anew by its next read.
local entries, size = {}, 0
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[5], '-', '+', ARGV[3])) do
  if size >= tonumber(ARGV[4]) then break end
  local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[5], pending[1])[1]
  if entry then
    entries[#entries + 1] = entry
    for _, word in ipairs(entry[2]) do size = size + #word end
  end
end
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  if consumer[4] == 0 and consumer[6] >= tonumber(ARGV[5]) then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer[2]) end
end
return entries
"""
EXTENT = b"""#!lua flags=allow-oom
local info, words = {}, redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #words, 2 do info[words[i]] = words[i + 1] end
local now, first = redis.call('TIME'), info['first-entry'] and info['first-entry'][1] or ''
if not info['entries-added'] then return {} end
local gone = info['entries-added'] - info['length']
local taken, told = unpack(redis.call('HMGET', KEYS[2], 'taken', 'told'))
local lost = told and gone - (taken or 0) - told or 0
-- Nobody can tell what became of entries that had left before anybody counted.
if not told then redis.call('HSET', KEYS[2], 'told', gone - (taken or 0)) end
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'told', lost) end
return {info['length'], first, math.max(0, lost), now[1] * 1000 + math.floor(now[2] / 1000)}
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

    An entry whose reply was lost on its way stays pending, and somebody claims it later.
    """

    def __init__(self, url: str, consumer: str = "") -> None:
        self._servers = open_servers(url)
        self._client = Client(self._servers, SECONDS, once=True)
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"

    async def begin(self, stream: Stream) -> bool:
        """See `Streams`."""
        async with _asking(stream):
            try:
                await self._client.ask(b"EVAL", BEGIN, b"2", stream, TAKEN % stream, GROUP)
            except ResponseError as error:
                if "BUSYGROUP" in str(error):
                    return False
                raise
            return True

    async def read(self, stream: Stream, count: int) -> Batch:
        """See `Streams`."""
        async with _asking(stream):
            # Never twice: entries whose reply is lost on its way are pending, and have to be claimed.
            found, ended = await self._client.ask(b"EVAL", READ, b"1", stream, GROUP, self.consumer, str(count), str(BATCH_BYTES))
            return Batch(_entries(found), bool(ended))

    async def claim(self, stream: Stream, count: int, idle: float) -> Sequence[Entry]:
        """See `Streams`."""
        words = (GROUP, self.consumer, str(count), str(BATCH_BYTES), str(round(1000 * idle)))
        async with _asking(stream):
            return _entries(await self._client.ask(b"EVAL", CLAIM, b"1", stream, *words))

    async def pending(self, stream: Stream) -> int:
        """See `Streams`."""
        async with _asking(stream):
            return int((await self._client.ask(b"XPENDING", stream, GROUP))[0])

    async def own(self, log: Owner, take_over: bool = False) -> Owner | None:
        """See `Streams`."""
        async with answering(SECONDS):
            held = await self._client.ask(b"EVAL", OWN, b"1", OWNER, log.id, log.place, str(log.seconds), str(int(take_over)))
        return Owner(held[0].decode(), held[1].decode("utf-8", "replace"), int(held[2])) if held else None

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """See `Streams`. Both steps or neither: an entry that is acknowledged but not deleted would stay for ever."""
        async with _asking(stream):
            for start in range(0, len(ids), ACKNOWLEDGED):
                some = ids[start : start + ACKNOWLEDGED]
                await self._client.ask(b"EVAL", ACKNOWLEDGE, b"2", stream, TAKEN % stream, GROUP, *some)

    async def extent(self, stream: Stream) -> Extent:
        """See `Streams`."""
        async with _asking(stream):
            found = await self._client.ask(b"EVAL", EXTENT, b"2", stream, TAKEN % stream)
        if not found:
            raise StoreError(TOO_OLD, f"Redis 7 or later is needed, or Valkey: this server's XINFO STREAM {stream} tells no entries-added")
        length, first, trimmed, now = found
        return Extent(length, Entry(first.decode(), b"").ts if first else None, trimmed, now / 1000)

    async def figures(self) -> bytes:
        """See `Streams`."""
        async with answering(SECONDS):
            return await figures_of(self._client)

    async def tell(self, figures: bytes) -> None:
        """See `Streams`."""
        async with answering(SECONDS):
            await self._client.ask(b"SET", FIGURES, figures)

    async def close(self) -> None:
        """See `Streams`."""
        await self._servers.close()


def _entries(found: Sequence[Any]) -> list[Entry]:
    return [Entry(entry_id.decode(), fields_of(words).get(FIELD, b"")) for entry_id, words in found]


@asynccontextmanager
async def _asking(stream: Stream) -> AsyncIterator[None]:
    """Tell a stream that is gone from a Redis that does not answer."""
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
