"""Values to tensors, in the request layout: user side `(R, W)`, history `(R, T, W)`, candidates `(R, C, W)`.

The only code that does so. Training replays its log through it and the service calls it, so they cannot differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from .ages import UNKNOWN_TIME, ages_of
from .counters import Array, Counter, Counts, CountTable, tallies_of
from .index import AdIds, grown
from .schema import AGES, FLOAT32_MAX, IDENTITY, SIDES, Field, Layout, Schema, Side, Slot, lay_out
from .values import ValueTextError, plain_all, text_of
from .vocabulary import FIRST, PADDING, UNKNOWN, HashBuckets, Ids, Numbers, Vocabularies, Vocabulary

Value = str | int | float | Sequence[str] | Sequence[float] | None
Features = Mapping[str, Value]
Feeds = dict[str, np.ndarray[Any, Any]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


IDENTITIES = frozenset(IDENTITY.values())


class FieldError(ValueError):
    """A value does not fit its field. Carries where, so that a caller can point at it; `row` is a candidate's position."""

    def __init__(self, side: str, name: str, detail: str, row: int | None = None) -> None:
        super().__init__(f"{side}.{name}: {detail}")
        self.side, self.name, self.detail, self.row = side, name, detail, row


@dataclass(frozen=True, slots=True)
class Block:
    """Encoded fields of one part of a request: `ids (n, width)` int64, or where many rows are kept unsigned of as few bytes as they fit,
    and `numbers (n, number_width)` float32.
    """

    ids: Ids
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Any) -> "Block":
        """The rows, in that order, ids as int64; `rows` of shape `(..., k)` gives blocks `(..., k, width)`."""
        return Block(self.ids[rows].astype(np.int64, copy=False), self.numbers[rows])

    def beside(self, other: "Block") -> "Block":
        """Both blocks' columns, this one's first."""
        return Block(np.hstack([self.ids, other.ids]), np.hstack([self.numbers, other.numbers]))


def clean(field: Field, value: Value) -> Value:
    """A value from outside, in the form that encoding takes: text, a list of texts, a number, or None for missing.

    Raises:
        FieldError: the value is of the wrong type for the field, or not finite.
    """
    if value is None:
        return None
    if field.missing_values:
        return _unless_missing(field, value)
    return _clean(field, value)


def _unless_missing(field: Field, value: Value) -> Value:
    """Clean, or None where it is one of the values that mean that there is none."""
    cleaned = _clean(field, value)
    if isinstance(cleaned, float):
        return None if np.float32(cleaned) in map(np.float32, field.missing_values) else cleaned  # as it is encoded
    if cleaned is None or isinstance(cleaned, str):
        return None if cleaned in field.missing_values else cleaned
    return [element for element in cleaned if element not in field.missing_values]  # type: ignore[return-value, union-attr]  # of texts


def clean_all(field: Field, values: Sequence[Value]) -> Sequence[Value]:
    """A column of values, each as `clean` gives it and raises for it; texts together, which takes a quarter of the time."""
    if field.kind != "category" or not {*map(type, values)} <= {str, type(None)}:
        return [clean(field, value) for value in values]
    missing, texts = {"", *field.missing_values}, plain_all([value or "" for value in values])  # type: ignore[misc]
    return texts if missing.isdisjoint(texts) else [None if text in missing else text for text in texts]


def _clean(field: Field, value: Value) -> Value:
    if field.kind == "number":
        if not _fits(value):
            raise FieldError(field.side, field.name, "expected a finite number that fits float32")
        return float(value)
    if field.kind == "vector":
        if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != field.length or not all(map(_fits, value)):
            raise FieldError(field.side, field.name, f"expected a list of {field.length} finite numbers that fit float32")
        return [float(element) for element in value]
    if field.kind == "list":
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise FieldError(field.side, field.name, "expected a list of texts")
        return [text for element in value if (text := _text(field, element)) is not None]
    return _text(field, value)


def _fits(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) <= FLOAT32_MAX


def _text(field: Field, value: object) -> str | None:
    try:
        return text_of(value)
    except ValueTextError as error:
        raise FieldError(field.side, field.name, str(error)) from None


def _missing(field: Field) -> int:
    """The first id of a category or a list that is missing."""
    return UNKNOWN if field.missing == "unknown" else PADDING


class UserCounter(NamedTuple):
    """A counter that differs by user."""

    name: str
    counter: Counter
    keys: Sequence[str]
    """Of its tallies."""
    row: int
    """Of `Request.counted`, where it differs by ad too."""
    column: int = 0
    """Of blocks of ads, where it differs by their values of a field but `ad_id`."""
    lookup: Vocabulary | HashBuckets | None = None
    """The vocabulary of that field."""


class Encoder:
    """Encodes fields as a schema and its vocabularies say."""

    def __init__(self, schema: Schema, vocabularies: Vocabularies) -> None:
        self.schema = schema
        self.vocabularies = vocabularies
        self.layouts = schema.layouts
        self.tensors = schema.tensors
        self._blocks = {name: part for name, (part, width) in self.tensors.items() if width}
        self.sides: dict[Side, Layout] = {side: lay_out(schema.side(side)) for side in SIDES}
        self._fields = {(field.side, field.name): field for field in schema.fields}
        self.tallies = list(tallies_of(list(schema.counters.values())))
        """What is counted for this schema."""
        counters = [(field.name, field.counter) for field in schema.side("ad") if field.counter]
        self.counted = [name for name, _ in counters]
        """The counters that differ by ad: the rows of `Request.counted`."""
        self.ad_tallies = [tally for tally in self.tallies if tally.by == "ad"]
        by_ad = [row for row, (_, each) in enumerate(counters) if each.by == ("ad",)]
        self.by_ad = by_ad, [counters[row][1] for row in by_ad]
        """Those of them that are the same for all users: their rows of `Request.counted`, and how they count."""
        self._nobody = frozenset(("", *schema.nobody))
        self._padding = frozenset(schema.history_padding)
        ad = self.layouts["ad"]
        columns = {slot.field.name: slot for slot in (*ad.ids, *ad.numbers)}
        history = [columns[name] for name in schema.history_fields]
        self.counter_columns = [columns[name].start for name in self.counted]
        """Theirs in a block of ads."""
        by_user = [(name, each) for name, each in schema.counters.items() if each.by != ("ad",)]
        self.by_user = [self._user_counter(name, each, columns) for name, each in by_user]
        """The others."""
        self._scalings = _by_transform([columns[name] for name in self.counted])
        self.history_ids, self.history_numbers = (
            np.array([c for s in history if s.field.dense == dense for c in range(s.start, s.stop)], np.int64) for dense in (False, True)
        )

    def _user_counter(self, name: str, counter: Counter, columns: Mapping[str, Slot]) -> UserCounter:
        keys, row = [tally.key for tally in counter.tallies], self.counted.index(name) if counter.value else 0
        if counter.value in ("", IDENTITY["ad"]):
            return UserCounter(name, counter, keys, row)
        told = columns[counter.value]
        return UserCounter(name, counter, keys, row, told.start, self.vocabularies.categories[told.field.vocabulary])

    def encode(self, side: Side, columns: Mapping[str, Sequence[Any]], rows: int) -> Block:
        """Encode `rows` rows of one side, given as clean columns by field name; an absent column is missing throughout."""
        layout = self.sides[side]
        ids = np.zeros((rows, layout.width), np.int64)
        numbers = np.zeros((rows, layout.number_width), np.float32)
        for slot in layout.ids:
            ids[:, slot.columns] = self._ids(slot.field, columns.get(slot.field.name), rows)
        for slot in layout.numbers:
            numbers[:, slot.columns] = self._dense(slot.field, columns.get(slot.field.name), rows)
        return Block(ids, numbers)

    def _ids(self, field: Field, values: Sequence[Any] | None, rows: int) -> Ids:
        missing = _missing(field)
        if values is None:
            ids = np.zeros((rows, field.length), np.int64)
        elif field.kind == "category":
            if field.name == IDENTITY["user"]:
                values = [None if self.is_nobody(user_id) else user_id for user_id in values]
            ids = self.vocabularies.categories[field.vocabulary].encode(values)[:, None]
        else:
            ids = self._lists(field, values)
        if missing != PADDING:
            ids[ids[:, 0] == PADDING, 0] = missing
        return ids

    def _lists(self, field: Field, values: Sequence[Sequence[str] | None]) -> Ids:
        kept = [value[: field.length] if value else () for value in values]
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        flat = self.vocabularies.categories[field.vocabulary].encode(list(chain.from_iterable(kept)))
        ids = np.zeros((len(kept), field.length), np.int64)
        ids[np.arange(field.length) < lengths[:, None]] = flat
        return ids

    def _dense(self, field: Field, values: Sequence[Any] | None, rows: int) -> Numbers:
        """The columns `(rows, length)` of a number or a vector."""
        if field.kind == "number":
            return self._numbers(field, values, rows)[:, None]
        none = (0.0,) * field.length
        return np.array([none if value is None else value for value in values or (None,) * rows], np.float32).reshape(rows, field.length)

    def _numbers(self, field: Field, values: Any, rows: int) -> Numbers:
        raw = np.full(rows, np.nan) if values is None else np.array(values, np.float64)
        scaled: Numbers = self._scaled(field, np.where(np.isnan(raw), float(field.missing), raw))
        return scaled

    def _scaled(self, field: Field, raw: Any) -> Any:
        """Numbers as the field's transform has them, float32: of an array, or one of numpy's."""
        if field.transform == "log":
            raw = np.copysign(np.log1p(np.abs(raw)), raw)
        elif field.transform == "standard":
            moments = self.vocabularies.moments[field.path]
            raw = np.zeros(raw.shape) if moments.constant else (raw - moments.mean) / moments.deviation
        return raw.astype(np.float32)

    def encode_one(self, side: Side, features: Features, identity: str | None = None) -> Block:
        """One row of one side, from values as they come from outside; `identity` is the user's or the ad's id.

        Raises:
            FieldError: a name that the schema does not have, or a value that does not fit its field.
        """
        ids, numbers = self._row(side, self._cleaned(side, features), identity)
        return Block(np.array([ids], np.int64), np.array([numbers], np.float32))

    def encode_user(self, request: "Request") -> Block:
        """The row of the part `user`: the user's fields, then the context's. Raises as `encode_one` does."""
        ids, numbers = self._row("user", {**request.stored, **self._cleaned("user", request.user)}, request.user_id)
        more_ids, more_numbers = self._row("context", self._cleaned("context", request.context), None)
        return Block(np.array([ids + more_ids], np.int64), np.array([numbers + more_numbers], np.float32))

    def _cleaned(self, side: Side, features: Features) -> dict[str, Any]:
        return {name: clean(self._sendable(side, name), value) for name, value in features.items()}

    def _row(self, side: Side, values: dict[str, Any], identity: str | None) -> tuple[list[int], list[float]]:
        """Ids and numbers of one row of clean values, one by one: a column of one costs as much as one of hundreds."""
        if identity is not None and not (side == "user" and self.is_nobody(identity)):
            values[IDENTITY[side]] = identity
        ids: list[int] = []
        for slot in self.sides[side].ids:
            ids += self._ids_of_one(slot.field, values.get(slot.field.name))
        numbers: list[float] = []
        for slot in self.sides[side].numbers:
            numbers += self._numbers_of_one(slot.field, values.get(slot.field.name))
        return ids, numbers

    def _numbers_of_one(self, field: Field, value: Any) -> Sequence[float]:
        if field.kind == "vector":
            return (0.0,) * field.length if value is None else value
        return [self._scaled(field, np.float64(field.missing if value is None else value))]

    def _ids_of_one(self, field: Field, value: Any) -> list[int]:
        lookup = self.vocabularies.categories[field.vocabulary]
        if field.kind == "category":
            return [lookup.id(value) or _missing(field)]
        found = [lookup.id(element) for element in value[: field.length]] if value else [_missing(field)]
        return found + [PADDING] * (field.length - len(found))

    def usable(self, side: Side, stored: Features) -> tuple[dict[str, Value], int]:
        """Clean stored features that the schema knows, and how many it knows but cannot read: they are not the caller's fault."""
        kept: dict[str, Value] = {}
        mistyped = 0
        for name, value in stored.items():
            known = self._fields.get((side, name))
            if known is not None and name not in IDENTITIES:
                try:
                    kept[name] = clean(known, value)
                except FieldError:
                    mistyped += 1
        return kept, mistyped

    def is_nobody(self, user_id: str | None) -> bool:
        """Whether an id means no user: nothing is known of nobody."""
        return not user_id or user_id in self._nobody

    def newest(self, history: Sequence[str]) -> Sequence[str]:
        """The behaviours that the schema has room for, of a history that ends with the newest; what only fills it up is left out."""
        if self._padding:
            history = [ad_id for ad_id in history if ad_id not in self._padding]
        length = self.schema.history_length
        return history[max(0, len(history) - length) :] if length else ()

    def newest_times(self, history: Sequence[str], ts: Sequence[float]) -> Sequence[float]:
        """The times of the behaviours that `newest` leaves, from those beside the history; all unknown where they are not there."""
        times = ts if len(ts) == len(history) else [UNKNOWN_TIME] * len(history)
        if self._padding:
            times = [at for ad_id, at in zip(history, times, strict=True) if ad_id not in self._padding]
        return times[max(0, len(times) - self.schema.history_length) :]

    def unknown_ads(self, ad_ids: Sequence[str]) -> Block:
        """Ads of which only the id is known: every other category is unknown, every number missing."""
        rows = len(ad_ids)
        block = self.encode("ad", {"ad_id": ad_ids}, rows)
        for slot in self.layouts["ad"].ids:
            if slot.field.name != "ad_id":
                block.ids[:, slot.start] = UNKNOWN
        return block

    def history_of(self, ads: Block) -> Block:
        """The history's columns of encoded ads `(..., width)`: what a behaviour on each of them is."""
        return Block(ads.ids.take(self.history_ids, -1), ads.numbers.take(self.history_numbers, -1))

    def overlay(self, block: Block, sent: Mapping[int, Features]) -> None:
        """Write the features sent with candidates, by position, over their rows of an ad block.

        Raises:
            FieldError: as `encode_one` does, with the candidate's `row`.
        """
        columns: dict[str, tuple[list[int], list[Any]]] = {}
        for row, features in sent.items():
            for name, value in features.items():
                rows, values = columns.setdefault(name, ([], []))
                rows.append(row)
                try:
                    values.append(clean(self._sendable("ad", name), value))
                except FieldError as error:
                    raise FieldError(error.side, error.name, error.detail, row) from None
        layout = self.layouts["ad"]
        for slot in (slot for slot in layout.ids if slot.field.name in columns):
            rows, values = columns[slot.field.name]
            block.ids[rows, slot.columns] = self._ids(slot.field, values, len(rows))
        for slot in (slot for slot in layout.numbers if slot.field.name in columns):
            rows, values = columns[slot.field.name]
            block.numbers[rows, slot.columns] = self._dense(slot.field, values, len(rows))

    def set_counters(self, block: Block, counted: Array) -> None:
        """Write the numbers of `counted`, `(counters, n)`, into an ad block."""
        for kind, rows, where in self._scalings:
            block.numbers[:, where] = self._scaled(kind, counted[rows]).T

    def feeds(self, blocks: Mapping[str, Block]) -> Feeds:
        """The tensors that a network takes, by name, from blocks of one request; blocks without columns are left out."""
        return {
            name: np.ascontiguousarray(blocks[part].ids if name.endswith("_ids") else blocks[part].numbers)[None if part != "user" else ...]
            for name, part in self._blocks.items()
            if part in blocks
        }

    def _sendable(self, side: Side, name: str) -> Field:
        known = self._fields.get((side, name))
        if known is None or name in IDENTITIES:
            raise FieldError(side, name, f"the schema {self.schema.name!r} has no such {side} feature")
        return known


def _by_transform(slots: Sequence[Slot]) -> list[tuple[Field, Any, Any]]:
    """Numbers that are scaled in one go: one of the fields, which of all they are, and their columns in the block."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, slot in enumerate(slots):
        transform = slot.field.transform
        groups.setdefault((transform, slot.field.path if transform == "standard" else ""), []).append(number)
    return [(slots[some[0]].field, _slice(some), _slice([slots[number].start for number in some])) for some in groups.values()]


def _slice(numbers: list[int]) -> slice | list[int]:
    whole = slice(numbers[0], numbers[-1] + 1)
    return whole if numbers == list(range(whole.start, whole.stop)) else numbers


class AdTower(Protocol):
    """What gives ads their vectors."""

    width: int
    """K."""

    def vectors(self, ads: Block) -> Numbers:
        """The vectors `(n, K)` of encoded ads."""


class AdTable:
    """Encoded ads by id, as columns that grow. Row 0 is the padding ad, so a padded history is a plain `take`.

    An ad that has left stays encoded, for the histories that contain it, but is no longer known as a candidate.
    """

    def __init__(self, encoder: Encoder, room: int = 0, ids: AdIds | None = None) -> None:
        """A table with room for so many ads before it grows. Tables of the same ads share `ids`: an ad has one row in all of them."""
        self.encoder = encoder
        self.ids = AdIds(room) if ids is None else ids
        self.ads = 0
        """Rows that have been put: it may lack some of the ids."""
        layout, rows = encoder.layouts["ad"], max(room, len(self.ids)) + 1
        self._block = Block(np.zeros((rows, layout.width), np.int64), np.zeros((rows, layout.number_width), np.float32))
        self._active = np.zeros(rows, np.bool_)
        self.vectors: dict[AdTower, Numbers] = {}
        """Of all rows `(rows or more, K)`, by each tower that was asked to give them."""
        self._counts = CountTable(encoder.by_ad[1], rows)
        self._revisions, self._revision = np.zeros(rows, np.int64), 0
        columns = [slot for slot in layout.ids if slot.field.name == IDENTITY["ad"]]
        vocabulary = encoder.vocabularies.categories[columns[0].field.vocabulary] if columns else None
        self._listed = (columns[0].start, vocabulary.values) if isinstance(vocabulary, Vocabulary) else None
        self.ids.expected = max(self.ids.expected, len(self._listed[1]) if self._listed else 0)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._active[: self._end]))

    @property
    def _end(self) -> int:
        return min(len(self.ids) + 1, len(self._active))

    @property
    def block(self) -> Block:
        """All rows, the padding ad first; views into the table, not copies."""
        return Block(self._block.ids[: self._end], self._block.numbers[: self._end])

    def take(self, rows: Ids) -> Block:
        """A copy of the rows."""
        return Block(self._block.ids.take(rows, 0), self._block.numbers.take(rows, 0))

    def rows(self, ad_ids: Sequence[str]) -> Ids:
        """Row of each ad, 0 where the table does not have it."""
        rows = self.ids.rows(ad_ids)
        if self.ads < len(self.ids):
            rows[self.lacks(rows)] = 0
        return rows

    def lacks(self, rows: Ids) -> Mask:
        """Which rows are of ads that other tables have and this one does not."""
        lacking: Mask = (rows >= len(self._active)) | (self._revisions.take(rows, mode="clip") == 0)
        return lacking

    @property
    def room(self) -> int:
        """Rows that there is memory for."""
        return len(self._active)

    def revisions(self, rows: Ids) -> Ids:
        """A number for each row that is another one, and above 0, after each time that it was put."""
        return self._revisions.take(rows)

    def feeds(self, rows: Ids) -> Feeds:
        """The tensors of ads `(1, n, W)`."""
        return self.encoder.feeds({"ad": self.take(rows)})

    def ad_ids(self, rows: Ids) -> list[str]:
        """The ads of rows."""
        ad_ids: list[str] = self.ids.texts[rows].tolist()
        return ad_ids

    def active(self, rows: Ids | slice) -> Mask:
        """Which rows are ads that have not left."""
        return self._active[rows]

    def put(self, ad_ids: Sequence[str], ads: Block, active: bool | Mask = True) -> None:
        """Add ads, or replace those already there. `active`, of all or `(n,)`: whether they have not left."""
        if len(ad_ids):
            rows = self.ids.add(ad_ids)
            self._share_texts(rows, ads)
            self.put_rows(rows, ads, active)

    def _share_texts(self, rows: Ids, ads: Block) -> None:
        """Have the ids as the objects that the vocabulary has of them, so that no text is in memory twice."""
        if self._listed:
            column, values = self._listed
            texts, ids = self.ids.texts, ads.ids[:, column] - FIRST
            known = rows[ids >= 0], [*map(values.__getitem__, ids[ids >= 0].tolist())]
            if texts[known[0]].tolist() == known[1]:
                texts[known[0]] = known[1]

    def put_rows(self, rows: Ids, ads: Block, active: bool | Mask) -> None:
        """The same by their rows."""
        self._grow(len(self.ids) + 1)
        self.ads += len(np.unique(rows[self._revisions.take(rows) == 0]))
        self._revision += 1
        self._revisions[rows] = self._revision
        self._block.ids[rows], self._block.numbers[rows], self._active[rows] = ads.ids, ads.numbers, active
        for tower, vectors in self.vectors.items():
            vectors[rows] = tower.vectors(ads)

    def keep_vectors(self, tower: AdTower, size: int) -> Iterator[None]:
        """Have the vectors of all ads by a tower from now on, after as many steps as it takes to give `size` ads theirs at each."""
        self.vectors[tower] = np.zeros((len(self._active), tower.width), np.float32)
        start = 1
        while start < self._end and tower in self.vectors:
            rows = np.arange(start, min(start + size, self._end))
            self.vectors[tower][rows] = tower.vectors(self.take(rows))
            start += size
            yield

    def count(self, ad_ids: Sequence[str], counts: Sequence[Counts]) -> None:
        """Take over what is counted with ads; those that the table does not have are left out."""
        rows = self.rows(ad_ids)
        known = rows.nonzero()[0]
        self._counts.put(rows[known], [counts[i] for i in known.tolist()])

    def ids_in(self, rows: Ids, column: int) -> Ids:
        """One column of the ids of rows `(n,)`."""
        ids: Ids = self._block.ids[rows, column]  # `take` of a column copies it whole
        return ids

    def counters(self, rows: Ids, ts: float) -> Array:
        """The counters `(counters, n)` that are the same for all users, of the ads of some rows, at a time."""
        return self._counts.numbers(rows, ts)

    def remove(self, ad_ids: Sequence[str]) -> None:
        """Mark ads as gone; their rows stay for histories."""
        self._active[self.rows(ad_ids)] = False

    def _grow(self, rows: int) -> None:
        if rows > len(self._active):
            self._block = Block(grown(self._block.ids, rows), grown(self._block.numbers, rows))
            self._active, self._revisions = grown(self._active, rows), grown(self._revisions, rows)
            self.vectors = {tower: grown(vectors, rows) for tower, vectors in self.vectors.items()}
            self._counts.grow(rows)


@dataclass(frozen=True, slots=True)
class Request:
    """One request's values: a user with features and behaviours (oldest first), a context, and candidates.

    `sent` holds the features that came with a candidate, by its position in `candidates`; `stored` what `Encoder.usable` left of
    the user's stored features, which those in `user` replace by name.
    """

    user_id: str
    user: Features
    context: Features
    history: Sequence[str]
    candidates: Sequence[str]
    sent: Mapping[int, Features] = field(default_factory=dict)
    stored: Features = field(default_factory=dict)
    history_ts: Sequence[float] = ()
    """When the behaviours were, beside `history`; empty: not known."""
    ts: float = 0.0
    """When the request is made, in seconds since 1970: what ages are counted from."""
    rows: Ids | None = None
    """The table's rows of the candidates, where they were looked up already."""
    counted: Array | None = None
    """The counters `Encoder.counted` of the candidates `(counters, C)`; what was sent goes before."""


def encode_request(table: AdTable, request: Request) -> tuple[Feeds, Mask]:
    """Tensors of one request `(1, ...)`, and which candidates `(C,)` the table knows. Raises as `encode_rows` does."""
    return encode_rows(table, request)[:2]


def encode_rows(table: AdTable, request: Request) -> tuple[Feeds, Mask, Ids | None]:
    """The same, and the rows `(C,)` of the table that the candidates are, but for their counters; None where one of them is unknown,
    or has features that were sent.

    Raises:
        FieldError: a feature that the schema does not have, or a value that does not fit its field.
    """
    encoder = table.encoder
    user = encoder.encode_user(request)
    rows = table.rows(request.candidates) if request.rows is None else request.rows
    ads, known = table.take(rows), table.active(rows)
    plain = np.count_nonzero(known) == len(known)  # several times faster than all(), which numpy has in Python
    if not plain:
        _fill_unknown(encoder, ads, request.candidates, ~known)
    if request.counted is not None:
        encoder.set_counters(ads, request.counted)
    if request.sent:
        encoder.overlay(ads, {row: features if known[row] else _without_missing(features) for row, features in request.sent.items()})
    blocks = {"user": user, "ad": ads}
    if encoder.schema.history_fields:
        blocks["history"] = encoder.history_of(_behaved(table, encoder.newest(request.history)))
    feeds = encoder.feeds(blocks)
    if encoder.schema.history_ages:
        times = encoder.newest_times(request.history, request.history_ts)
        feeds[AGES] = ages_of(request.ts, times)[None] if times else np.zeros((1, 1), np.float32)
    return feeds, known, rows if plain and not request.sent else None


def _without_missing(features: Features) -> Features:
    """Without those that are None: of an ad that nobody knows, to say that a feature is missing is to say nothing."""
    return {name: value for name, value in features.items() if value is not None}


def _behaved(table: AdTable, behaviours: Sequence[str]) -> Block:
    """The ads of behaviours, at least the padding ad."""
    rows = table.rows(behaviours) if behaviours else np.zeros(1, np.int64)
    past = table.take(rows)
    if behaviours and np.count_nonzero(rows) < len(rows):
        _fill_unknown(table.encoder, past, behaviours, rows == 0)
    return past


def _fill_unknown(encoder: Encoder, ads: Block, ad_ids: Sequence[str], unknown: Mask) -> None:
    where = np.flatnonzero(unknown).tolist()
    if where:
        filled = encoder.unknown_ads([ad_ids[i] for i in where])
        ads.ids[where], ads.numbers[where] = filled.ids, filled.numbers
