"""The ad catalogue in memory: read whole from the store, then kept in step with its change stream.

Knows nothing about requests. Everything here runs on the event loop, so that a table never changes under a reader.
"""

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from features.encode import AdTable, AdTower, Encoder, Features, FieldError, clean_all
from features.merging import ForgetAd, left_before
from features.schema import IDENTITY, Field
from features.state import Ad, ChangesLostError, Store, StoreError, unpack_features

from ..telemetry.metrics import Metrics
from .ads import Ads, View

AT_ONCE = 500
"""Ads encoded before other work gets a turn on the event loop: about a millisecond."""
AT_ONCE_UNDER_LOAD = 50
"""The same for a table that is not needed yet: what it takes is taken from requests."""
POLL_SECONDS = 1.0
BACK_OFF_SECONDS = (0.1, 5.0)
GONE_SECONDS = 90 * 24 * 3600.0
FREE_SECONDS = 60.0
"""How often it is looked whether there is enough to free."""
FREE_AT_LEAST, FREE_SHARE = 1_000, 0.1
"""Ads to free, and their share of the active ones, that are worth reading the catalogue anew: tables have no holes."""

log = logging.getLogger(__name__)


class Catalogue:
    """Encoded ads, one table for each distinct fingerprint among the models."""

    def __init__(self, store: Store, encoders: Mapping[str, Encoder], metrics: Metrics) -> None:
        self._store, self._encoders, self._metrics = store, dict(encoders), metrics
        self._towers: dict[AdTower, str] = {}
        """Those whose vectors are kept, and the fingerprints of what they take."""
        self._ads = self._empty()
        self._in_step = self._looked = time.monotonic()
        self.gone_seconds = GONE_SECONDS
        """How long an ad that left is kept, for the histories that hold it."""
        self.loaded = False
        """Whether all ads have been read once."""
        self._emptied = False
        self.reason: str | None = None
        """Why the catalogue is not in step with the store, None while it is."""
        self.detail: str | None = None
        """The same as a sentence, where the store has one."""

    def _empty(self) -> Ads:
        ads = Ads({})
        for fingerprint, encoder in self._encoders.items():
            ads.add(fingerprint, encoder)
        for tower, fingerprint in self._towers.items():
            deque(ads.tables[fingerprint].keep_vectors(tower, AT_ONCE), 0)  # of no ads yet
        return ads

    def table(self, fingerprint: str) -> AdTable:
        """The ads as the encoder of that fingerprint encodes them. Ask anew for each request: a re-read replaces it."""
        return self._ads.tables[fingerprint]

    def view(self, fingerprint: str) -> View:
        """That table and the features that its rows are encoded from now. It stays good when the catalogue is read anew or drops it."""
        return View(self._ads, fingerprint)

    async def add(self, fingerprint: str, encoder: Encoder, tower: AdTower | None = None) -> None:
        """Encode all ads for one more fingerprint while ranking goes on; when it returns, that table is in step with the others.

        It has the ads' vectors by a tower too.
        """
        before, ads = set(self._encoders), self._ads
        try:
            if fingerprint not in before:
                self._encoders[fingerprint] = encoder
                # Changes reach it from now on: an ad may be encoded twice, each time as it is then.
                ads.add(fingerprint, encoder)
                await self._fill(ads, fingerprint)
            if tower is not None:
                self._towers[tower] = fingerprint
                await self._vectorise(self._ads)  # those of now: they may have been read anew meanwhile
        except BaseException:  # else whoever asks for it again would be given a table that is half full
            self.keep(before, self._towers.keys() - {tower})
            raise

    async def _vectorise(self, ads: Ads) -> None:
        """Have the tables keep the vectors that they lack."""
        for tower, fingerprint in [*self._towers.items()]:
            table = ads.tables.get(fingerprint)
            if table is not None and tower not in table.vectors:
                for _ in table.keep_vectors(tower, AT_ONCE):
                    await asyncio.sleep(0)

    def keep(self, fingerprints: Collection[str], towers: Collection[AdTower | None] | None = None) -> None:
        """Let go of the tables of all other fingerprints, and of vectors by others than these towers; None: by none."""
        for tower, fingerprint in [*self._towers.items()]:
            if fingerprint not in fingerprints or (towers is not None and tower not in towers):
                del self._towers[tower]
                if fingerprint in self._ads.tables:
                    self._ads.tables[fingerprint].vectors.pop(tower, None)
        for fingerprint in self._encoders.keys() - set(fingerprints):
            del self._encoders[fingerprint]
            self._ads.drop(fingerprint)

    async def _fill(self, ads: Ads, fingerprint: str) -> None:
        for _ in ads.fill(fingerprint, AT_ONCE_UNDER_LOAD, self._encode):
            await asyncio.sleep(0)

    @property
    def ads(self) -> int:
        """Active ads, as the table that has been there longest has them."""
        return len(next(iter(self._ads.tables.values()), ()))

    def features(self, ad_ids: Sequence[str]) -> dict[str, Features]:
        """The features of those of the ads that are known, whether or not they have left."""
        return {ad_id: unpack_features(packed) for ad_id, packed in self._ads.features(ad_ids).items() if packed is not None}

    async def sample(self, count: int, wanted: Callable[[Ad], bool]) -> list[Ad]:
        """Active ads at random that are wanted, `count` at most. Other work gets its turns: where few are wanted, all are looked at."""
        ads, found = self._ads, list[Ad]()
        rows = np.random.default_rng().permutation(len(ads.ids)) + 1
        for start in range(0, len(rows), AT_ONCE):
            for ad_id, packed in ads.features(ads.ids.texts[rows[start : start + AT_ONCE]].tolist()).items():
                if packed is not None and ad_id not in ads.gone and wanted(ad := Ad(ad_id, unpack_features(packed))):
                    found.append(ad)
                if len(found) == count:
                    return found
            await asyncio.sleep(0)
        return found

    @property
    def lag(self) -> float:
        """Seconds since the catalogue was last known to be in step with the store, or since the start."""
        return time.monotonic() - self._in_step

    def observe(self) -> None:
        """Set the gauges."""
        self._metrics.catalogue(self.ads, self.lag)

    async def follow(self) -> None:
        """Load, then follow, for ever; what goes wrong with the store is waited out."""
        pause, cursor = BACK_OFF_SECONDS[0], None
        while True:
            try:
                cursor = await self.load() if cursor is None else await self._step(cursor)
                pause, self.reason, self.detail = BACK_OFF_SECONDS[0], "store_emptied" if self._emptied else None, None
                continue
            except ChangesLostError as error:
                log.warning("reading the catalogue again: %s", error)
                cursor = None
            except StoreError as error:
                if self.reason != error.reason:
                    log.warning("the catalogue is not followed for now: %s", error)
                self.reason, self.detail = error.reason, str(error)
            self.observe()
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, BACK_OFF_SECONDS[1])

    async def load(self) -> str:
        """Read all ads into fresh tables and swap them in, unless the store has lost them; the cursor to follow from."""
        began, cursor, fresh, forgotten = time.monotonic(), await self._store.cursor(), self._empty(), list[str]()
        before = time.time() - self.gone_seconds
        async for ads in self._store.all_ads():
            old = {ad.ad_id for ad in ads if left_before(ad, before)}
            forgotten += old
            await self._put(fresh, [ad for ad in ads if ad.ad_id not in old])
        await self._complete(fresh)
        # No turn of the event loop from here to the swap.
        # A store that lost its data, by a restart without persistence say, must not take the ads from a service that has them.
        self._emptied = self.ads > 0 and not any(len(table) for table in fresh.tables.values())
        if self._emptied:
            log.warning("the store has no ads any more; ranking goes on with the %d that are in memory: load them again", self.ads)
            return cursor
        self._ads, self.loaded, self._in_step = fresh, True, began
        self.observe()
        log.info("catalogue loaded: %d active ads in %.1f s", self.ads, time.monotonic() - began)
        if forgotten:
            await self._forget(forgotten, before)
        return cursor

    async def _complete(self, ads: Ads) -> None:
        """Give ads that were read what has been added meanwhile, and take from them what has been let go of.

        Either may go on while this waits: when it returns nothing is amiss, and no turn of the event loop has passed since it looked.
        """
        while (added := self._encoders.keys() - ads.tables.keys()) or self._lack_vectors(ads):
            if added:
                fingerprint = added.pop()
                ads.add(fingerprint, self._encoders[fingerprint])
                await self._fill(ads, fingerprint)
            else:
                await self._vectorise(ads)
        for fingerprint in ads.tables.keys() - self._encoders.keys():
            ads.drop(fingerprint)
        for fingerprint, table in ads.tables.items():
            table.vectors = {tower: vectors for tower, vectors in table.vectors.items() if self._towers.get(tower) == fingerprint}

    def _lack_vectors(self, ads: Ads) -> bool:
        """Whether a table lacks vectors that it is to keep."""
        return any(tower not in ads.tables[fingerprint].vectors for tower, fingerprint in self._towers.items() if fingerprint in ads.tables)

    async def _forget(self, ad_ids: Sequence[str], before: float) -> None:
        """Delete ads that left before a time from the store. What is not deleted now is at the next reading."""
        try:
            await self._store.rewrite("ad", [ForgetAd(ad_id, before) for ad_id in ad_ids])
            log.info("%d ads that left more than %.0f days ago are deleted", len(ad_ids), self.gone_seconds / 86_400)
        except StoreError as error:
            log.warning("%d ads that left long ago could not be deleted: %s", len(ad_ids), error)

    @property
    def _has_much_to_free(self) -> bool:
        """Whether many ads in memory left long ago, or are not in the store any more. Counted once in `FREE_SECONDS`."""
        now = time.monotonic()
        if now - self._looked < FREE_SECONDS:
            return False
        self._looked, before = now, time.time() - self.gone_seconds
        return sum(left < before for left in self._ads.gone.values()) > max(FREE_AT_LEAST, FREE_SHARE * self.ads)

    async def _step(self, cursor: str) -> str | None:
        """Take over what changed; the next cursor, or None where the catalogue had better be read anew."""
        ads, cursor_after = await self._store.changed_ads(cursor, POLL_SECONDS)
        asked = time.monotonic()
        await self._put(self._ads, ads)
        self._emptied &= not ads
        self._in_step = asked
        self.observe()
        return None if self._has_much_to_free else cursor_after

    async def _put(self, into: Ads, ads: Sequence[Ad]) -> None:
        size = math.ceil(len(ads) / max(1, round(len(ads) / AT_ONCE)))  # a reply of 540 is one slice, not one of 500 and one of 40
        for start in range(0, len(ads), max(1, size)):
            into.change(ads[start : start + size], self._encode)
            await asyncio.sleep(0)

    def _encode(self, table: AdTable, ads: Sequence[Ad]) -> Collection[str]:
        if mistyped := put_ads(table, ads):
            first = next(iter(mistyped.items()))
            log.warning("%d ads are left out, they do not fit the schema; the first: %r (%s)", len(mistyped), *first)
            self._metrics.degraded("catalogue", "ad_mistyped", len(mistyped))
        return mistyped


def put_ads(table: AdTable, ads: Sequence[Ad]) -> dict[str, str]:
    """Encode ads into a table; those that do not fit the schema and were left out, and why."""
    mistyped, fields = dict[str, str](), table.encoder.schema.side("ad")
    for active in (True, False):
        # An ad that was deleted outright has no features: those it had stay, for the histories that hold it.
        kept = [ad for ad in ads if ad.active == active and (active or ad.features)]
        if not kept:
            continue
        try:
            columns = _columns(fields, kept)
        except FieldError:
            misfits = _misfits(fields, kept)
            mistyped |= misfits
            kept = [ad for ad in kept if ad.ad_id not in misfits]
            columns = _columns(fields, kept)
        table.put([ad.ad_id for ad in kept], table.encoder.encode("ad", columns, len(kept)), active)
    table.remove([ad.ad_id for ad in ads if not ad.active])
    return mistyped


def _columns(fields: Sequence[Field], ads: Sequence[Ad]) -> dict[str, Sequence[Any]]:
    columns = {
        field.name: clean_all(field, [ad.features.get(field.name) for ad in ads]) for field in fields if field.name != IDENTITY["ad"]
    }
    return {**columns, IDENTITY["ad"]: [ad.ad_id for ad in ads]}


def _misfits(fields: Sequence[Field], ads: Sequence[Ad]) -> dict[str, str]:
    found = {}
    for ad in ads:
        try:
            _columns(fields, [ad])
        except FieldError as error:
            found[ad.ad_id] = str(error)
    return found
