"""Users, ads and changes in Redis 7 or later, or Valkey, however its servers are arranged (`client.py`).

`adrank:user:{<user id>}` is one packed state with a TTL. The catalogue is 64 hashes `adrank:ads:{<n>}`, ad id -> packed ad.
`adrank:ads:changes` is a stream whose entries name ads that changed. How events change both is said in `events.py`. No command
and no transaction spans two slots, so a Redis Cluster holds this layout as it is.
"""

import asyncio
import logging
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Literal

from redis.exceptions import RedisError, ResponseError

from features.entity_updates import EntityUpdates, Kind, Outcome
from features.merging import Rewrite
from features.packing import StateError, pack, unpacker
from features.state import (
    OF_ADS,
    STATE_BYTES,
    Ad,
    ChangesLostError,
    StoreError,
    StoreRoom,
    UserState,
    pack_ad,
    pack_user,
    unpack_ad,
    unpack_user,
)
from features.streams import FIELD, FIGURES, FIGURES_BYTES, SERVED

from .bulk import BATCH, BulkStore, batches
from .client import Client, Reads, open_servers
from .damage import Damage, is_wrong_type
from .errors import as_store_error
from .events import UNTOLD, Bounds, EventStore, Place, room_of
from .server import Command, unrefused

CHANGES = "adrank:ads:changes"
HASHES = 64
CHANGES_KEPT, CHANGES_BYTES = 10_000, 16 * 2**20
"""Entries of the change stream that are kept, and about how many bytes: an entry may be 500 ids or one."""
PROBE = "adrank:user:probe"
"""A key that no user has, since those have braces."""
ENTRIES_READ = 8
BULK_SECONDS = 30.0
"""A bulk step, such as one batch of a load, may take this long; the request path has its own, short timeout."""
APPEND_SECONDS = 5.0
"""How long an append to a stream may take: nobody waits for it, and a server that writes to a slow disk may be silent for seconds."""
EVENT_SECONDS = 2.0
"""A step of a batch of events may take this long; its caller, unlike one who wants a ranking, can wait and would have to come again."""
FOLLOW_SECONDS = 5.0
"""How long past its wait a read of changes may take: soon enough to notice a server that is there but silent."""
WAIT_SECONDS = 5.0
"""The longest wait for a change."""

_unpack_ids: Callable[[bytes], list[str]] = unpacker(list[str], "a list of ids")

log = logging.getLogger(__name__)


def user_key(user_id: str) -> str:
    """The key of a user's state; the braces make it the user's own slot in a cluster."""
    return f"adrank:user:{_tag(user_id)}"


def ads_key(ad_id: str) -> str:
    """The key of the hash that holds an ad."""
    return f"adrank:ads:{{{_hash(ad_id)}}}"


def place(entity: EntityUpdates) -> Place:
    """The keys of what events are about; those of one entity are in one slot."""
    return place_of(entity.kind, entity.id)


def place_of(kind: Kind, name: str) -> Place:
    """The keys of a user, an ad or a ranking."""
    if kind == "user":
        return Place(f"adrank:seen:user:{_tag(name)}", user_key(name))
    if kind in OF_ADS:
        return Place(f"adrank:seen:{kind}:{{{_hash(name)}}}:{name}", ads_key(name), name)
    return Place(f"adrank:seen:request:{_tag(name)}")


def _hash(ad_id: str) -> int:
    return zlib.crc32(ad_id.encode()) % HASHES


def _tag(name: str) -> str:
    """The name in braces. A cluster does not see braces that close at once, so such a name begins with something else."""
    return f"{{\\{name}}}" if name.startswith(("}", "\\")) else f"{{{name}}}"


class RedisStore:
    """A `features.state.Store`. Connects when first used, so a Redis that is down does not stop the service's start."""

    def __init__(self, url: str, timeout: float, ttl: int, on_damaged: Callable[[], None], bounds: Bounds = UNTOLD) -> None:
        """Seconds for a `get_user`, seconds that a user is kept, what counts a damaged ad, and what bounds events."""
        self._timeout, self._ttl, self._on_damaged = timeout, ttl, on_damaged
        self._servers = servers = open_servers(url)
        self._users = Reads(servers, timeout, STATE_BYTES)
        self._served, self._eventful = Client(servers, APPEND_SECONDS, once=True), Client(servers, EVENT_SECONDS)
        self._bulk, self._following = Client(servers, BULK_SECONDS), Client(servers, WAIT_SECONDS + FOLLOW_SECONDS)
        self.damage = Damage()
        self._bulk_store = BulkStore(self._bulk, ttl, self.damage)
        self._events = EventStore(self._eventful, place, ttl, bounds, self.damage)

    async def get_user(self, user_id: str) -> UserState | None:
        """See `Store`; gives up after the timeout, whatever Redis or the network do.

        A value that is too large is not read to its end: who asks next would have to wait for it.
        """
        key = user_key(user_id)
        try:
            value = await self._users.read(key)
            return unpack_user(user_id, value) if value else None
        except StateError as error:
            damaged = error
        except (OSError, RedisError) as error:
            if not is_wrong_type(error):
                raise as_store_error(error, self._timeout) from error
            damaged = StateError("what is stored for a user is no value, but a key of another type")
        self.damage.tell(key, str(damaged))
        raise StoreError("store_corrupt", str(damaged)) from damaged

    async def put_users(self, users: Iterable[tuple[str, UserState]]) -> None:
        """See `Store`."""
        for batch in batches(users):
            async with answering(BULK_SECONDS):
                await self._bulk_store.put_users((place_of("user", user_id), pack_user(user_id, state)) for user_id, state in batch)

    async def put_ads(self, ads: Iterable[Ad]) -> None:
        """See `Store`. Announced after they are written: who hears of a change can read it."""
        for batch in batches(ads):
            async with answering(BULK_SECONDS):
                await self._bulk_store.put_ads((place_of("ad", ad.ad_id), pack_ad(ad)) for ad in batch)
                await self._announce(self._bulk, [ad.ad_id for ad in batch])

    async def rewrite(self, kind: Literal["user", "ad"], rewrites: Sequence[Rewrite]) -> None:
        """See `Store`."""
        for batch in batches(rewrites):
            async with answering(BULK_SECONDS):
                changed = await self._bulk_store.rewrite(batch, partial(place_of, kind))
                if changed and kind == "ad":
                    await self._announce(self._bulk, changed)

    async def apply(self, entities: Sequence[EntityUpdates]) -> list[Sequence[Outcome]]:
        """See `Store`."""
        try:
            outcomes = await self._events.apply(entities)
        except (OSError, RedisError) as error:
            raise as_store_error(error, EVENT_SECONDS) from error
        # Those of duplicates too: who did such an event first may not have lived to announce it.
        for batch in batches(dict.fromkeys(entity.id for entity in entities if entity.kind in OF_ADS)):
            async with answering(EVENT_SECONDS):
                await self._announce(self._eventful, batch)
        return outcomes

    async def _announce(self, client: Client, ad_ids: Sequence[str]) -> None:
        unrefused((await self.damage.ask_all(client, [_announcement(ad_ids)]))[0])

    async def all_ads(self) -> AsyncIterator[list[Ad]]:
        """See `Store`. An ad may come twice (HSCAN); a damaged one is left out and counted."""
        for n in range(HASHES):
            cursor = b""
            while cursor != b"0":
                key = f"adrank:ads:{{{n}}}"
                async with answering(BULK_SECONDS):
                    (reply,) = await self._bulk.ask_all([(b"HSCAN", key, cursor or b"0", b"COUNT", str(BATCH))])
                    cursor, found = self._unless_wrong(key, reply) or (b"0", [])
                yield [ad for ad_id, value in fields_of(found).items() if (ad := self._ad(ad_id, value))]

    async def cursor(self) -> str:
        """See `Store`. The id of the last change, and how many there have ever been, where the server counts them."""
        async with answering(BULK_SECONDS):
            last, added, _ = await self._stream()
        return f"{last}/{'' if added is None else added}"

    async def changed_ads(self, cursor: str, wait: float) -> tuple[list[Ad], str]:
        """See `Store`."""
        last, _, count = cursor.partition("/")
        wait = min(wait, WAIT_SECONDS)
        async with answering(wait + FOLLOW_SECONDS):
            # A block of 0 would wait for ever.
            command = (b"XREAD", b"COUNT", str(ENTRIES_READ), b"BLOCK", str(max(1, int(wait * 1000))), b"STREAMS", CHANGES, last)
            (reply,) = await self._following.ask_all([command])
            if is_wrong_type(reply):
                await self.damage.clear(self._following, CHANGES, b"stream")
                raise ChangesLostError("what stood in the place of the change stream was no stream")
            (reply,) = unrefused([reply])
            # Checked after reading: what was read before it was trimmed is not lost.
            await self._check_reach(last, int(count) if count else None)
            entries = reply[0][1] if reply else []
            ads = await self._read(dict.fromkeys(ad_id for _, entry in entries for ad_id in _announced(fields_of(entry))))
        if not entries:
            return ads, cursor
        return ads, f"{entries[-1][0].decode()}/{int(count) + len(entries) if count else ''}"

    async def _check_reach(self, last: str, count: int | None) -> None:
        """The entry at the cursor still stands, so all after it do; or else exactly those up to the cursor have gone.

        A server that does not count what it ever had (Redis before 7) cannot tell the second, unless nothing came after the cursor.
        """
        if await self._following.ask(b"XRANGE", CHANGES, last, last, b"COUNT", b"1"):
            return
        newest, added, gone = await self._stream()
        if added is None or count is None:
            if newest == last:
                return
            raise ChangesLostError(f"the change stream may have been trimmed past {last}; Redis before 7 does not count what has gone")
        if gone != count or _order(newest) < _order(last):
            raise ChangesLostError(f"the change stream was trimmed or emptied past {last}; it has lost {gone} of {added} changes")

    async def _stream(self) -> tuple[str, int | None, int]:
        """Id of the last entry, how many entries there have ever been (None: the server does not say), and how many were trimmed."""
        try:
            info = fields_of(await self._following.ask(b"XINFO", b"STREAM", CHANGES))
        except ResponseError as error:
            if is_wrong_type(error):
                await self.damage.clear(self._following, CHANGES, b"stream")
                return "0-0", 0, 0
            if "no such key" in str(error):
                return "0-0", 0, 0
            raise
        last = info[b"last-generated-id"].decode()
        if b"entries-added" not in info:
            return last, None, 0
        added = int(info[b"entries-added"])
        return last, added, added - int(info[b"length"])

    async def _read(self, ad_ids: Iterable[str]) -> list[Ad]:
        """The ads as they are now; one that is not there any more has left."""
        by_hash: dict[str, list[str]] = defaultdict(list)
        for ad_id in ad_ids:
            by_hash[ads_key(ad_id)].append(ad_id)
        if not by_hash:
            return []
        replies = await self._following.ask_all([(b"HMGET", key, *wanted) for key, wanted in by_hash.items()])
        found_of = zip(by_hash.values(), map(self._unless_wrong, by_hash, replies), strict=True)
        pairs = [pair for wanted, values in found_of if values is not None for pair in zip(wanted, values, strict=True)]
        found = [Ad(ad_id, {}, active=False) if value is None else self._ad(ad_id, value) for ad_id, value in pairs]
        return [ad for ad in found if ad]

    def _unless_wrong(self, key: str, reply: Any) -> Any:
        """What was read of a hash of ads; None where something else has its place: its ads are done without.

        Raises:
            ResponseError: it is another refusal.
        """
        if not is_wrong_type(reply):
            return unrefused([reply])[0]
        self.damage.tell(key, "ads are kept there in a hash, and it is none")
        self._on_damaged()
        return None

    def _ad(self, ad_id: str | bytes, value: bytes) -> Ad | None:
        try:
            return unpack_ad(ad_id if isinstance(ad_id, str) else ad_id.decode(), value)
        except ValueError as error:  # a StateError, or an id that is not UTF-8
            self.damage.tell(ads_key(ad_id) if isinstance(ad_id, str) else ad_id, f"an ad is left out: {error}")
            self._on_damaged()
            return None

    async def append_served(self, records: Sequence[bytes]) -> int:
        """See `Store`. Never sent twice, so that a record has one id in the stream."""
        commands: list[Command] = [(b"XADD", SERVED, b"*", FIELD, record) for record in records]
        try:
            replies = unrefused(await self._served.ask_all([*commands, (b"XLEN", SERVED)]))
        except (OSError, RedisError) as error:
            if is_wrong_type(error):
                with suppress(OSError, RedisError):
                    await self.damage.clear(self._served, SERVED, b"stream")  # for the next: some of these may have been appended
            raise as_store_error(error, APPEND_SECONDS) from error
        return int(replies[-1])

    async def served_room(self) -> StoreRoom:
        """See `Store`."""
        async with answering(APPEND_SECONDS):
            return await room_of(self._served, SERVED)

    async def figures(self) -> bytes:
        """See `Store`."""
        async with answering(EVENT_SECONDS):
            return await figures_of(self._eventful)

    async def ping(self) -> None:
        """See `Store`."""
        try:
            async with asyncio.timeout(self._timeout):
                # A read too, which is what a request needs: a user of the store may be allowed PING and not that.
                replies = [self._servers.send([(b"GETRANGE", PROBE, b"0", b"0")])]
                replies += [server.send([(b"PING",)]) for server in await self._servers.primaries()]
                for (reply,) in await asyncio.gather(*replies):
                    unrefused([reply])
        except (OSError, RedisError) as error:
            raise as_store_error(error, self._timeout) from error

    async def user_ids(self, most: int) -> list[str]:
        """Users that there are, `most` at most. For tools: it asks for keys by the thousand.

        Raises:
            StoreError: the store does not answer.
        """
        start, found = user_key("")[:-1].encode(), dict[bytes, None]()
        async with answering(BULK_SECONDS):
            for server in await self._servers.primaries():
                primary, cursor = Client(server, BULK_SECONDS), b""
                while cursor != b"0" and len(found) < most:
                    cursor, keys = await primary.ask(b"SCAN", cursor or b"0", b"MATCH", start + b"*", b"COUNT", b"1000")
                    found |= dict.fromkeys(keys)
        return [key.removeprefix(start)[:-1].decode("utf-8", "replace") for key in islice(found, most)]

    async def close(self) -> None:
        """See `Store`."""
        await self._users.close()
        await self._servers.close()


async def figures_of(client: Client) -> bytes:
    """What the joiner told, as far as it may be large. Raises as `Client.ask` does."""
    return bytes(await client.ask(b"GETRANGE", FIGURES, b"0", str(FIGURES_BYTES)))


def fields_of(words: Sequence[Any]) -> dict[Any, Any]:
    """A reply of names and values in turn, as a mapping."""
    return dict(zip(words[::2], words[1::2], strict=True))


def _announcement(ad_ids: Sequence[str]) -> Command:
    packed = pack(ad_ids)
    return (b"XADD", CHANGES, b"MAXLEN", b"~", str(min(CHANGES_KEPT, CHANGES_BYTES // len(packed))), b"*", b"ads", packed)


@asynccontextmanager
async def answering(seconds: float) -> AsyncIterator[None]:
    """Bound what is done inside, and turn its failures into `StoreError`s."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except (OSError, RedisError) as error:
        raise as_store_error(error, seconds) from error
    except StateError:
        raise
    except (LookupError, TypeError, ValueError) as error:  # a reply that lacks what is looked for in it
        log.exception("a reply of the store has another form than is known here")
        raise StoreError("store_error", f"the store's reply has another form than that of Redis or Valkey ({error!r})") from error


def _announced(entry: dict[bytes, bytes]) -> Sequence[str]:
    try:
        return _unpack_ids(entry[b"ads"])
    except (KeyError, StateError) as error:
        raise ChangesLostError("an entry of the change stream is damaged") from error


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split("-")))
