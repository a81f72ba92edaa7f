"""All ads in memory: encoded, and the packed features that they were encoded from, now and at the moment of any request under way.

Knows nothing about the store or about how ads are encoded.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from features.counters import Counts
from features.encode import AdTable, Encoder
from features.id_remap import IdRemap
from features.index import AdIds
from features.state import ACTIVE, NEVER, Ad, pack_features, unpack_features
from features.vocabulary import Ids

from .packed import PackedFeatures

AT_ONCE = 1_000
"""Ads whose rows are taken over from another table before other work gets a turn on the event loop: about half a millisecond."""

ALWAYS = float("inf")

Sources = Mapping[str, bytes | None]
"""By ad id packed features, None: there were none."""
Encode = Callable[[AdTable, Sequence[Ad]], Collection[str]]
"""Encodes ads into a table, and tells the ids of those that do not fit its schema and were left out."""


class _Change:
    """A batch of changes: what was there before. The last one is empty, and is filled and followed by another when ads change.

    Who holds one holds all that came after it, and nobody else does: what no reader needs any more goes by itself.
    """

    __slots__ = ("following", "misfits", "packed")

    def __init__(self) -> None:
        self.packed: Sources = {}
        """Of the ads that changed."""
        self.misfits: Mapping[str, Sources] = {}
        """By the fingerprint of each table that changed, of those of them that were misfits."""
        self.following: _Change | None = None


@dataclass
class Ads:
    """All ads: encoded, by fingerprint; their packed features; and which of them have left."""

    tables: dict[str, AdTable]
    gone: dict[str, float] = field(default_factory=dict)
    """Those that have left, and when: `ALWAYS` where it is not known, `NEVER` where they are not in the store any more."""
    misfits: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    """By fingerprint, of the ads whose features do not fit its schema: what their rows were encoded from, None: there is no row."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Of those ads with which something is counted."""
    latest: _Change = field(default_factory=_Change)
    packed: PackedFeatures = field(default_factory=PackedFeatures)
    """Of every ad that has an id, by its row, those of misfits included."""
    ids: AdIds = field(default_factory=AdIds)
    """What all tables number ads by."""

    def features(self, ad_ids: Sequence[str]) -> dict[str, bytes | None]:
        """The packed features of ads, None of those that are not known."""
        return dict(zip(ad_ids, self.packed.get(self.ids.rows(ad_ids)), strict=True))

    def misfits_of(self, fingerprint: str) -> dict[str, bytes | None]:
        """Those of one table."""
        return self.misfits.setdefault(fingerprint, {})

    def add(self, fingerprint: str, encoder: Encoder) -> None:
        """Have one more table, empty, with the same rows as the others."""
        self.tables[fingerprint] = AdTable(encoder, len(self.ids), self.ids)

    def change(self, ads: Sequence[Ad], encode: Encode) -> None:
        """Take over ads that were read: keep their features, and encode them into each table.

        One that was deleted outright has no features, and keeps those it had. Most changes are counts alone.
        """
        counted = [ad for ad in ads if ad.counts]
        self.counts.update((ad.ad_id, ad.counts) for ad in counted)
        before = self.features([ad.ad_id for ad in counted])
        same = {ad.ad_id for ad in counted if self._is_known(ad, before[ad.ad_id])}
        self._change([ad for ad in ads if ad.ad_id not in same], encode)
        for table in self.tables.values():
            table.count([ad.ad_id for ad in counted], [ad.counts for ad in counted])

    def _is_known(self, ad: Ad, packed: bytes | None) -> bool:
        return ad.active and ad.ad_id not in self.gone and packed == pack_features(ad.features)

    def _change(self, ads: Sequence[Ad], encode: Encode) -> None:
        if not ads:
            return
        told = {ad.ad_id: ad.features for ad in ads if ad.active or ad.features}
        rows, before = self.ids.add([*told]), self.features([ad.ad_id for ad in ads])
        change, self.latest = self.latest, _Change()
        change.packed = before
        change.misfits = {fingerprint: self._misfits_among(fingerprint, before) for fingerprint in self.tables}
        change.following = self.latest
        self.packed.put(rows, [*map(pack_features, told.values())])
        for ad in ads:
            if ad.active:
                self.gone.pop(ad.ad_id, None)
            elif ad.features or before[ad.ad_id] is not None:
                self.gone[ad.ad_id] = ad.changed.get(ACTIVE, ALWAYS if ad.features else NEVER)
        for fingerprint in self.tables:
            self._encode(fingerprint, ads, before, encode)

    def _misfits_among(self, fingerprint: str, ad_ids: Collection[str]) -> Sources:
        misfits = self.misfits_of(fingerprint)
        return {ad_id: misfits[ad_id] for ad_id in ad_ids if ad_id in misfits} if misfits else {}

    def fill(self, fingerprint: str, size: int, encode: Encode) -> Iterator[None]:
        """Bring the ads that are there into a table that is new, some at each step, each ad as it is when its turn comes.

        Rows that another table has are taken over from there where its encoder differs in its vocabularies only; `size` ads
        at once are encoded where not.
        """
        table, misfits, end = self.tables[fingerprint], self.misfits_of(fingerprint), len(self.ids) + 1
        source = yield from self._like(fingerprint)
        for start in range(1, end, AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, end))
            if source:
                self._take_over(fingerprint, source, rows)
            rest = table.ad_ids(rows[table.lacks(rows)])
            yield
            yield from self._fill(fingerprint, [ad_id for ad_id in rest if ad_id not in misfits], size, encode)
            self._count(table, table.ad_ids(rows))

    def _count(self, table: AdTable, ad_ids: Sequence[str]) -> None:
        if table.encoder.ad_tallies:
            table.count(ad_ids, [self.counts.get(ad_id, {}) for ad_id in ad_ids])

    def _like(self, fingerprint: str) -> Generator[None, None, tuple[str, IdRemap] | None]:
        """A table whose rows can be taken over, by its fingerprint, and how."""
        encoder = self.tables[fingerprint].encoder
        for other, table in self.tables.items():
            remap = IdRemap(table.encoder, encoder)
            if other != fingerprint and remap.possible:
                yield from remap.steps()
                return other, remap
        return None

    def _take_over(self, fingerprint: str, source: tuple[str, IdRemap], rows: Ids) -> None:
        """Take over those of some rows from another table that can be."""
        other, remap = source
        if not {fingerprint, other} <= self.tables.keys():
            return
        table, misfits = self.tables[other], self.misfits_of(other)
        rows = rows[~table.lacks(rows)]
        ads, unsure = remap(table.take(rows))
        if misfits:
            unsure |= np.isin(rows, table.ids.rows(list(misfits)))
        sure = np.flatnonzero(~unsure)
        self.tables[fingerprint].put_rows(rows[sure], ads.take(sure), table.active(rows[sure]))

    def _fill(self, fingerprint: str, ad_ids: list[str], size: int, encode: Encode) -> Iterator[None]:
        for at in range(0, len(ad_ids), size):
            if fingerprint in self.tables:
                packed = self.features(ad_ids[at : at + size])
                ads = [Ad(ad_id, unpack_features(each), ad_id not in self.gone) for ad_id, each in packed.items() if each is not None]
                self._encode(fingerprint, ads, packed, encode)
            yield

    def _encode(self, fingerprint: str, ads: Sequence[Ad], before: Sources, encode: Encode) -> None:
        """Encode ads into one table; `before` are the features that they had."""
        table, misfits = self.tables[fingerprint], self.misfits_of(fingerprint)
        refused = encode(table, ads)
        if refused or misfits:
            for ad in ads:
                if ad.ad_id in refused:
                    misfits.setdefault(ad.ad_id, before[ad.ad_id] if table.rows([ad.ad_id])[0] else None)
                elif ad.active or ad.features:
                    misfits.pop(ad.ad_id, None)

    def drop(self, fingerprint: str) -> None:
        """Let go of a table."""
        self.tables.pop(fingerprint, None)
        self.misfits.pop(fingerprint, None)


class View:
    """A table, and what its rows were encoded from at one moment, however the ads change after it.

    It costs nothing until it is asked: changes keep what they replace, for those who hold a view from before them.
    """

    __slots__ = ("_ads", "_fingerprint", "_misfits", "_since", "table")

    def __init__(self, ads: Ads, fingerprint: str) -> None:
        """A view of now.

        Raises:
            KeyError: there is no such table.
        """
        self.table, self._misfits = ads.tables[fingerprint], ads.misfits_of(fingerprint)
        self._ads, self._fingerprint, self._since = ads, fingerprint, ads.latest

    def renew(self) -> None:
        """See the table as it is now. One that was dropped is as it was then."""
        while self._since.following is not None and self._fingerprint in self._since.misfits:
            self._since = self._since.following

    def features(self, ad_ids: Sequence[str]) -> Mapping[str, bytes]:
        """The packed features (`state.pack_features`) of those of the ads that had a row, whether or not they had left."""
        found = self._ads.features(ad_ids)
        if self._misfits:
            found.update((ad_id, self._misfits[ad_id]) for ad_id in found.keys() & self._misfits.keys())
        change, restored = self._since, set[str]()
        while change.following is not None:
            misfits = change.misfits.get(self._fingerprint, self._misfits)
            for ad_id in (found.keys() & change.packed.keys()) - restored:
                found[ad_id] = misfits[ad_id] if ad_id in misfits else change.packed[ad_id]
                restored.add(ad_id)
            change = change.following
        for ad_id in [ad_id for ad_id, packed in found.items() if packed is None]:
            del found[ad_id]
        return cast("Mapping[str, bytes]", found)
