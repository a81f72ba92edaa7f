"""JSON lines as columns: one object a line, a key that an object lacks is missing there.

A name that no object has at its top is looked for along its dots: `user.age` in {"user": {"age": 25}}.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isinf, isnan
from typing import Any

import polars as pl

from .files import SourceFile
from .prepared import DataError

EXACT = 2**53
"""From here on a float no longer tells neighbouring whole numbers apart."""
ROOM = 2**63


def objects(file: SourceFile, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, and the line's number.

    Raises:
        DataError: a line holds no JSON object.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found = json.loads(line, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file.name}, line {number}: not JSON: {error}") from error
            if not isinstance(found, dict):
                raise DataError(f'{file.name}, line {number}: expected a JSON object, such as {{"label": 1}}')
            yield number, found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in found if names.count(name) > 1)} twice")
    return found


def value_of(found: Mapping[str, Any], name: str) -> Any:
    """What an object says of a column, None where it says nothing."""
    if name in found:
        return found[name]
    head, dot, rest = name.partition(".")
    inner = found.get(head)
    return value_of(inner, rest) if dot and isinstance(inner, dict) else None


def has(found: Mapping[str, Any], name: str) -> bool:
    """Whether an object names a column."""
    head, dot, rest = name.partition(".")
    inner = found.get(head)
    return name in found or bool(dot and isinstance(inner, dict) and has(inner, rest))


def wrong(value: Any) -> str | None:
    """What a value is that no column takes, None where it is nothing of the kind."""
    if isinstance(value, list):
        return "a list with an object or a list in it" if any(isinstance(each, dict | list) for each in value) else None
    if isinstance(value, str):
        return None if value.isascii() or value == value.encode(errors="ignore").decode() else "text with half of a surrogate pair"
    return "an object" if isinstance(value, dict) else "no finite number" if isinstance(value, float) and isinf(value) else None


def paths(found: Mapping[str, Any]) -> Iterator[str]:
    """The names of an object's columns, those within an object as `has` takes them."""
    for name, value in found.items():
        yield from (f"{name}.{rest}" for rest in paths(value)) if isinstance(value, dict) else (name,)


def series(name: str, values: Sequence[Any]) -> pl.Series:
    """Values of one column: of one type where they have one, else all as text, so that no digit is lost."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str}:
        return pl.Series(name, values, pl.String)
    if kinds == {bool}:
        return pl.Series(name, values, pl.Boolean)
    if kinds <= {int, float} and _exact(values, kinds):
        return pl.Series(name, values, pl.Float64 if float in kinds else pl.Int64)
    if kinds == {list}:
        flat = series(name, [element for value in values if value is not None for element in value])
        texts = flat.dtype if not flat.is_empty() else pl.String()
        return pl.Series(name, [_like(value, texts) for value in values], pl.List(texts), strict=False)
    return pl.Series(name, [text(value) for value in values], pl.String)


def _exact(values: Sequence[Any], kinds: set[type]) -> bool:
    room = EXACT if float in kinds else ROOM
    return all(abs(value) < room for value in values if type(value) is int)


def _like(value: list[Any] | None, dtype: pl.DataType) -> list[Any] | None:
    if value is None or dtype != pl.String:
        return value
    return [text(element) for element in value]


def text(value: Any) -> str | None:
    """A value as a CSV would hold it, None where it is missing."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and isnan(value):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    return json.dumps(value)
