"""Users and ads written by the thousand, as a load does: over what is there, or put together with it while events go on to come.

No command here touches two slots. Knows nothing about what is written.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from features.merging import Rewrite
from features.state import STATE_BYTES, StoreError

from .client import Client
from .damage import Damage, is_wrong_type
from .events import READ, STORED, Place
from .server import Command, unrefused

BATCH = 500
"""Users of one pipeline, ads of one stream entry: what is held in memory and on the wire at once."""
ATTEMPTS = 60
"""How often a state is put together anew while events change it. Of those who try at once, one succeeds each time."""
PAUSE_SECONDS = 0.002
"""How much longer each attempt may wait than the one before."""
SWAP = (
    b"""
-- KEYS: state; ARGV: field, most bytes, state as it was read, state as it is to be (empty: deleted), ttl.
local state, field, bytes = KEYS[1], ARGV[1], tonumber(ARGV[2])
"""
    + STORED
    + b"""
if stored ~= ARGV[3] then return 0 end
if field ~= '' then
  if ARGV[4] == '' then redis.call('HDEL', state, field) else redis.call('HSET', state, field, ARGV[4]) end
else
  if ARGV[4] == '' then redis.call('DEL', state) else redis.call('SET', state, ARGV[4], 'EX', ARGV[5]) end
end
return 1
"""
)
PUT = b"""
-- KEYS: state, seen; ARGV: state as it is to be, ttl. Events that it does not hold may be done again.
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return redis.call('DEL', KEYS[2])
"""

T = TypeVar("T")


class BulkStore:
    """Writes many users or ads to what a server keeps."""

    def __init__(self, client: Client, ttl: int, damage: Damage) -> None:
        """The way to the servers, and seconds that a user is kept."""
        self._client, self._ttl, self._damage = client, str(ttl), damage

    async def put_users(self, users: Iterable[tuple[Place, bytes]]) -> None:
        """Write packed users over what is there, and forget which events they have had.

        Raises:
            OSError, RedisError: the server did not answer, or refused.
        """
        commands: list[Command] = [(b"EVAL", PUT, b"2", place.state, place.seen, packed, self._ttl) for place, packed in users]
        unrefused(await self._client.ask_all(commands))

    async def put_ads(self, ads: Iterable[tuple[Place, bytes]]) -> None:
        """The same for ads. An event that comes between the two steps may be done again, which changes nothing for an ad."""
        hashes, seen = defaultdict[str, list[str | bytes]](list), defaultdict[str, list[str]](list)
        for place, packed in ads:
            hashes[place.state] += (place.field, packed)
            seen[place.state].append(place.seen)
        writes: list[Command] = [(b"HSET", key, *values) for key, values in hashes.items()]
        unrefused((await self._damage.ask_all(self._client, writes))[0])
        unrefused(await self._client.ask_all([(b"DEL", *keys) for keys in seen.values()]))

    async def rewrite(self, rewrites: Sequence[Rewrite], place: Callable[[str], Place]) -> list[str]:
        """Put what the rewrites make of what is stored in its place, each once nobody else has written meanwhile; which were changed.

        Raises:
            StoreError: others change the same all the time.
            OSError, RedisError: the server did not answer, or refused.
        """
        waiting, changed = {each.id: each for each in rewrites}, list[str]()
        for attempt in range(ATTEMPTS):
            waiting = await self._try(waiting, {name: place(name) for name in waiting}, changed)
            if not waiting:
                return changed
            await asyncio.sleep(random.uniform(0, PAUSE_SECONDS * attempt))
        raise StoreError("contended", f"others changed {len(waiting)} users or ads {ATTEMPTS} times over; load again")

    async def _try(self, rewrites: Mapping[str, Rewrite], places: Mapping[str, Place], changed: list[str]) -> dict[str, Rewrite]:
        """Those that somebody else was before."""
        replies, _ = await self._damage.ask_all(self._client, [_read(place) for place in places.values()])
        stored = {name: reply or b"" for name, reply in zip(places, unrefused(replies), strict=True)}
        packed = {name: rewrites[name].of(stored[name]) for name in places}
        done = {name: value for name, value in packed.items() if value is not None}
        commands = [self._swap(places[name], stored[name], value) for name, value in done.items()]
        answers = await self._client.ask_all(commands) if commands else []
        # A key whose type changed since it was read is seen to when it is read again.
        won = unrefused([0 if is_wrong_type(answer) else answer for answer in answers])
        changed += [name for name, one in zip(done, won, strict=True) if one]
        return {name: rewrites[name] for name, one in zip(done, won, strict=True) if not one}

    def _swap(self, place: Place, stored: bytes, packed: bytes) -> Command:
        return (b"EVAL", SWAP, b"1", place.state, place.field, str(STATE_BYTES), stored, packed, self._ttl)


def _read(place: Place) -> Command:
    if place.field:
        return (b"EVAL", READ, b"1", place.state, place.field, str(STATE_BYTES))
    return (b"GETRANGE", place.state, b"0", str(STATE_BYTES))


def batches(items: Iterable[T]) -> Iterable[list[T]]:
    """The items, `BATCH` at a time."""
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch
