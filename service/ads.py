"""All ads in memory: encoded, and the packed features that they were encoded from, now and at the moment of any request under way.

Knows nothing about the store or about how ads are encoded.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from features.encode import AdTable
from features.state import Ad, pack_features, unpack_features

Sources = Mapping[str, bytes | None]
"""By ad id the packed features that its row was encoded from, None: there is no row."""
Encode = Callable[[AdTable, Sequence[Ad]], Collection[str]]
"""Encodes ads into a table, and tells the ids of those that do not fit its schema and were left out."""


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
class Ads:
    """All ads: encoded, by fingerprint; their packed features; and which of them have left."""

    tables: dict[str, AdTable]
    packed: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    misfits: dict[str, dict[str, bytes | None]] = field(default_factory=dict)
    """By fingerprint, of the ads whose features do not fit its schema: what their rows were encoded from instead."""
    latest: _Change = field(default_factory=_Change)

    def sources(self, fingerprint: str, ad_ids: Sequence[str]) -> dict[str, bytes | None]:
        """What the ads' rows were encoded from."""
        found = dict(zip(ad_ids, map(self.packed.get, ad_ids), strict=True))
        if misfits := self.misfits.get(fingerprint):
            found.update((ad_id, misfits[ad_id]) for ad_id in found.keys() & misfits.keys())
        return found

    def change(self, ads: Sequence[Ad], encode: Encode) -> None:
        """Take over ads that were read: keep their features, and encode them into each table.

        One that was deleted outright has no features, and keeps those it had.
        """
        changed = [ad.ad_id for ad in ads]
        before = {fingerprint: self.sources(fingerprint, changed) for fingerprint in self.tables}
        self.packed.update((ad.ad_id, pack_features(ad.features)) for ad in ads if ad.active or ad.features)
        self.gone.difference_update(ad.ad_id for ad in ads if ad.active)
        self.gone.update(ad.ad_id for ad in ads if not ad.active)
        for fingerprint, sources in before.items():
            self._encode(fingerprint, ads, sources, encode)
        change, self.latest = self.latest, _Change()
        change.before, change.following = before, self.latest

    def fill(self, fingerprint: str, size: int, encode: Encode) -> Iterator[None]:
        """Encode the ads that are there into a table that is new, so many at each step, each as it is when its turn comes."""
        ad_ids = list(self.packed)
        for start in range(0, len(ad_ids), size):
            some = ad_ids[start : start + size]
            ads = [Ad(ad_id, unpack_features(self.packed[ad_id]), ad_id not in self.gone) for ad_id in some]
            if fingerprint in self.tables:
                self._encode(fingerprint, ads, self.sources(fingerprint, some), encode)
            yield

    def _encode(self, fingerprint: str, ads: Sequence[Ad], before: Sources, encode: Encode) -> None:
        """Encode ads into one table, whose rows were encoded from `before`."""
        table, misfits = self.tables[fingerprint], self.misfits.setdefault(fingerprint, {})
        refused = encode(table, ads)
        if refused or misfits:
            for ad in ads:
                if ad.ad_id in refused:
                    misfits[ad.ad_id] = before[ad.ad_id] if table.rows([ad.ad_id])[0] else None
                elif ad.active or ad.features:
                    misfits.pop(ad.ad_id, None)

    def drop(self, fingerprint: str) -> None:
        """Let go of a table."""
        self.tables.pop(fingerprint, None)
        self.misfits.pop(fingerprint, None)


class Held(NamedTuple):
    """The ads encoded for one fingerprint, held by a request that may outlast their place in the catalogue."""

    ads: Ads
    fingerprint: str
    table: AdTable

    def view(self) -> "View":
        """The features that the rows of the table are encoded from now."""
        return View(self.ads, self.fingerprint)


class View:
    """What ads' rows were encoded from at one moment, for one fingerprint, however the ads change after it.

    It costs nothing until it is asked: changes keep what they replace, for those who hold a view from before them.
    """

    __slots__ = ("_ads", "_fingerprint", "_since")

    def __init__(self, ads: Ads, fingerprint: str) -> None:
        self._ads, self._fingerprint, self._since = ads, fingerprint, ads.latest

    def features(self, ad_ids: Sequence[str]) -> Mapping[str, bytes]:
        """The packed features (`state.pack_features`) of those of the ads that had a row, whether or not they had left.

        Raises:
            KeyError: the fingerprint's table was dropped, and ads have changed since.
        """
        found, change = self._ads.sources(self._fingerprint, ad_ids), self._since
        restored: set[str] = set()
        while change.following is not None:
            before, change = change.before[self._fingerprint], change.following
            for ad_id in (found.keys() & before.keys()) - restored:
                found[ad_id] = before[ad_id]
                restored.add(ad_id)
        for ad_id in [ad_id for ad_id, packed in found.items() if packed is None]:
            del found[ad_id]
        return cast("Mapping[str, bytes]", found)
