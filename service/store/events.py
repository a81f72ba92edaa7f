"""Events into Redis, each once: read what they are about, change it, and write it if nobody else wrote meanwhile.

The ids of the events that a user, an ad or a ranking has had stand in `adrank:seen:…`, a sorted set by the events' own times, in the
slot of the state that they changed, and change together with it. Impressions, clicks and conversions go into the stream
`adrank:events` before that: one may stand there twice, none that was acknowledged is missing. Nothing here touches two slots at once.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from redis.exceptions import NoScriptError, ResponseError

from features.entity_updates import REPLACED, Change, EntityUpdates, Outcome, together
from features.events import JOINED, pack_event
from features.state import NEVER, SEEN_LIMIT, SEEN_SECONDS, STATE_BYTES, StoreError, StoreRoom
from features.streams import EVENTS, FIELD

from .client import Client
from .damage import Damage, is_wrong_type
from .server import Command, unrefused

ATTEMPTS = 60
"""How often a change is tried while others change the same. Of those who try at once, one succeeds each time."""
PAUSE_SECONDS = 0.0005
"""How much longer each attempt may wait for the others to be through than the one before."""
DONE, TAKEN = b"done", b"taken"
STORED = b"""
  local stored
  if field == '' then stored = redis.call('GETRANGE', state, 0, bytes)
  elseif redis.call('HSTRLEN', state, field) > bytes then stored = 'oversized'
  else stored = redis.call('HGET', state, field) or '' end
"""
"""Lua: what is stored, of a state that is too large only the begin or a word that is no state."""
WRITE = (
    b"""
-- KEYS: seen, state; ARGV: seconds, most, field, ttl, state as it was read, state as it is to be, most bytes, time and id of each event.
-- Redis's own clock says what is forgotten: that of a service may jump.
local seen, state, field = KEYS[1], KEYS[2], ARGV[3]
local seconds, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local past = tonumber(redis.call('TIME')[1]) - seconds
local floor = past
if redis.call('ZCARD', seen) >= most then
  floor = math.max(floor, tonumber(redis.call('ZRANGE', seen, 0, 0, 'WITHSCORES')[2]))
end
local ids = {}
for i = 8, #ARGV, 2 do
  if tonumber(ARGV[i]) <= floor then return string.format('%.17g', floor) end
  ids[#ids + 1] = ARGV[i + 1]
end
for _, score in ipairs(redis.call('ZMSCORE', seen, unpack(ids))) do
  if score then return 'taken' end
end
if state then
  local bytes = tonumber(ARGV[7])
"""
    + STORED
    + b"""
  if stored ~= ARGV[5] then return 'taken' end
  if field == '' then redis.call('SET', state, ARGV[6], 'EX', ARGV[4]) else redis.call('HSET', state, field, ARGV[6]) end
end
redis.call('ZADD', seen, unpack(ARGV, 8))
redis.call('ZREMRANGEBYSCORE', seen, '-inf', string.format('%.17g', past))
redis.call('ZREMRANGEBYRANK', seen, 0, -1 - most)
local newest = tonumber(redis.call('ZRANGE', seen, -1, -1, 'WITHSCORES')[2])
redis.call('EXPIREAT', seen, string.format('%.0f', math.ceil(newest) + seconds + 1))
return 'done'
"""
)
READ = b"""
-- KEYS: hash; ARGV: field, most bytes.
if redis.call('HSTRLEN', KEYS[1], ARGV[1]) > tonumber(ARGV[2]) then return 'oversized' end
return redis.call('HGET', KEYS[1], ARGV[1])
"""
UNREADABLE = b"\xc1"
"""No state."""
DIGEST = hashlib.sha1(WRITE, usedforsecurity=False).hexdigest()


class Place(NamedTuple):
    """The keys of an entity: of its events' ids, and of its state, in one slot; a `field` where the state is in a hash."""

    seen: str
    state: str = ""
    field: str = ""

    @property
    def name(self) -> str:
        """Of the state, for a log."""
        return f"{self.state} ({self.field})" if self.field else self.state


class Bounds(NamedTuple):
    """For how long after their time events are remembered, and how many may wait for the joiner, of how many bytes of memory."""

    seen_seconds: float = SEEN_SECONDS
    waiting: int = 1_000_000
    waiting_bytes: int = 512 * 2**20


ROOM = b"""
-- KEYS: a stream. What may not be asked is missing. In one script, so that it is answered by the node that has the stream.
local stream, info = redis.pcall('MEMORY', 'USAGE', KEYS[1]), redis.pcall('INFO', 'memory')
if type(stream) == 'table' then stream = -1 end
if type(info) ~= 'string' then info = '' end
return {stream or 0, tonumber(string.match(info, 'used_memory:(%d+)') or -1), tonumber(string.match(info, 'maxmemory:(%d+)') or 0)}
"""
LOOK_SECONDS = 1.0
"""How often it is asked what a stream takes of memory."""


async def room_of(client: Client, stream: str) -> StoreRoom:
    """What a stream takes of the memory of the server that has it; raises as the client does."""
    size, used, most = await client.ask(b"EVAL", ROOM, b"1", stream)
    return StoreRoom(None if size < 0 else int(size), None if used < 0 else int(used), int(most))


UNTOLD = Bounds()
"""Where nobody says otherwise."""


class _Turn(NamedTuple):
    """An entity, what was read of it, and what is to become of it."""

    entity: EntityUpdates
    place: Place
    stored: bytes
    change: Change

    def write(self, ttl: int, seen_seconds: float) -> Command:
        keys = [self.place.seen, *([self.place.state] if self.place.state else [])]
        state = (self.place.field, str(ttl), self.stored, self.change.packed, str(STATE_BYTES))
        events = [word for event in self.change.fresh for word in (repr(float(event.ts)), event.event_id)]
        return (b"EVALSHA", DIGEST, str(len(keys)), *keys, repr(seen_seconds), str(SEEN_LIMIT), *state, *events)


class EventStore:
    """Applies events to what a server keeps."""

    def __init__(self, client: Client, place: Callable[[EntityUpdates], Place], ttl: int, bounds: Bounds, damage: Damage) -> None:
        """The way to the servers, the keys of an entity, seconds that a user's state is kept."""
        self._client, self._place, self._ttl, self._bounds, self._damage = client, place, ttl, bounds, damage
        self._bytes, self._looked = 0, -LOOK_SECONDS
        """What the events that wait take of memory, and when that was asked."""

    async def apply(self, entities: Sequence[EntityUpdates]) -> list[Sequence[Outcome]]:
        """What became of each event, beside the entities.

        Raises:
            StoreError: too many events wait to be joined, or others change the same all the time.
            OSError, RedisError: the server did not answer, or refused.
        """
        outcomes: list[Sequence[Outcome]] = []
        for some in together(entities):
            outcomes += await self._apply(some)
            await asyncio.sleep(0)
        return outcomes

    async def _apply(self, entities: Sequence[EntityUpdates]) -> list[Sequence[Outcome]]:
        outcomes: dict[int, Sequence[Outcome]] = {}
        waiting = dict.fromkeys(range(len(entities)), NEVER)
        for attempt in range(ATTEMPTS):
            turns = await self._read(entities, waiting)
            if attempt == 0:  # what is new later on was new before
                await self._append(turns.values())
            replies = await self._write({i: turn for i, turn in turns.items() if turn.change.fresh})
            done = {i: turn for i, turn in turns.items() if replies.get(i, DONE) == DONE}
            self._tell(done.values())
            outcomes |= {i: turn.change.outcomes for i, turn in done.items()}
            waiting = {i: waiting[i] if reply == TAKEN else float(reply) for i, reply in replies.items() if reply != DONE}
            if not waiting:
                return [outcomes[i] for i in range(len(entities))]
            await asyncio.sleep(random.uniform(0, PAUSE_SECONDS * attempt))
        raise StoreError("contended", f"others changed the same users or ads {ATTEMPTS} times over; send the events again")

    async def _read(self, entities: Sequence[EntityUpdates], waiting: Mapping[int, float]) -> dict[int, _Turn]:
        places = {i: self._place(entities[i]) for i in waiting}
        commands = [command for i, place in places.items() for command in _reads(entities[i], place)]
        answers, replaced = await self._damage.ask_all(self._client, commands)
        replies, turns = iter(unrefused(answers)), {}
        for i, place in places.items():
            stored = (next(replies) or b"") if place.state else b""
            change = entities[i].change(UNREADABLE if place.state in replaced else stored, next(replies), waiting[i])
            turns[i] = _Turn(entities[i], place, stored, change)
        return turns

    async def _append(self, turns: Iterable[_Turn]) -> None:
        """Put what the joiner reads into its stream, unless that is full: entries that it has not taken are never dropped."""
        events = [event for turn in turns for event in turn.change.fresh if event.type in JOINED and turn.entity.leads(event)]
        if not events:
            return
        (length,) = unrefused((await self._damage.ask_all(self._client, [(b"XLEN", EVENTS)]))[0])
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked, self._bytes = now, (await room_of(self._client, EVENTS)).stream or 0
        if length >= self._bounds.waiting or self._bytes >= self._bounds.waiting_bytes:
            detail = (
                f"{length:,} events wait to be joined ({self._bytes / 2**20:,.0f} MB), the most that are kept; "
                "see whether adrank join runs, and send these again later"
            )
            raise StoreError("backlog", detail)
        packed = [pack_event(event) for event in events]
        self._bytes += sum(map(len, packed))
        unrefused(await self._client.ask_all([(b"XADD", EVENTS, b"*", FIELD, each) for each in packed]))

    async def _write(self, turns: Mapping[int, _Turn]) -> dict[int, bytes]:
        if not turns:
            return {}
        commands = [turn.write(self._ttl, self._bounds.seen_seconds) for turn in turns.values()]
        replies = await self._client.ask_all(commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            # The server has been started since: nothing was done where it does not know the script, and what was done is not done twice.
            again = [(b"EVAL", WRITE, *command[2:]) for command in commands]
            fresh = iter(await self._client.ask_all([again[i] for i, reply in enumerate(replies) if isinstance(reply, ResponseError)]))
            replies = [next(fresh) if isinstance(reply, ResponseError) else reply for reply in replies]
        # A key whose type changed since it was read is seen to when it is read again.
        return dict(zip(turns, unrefused([TAKEN if is_wrong_type(reply) else reply for reply in replies]), strict=True))

    def _tell(self, turns: Iterable[_Turn]) -> None:
        for turn in turns:
            if REPLACED in turn.change.outcomes:
                self._damage.tell(turn.place.name, "what it held could not be read and gave way to what events tell")


def _reads(entity: EntityUpdates, place: Place) -> list[Command]:
    ids = [event.event_id for event in entity.events]
    seen: Command = (b"ZMSCORE", place.seen, *ids)
    if place.field:
        return [(b"EVAL", READ, b"1", place.state, place.field, str(STATE_BYTES)), seen]
    return [(b"GETRANGE", place.state, b"0", str(STATE_BYTES)), seen] if place.state else [seen]
