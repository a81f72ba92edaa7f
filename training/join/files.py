"""Rankings and their events as the files of the log (docs/log.md), each written whole or not at all.

Columns are built as lists, what belongs to the ranking once a ranking, and only then brought to the rows by position.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from features.encode import IDENTITIES, Features, FieldError, clean
from features.events import Event
from features.schema import Field, Schema, Side
from features.served import ServedRecord
from features.state import StateError, unpack_features

from ..datasets.prepared import DTYPES
from .records import revision
from .state import Held

REVISIONS = pl.List(pl.UInt64())
ROW_TYPES: Mapping[str, pl.DataType] = {
    "label": pl.Int8(),
    "ad_id": pl.String(),
    "position": pl.Int64(),
    "p_click": pl.Float64(),
    "propensity": pl.Float64(),
    "known": pl.Boolean(),
    "revision": pl.UInt64(),
    "conversion": pl.Int8(),
    "value": pl.Float64(),
    "click_ts": pl.Float64(),
    "candidates": pl.List(pl.String()),
    "candidate_revisions": REVISIONS,
}
RANKING_TYPES: Mapping[str, pl.DataType] = {
    "request_id": pl.String(),
    "model": pl.String(),
    "version": pl.Int64(),
    "user_id": pl.String(),
    "ts": pl.Int64(),
    "history": pl.List(pl.String()),
    "history_revisions": REVISIONS,
    "policy": pl.String(),
}
CONVERSION_TYPES: Mapping[str, pl.DataType] = {
    "event_id": pl.String(),
    "ts": pl.Float64(),
    "user_id": pl.String(),
    "request_id": pl.String(),
    "ad_id": pl.String(),
    "value": pl.Float64(),
    "window": pl.Float64(),
}
TIMES_TYPE: pl.DataType = pl.List(pl.Float64())
"""Of `history_ts`, which stands beside `history` in a log whose schema has ages."""
UNJOINED_TYPES: Mapping[str, pl.DataType] = {
    "outcome": pl.String(),
    "type": pl.String(),
    "event_id": pl.String(),
    "ts": pl.Float64(),
    "user_id": pl.String(),
    "request_id": pl.String(),
    "ad_id": pl.String(),
    "position": pl.Int64(),
    "value": pl.Float64(),
    "stream": pl.String(),
    "entry": pl.String(),
    "packed": pl.Binary(),
}


@dataclass(frozen=True, slots=True)
class Came:
    """What came of one ranking, by ad: when it was first clicked, where it was shown, and what its conversions are worth."""

    clicks: dict[str, float] = field(default_factory=dict)
    shown: dict[str, int | None] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Add an event; of several impressions the first by the callers' clocks says where, so they are to be added in that order."""
        if event.type == "click":
            self.clicks[event.ad_id] = min(float(event.ts), self.clicks.get(event.ad_id, float("inf")))
        elif event.type == "impression":
            self.shown.setdefault(event.ad_id, event.position)
        else:
            self.values[event.ad_id] = self.values.get(event.ad_id, 0.0) + float(event.value or 0)


NOTHING = Came()


@dataclass
class Content:
    """The frames of one part, and what could not be brought into them."""

    rows: pl.DataFrame
    ads: list[tuple[str, bytes]]
    """(ad id, packed features) of the rankings that have rows, each pair once."""
    troubles: Counter[str]
    """`field_unknown`: values of fields that the schema lacks; `value_unfit`: values that do not fit their field."""
    shown: Counter[str]
    """Rankings by how it is known what of them was shown: `said`, `reported`, `assumed`; those without rows are `unknown`."""


class Columns:
    """Turns features into the columns of the schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.rankings = {**RANKING_TYPES, **({"history_ts": TIMES_TYPE} if schema.history_ages else {})}
        self.fields: dict[Side, dict[str, tuple[int, Field]]] = {}
        sides: tuple[Side, Side, Side] = ("user", "context", "ad")
        for side in sides:
            fields = [each for each in schema.side(side) if each.name not in IDENTITIES]
            self.fields[side] = {each.name: (i, each) for i, each in enumerate(fields)}
        self.tensors: dict[str, pl.DataType] = {
            name: pl.List(pl.Int64()) if name.endswith("_ids") else pl.List(pl.Float32()) for name in schema.tensors
        }

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
        return [pl.Series(each.path, [row[i] for row in rows], DTYPES[each.kind]) for i, each in self.fields[side].values()]

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


class Builder:
    """Builds the rows of one part, ranking by ranking."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._rows: dict[str, list[Any]] = {name: [] for name in ROW_TYPES}
        self._rankings: dict[str, list[Any]] = {name: [] for name in columns.rankings}
        self._sides: dict[Side, list[list[Any]]] = {"user": [], "context": [], "ad": [[None] * len(columns.fields["ad"])]}
        self._ranking_of: list[int] = []
        self._ad_of: list[int] = []
        self._tensors: dict[str, dict[int, Any]] = {name: {} for name in columns.tensors}
        self._packed: dict[bytes, tuple[int, int]] = {}
        """By packed features their revision, and their row among the ad side's values."""
        self._ads: set[tuple[str, bytes]] = set()
        self._troubles: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()

    def add(self, served: ServedRecord, came: Came, counted: int) -> None:
        """Add a ranking's rows: of so many of its ads, from the first, and of those that were reported as shown."""
        indices = [i for i, ad_id in enumerate(served.ad_ids) if i < counted or ad_id in came.shown]
        how = "reported" if not counted else "said" if counted == served.shown else "assumed"
        self._shown[how if indices else "unknown"] += 1
        if not indices:
            return
        self._add_ranking(served)
        first = len(self._ranking_of)
        for i in indices:
            self._add_row(served, i, came)
        rows = self._rows
        rows["candidates"] += [served.candidates or None, *[None] * (len(indices) - 1)]
        explored = [self._revision(served, ad_id) for ad_id in served.candidates] if served.candidates else None
        rows["candidate_revisions"] += [explored, *[None] * (len(indices) - 1)]
        if served.tensors:
            self._add_tensors(served, indices, first)

    def _add_ranking(self, served: ServedRecord) -> None:
        packed = served.ads
        self._ads.update(packed.items())
        known = (packed.get(ad_id) for ad_id in served.history)
        revisions = [0 if each is None else self._look_up(each)[0] for each in known]
        values = (
            served.request_id,
            served.model,
            served.version,
            served.user_id,
            int(served.ts),
            served.history,
            revisions,
            served.policy,
            [float(ts) for ts in served.history_ts] if served.history_ts or not served.history else None,
        )
        for column, value in zip(self._rankings.values(), values, strict=False):  # the last is for logs with ages alone
            column.append(value)
        self._sides["user"].append(self._columns.values("user", served.user, self._troubles))
        self._sides["context"].append(self._columns.values("context", served.context, self._troubles))

    def _add_row(self, served: ServedRecord, i: int, came: Came) -> None:
        ad_id = served.ad_ids[i]
        packed = None if ad_id in served.unknown else served.ads.get(ad_id)
        revised, row = (0, 0) if packed is None else self._look_up(packed)
        if ad_id in served.sent:
            row = self._sent(row, served.sent[ad_id])
        order = served.positions[i] if served.positions else i + 1
        clicked = came.clicks.get(ad_id)
        values = (
            int(clicked is not None),
            ad_id,
            came.shown.get(ad_id) or order,
            float(served.p_click[i]),
            float(served.propensity[i]),
            packed is not None,
            revised,
            int(ad_id in came.values),
            came.values.get(ad_id),
            clicked,
        )
        for column, value in zip(self._rows.values(), values, strict=False):
            column.append(value)
        self._ad_of.append(row)
        self._ranking_of.append(len(self._rankings["request_id"]) - 1)

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

    def _add_tensors(self, served: ServedRecord, indices: Sequence[int], first: int) -> None:
        for name, data in served.tensors.items():
            kind = np.dtype("<i8") if name.endswith("_ids") else np.dtype("<f4")
            ads = len(served.ad_ids) if name.startswith("ad_") else 1
            if name not in self._tensors or len(data) % (kind.itemsize * ads):
                self._troubles["field_unknown" if name not in self._tensors else "value_unfit"] += 1
                continue
            values = np.frombuffer(data, kind).reshape(ads, -1)
            for row, i in enumerate(indices, first):
                self._tensors[name][row] = values[i if ads > 1 else 0].tolist()

    def content(self) -> Content:
        """What has been added, as frames."""
        rankings = [pl.Series(name, values, self._columns.rankings[name]) for name, values in self._rankings.items()]
        rankings += self._columns.series("user", self._sides["user"]) + self._columns.series("context", self._sides["context"])
        of_ranking = pl.DataFrame(rankings)[self._ranking_of]
        of_ad = [column.gather(self._ad_of) for column in self._columns.series("ad", self._sides["ad"])]
        count = range(len(self._ranking_of))
        tensors = [
            pl.Series(f"tensors.{name}", [of_row.get(row) for row in count], self._columns.tensors[name])
            for name, of_row in self._tensors.items()
        ]
        own = [pl.Series(name, values, ROW_TYPES[name]) for name, values in self._rows.items()]
        rows = pl.DataFrame(own).hstack(of_ranking.get_columns()).hstack([*of_ad, *tensors])
        return Content(rows, sorted(self._ads), self._troubles, self._shown)


def unjoined(events: Iterable[tuple[str, str, str, bytes, Event | None]]) -> pl.DataFrame:
    """The rows of an `unjoined/` file, from outcome, stream, entry, packed value and the event in it, None where it is none."""
    columns: dict[str, list[Any]] = {name: [] for name in UNJOINED_TYPES}
    for outcome, stream, entry, packed, event in events:
        parts: tuple[Any, ...] = (None,) * 8
        if event is not None:
            ts, value = float(event.ts), None if event.value is None else float(event.value)
            parts = event.type, event.event_id, ts, event.user_id, event.request_id, event.ad_id, event.position, value
        for column, each in zip(columns.values(), (outcome, *parts, stream, entry, packed), strict=True):
            column.append(each)
    return pl.DataFrame([pl.Series(name, values, UNJOINED_TYPES[name]) for name, values in columns.items()])


def conversions(events: Iterable[tuple[Held, Event]], window: float) -> pl.DataFrame:
    """The rows of a `conversions/` file: what was converted after its ranking's rows were written, and how long that may be after it."""
    rows = [
        (event.event_id, min(float(event.ts), held.taken), event.user_id, event.request_id, event.ad_id, event.value, window)
        for held, event in events
    ]
    return pl.DataFrame(rows, CONVERSION_TYPES, orient="row")


def grouped(events: Iterable[tuple[int, Event]]) -> Mapping[int, Came]:
    """What came of each ranking, from its number and the event."""
    came: dict[int, Came] = defaultdict(Came)
    for n, event in sorted(events, key=lambda pair: (pair[1].ts, pair[1].event_id)):
        came[n].add(event)
    return came
