"""What the fields of a request are: their side, kind and rules, read from `schema.toml`.

Knows nothing about values: `vocabulary.py` turns values into ids and `encode.py` lays the ids out as tensors.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tomli_w

Side = Literal["user", "context", "ad"]
SIDES: tuple[Side, ...] = ("user", "context", "ad")
KINDS = ("category", "list", "number")
TRANSFORMS = ("none", "log", "standard")
MISSING_CATEGORY = ("padding", "unknown")
IDENTITY = {"user": "user_id", "ad": "ad_id"}
MAX_LIST_LENGTH = 1_000
MAX_HISTORY_LENGTH = 10_000
MAX_BUCKETS = 2**31
FLOAT32_MAX = 3.4028234663852886e38


class SchemaError(ValueError):
    """A schema says something impossible; the message names the field and the mend."""


@dataclass(frozen=True, slots=True)
class Field:
    """One feature of one side of a request.

    A field called `user_id` on the user side, or `ad_id` on the ad side, is the identity itself used as a feature.
    """

    name: str
    side: Side
    kind: str
    vocabulary: str = ""
    """Fields that name the same vocabulary share its ids and its embeddings. Default: the field's own name."""
    buckets: int = 0
    """Above 0, values are hashed into this many ids and no vocabulary is kept."""
    min_count: int = 1
    """A value seen less often in the training split is unknown."""
    length: int = 1
    """For a list: how many values are kept, the first ones."""
    transform: str = "none"
    """For a number: `none`, `log` (sign(x) log(1 + |x|)) or `standard` ((x - mean) / deviation, from the training split; 0 where
    the number is constant there up to rounding)."""
    missing: str | float = "padding"
    """For a category or list `padding` (id 0) or `unknown` (id 1); for a number the raw value that stands in."""

    @property
    def path(self) -> str:
        """The field's name in a prepared data set and in messages, such as `ad.genres`."""
        return f"{self.side}.{self.name}"


@dataclass(frozen=True, slots=True)
class Slot:
    """The columns `start:stop` that a field takes in its side's block of ids or of numbers."""

    field: Field
    start: int
    stop: int

    @property
    def columns(self) -> slice:
        """The columns as a slice, for indexing the last axis."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of one part of a request lie in its two blocks: `ids (..., width)` and `numbers (..., number_width)`."""

    ids: tuple[Slot, ...]
    numbers: tuple[Slot, ...]

    @property
    def width(self) -> int:
        """Columns of the id block."""
        return self.ids[-1].stop if self.ids else 0

    @property
    def number_width(self) -> int:
        """Columns of the number block."""
        return len(self.numbers)


def lay_out(fields: tuple[Field, ...]) -> Layout:
    """Columns for the fields, in their order."""
    slots, start = [], 0
    for field in fields:
        if field.kind != "number":
            slots.append(Slot(field, start, start + field.length))
            start += field.length
    numbers = [field for field in fields if field.kind == "number"]
    return Layout(tuple(slots), tuple(Slot(field, i, i + 1) for i, field in enumerate(numbers)))


@dataclass(frozen=True, slots=True)
class Schema:
    """All fields of a request. A behaviour of the history is an ad, so the history's fields are ad fields, named again."""

    name: str
    fields: tuple[Field, ...]
    history_fields: tuple[str, ...] = ()
    history_length: int = 0
    negative_sampling: float = 1.0
    """The share of non-clicks that the log kept; exported probabilities are corrected for it."""

    def side(self, side: Side) -> tuple[Field, ...]:
        """The fields of one side, in the schema's order."""
        return tuple(field for field in self.fields if field.side == side)

    def field(self, side: Side, name: str) -> Field | None:
        """One field, or None where the schema has none of that name."""
        return next((field for field in self.fields if field.side == side and field.name == name), None)

    @property
    def history(self) -> tuple[Field, ...]:
        """The ad fields that a behaviour carries, `ad_id` first."""
        by_name = {field.name: field for field in self.side("ad")}
        return tuple(by_name[name] for name in self.history_fields)

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of each part of a request: `user` (user fields, then context fields), `history`, `ad`."""
        return {
            "user": lay_out(self.side("user") + self.side("context")),
            "history": lay_out(self.history),
            "ad": lay_out(self.side("ad")),
        }

    @property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """The tensors of a request that this schema needs: name -> (part, width). A block without columns is left out."""
        widths = {}
        for part, layout in self.layouts.items():
            widths[f"{part}_ids"] = (part, layout.width)
            widths[f"{part}_numbers"] = (part, layout.number_width)
        return {name: (part, width) for name, (part, width) in widths.items() if width}

    def to_toml(self) -> str:
        """The schema as the text of a `schema.toml`, defaults left out."""
        document: dict[str, Any] = {"name": self.name}
        if self.negative_sampling != 1.0:
            document["negative_sampling"] = self.negative_sampling
        if self.history_fields:
            document["history"] = {"length": self.history_length, "fields": list(self.history_fields)}
        for field in self.fields:
            defaults = Field(field.name, field.side, field.kind, vocabulary=field.name, missing=_default_missing(field.kind))
            entries = {k: v for k, v in asdict(field).items() if k == "kind" or v != getattr(defaults, k)}
            document.setdefault(field.side, {})[field.name] = entries
        return tomli_w.dumps(document)

    def canonical(self) -> str:
        """A text that is equal for equal schemas, for fingerprints."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def _default_missing(kind: str) -> str | float:
    return 0.0 if kind == "number" else "padding"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SchemaError(message)


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _field(side: Side, name: str, entries: object) -> Field:
    where = f"field {side}.{name}"
    if not isinstance(entries, Mapping):
        raise SchemaError(f"{where}: expected a table such as [{side}.{name}] with kind = ...")
    known = {"kind", "vocabulary", "buckets", "min_count", "length", "transform", "missing"}
    _require(set(entries) <= known, f"{where}: unknown settings {sorted(set(entries) - known)}; known are {sorted(known)}")
    kind = entries.get("kind")
    _require(kind in KINDS, f"{where}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    field = Field(**{"name": name, "side": side, "kind": kind, "vocabulary": name, "missing": _default_missing(str(kind)), **entries})
    _require(isinstance(field.vocabulary, str) and bool(field.vocabulary), f"{where}: vocabulary must be a name")
    _require(_is_int(field.buckets, 0, MAX_BUCKETS), f"{where}: buckets must be a whole number from 0 to {MAX_BUCKETS}")
    _require(_is_int(field.min_count, 1, 2**62), f"{where}: min_count must be a whole number of at least 1")
    _require(_is_int(field.length, 1, MAX_LIST_LENGTH), f"{where}: length must be a whole number from 1 to {MAX_LIST_LENGTH}")
    _require(kind == "list" or field.length == 1, f"{where}: only a list has a length")
    _require(field.transform in TRANSFORMS, f"{where}: transform must be one of {', '.join(TRANSFORMS)}")
    if kind == "number":
        _require((field.buckets, field.min_count) == (0, 1), f"{where}: a number has neither buckets nor min_count")
        is_number = isinstance(field.missing, int | float) and not isinstance(field.missing, bool) and abs(field.missing) <= FLOAT32_MAX
        _require(is_number, f"{where}: missing must be a finite number that fits float32, the raw value that stands in")
        return field
    _require(field.transform == "none", f"{where}: only a number has a transform")
    _require(field.missing in MISSING_CATEGORY, f"{where}: missing must be one of {', '.join(MISSING_CATEGORY)}")
    return field


def _history(document: object) -> tuple[tuple[str, ...], int]:
    if document is None:
        return (), 0
    if not isinstance(document, Mapping) or set(document) != {"length", "fields"}:
        raise SchemaError('[history] takes exactly: length = how many behaviours, fields = [ad fields, "ad_id" first]')
    length, names = document["length"], document["fields"]
    _require(_is_int(length, 1, MAX_HISTORY_LENGTH), f"[history]: length must be a whole number from 1 to {MAX_HISTORY_LENGTH}")
    is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _require(is_names and names[:1] == ["ad_id"], '[history]: fields must be a list of ad fields that starts with "ad_id"')
    _require(len(set(names)) == len(names), "[history]: fields names a field twice")
    return tuple(names), length


def parse_schema(text: str) -> Schema:
    """Read a `schema.toml`.

    Raises:
        SchemaError: the text is not TOML, or says something impossible; the message names the field.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SchemaError(f"not a TOML text: {error}") from error
    known = {"name", "negative_sampling", "history", *SIDES}
    _require(set(document) <= known, f"unknown entries {sorted(set(document) - known)}; known are {sorted(known)}")
    name = document.get("name")
    if not isinstance(name, str) or not name:
        raise SchemaError('name = "..." is missing at the top')
    sampling = document.get("negative_sampling", 1.0)
    is_share = isinstance(sampling, int | float) and not isinstance(sampling, bool) and 0 < sampling <= 1
    _require(is_share, "negative_sampling is the share of non-clicks that the log kept: above 0, at most 1")
    fields = []
    for side in SIDES:
        tables = document.get(side, {})
        _require(isinstance(tables, Mapping), f"{side}: expected tables such as [{side}.name]")
        fields += [_field(side, field_name, entries) for field_name, entries in tables.items()]
    _require(any(field.side == "ad" for field in fields), 'there is no ad field: add one, such as [ad.ad_id] kind = "category"')
    history_fields, history_length = _history(document.get("history"))
    ad_fields = {field.name for field in fields if field.side == "ad"}
    absent = [name for name in history_fields if name not in ad_fields]
    _require(not absent, f"[history]: {absent} are not ad fields; a behaviour is an ad, so each needs its [ad.…] table")
    schema = Schema(name, tuple(fields), history_fields, history_length, float(sampling))
    _check_vocabularies(schema)
    return schema


def _check_vocabularies(schema: Schema) -> None:
    owners: dict[str, Field] = {}
    for field in schema.fields:
        identity = field.name in IDENTITY.values()
        _require(not identity or IDENTITY.get(field.side) == field.name, f"field {field.path}: {field.name} belongs to the other side")
        _require(not identity or field.kind == "category", f"field {field.path}: an identity is a category")
        if field.kind == "number":
            continue
        owner = owners.setdefault(field.vocabulary, field)
        same = (owner.buckets, owner.min_count) == (field.buckets, field.min_count)
        _require(same, f"fields {owner.path} and {field.path} share a vocabulary but not its buckets and min_count")
