"""What the fields of a request are: their side, kind and rules, read from `schema.toml`.

Knows nothing about values: `vocabulary.py` turns values into ids and `encode.py` lays the ids out as tensors.
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import tomli_w

from .counters import Counter, counter_of
from .errors import AdrankError

T = TypeVar("T")
Side = Literal["user", "context", "ad"]
SIDES: tuple[Side, ...] = ("user", "context", "ad")
KINDS = ("category", "list", "number", "vector")
TRANSFORMS = ("none", "log", "standard")
MISSING_CATEGORY = ("padding", "unknown")
IDENTITY = {"user": "user_id", "ad": "ad_id"}
MAX_LIST_LENGTH = 1_000
MAX_HISTORY_LENGTH = 10_000
MAX_BUCKETS = 2**31
FLOAT32_MAX = 3.4028234663852886e38
AGES = "history_ages"
"""The tensor of the behaviours' ages."""


class SchemaError(AdrankError, ValueError):
    """A schema says something impossible; the message names the field and the mend."""


@dataclass(frozen=True, slots=True)
class Field:
    """One feature of one side of a request.

    A field called `user_id` on the user side, or `ad_id` on the ad side, is the identity itself used as a feature.
    """

    name: str
    """The name, of this side alone."""
    side: Side
    """Whose: the user's, the context's (of the request), or the ad's."""
    kind: str
    """`category` (one value), `list` (several), `number`, or `vector` (so many numbers, such as an embedding of an ad's text)."""
    vocabulary: str = ""
    """Fields that name the same vocabulary share its ids and its embeddings. Default: the field's own name."""
    buckets: int = 0
    """Above 0, values are hashed into this many ids and no vocabulary is kept."""
    min_count: int = 1
    """A value seen less often in the training split is unknown."""
    length: int = 1
    """For a list: how many values are kept, the first ones. For a vector: how many numbers it has."""
    transform: str = "none"
    """For a number: `none`, `log` (sign(x) log(1 + |x|)) or `standard` ((x - mean) / deviation, from the training split; 0 where
    the number is constant there up to rounding)."""
    missing: str | float = "padding"
    """For a category or list `padding` (id 0) or `unknown` (id 1); for a number the raw value that stands in."""
    missing_values: tuple[str, ...] = ()
    """Values that mean that there is none, such as NULL or -1: in the log, in a request and in the store alike."""
    max_size: int = 0
    """Above 0, at most so many values have an id, the most frequent ones; the others are unknown."""
    counter: Counter | None = None
    """What a number counts that adrank keeps itself: told by a table `[counter.NAME]`, never here."""

    @property
    def dense(self) -> bool:
        """Whether its values are numbers as they stand, not looked up in a vocabulary."""
        return self.kind in ("number", "vector")

    @property
    def path(self) -> str:
        """The field's name in a prepared data set and in messages, such as `ad.genres`."""
        return f"{self.side}.{self.name}"

    def fitting(self, tokens: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some values that mean missing which this field can have; identities have none."""
        if self.name in IDENTITY.values():
            return ()
        return tuple(token for token in tokens if not self.dense or (self.kind == "number" and _is_finite(token)))


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
        return self.numbers[-1].stop if self.numbers else 0


def lay_out(fields: tuple[Field, ...]) -> Layout:
    """Columns for the fields, in their order."""
    slots: dict[bool, list[Slot]] = {False: [], True: []}
    for field in fields:
        before = slots[field.dense]
        start = before[-1].stop if before else 0
        before.append(Slot(field, start, start + field.length))
    return Layout(tuple(slots[False]), tuple(slots[True]))


@dataclass(frozen=True, slots=True)
class Schema:
    """All fields of a request. A behaviour of the history is an ad, so the history's fields are ad fields, named again."""

    name: str
    fields: tuple[Field, ...]
    history_fields: tuple[str, ...] = ()
    history_length: int = 0
    nobody: tuple[str, ...] = ()
    """User ids that mean no user, such as the zero device id: no features, no history, no group of rows."""
    history_padding: tuple[str, ...] = ()
    """What fills up a history and is no behaviour."""
    history_ages: bool = False
    """Whether networks are given how long ago each behaviour was."""

    def side(self, side: Side) -> tuple[Field, ...]:
        """The fields of one side, in the schema's order."""
        return tuple(field for field in self.fields if field.side == side)

    def field(self, side: Side, name: str) -> Field | None:
        """One field, or None where the schema has none of that name."""
        return next((field for field in self.fields if field.side == side and field.name == name), None)

    @property
    def counters(self) -> dict[str, Counter]:
        """What is counted, by the name of the field that it is."""
        return {field.name: field.counter for field in self.fields if field.counter}

    @property
    def told(self) -> "Schema":
        """The schema without the fields that adrank counts itself: what others tell."""
        return replace(self, fields=tuple(field for field in self.fields if not field.counter))

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
        """The tensors of a request that this schema needs: name -> (part, width). A block without columns is left out.

        `AGES` is `(R, T)`, a number a behaviour, and has no axis of columns: its width is 0.
        """
        widths = {}
        for part, layout in self.layouts.items():
            widths[f"{part}_ids"] = (part, layout.width)
            widths[f"{part}_numbers"] = (part, layout.number_width)
            if part == "history" and self.history_ages:
                widths[AGES] = (part, 0)
        return {name: (part, width) for name, (part, width) in widths.items() if width or name == AGES}

    def to_toml(self) -> str:
        """The schema as the text of a `schema.toml`, defaults left out."""
        document: dict[str, Any] = {"name": self.name}
        if self.nobody:
            document["nobody"] = list(self.nobody)
        if self.history_fields:
            padding = {"padding": list(self.history_padding)} if self.history_padding else {}
            ages = {"ages": True} if self.history_ages else {}
            document["history"] = {"length": self.history_length, "fields": list(self.history_fields), **padding, **ages}
        for field in self.told.fields:
            defaults = Field(field.name, field.side, field.kind, vocabulary=field.name, missing=_default_missing(field.kind))
            entries = {k: v for k, v in asdict(field).items() if k == "kind" or v != getattr(defaults, k)}
            entries |= {"missing_values": list(field.missing_values)} if field.missing_values else {}
            document.setdefault(field.side, {})[field.name] = entries
        for field in self.fields:
            if field.counter:
                document.setdefault("counter", {})[field.name] = {**field.counter.entries(), "transform": field.transform}
        return tomli_w.dumps(document)

    def canonical(self) -> str:
        """A text that is equal for schemas that make the same tensors of the same values and vocabularies, for fingerprints.

        How often a value must be seen decides what a vocabulary holds, not what is made of it. `negative_sampling` was a part of
        schemas once: it stays in the text as it was for most, so that their fingerprints are still the same.
        """
        alike = replace(self, fields=tuple(replace(field, min_count=1, max_size=0) for field in self.fields))
        return json.dumps({**_said(asdict(alike)), "negative_sampling": 1.0}, sort_keys=True, separators=(",", ":"))


LATER = ("missing_values", "max_size", "counter", "nobody", "history_padding", "history_ages")


def _said(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what schemas could not say at first and this one does not say, so that its fingerprint is still the same."""
    known = {key: value for key, value in schema.items() if value or key not in LATER}
    return {**known, "fields": [{key: value for key, value in field.items() if value or key not in LATER} for field in schema["fields"]]}


def _default_missing(kind: str) -> str | float:
    return 0.0 if kind in ("number", "vector") else "padding"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SchemaError(message)


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise SchemaError("\n".join(mistakes))


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _is_finite(text: str) -> bool:
    try:
        return _is_number(float(text))
    except ValueError:
        return False


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value)


FIELD = ("kind", "vocabulary", "buckets", "min_count", "length", "transform", "missing", "missing_values", "max_size")


def _field(side: Side, name: str, entries: object) -> Field:
    where = f"field {side}.{name}"
    if not isinstance(entries, Mapping):
        raise SchemaError(f"{where}: expected a table such as [{side}.{name}] with kind = ...")
    unknown, kind = sorted(set(entries) - set(FIELD)), entries.get("kind")
    mistakes = [f"unknown settings {unknown}; known are {sorted(FIELD)}"] if unknown else []
    if kind not in KINDS:
        mistakes.append(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    given = {key: value for key, value in entries.items() if key in FIELD}
    field = Field(**{"name": name, "side": side, "kind": str(kind), "vocabulary": name, "missing": _default_missing(str(kind)), **given})
    mistakes += _mistakes(field)
    if not mistakes and kind == "number":
        mistakes += _mistakes_of_number(field)
    elif not mistakes and kind == "vector":
        mistakes += _mistakes_of_vector(field)
    elif not mistakes:
        rules = {
            "only a number has a transform": field.transform == "none",
            f"missing must be one of {', '.join(MISSING_CATEGORY)}": field.missing in MISSING_CATEGORY,
        }
        mistakes += [rule for rule, holds in rules.items() if not holds]
    _refuse([f"{where}: {mistake}" for mistake in mistakes])
    return replace(field, missing_values=tuple(field.missing_values))


def _mistakes(field: Field) -> list[str]:
    rules = {
        "vocabulary must be a name": isinstance(field.vocabulary, str) and bool(field.vocabulary),
        f"buckets must be a whole number from 0 to {MAX_BUCKETS}": _is_int(field.buckets, 0, MAX_BUCKETS),
        "min_count must be a whole number of at least 1": _is_int(field.min_count, 1, 2**62),
        "max_size must be a whole number of at least 0, and buckets has none": _is_int(field.max_size, 0, 0 if field.buckets else 2**62),
        f"length must be a whole number from 1 to {MAX_LIST_LENGTH}": _is_int(field.length, 1, MAX_LIST_LENGTH),
        "only a list or a vector has a length": field.kind not in KINDS or field.kind in ("list", "vector") or field.length == 1,
        f"transform must be one of {', '.join(TRANSFORMS)}": field.transform in TRANSFORMS,
        'missing_values must be a list of texts, such as ["NULL", "-1"]': _is_texts(field.missing_values),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _mistakes_of_number(field: Field) -> list[str]:
    rules = {
        "a number has neither buckets, min_count nor max_size": (field.buckets, field.min_count, field.max_size) == (0, 1, 0),
        "missing must be a finite number that fits float32, the raw value that stands in": _is_number(field.missing),
        "missing_values of a number must be numbers, as texts": all(map(_is_finite, field.missing_values)),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _mistakes_of_vector(field: Field) -> list[str]:
    rules = {
        "a vector needs a length of at least 2, how many numbers it has": field.length > 1,
        "a vector has neither buckets, min_count, max_size nor a transform": (
            (field.buckets, field.min_count, field.max_size, field.transform) == (0, 1, 0, "none")
        ),
        "a vector that is missing is 0 throughout: leave missing and missing_values out": field.missing == 0 and not field.missing_values,
    }
    return [rule for rule, holds in rules.items() if not holds]


def _history(document: object) -> tuple[tuple[str, ...], int, tuple[str, ...], bool]:
    """The fields, the length, what fills a history up, and whether it has ages."""
    if document is None:
        return (), 0, (), False
    if not isinstance(document, Mapping) or set(document) - {"padding", "ages"} != {"length", "fields"}:
        raise SchemaError('[history] takes exactly: length = how many behaviours, fields = [ad fields, "ad_id" first]')
    length, names, padding = document["length"], document["fields"], document.get("padding", [])
    ages = document.get("ages", False)
    is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    rules = {
        f"length must be a whole number from 1 to {MAX_HISTORY_LENGTH}": _is_int(length, 1, MAX_HISTORY_LENGTH),
        'fields must be a list of ad fields that starts with "ad_id"': is_names and names[:1] == ["ad_id"],
        "fields names a field twice": not is_names or len(set(names)) == len(names),
        "padding must be a list of texts": _is_texts(padding),
        "ages must be true or false": isinstance(ages, bool),
    }
    _refuse([f"[history]: {rule}" for rule, holds in rules.items() if not holds])
    return tuple(names), length, tuple(padding), ages


def sampling_in(document: Mapping[str, Any]) -> float | None:
    """The share of non-clicks that a log kept, where a document says it: `data.toml`, or the section [table] of a schema file.

    Raises:
        SchemaError: it is not a share.
    """
    sampling = document.get("negative_sampling")
    if sampling is None:
        return None
    if not _is_number(sampling) or not 0 < sampling <= 1:
        raise SchemaError(f"negative_sampling is {sampling!r}; it is the share of non-clicks that the log kept: above 0, at most 1")
    return float(sampling)


def parse_schema(text: str) -> Schema:
    """Read a `schema.toml`.

    Raises:
        SchemaError: the text is not TOML, or says something impossible; the message has a line for every mistake, with its field.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SchemaError(f"not a TOML text: {error}") from error
    mistakes = list[str]()
    known = {"name", "nobody", "history", "counter", *SIDES}
    if unknown := sorted(set(document) - known):
        mistakes.append(f"unknown entries {unknown}; known are {sorted(known)}")
    name, nobody = document.get("name"), document.get("nobody", [])
    if not isinstance(name, str) or not name:
        mistakes.append('name = "..." is missing at the top')
    if not _is_texts(nobody):
        mistakes.append("nobody must be a list of user ids")
    fields = _fields(document, mistakes)
    history = tried(lambda: _history(document.get("history")), mistakes) or ((), 0, (), False)
    if not any(field.side == "ad" for field in fields) and not document.get("ad"):
        mistakes.append('there is no ad field: add one, such as [ad.ad_id] kind = "category"')
    named = document.get("ad")
    absent = [each for each in history[0] if not isinstance(named, Mapping) or each not in named]
    if absent:
        mistakes.append(f"[history]: {absent} are not ad fields; a behaviour is an ad, so each needs its [ad.…] table")
    mistakes += [
        f"[history]: {field.name} is a counter, which behaviours do not have"
        for field in fields
        if field.counter and field.name in history[0]
    ]
    mistakes += _misfits(fields)
    _refuse(mistakes)
    return Schema(str(name), tuple(fields), *history[:2], tuple(nobody), *history[2:])


def _fields(document: Mapping[str, Any], mistakes: list[str]) -> list[Field]:
    fields = list[Field | None]()
    for side in SIDES:
        tables = document.get(side, {})
        if isinstance(tables, Mapping):
            fields += [tried(partial(_field, side, name, entries), mistakes) for name, entries in tables.items()]
        else:
            mistakes.append(f"{side}: expected tables such as [{side}.name]")
    told = [field for field in fields if field is not None]
    tables = document.get("counter", {})
    if not isinstance(tables, Mapping):
        mistakes.append("counter: expected tables such as [counter.name]")
        return told
    counters = [tried(partial(_counter, name, entries, told), mistakes) for name, entries in tables.items()]
    return told + [field for field in counters if field is not None]


def _counter(name: str, entries: object, told: Sequence[Field]) -> Field:
    counter, mistakes = counter_of(entries) if isinstance(entries, Mapping) else (None, [f"expected a table such as [counter.{name}]"])
    transform = entries.get("transform", "log") if isinstance(entries, Mapping) else "log"
    if transform not in TRANSFORMS:
        mistakes.append(f"transform must be one of {', '.join(TRANSFORMS)}")
    if counter is not None:
        if any((field.side, field.name) == (counter.side, name) for field in told):
            mistakes.append(f"there is a field {counter.side}.{name} already")
        if counter.value and not any((field.side, field.name) == ("ad", counter.value) and not field.dense for field in told):
            mistakes.append(f"by names {counter.value}, which is no category or list of ads")
    if counter is None or mistakes:
        raise SchemaError("\n".join(f"counter {name}: {mistake}" for mistake in mistakes))
    side: Side = "user" if counter.side == "user" else "ad"
    return Field(name, side, "number", vocabulary=name, transform=transform, missing=counter.least, counter=counter)


def tried(make: Callable[[], T], mistakes: list[str]) -> T | None:
    """What is made, or None where it says something impossible, which is added to the mistakes."""
    try:
        return make()
    except SchemaError as error:
        mistakes += str(error).split("\n")
        return None


def _misfits(fields: Sequence[Field]) -> list[str]:
    """Fields that do not fit their side, or each other."""
    owners, mistakes = dict[str, Field](), list[str]()
    for field in fields:
        identity = field.name in IDENTITY.values()
        if identity and IDENTITY.get(field.side) != field.name:
            mistakes.append(f"field {field.path}: {field.name} belongs to the other side")
        elif identity and field.kind != "category":
            mistakes.append(f"field {field.path}: an identity is a category")
        elif identity and field.missing_values:
            mistakes.append(f"field {field.path}: an identity has no missing_values; nobody = [...] says which user ids mean no user")
        elif not field.dense:
            owner = owners.setdefault(field.vocabulary, field)
            if (owner.buckets, owner.min_count, owner.max_size) != (field.buckets, field.min_count, field.max_size):
                mistakes.append(f"fields {owner.path} and {field.path} share a vocabulary but not its buckets, min_count and max_size")
    return mistakes
