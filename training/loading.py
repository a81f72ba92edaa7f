"""A prepared data set goes into a store: put together with what events told since, or written over it.

Knows a store only by its protocol. Both ways may be broken off at any time and done again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from rich.progress import Progress

from features.merging import ForgetAd, MergeAd, MergeUser, RetireAd, Rewrite, bounded
from features.packing import StateError
from features.schema import Side
from features.state import Store, pack_ad, pack_user

from .datasets.prepared import DataError, Prepared
from .datasets.states import ads, newest_time, user_states

BATCH = 500
"""Users or ads of one step."""
SMALL = 0.5
"""A whole catalogue with less than this share of the ads that are active is suspicious."""
AD_GONE_SECONDS = 90 * 24 * 3600.0

T = TypeVar("T")
Wrap = Callable[[Rewrite], Rewrite]


@dataclass
class Loaded:
    """What a load found and did, or would do."""

    users: int = 0
    ads: int = 0
    newer_users: int = 0
    """Users of whom the store knows something that the data set does not, or not yet; and what of them."""
    behaviours: int = 0
    features: int = 0
    newer_ads: int = 0
    active: int = 0
    """Ads of the store that were active, where the data set is the whole catalogue."""
    retired: int = 0
    """Those of them that are not in the data set and left."""
    stayed: int = 0
    """Those that are not in it and stay, since events that are newer tell of them."""
    forgotten: int = 0
    """Ads that left long ago and were deleted."""

    @property
    def newer(self) -> str:
        """What the store knows and the data set does not, for people; empty where that is nothing."""
        counted = ((self.behaviours, "behaviour"), (self.features, "feature"))
        users = " and ".join(_counted(count, what) for count, what in counted if count)
        newer = f"what was told of {_counted(self.newer_ads, 'ad')}" if self.newer_ads else ""
        return " and ".join(part for part in (users and f"{users} of {_counted(self.newer_users, 'user')}", newer) if part)

    @property
    def summary(self) -> str:
        """What was done, a line each."""
        lines = [f"loaded {self.users:,} users and {self.ads:,} ads"]
        if self.newer:
            lines.append(f"kept what events told since: {self.newer}")
        if self.retired or self.forgotten:
            lines.append(f"{_counted(self.retired, 'ad')} left the catalogue, {self.forgotten:,} that left long ago were deleted")
        if self.stayed:
            lines.append(f"stays, since newer events tell of it: {_counted(self.stayed, 'ad')} that the data set lacks")
        return "\n".join(lines)


class Loading:
    """Loads a data set into a store."""

    def __init__(self, store: Store, prepared: Prepared, progress: Progress, gone_seconds: float = AD_GONE_SECONDS) -> None:
        """`gone_seconds`: how long ads that left are kept."""
        self._store, self._prepared, self._progress, self._gone_seconds = store, prepared, progress, gone_seconds
        self.until = newest_time(prepared)
        sides: tuple[Side, ...] = ("user", "ad")
        self._fields = {side: {each.name for each in prepared.schema.side(side)} for side in sides}

    async def look(self, whole: bool) -> Loaded:
        """What there is that writing over it would lose, and where the data set is the `whole` catalogue, how many ads are active.

        Raises:
            StoreError: the store does not answer.
            DataError: the data set cannot be read.
        """
        found = await self._merged(whole, _Unchanged)
        if whole:
            async for batch in self._store.all_ads():
                found.active += sum(ad.active for ad in batch)
        return found

    async def merge(self, whole: bool = False) -> Loaded:
        """Put the data set together with what the store knows; with `whole`, ads that are not in it leave the catalogue.

        Raises:
            StoreError, DataError: as `look` does.
        """
        done = await self._merged(whole, lambda rewrite: rewrite)
        if whole:
            await self._retire(done)
        return done

    async def overwrite(self, whole: bool = False) -> Loaded:
        """The same, but what the store knows of the data set's users and ads gives way.

        Raises:
            StoreError, DataError: as `look` does.
        """
        done = Loaded()
        with _fitting():
            for ad_batch in _batches(self._shown("ads", ads(self._prepared))):
                for ad in ad_batch:
                    bounded(ad.ad_id, ad.features, pack_ad(ad))
                await self._store.put_ads(ad_batch)
                done.ads += len(ad_batch)
            for user_batch in _batches(self._shown("users", user_states(self._prepared))):
                for user_id, state in user_batch:
                    bounded(user_id, state.features, pack_user(user_id, state))
                await self._store.put_users(user_batch)
                done.users += len(user_batch)
        if whole:
            await self._retire(done)
        return done

    async def _merged(self, whole: bool, wrap: Wrap) -> Loaded:
        done = Loaded()
        with _fitting():
            for ad_batch in _batches(self._shown("ads", ads(self._prepared))):
                await self._merge_ads([MergeAd(ad, self.until, whole, self._fields["ad"]) for ad in ad_batch], wrap, done)
            for user_batch in _batches(self._shown("users", user_states(self._prepared))):
                await self._merge_users(
                    [MergeUser(user_id, state, self.until, self._fields["user"]) for user_id, state in user_batch], wrap, done
                )
        return done

    async def _merge_ads(self, merges: Sequence[MergeAd], wrap: Wrap, done: Loaded) -> None:
        await self._store.rewrite("ad", [wrap(merge) for merge in merges])
        done.ads += len(merges)
        done.newer_ads += sum(bool(merge.news) for merge in merges)

    async def _merge_users(self, merges: Sequence[MergeUser], wrap: Wrap, done: Loaded) -> None:
        await self._store.rewrite("user", [wrap(merge) for merge in merges])
        done.users += len(merges)
        done.newer_users += sum(bool(merge.news) for merge in merges)
        done.behaviours += sum(merge.news.behaviours for merge in merges)
        done.features += sum(merge.news.features for merge in merges)

    async def _retire(self, done: Loaded) -> None:
        """Let the ads leave that the data set does not have, and delete those that left long ago."""
        there, now = {ad.ad_id for ad in ads(self._prepared)}, int(time.time())
        async for batch in self._store.all_ads():
            missing = [RetireAd(ad.ad_id, self.until, now) for ad in batch if ad.active and ad.ad_id not in there]
            left = [ForgetAd(ad.ad_id, now - self._gone_seconds) for ad in batch if not ad.active and ad.ad_id not in there]
            await self._store.rewrite("ad", [*missing, *left])
            done.stayed += sum(each.stays for each in missing)
            done.retired += sum(not each.stays for each in missing)
            done.forgotten += sum(each.done for each in left)

    def _shown(self, kind: str, items: Iterable[T]) -> Iterator[T]:
        task, count = self._progress.add_task(f"loading {kind}", total=None), 0
        for item in items:
            count += 1
            yield item
            self._progress.update(task, completed=count)
        self._progress.update(task, total=count)


class _Unchanged:
    """A rewrite that is only looked at."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.id, self._rewrite = rewrite.id, rewrite

    def of(self, stored: bytes) -> bytes | None:
        """See `Rewrite`."""
        self._rewrite.of(stored)
        return None


@contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise DataError(f"the data set does not fit into a store: {error}") from error


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def refusal(found: Loaded, sure: bool) -> str | None:
    """Why a data set had better not be the whole catalogue; None where it may be. `sure`: a small one is meant."""
    if not found.ads:
        return "--replace: the data set has no ads, and an empty catalogue cannot be meant; to load the users alone, leave --replace out"
    if found.ads < SMALL * found.active and not sure:
        share = f"the data set has {found.ads:,} ads, less than half of the {found.active:,} that are active in the store"
        return f"--replace: {share}; if it is the whole catalogue all the same, add --yes"
    return None


async def fill_store(store: Store, prepared: Prepared, progress: Progress) -> Loaded:
    """Merge a data set into a store, then let go of the store.

    Raises:
        StoreError: the store does not answer.
        DataError: the data set cannot be read.
    """
    try:
        return await Loading(store, prepared, progress).merge()
    finally:
        await store.close()


def _batches(items: Iterable[T]) -> Iterator[Sequence[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch
