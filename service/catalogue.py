"""The ad catalogue in memory: read whole from the store, then kept in step with its change stream.

Knows nothing about requests. Everything here runs on the event loop, so that a table never changes under a reader.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from features.encode import AdTable, Encoder, FieldError, clean
from features.schema import IDENTITY, Field
from features.state import Ad, ChangesLostError, Store, StoreError, pack_features, unpack_features

from .metrics import Metrics

AT_ONCE = 200
"""Ads encoded before other work gets a turn on the event loop: about a millisecond."""
AT_ONCE_UNDER_LOAD = 50
"""The same for a table that is not needed yet: what it takes is taken from requests."""
POLL_SECONDS = 1.0
BACK_OFF_SECONDS = (0.1, 5.0)

log = logging.getLogger(__name__)


Sources = Mapping[str, bytes | None]
"""By ad id the packed features that its row was encoded from, None: there is no row."""


class _Change:
    """A batch of changes. The last one is empty, and is filled and followed by another when ads change.

    Who holds one holds all that came after it, and nobody else does: what no reader needs any more goes by itself.
    """

    __slots__ = ("before", "following")

    def __init__(self) -> None:
        self.before: Mapping[str, Sources] = {}
        """By fingerprint, of the ads that changed."""
        self.following: _Change | None = None


@dataclass
class _Ads:
    """All ads: encoded, by fingerprint; their packed features; and which of them have left."""

    tables: dict[str, AdTable]
    features: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    misfits: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    """By fingerprint, of the ads whose features do not fit its schema: what their rows were encoded from instead."""
    latest: _Change = field(default_factory=_Change)

    def sources(self, fingerprint: str, ad_ids: Iterable[str]) -> dict[str, bytes | None]:
        """What the ads' rows were encoded from."""
        known = self.features
        found = {ad_id: known.get(ad_id) for ad_id in ad_ids}
        if misfits := self.misfits.get(fingerprint):
            found.update((ad_id, misfits[ad_id]) for ad_id in found.keys() & misfits.keys())
        return found

    def change(self, ads: Sequence[Ad], encode: Callable[[AdTable, Sequence[Ad]], Collection[str]]) -> None:
        """Take over ads that were read: note their features, and encode them into each table."""
        changed = [ad.ad_id for ad in ads]
        before = {fingerprint: self.sources(fingerprint, changed) for fingerprint in self.tables}
        self.note(ads)
        for fingerprint, sources in before.items():
            self.encode(fingerprint, ads, sources, encode)
        change, self.latest = self.latest, _Change()
        change.before, change.following = before, self.latest

    def encode(
        self, fingerprint: str, ads: Sequence[Ad], before: Sources, encode: Callable[[AdTable, Sequence[Ad]], Collection[str]]
    ) -> None:
        """Encode ads into one table, whose rows were encoded from `before`; `encode` tells those that do not fit."""
        table, misfits = self.tables[fingerprint], self.misfits.setdefault(fingerprint, {})
        refused = encode(table, ads)
        if refused or misfits:
            for ad in ads:
                if ad.ad_id in refused:
                    misfits[ad.ad_id] = before[ad.ad_id] if table.rows([ad.ad_id])[0] else None
                elif ad.active or ad.features:
                    misfits.pop(ad.ad_id, None)

    def note(self, ads: Sequence[Ad]) -> None:
        """Keep the features of ads that were read; one that was deleted outright has none, and keeps those it had."""
        self.features.update((ad.ad_id, pack_features(ad.features)) for ad in ads if ad.active or ad.features)
        self.gone.difference_update(ad.ad_id for ad in ads if ad.active)
        self.gone.update(ad.ad_id for ad in ads if not ad.active)

    def batches(self, size: int) -> Iterator[list[Ad]]:
        """The ads that are there now, some at a time, each as it is when its turn comes."""
        ad_ids = list(self.features)
        for start in range(0, len(ad_ids), size):
            some = ad_ids[start : start + size]
            yield [Ad(ad_id, unpack_features(self.features[ad_id]), ad_id not in self.gone) for ad_id in some]


class View:
    """What ads' rows were encoded from at one moment, for one fingerprint, however the catalogue changes after it.

    It costs nothing until it is asked: changes keep what they replace, for those who hold a view from before them.
    """

    __slots__ = ("_ads", "_fingerprint", "_since")

    def __init__(self, ads: _Ads, fingerprint: str) -> None:
        self._ads, self._fingerprint, self._since = ads, fingerprint, ads.latest

    def features(self, ad_ids: Iterable[str]) -> dict[str, bytes]:
        """The packed features (`state.pack_features`) of those of the ads that had a row, whether or not they had left.

        Raises:
            KeyError: the catalogue has let go of the fingerprint and has changed since.
        """
        found, change = self._ads.sources(self._fingerprint, ad_ids), self._since
        restored: set[str] = set()
        while change.following is not None:
            before, change = change.before[self._fingerprint], change.following
            for ad_id in (found.keys() & before.keys()) - restored:
                found[ad_id] = before[ad_id]
                restored.add(ad_id)
        return {ad_id: packed for ad_id, packed in found.items() if packed is not None}


class Catalogue:
    """Encoded ads, one table for each distinct fingerprint among the models."""

    def __init__(self, store: Store, encoders: Mapping[str, Encoder], metrics: Metrics) -> None:
        self._store, self._encoders, self._metrics = store, dict(encoders), metrics
        self._ads = self._empty()
        self._in_step = time.monotonic()
        self.loaded = False
        """Whether all ads have been read once."""
        self._emptied = False
        self.reason: str | None = None
        """Why the catalogue is not in step with the store, None while it is."""

    def _empty(self) -> _Ads:
        return _Ads({fingerprint: AdTable(encoder) for fingerprint, encoder in self._encoders.items()})

    def table(self, fingerprint: str) -> AdTable:
        """The ads as the encoder of that fingerprint encodes them. Ask anew for each request: a re-read replaces it."""
        return self._ads.tables[fingerprint]

    def view(self, fingerprint: str) -> View:
        """The features that the rows of `table` are encoded from now."""
        return View(self._ads, fingerprint)

    async def add(self, fingerprint: str, encoder: Encoder) -> None:
        """Encode all ads for one more fingerprint while ranking goes on; when it returns, that table is in step with the others."""
        if fingerprint in self._encoders:
            return
        self._encoders[fingerprint] = encoder
        ads = self._ads
        ads.tables[fingerprint] = AdTable(encoder)  # changes reach it from now on: an ad may be encoded twice, each time as it is then
        await self._fill(ads, fingerprint)

    def keep(self, fingerprints: Collection[str]) -> None:
        """Let go of the tables of all other fingerprints."""
        for fingerprint in self._encoders.keys() - set(fingerprints):
            del self._encoders[fingerprint]
            self._ads.tables.pop(fingerprint, None)
            self._ads.misfits.pop(fingerprint, None)

    async def _fill(self, ads: _Ads, fingerprint: str) -> None:
        for batch in ads.batches(AT_ONCE_UNDER_LOAD):
            if fingerprint in ads.tables:
                before = ads.sources(fingerprint, [ad.ad_id for ad in batch])
                ads.encode(fingerprint, batch, before, self._encode)
            await asyncio.sleep(0)

    @property
    def ads(self) -> int:
        """Active ads, as the table that has been there longest has them."""
        return len(next(iter(self._ads.tables.values()), ()))

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
                pause, self.reason = BACK_OFF_SECONDS[0], "store_emptied" if self._emptied else None
                continue
            except ChangesLostError as error:
                log.warning("reading the catalogue again: %s", error)
                cursor = None
            except StoreError as error:
                if self.reason is None:
                    log.warning("the catalogue is not followed for now: %s", error)
                self.reason = error.reason
            self.observe()
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, BACK_OFF_SECONDS[1])

    async def load(self) -> str:
        """Read all ads into fresh tables and swap them in, unless the store has lost them; the cursor to follow from."""
        began, cursor, fresh = time.monotonic(), await self._store.cursor(), self._empty()
        async for ads in self._store.all_ads():
            await self._put(fresh, ads)
        while added := self._encoders.keys() - fresh.tables.keys():  # meanwhile
            fingerprint = added.pop()
            fresh.tables[fingerprint] = AdTable(self._encoders[fingerprint])
            await self._fill(fresh, fingerprint)
        # A store that lost its data, by a restart without persistence say, must not take the ads from a service that has them.
        self._emptied = self.ads > 0 and not any(len(table) for table in fresh.tables.values())
        if self._emptied:
            log.warning("the store has no ads any more; ranking goes on with the %d that are in memory: load them again", self.ads)
            return cursor
        self._ads, self.loaded, self._in_step = fresh, True, began
        self.observe()
        log.info("catalogue loaded: %d active ads in %.1f s", self.ads, time.monotonic() - began)
        return cursor

    async def _step(self, cursor: str) -> str:
        ads, cursor_after = await self._store.changed_ads(cursor, POLL_SECONDS)
        asked = time.monotonic()
        await self._put(self._ads, ads)
        self._emptied &= not ads
        self._in_step = asked
        self.observe()
        return cursor_after

    async def _put(self, into: _Ads, ads: Sequence[Ad]) -> None:
        for start in range(0, len(ads), AT_ONCE):
            into.change(ads[start : start + AT_ONCE], self._encode)
            await asyncio.sleep(0)

    def _encode(self, table: AdTable, ads: Sequence[Ad]) -> Collection[str]:
        if mistyped := put_ads(table, ads):
            first = next(iter(mistyped.items()))
            log.warning("%d ads are left out, they do not fit the schema; the first: %r (%s)", len(mistyped), *first)
            self._metrics.degraded("catalogue", "ad_mistyped", len(mistyped))
        return mistyped


def put_ads(table: AdTable, ads: Sequence[Ad]) -> dict[str, str]:
    """Encode ads into a table; those that do not fit the schema and were left out, and why."""
    mistyped, fields = {}, table.encoder.schema.side("ad")
    for active in (True, False):
        # An ad that was deleted outright has no features: those it had stay, for the histories that hold it.
        kept: list[tuple[str, list[Any]]] = []
        for ad in ads:
            if ad.active == active and (active or ad.features):
                try:
                    kept.append((ad.ad_id, _clean(fields, ad)))
                except FieldError as error:
                    mistyped[ad.ad_id] = str(error)
        columns = dict(zip([field.name for field in fields], zip(*(row for _, row in kept), strict=True), strict=False))
        table.put([ad_id for ad_id, _ in kept], table.encoder.encode("ad", columns, len(kept)), active)
    table.remove([ad.ad_id for ad in ads if not ad.active])
    return mistyped


def _clean(fields: Sequence[Field], ad: Ad) -> list[Any]:
    return [ad.ad_id if field.name == IDENTITY["ad"] else clean(field, ad.features.get(field.name)) for field in fields]
