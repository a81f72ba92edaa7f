"""Values to ids. 0 is padding or missing, 1 is unknown, values start at 2. Ids stay int64: float32 loses them above 2**24."""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from json.decoder import scanstring  # type: ignore[attr-defined]  # in C, and of one string
from operator import eq
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from .index import Ids as Ids  # noqa: PLC0414  # it is imported from here
from .index import RowIndex
from .schema import Schema
from .values import plain

PADDING, UNKNOWN, FIRST = 0, 1, 2
ENCODING = 1
"""Raise this whenever encoding changes what it does: it is part of every fingerprint, so old bundles are refused."""
CANCELLED = 1e-7
"""A deviation that is a smaller share of the mean was left over from rounding, in bundles that took E[x²] - E[x]² for the variance."""
AT_ONCE = 5_000
"""Values written at once: about half a millisecond."""
MANY = 50_000
"""Values of a vocabulary."""
BEGINNING = '{"categories":{'
VALUES = re.compile(r'(?:"[^"\\]*+(?:\\.[^"\\]*+)*+",?+){1,1000}+')
"""As many strings of a list: read at once, a tenth of a millisecond."""

Numbers = npt.NDArray[np.float32]


class Vocabulary:
    """The values that training saw, in the order of their ids.

    Many are found by an index of arrays, which takes a third of a dict's memory; few by a dict, which is quicker.
    """

    def __init__(self, values: Sequence[str], many: int = MANY) -> None:
        self.values = tuple(values)
        self._index = RowIndex(len(self.values), spread=2) if len(self.values) >= max(many, 1) else None
        if self._index is None:
            self._ids: dict[str | None, int] = {value: i for i, value in enumerate(self.values, FIRST)}
        else:
            self._ids = {}
            for start in range(0, len(self.values), AT_ONCE):
                self._index.add(self.values[start : start + AT_ONCE])
        if (len(self._ids) if self._index is None else len(self._index)) != len(self.values):
            raise ValueError("a vocabulary names a value twice")
        self._ids[None] = PADDING

    @property
    def size(self) -> int:
        """Ids in use, padding and unknown included: the height of an embedding table."""
        return len(self.values) + FIRST

    def id(self, value: str | None) -> int:
        """The id of one value; None is padding."""
        found = self._ids.get(value)
        if found is None:
            return UNKNOWN if self._index is None else int(self._indexed(self._index, [value])[0])
        return found

    def encode(self, values: Sequence[str | None]) -> Ids:
        """Ids `(n,)` of the values, each as `id` gives it."""
        ids = np.fromiter(map(self._ids.get, values, repeat(UNKNOWN)), np.int64, len(values))
        return ids if self._index is None else np.where(ids == UNKNOWN, self._indexed(self._index, values), ids)

    def _indexed(self, index: RowIndex, values: Sequence[str | None]) -> Ids:
        """By the index: its rows are the ids but one, and a value that has none is unknown."""
        ids = index.rows(values) + (FIRST - 1)  # type: ignore[arg-type]  # None has a hash too
        same = [*map(eq, map(self.values.__getitem__, (ids - FIRST).tolist()), values)]
        return ids if all(same) else np.where(same, ids, UNKNOWN)

    def own(self, values: Sequence[str]) -> list[str]:
        """The values as the objects that it has of them, so that no text is in memory twice."""
        found = [value if i < FIRST else self.values[i - FIRST] for i, value in zip(self.encode(values).tolist(), values, strict=True)]
        return found if found == list(values) else [own if own == value else value for own, value in zip(found, values, strict=True)]


class HashBuckets:
    """Values hashed into a fixed number of ids, for values too many or too new to list."""

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    @property
    def size(self) -> int:
        """Ids in use, padding and unknown included."""
        return self.buckets + FIRST

    def id(self, value: str | None) -> int:
        """The id of one value; None is padding. CRC-32 because it is stable across machines and fast."""
        return PADDING if value is None else FIRST + zlib.crc32(plain(value).encode()) % self.buckets

    def encode(self, values: Sequence[str | None]) -> Ids:
        """Ids `(n,)` of the values, each as `id` gives it."""
        return np.fromiter(map(self.id, values), np.int64, len(values))


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation of a number over the training split, for the `standard` transform."""

    mean: float
    deviation: float
    weight: float | None = None
    """0 where the number was constant, so that no value of it is far from the mean; 1 where it was not, though the deviation is tiny
    beside the mean. None: the two tell it."""

    @property
    def constant(self) -> bool:
        """Whether the number told nothing when the model was trained. It weighs nothing then: every value is encoded as 0."""
        return self.deviation <= CANCELLED * abs(self.mean) if self.weight is None else not self.weight


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """Everything about values that is learned from the training split."""

    categories: Mapping[str, Vocabulary | HashBuckets]
    moments: Mapping[str, Moments]

    def to_json(self) -> str:
        """As the text of a bundle's `vocabularies.json`; hash buckets follow from the schema and are not written."""
        return b"".join(self.json_pieces()).decode()

    def json_pieces(self) -> Iterator[bytes]:
        """The text in pieces, each made so soon that other threads need not wait."""
        before = BEGINNING.encode()
        for name, vocabulary in self.categories.items():
            if isinstance(vocabulary, Vocabulary):
                yield before + orjson.dumps(name) + b":["
                for start in range(0, len(vocabulary.values), AT_ONCE):
                    yield b"," * (start > 0) + orjson.dumps(vocabulary.values[start : start + AT_ONCE])[1:-1]
                before = b"],"
        moments = {path: [m.mean, m.deviation, m.weight][: 2 + (m.weight is not None)] for path, m in self.moments.items()}
        yield (
            (b"]" if before == b"]," else before)
            + b'},"moments":'
            + json.dumps(moments, ensure_ascii=False, separators=(",", ":")).encode()
            + b"}"
        )


def parse_vocabularies(text: str, schema: Schema, others: Iterable[Vocabularies] = ()) -> Vocabularies:
    """Read a `vocabularies.json`. What the others have in memory already, under the same name, is not kept twice.

    Raises:
        ValueError: it is not JSON of that form, or lacks a vocabulary that the schema needs.
    """
    try:
        document = _read(text, others)
    except (ValueError, IndexError):  # written by someone else, or not JSON, which is told better here
        document = orjson.loads(text)
    try:
        listed, moments = document["categories"], document["moments"]
        categories: dict[str, Vocabulary | HashBuckets] = {}
        for field in schema.fields:
            if not field.dense:
                buckets = field.buckets
                categories[field.vocabulary] = HashBuckets(buckets) if buckets else Vocabulary(listed[field.vocabulary])
        standard = [field.path for field in schema.fields if field.transform == "standard"]
        return Vocabularies(categories, {path: Moments(*map(float, moments[path])) for path in standard})
    except (KeyError, TypeError) as error:
        raise ValueError(f"vocabularies do not fit the schema {schema.name!r}: {error!r}") from error


def _read(text: str, others: Iterable[Vocabularies]) -> dict[str, Any]:
    """What `Vocabularies.to_json` wrote, some values at a time: whole, it would hold up other threads, and leave holes in memory.

    Raises:
        ValueError, IndexError: something else wrote it.
    """
    at, listed = _past(text, 0, BEGINNING), dict[str, list[str]]()
    while text[at] != "}":
        name, at = scanstring(text, _past(text, at, '"'))
        known = [each for other in others if isinstance(each := other.categories.get(name), Vocabulary)]
        values, at = listed.setdefault(name, []), _past(text, at, ":[")
        while some := VALUES.match(text, at):
            at = some.end()
            values += _as_known(orjson.loads(f"[{some[0].removesuffix(',')}]"), len(values), known)
        at = _past(text, at, "]")
        at += text[at] == ","
    document: dict[str, Any] = orjson.loads(BEGINNING + text[at:])
    return {**document, "categories": listed}


def _as_known(values: list[str], start: int, known: Iterable[Vocabulary]) -> Sequence[str]:
    """The values, which stand at `start` and after it, as the objects that are in memory already where they are."""
    for each in known:
        same = each.values[start : start + len(values)]
        if same == tuple(values):  # a model that is trained again mostly keeps its values and their ids
            return same
        values = each.own(values)
    return values


def _past(text: str, at: int, expected: str) -> int:
    if not text.startswith(expected, at):
        raise ValueError(f"expected {expected} at {at}")
    return at + len(expected)


def fingerprint(schema: Schema, vocabularies: Vocabularies) -> str:
    """What encoding does, in 16 hexadecimal digits: bundles and services that differ in it must not meet."""
    digest = hashlib.sha256(f"{ENCODING}\0{schema.canonical()}\0".encode())
    for piece in vocabularies.json_pieces():
        digest.update(piece)
    return digest.hexdigest()[:16]
