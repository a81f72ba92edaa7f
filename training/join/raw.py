"""Entries of the streams as rows of raw files (docs/log.md): a row a ranking, with lists of what belongs to its ads, and a row an event.

Columns are built as lists, and only then brought to the ads by position. Knows nothing about where entries come from or files go.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite
from typing import Any, TypeVar

import numpy as np
import polars as pl

from features.encode import IDENTITIES, Features, FieldError, clean
from features.events import JOINED, Event, unpack_event
from features.packing import StateError
from features.schema import Field, Schema, Side
from features.served import ServedRecord, unpack_served
from features.state import unpack_features
from features.streams import Entry, Stream

from ..datasets.prepared import DTYPES

T = TypeVar("T")
HOUR = 3600
LATEST = 253_402_300_799
"""The last second of the year 9999."""
LAST_POSITION = 2**31 - 1
DAMAGED, FOREIGN = "damaged", "foreign"
"""Why an entry is put aside: it is no record, or an event that is not for the log."""
REVISIONS = pl.List(pl.UInt64())
RANKING_TYPES: Mapping[str, pl.DataType] = {
    "entry": pl.String(),
    "received": pl.Float64(),
    "since": pl.Float64(),
    "request_id": pl.String(),
    "model": pl.String(),
    "version": pl.Int64(),
    "user_id": pl.String(),
    "ts": pl.Float64(),
    "policy": pl.String(),
    "shown": pl.Int64(),
    "history": pl.List(pl.String()),
    "history_revisions": REVISIONS,
    "candidates": pl.List(pl.String()),
    "candidate_revisions": REVISIONS,
    "candidate_bids": pl.List(pl.Int64()),
    "candidate_bid_types": pl.List(pl.String()),
    "objective": pl.String(),
    "experiment": pl.List(pl.String()),
}
"""`since` is when windows begin: when it was ranked, or received if that clock was ahead."""
LATER = {"candidate_bids", "candidate_bid_types", "objective", "experiment", "bid", "bid_type", "price", "p_conversion"}
"""Columns of rankings and ads that files of before do not have."""
TIMES_TYPE: pl.DataType = pl.List(pl.Float64())
"""Of `history_ts`, which stands beside `history` in a log whose schema has ages."""
AD_TYPES: Mapping[str, pl.DataType] = {
    "ad_id": pl.String(),
    "position": pl.Int64(),
    "p_click": pl.Float64(),
    "propensity": pl.Float64(),
    "known": pl.Boolean(),
    "revision": pl.UInt64(),
    "bid": pl.Int64(),
    "bid_type": pl.String(),
    "price": pl.Int64(),
    "p_conversion": pl.Float64(),
}
EVENT_TYPES: Mapping[str, pl.DataType] = {
    "entry": pl.String(),
    "received": pl.Float64(),
    "at": pl.Float64(),
    "type": pl.String(),
    "event_id": pl.String(),
    "ts": pl.Float64(),
    "user_id": pl.String(),
    "request_id": pl.String(),
    "ad_id": pl.String(),
    "position": pl.Int64(),
    "value": pl.Float64(),
}
"""`at` is `ts`, or `received` if that clock was ahead."""
ASIDE_TYPES: Mapping[str, pl.DataType] = {"stream": pl.String(), "entry": pl.String(), "why": pl.String(), "packed": pl.Binary()}


class LogColumns:
    """The columns of a log's files, and features as values of them."""

    def __init__(self, schema: Schema) -> None:
        self.fields: dict[Side, dict[str, tuple[int, Field]]] = {}
        sides: tuple[Side, Side, Side] = ("user", "context", "ad")
        for side in sides:
            fields = [each for each in schema.side(side) if each.name not in IDENTITIES]
            self.fields[side] = {each.name: (i, each) for i, each in enumerate(fields)}
        self.tensors: dict[str, pl.DataType] = {
            name: pl.List(pl.Int64()) if name.endswith("_ids") else pl.List(pl.Float32()) for name in schema.tensors
        }
        self.rankings = {**RANKING_TYPES, **({"history_ts": TIMES_TYPE} if schema.history_ages else {})}

    def types(self, side: Side) -> dict[str, pl.DataType]:
        """The types of a side's columns."""
        return {each.path: DTYPES[each.kind] for _, each in self.fields[side].values()}

    @property
    def of_ads(self) -> dict[str, pl.DataType]:
        """The columns that a ranking has a value an ad of."""
        tensors = {f"tensors.{name}": dtype for name, dtype in self.tensors.items() if name.startswith("ad_")}
        return {**AD_TYPES, **self.types("ad"), **tensors}

    @property
    def impressions(self) -> dict[str, pl.DataType]:
        """All columns of a file of impressions."""
        tensors = {f"tensors.{name}": dtype for name, dtype in self.tensors.items() if not name.startswith("ad_")}
        lists = {name: pl.List(dtype) for name, dtype in self.of_ads.items()}
        return {**self.rankings, **self.types("user"), **self.types("context"), **tensors, **lists}

    def values(self, side: Side, features: Features, troubles: Counter[str]) -> list[Any]:
        """The clean values of a side's fields in their order, None where missing."""
        known = self.fields[side]
        row: list[Any] = [None] * len(known)
        for name, value in features.items():
            if name not in known:
                troubles["field_unknown"] += 1
                continue
            i, each = known[name]
            try:
                row[i] = clean(each, value)
            except FieldError:
                troubles["value_unfit"] += 1
        return row

    def series(self, side: Side, rows: Sequence[Sequence[Any]]) -> list[pl.Series]:
        """Rows of values as columns."""
        return [pl.Series(name, [row[i] for row in rows], dtype) for i, (name, dtype) in enumerate(self.types(side).items())]

    def ads(self, ads: Iterable[tuple[str, bytes]]) -> pl.DataFrame:
        """The rows of an `ads/` file."""
        pairs = list(ads)
        rows = [self.values("ad", _unpacked(packed, Counter()), Counter()) for _, packed in pairs]
        ids = pl.Series("ad_id", [ad_id for ad_id, _ in pairs], pl.String())
        revisions = pl.Series("revision", [revision(packed) for _, packed in pairs], pl.UInt64())
        return pl.DataFrame([ids, revisions, *self.series("ad", rows)])


def _unpacked(packed: bytes, troubles: Counter[str]) -> Features:
    try:
        return unpack_features(packed)
    except StateError:
        troubles["value_unfit"] += 1
        return {}


@dataclass
class RawBatch:
    """What a batch of entries comes to."""

    frames: dict[int, pl.DataFrame] = field(default_factory=dict)
    """By hour since 1970, UTC: of rankings that in which they were ranked, of events that in which they were received."""
    aside: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    """Stream, entry, why, and value of entries that cannot be rows."""
    ads: set[tuple[str, bytes]] = field(default_factory=set)
    """(ad id, packed features) of the rankings."""
    troubles: Counter[str] = field(default_factory=Counter)
    """`field_unknown`: values of fields that the schema lacks; `value_unfit`: values that do not fit their field."""
    models: Counter[str] = field(default_factory=Counter)
    """Rankings by model."""
    events: int = 0


def _readable(entries: Iterable[Entry], stream: Stream, read: Callable[[bytes], T], batch: RawBatch) -> Iterator[tuple[Entry, T]]:
    """The entries that can be read, and what they hold; the others are put aside."""
    for entry in entries:
        try:
            held = read(entry.value)
        except StateError:
            batch.aside.append((stream, entry.id, DAMAGED, entry.value))
        else:
            yield entry, held


def impressions_of(entries: Sequence[Entry], stream: Stream, columns: LogColumns) -> RawBatch:
    """Rankings as rows."""
    batch, hours = RawBatch(), defaultdict[int, list[tuple[Entry, ServedRecord]]](list)
    for entry, served in _readable(entries, stream, read_served, batch):
        hours[int(served.ts // HOUR)].append((entry, served))
        batch.models[served.model] += 1
        batch.ads.update(served.ads.items())
    for hour, rankings in hours.items():
        builder = _Builder(columns, batch.troubles)
        for entry, served in rankings:
            builder.add(entry, served)
        batch.frames[hour] = builder.frame()
    return batch


def events_of(entries: Sequence[Entry], stream: Stream) -> RawBatch:
    """Events as rows."""
    batch, hours = RawBatch(), defaultdict[int, list[tuple[Any, ...]]](list)
    for entry, event in _readable(entries, stream, read_event, batch):
        if event.type not in JOINED:
            batch.aside.append((stream, entry.id, FOREIGN, entry.value))
            continue
        value = None if event.value is None else float(event.value)
        who = event.user_id, event.request_id, event.ad_id, event.position, value
        ts = float(event.ts)
        hours[int(entry.ts // HOUR)].append((entry.id, entry.ts, min(ts, entry.ts), event.type, event.event_id, ts, *who))
        batch.events += 1
    batch.frames = {hour: pl.DataFrame(rows, dict(EVENT_TYPES), orient="row") for hour, rows in hours.items()}
    return batch


class _Builder:
    """Builds rows, ranking by ranking."""

    def __init__(self, columns: LogColumns, troubles: Counter[str]) -> None:
        self._columns, self._troubles = columns, troubles
        self._rankings: list[tuple[Any, ...]] = []
        self._ads: list[tuple[Any, ...]] = []
        self._sides: dict[Side, list[list[Any]]] = {"user": [], "context": [], "ad": [[None] * len(columns.fields["ad"])]}
        self._ad_of: list[int] = []
        """By ad of a ranking its row among the ad side's values."""
        self._packed: dict[bytes, tuple[int, int]] = {}
        """By packed features their revision, and their row there."""
        self._tensors: dict[str, dict[int, list[Any]]] = {name: {} for name in columns.tensors}
        """By name and ranking, or ad of a ranking, the values."""

    def add(self, entry: Entry, served: ServedRecord) -> None:
        """Add a ranking."""
        packed = (served.ads.get(ad_id) for ad_id in served.history)
        values = (entry.id, entry.ts, float(min(served.ts, entry.ts)), served.request_id, served.model, served.version, served.user_id)
        more = (
            float(served.ts),
            served.policy,
            served.shown,
            served.history,
            [0 if each is None else self._look_up(each)[0] for each in packed],
        )
        explored = [self._revision(served, ad_id) for ad_id in served.candidates] if served.candidates else None
        times = [float(ts) for ts in served.history_ts] if served.history_ts or not served.history else None
        if served.tensors:
            self._add_tensors(served)
        arms = sorted(f"{name}={arm}" for name, arm in served.experiment.items()) or None
        offered = (served.bids, served.bid_types) if served.bids and served.candidates else (None, None)
        row = *values, *more, served.candidates or None, explored, *offered, served.objective, arms, times
        self._rankings.append(row[: len(self._columns.rankings)])
        self._sides["user"].append(self._columns.values("user", served.user, self._troubles))
        self._sides["context"].append(self._columns.values("context", served.context, self._troubles))
        bids = dict(zip(served.candidates or served.ad_ids, zip(served.bids, served.bid_types, strict=True), strict=bool(served.bids)))
        for i, ad_id in enumerate(served.ad_ids):
            bid, kind = bids.get(ad_id, (-1, None))
            paid = served.prices[i] if served.prices else None
            self._add_ad(served, i, ad_id, (None, None, None) if bid < 0 else (bid, kind, paid))

    def _add_ad(self, served: ServedRecord, i: int, ad_id: str, money: tuple[int | None, str | None, int | None]) -> None:
        packed = None if ad_id in served.unknown else served.ads.get(ad_id)
        revised, row = (0, 0) if packed is None else self._look_up(packed)
        if ad_id in served.sent:
            row = self._sent(row, served.sent[ad_id])
        position = served.positions[i] if served.positions else i + 1
        converts = float(served.p_conversion[i]) if served.p_conversion else None
        shares = float(served.p_click[i]), float(served.propensity[i])
        self._ads.append((len(self._rankings) - 1, ad_id, position, *shares, packed is not None, revised, *money, converts))
        self._ad_of.append(row)

    def _revision(self, served: ServedRecord, ad_id: str) -> int:
        packed = served.ads.get(ad_id)
        return 0 if packed is None or ad_id in served.unknown else self._look_up(packed)[0]

    def _look_up(self, packed: bytes) -> tuple[int, int]:
        found = self._packed.get(packed)
        if found is None:
            values = self._columns.values("ad", _unpacked(packed, self._troubles), self._troubles)
            found = self._packed[packed] = revision(packed), len(self._sides["ad"])
            self._sides["ad"].append(values)
        return found

    def _sent(self, row: int, features: Features) -> int:
        """A row of the ad side with the sent features over those of another."""
        stored, ads = self._sides["ad"][row], self._sides["ad"]
        sent = self._columns.values("ad", features, self._troubles)
        named = [name in features for name in self._columns.fields["ad"]]
        ads.append([new if is_sent else old for new, old, is_sent in zip(sent, stored, named, strict=True)])
        return len(ads) - 1

    def _add_tensors(self, served: ServedRecord) -> None:
        for name, data in served.tensors.items():
            kind, of_ads = np.dtype("<i8") if name.endswith("_ids") else np.dtype("<f4"), name.startswith("ad_")
            ads = len(served.ad_ids) if of_ads else 1
            if name not in self._tensors or not ads or len(data) % (kind.itemsize * ads):
                self._troubles["field_unknown" if name not in self._tensors else "value_unfit"] += 1
                continue
            first = len(self._ads) if of_ads else len(self._rankings)
            self._tensors[name].update(enumerate(np.frombuffer(data, kind).reshape(ads, -1).tolist(), first))

    def frame(self) -> pl.DataFrame:
        """What has been added."""
        columns = self._columns
        rankings = pl.DataFrame(self._rankings, columns.rankings, orient="row")
        rankings = rankings.hstack([*columns.series("user", self._sides["user"]), *columns.series("context", self._sides["context"])])
        ads = pl.DataFrame(self._ads, {"n": pl.UInt32(), **AD_TYPES}, orient="row")
        ads = ads.hstack([column.gather(self._ad_of) for column in columns.series("ad", self._sides["ad"])])
        of_ads, of_rankings = list[pl.Series](), list[pl.Series]()
        for name, found in self._tensors.items():
            into, count = (of_ads, len(ads)) if name.startswith("ad_") else (of_rankings, len(rankings))
            into.append(pl.Series(f"tensors.{name}", [found.get(row) for row in range(count)], columns.tensors[name]))
        lists = ads.hstack(of_ads).group_by("n", maintain_order=True).agg(pl.all())
        whole = rankings.hstack(of_rankings).with_row_index("n").join(lists, on="n", how="left", maintain_order="left")
        return whole.select(*columns.impressions)


def read_served(value: bytes) -> ServedRecord:
    """The ranking in an entry's value.

    Raises:
        StateError: it is none, or holds something that a file of the log cannot.
    """
    served = unpack_served(value)
    positions = served.positions
    fits = (
        _are(str, served.ad_ids, served.history, served.candidates, served.unknown, served.ads, served.sent, served.tensors)
        and _are(bytes, served.ads.values(), served.tensors.values())
        and _are(dict, served.sent.values())
        and _are_shares(served.p_click)
        and _are_shares(served.propensity)
        and _are(int, positions)
        and _are(int, served.bids, served.prices)
        and all(-1 <= micros < 2**63 for micros in (*served.bids, *served.prices))
        and set(served.bid_types) <= {"cpm", "cpc", "cpa"}
        and len(positions) in (0, len(served.ad_ids))
        and (not positions or 0 < min(positions) <= max(positions) <= LAST_POSITION)
        and set(map(type, served.history_ts)) <= {int, float}
        and 0 <= served.version < 2**63
        and 0 <= served.ts <= LATEST
    )
    if not fits:
        raise StateError("a served ranking is damaged: a value is of the wrong type or out of bounds")
    return served


def read_event(value: bytes) -> Event:
    """The event in an entry's value.

    Raises:
        StateError: it is none, or holds something that a file of the log cannot.
    """
    event = unpack_event(value)
    if not 0 <= event.ts <= LATEST or not isfinite(event.value or 0) or not 0 < (1 if event.position is None else event.position) <= 2**31:
        raise StateError("an event is damaged: a number is out of bounds")
    return event


def _are(kind: type, *values: Iterable[object]) -> bool:
    return all(set(map(type, each)) <= {kind} for each in values)


def _are_shares(values: Sequence[object]) -> bool:
    return set(map(type, values)) <= {int, float} and all(0 <= value <= 1 for value in values)  # type: ignore[operator]


def revision(packed: bytes) -> int:
    """Which features these are: a hash of 64 bits, never 0."""
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "big") or 1
