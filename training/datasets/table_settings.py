"""The section [table] of a schema file: how a table holds the fields of its schema. Knows nothing about rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from features.files import read_toml
from features.schema import IDENTITY, Schema, SchemaError, parse_schema, sampling_in, tried
from features.values import plain_all

from .prepared import SHARES, SPLITS, DataError, wrong_head
from .times import UNITS, wrong_format

TEXT = (
    *("label", "user_id", "ad_id", "ts", "ts_unit", "history", "separator", "list_separator", "quote"),
    *("propensity", "position", "candidates", "weight"),
)
TOKENS = ("ts_format", "missing", "nobody", "padding")


@dataclass(frozen=True)
class TableSettings:
    """The section [table] of a schema file. Of `missing`, `nobody` and `padding`, None is: not said."""

    label: str = "label"
    """The column of clicks: 0 or 1."""
    user_id: str = "user_id"
    """The column of users' ids; `""` where there is none. A row may lack its user."""
    ad_id: str = "ad_id"
    """The column of ads' ids; `""` where there is none."""
    ts: str = ""
    """The column of times; without it the rows count as in order."""
    ts_unit: str = "s"
    """What numbers in `ts` count since 1970: `s`, `ms`, `us` or `ns`."""
    ts_format: tuple[str, ...] | None = None
    """How times are written, as for strptime: `%y%m%d%H`; a list where there are several. Without it ISO 8601 or numbers."""
    split: str | list[float] = field(default_factory=lambda: list(SHARES))
    """Shares by order of time, or the column that says `train`, `valid` or `test`."""
    history: str = ""
    """The column of the ads clicked before, oldest first; without it the history is built from the clicks."""
    padding: tuple[str, ...] | None = None
    """What fills up histories of a fixed length; dropped before the newest behaviours are kept."""
    missing: tuple[str, ...] | None = None
    """Texts that mean missing, such as `NULL`; `[]` where none does."""
    nobody: tuple[str, ...] | None = None
    """User ids that mean no user, such as a device id of zeros: no history, no state in Redis, no group of GAUC."""
    separator: str = ","
    """Between the columns of a CSV."""
    list_separator: str = "|"
    """Between the elements of a list in a CSV."""
    quote: str = '"'
    """Around fields of a CSV that hold a separator; `""` where nothing is quoted."""
    quoted_newlines: bool = False
    """Whether a quoted field may hold lines that look like rows; if not, such a field is refused, as a quote that swallows rows."""
    outcomes: Mapping[str, str] = field(default_factory=dict)
    """The columns of what else came of a row, by head, such as `{ conversion = "bought" }`: 0, 1 or nothing. See `--set heads`."""
    weight: str = ""
    """The column of what a row weighs in training, at least 0."""
    propensity: str = ""
    """The column of the probability with which the ad was shown, for `adrank replay`."""
    position: str = ""
    """The column of the place where the ad was shown, from 1, for `adrank replay`."""
    candidates: str = ""
    """The column of all ads that could have been shown, for `adrank replay`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column of a field where it has another name, by `side.field`."""
    negative_sampling: float | None = None
    """The share of non-clicks that the log kept; probabilities are corrected for it."""

    @property
    def nobodies(self) -> tuple[str, ...]:
        """The user ids that mean no user: what means missing anywhere means no user here."""
        return tuple(dict.fromkeys((*(self.nobody or ()), *(self.missing or ()))))


def read_schema(path: Path) -> tuple[Schema, TableSettings]:
    """A schema file: the schema, and how the table holds it.

    Raises:
        DataError: the file cannot be read, or says something impossible; the message names every mistake.
    """
    document = read_toml(path, DataError)
    section, mistakes = document.pop("table", {}), list[str]()
    settings = tried(lambda: _settings(section), mistakes)
    schema = tried(lambda: parse_schema(tomli_w.dumps(document)), mistakes)
    if schema and settings:
        mistakes += _misfits(schema, settings)
    if mistakes or not schema or not settings:
        raise DataError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return _with_tokens(schema, settings), settings


def _settings(entries: object) -> TableSettings:
    if not isinstance(entries, Mapping):
        raise SchemaError("[table] must be a section")
    known = {entry.name for entry in fields(TableSettings)}
    mistakes = [_unknown(entries, known)] if set(entries) - known else []
    mistakes += [f"{name} must be text, not {entries[name]!r}" for name in TEXT if not isinstance(entries.get(name, ""), str)]
    mistakes += [
        f"{name} must be a text or a list of texts, not {entries[name]!r}" for name in TOKENS if not _is_texts(entries.get(name, ""))
    ]
    sampling = tried(lambda: sampling_in(entries), mistakes)
    if not isinstance(entries.get("quoted_newlines", False), bool):
        mistakes.append(f"quoted_newlines must be true or false, not {entries['quoted_newlines']!r}")
    if not mistakes:
        listed = {name: _listed(name, entries[name]) for name in TOKENS if name in entries}
        settings = TableSettings(**{**entries, **listed, "negative_sampling": sampling})
        mistakes = _impossible(settings)
        if not mistakes:
            return settings
    raise SchemaError("\n".join(f"[table]: {mistake}" for mistake in mistakes))


def _unknown(entries: Mapping[str, Any], known: set[str]) -> str:
    return f"unknown entries {sorted(set(entries) - known)}; known are {sorted(known)}"


def _listed(name: str, value: str | list[str]) -> tuple[str, ...]:
    """The texts of an entry; those that stand for values as the texts that these are looked up by, as cells are: -1.0 is -1.

    "" is what an empty cell is read as: no value, whether it is listed or not.
    """
    texts = [value] if isinstance(value, str) else value
    return tuple(texts if name == "ts_format" else filter(None, plain_all(texts)))


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _impossible(settings: TableSettings) -> list[str]:
    """What cannot be, whatever the schema is."""
    mistakes = []
    if not _is_split(settings.split):
        mistakes.append(f"split is {settings.split!r}; it must be three shares above 0 that add up to 1, or the name of a column")
    if settings.ts_unit not in UNITS:
        mistakes.append(f"ts_unit is {settings.ts_unit!r}; it must be one of {', '.join(UNITS)}")
    mistakes += [f"ts_format {wrong}" for each in settings.ts_format or () if (wrong := wrong_format(each))]
    if settings.ts_format and not settings.ts:
        mistakes.append('ts_format says how times are written, but no column has them: add ts = "column"')
    if len(settings.separator) != 1 or settings.separator in '"\r\n' or not settings.list_separator:
        mistakes.append("separator must be one character, no quote or end of line, and list_separator at least one")
    if len(settings.quote) > 1 or settings.quote in ("\r", "\n", settings.separator):
        mistakes.append('quote must be one character, neither the separator nor an end of line, or "" where quotes are plain text')
    mistakes += _misnamed_outcomes(settings.outcomes)
    mistakes += [
        f'{name} is the column that tells more of a propensity: name that too, propensity = "column"'
        for name in ("position", "candidates")
        if getattr(settings, name) and not settings.propensity
    ]
    return mistakes


def _misnamed_outcomes(outcomes: object) -> list[str]:
    if not isinstance(outcomes, Mapping) or not all(isinstance(name, str) and name for name in outcomes.values()):
        return ['outcomes must name columns by head, such as { conversion = "bought" }']
    return [f"outcomes: {mistake}" for head in outcomes if (mistake := wrong_head(head))]


def _is_split(split: object) -> bool:
    if isinstance(split, str) and split:
        return True
    shares = [share for share in split if type(share) in (int, float) and share > 0] if isinstance(split, list) else []
    return split == shares and len(shares) == len(SPLITS) and abs(sum(shares) - 1) <= 1e-6


def _misfits(schema: Schema, settings: TableSettings) -> list[str]:
    """What does not fit the schema."""
    paths = {feature.path for feature in schema.told.fields}
    mistakes = _misnamed(paths, settings)
    for side, name in IDENTITY.items():
        if f"{side}.{name}" in paths and not getattr(settings, name):
            mistakes.append(f'{name} = "" says that the table has none, but {side}.{name} is a field')
    if settings.history and not schema.history_length:
        mistakes.append("history names a column, but the schema has no [history]")
    if schema.history_ages and (settings.history or not settings.ts):
        mistakes.append("[history] has ages, which need times: name ts, and leave history out so that it is built from the rows")
    if schema.counters and not settings.ts:
        mistakes.append("[counter] tables need times: name ts")
    if any("conversion" in counter.of for counter in schema.counters.values()):
        mistakes.append("a row does not say when its conversion came, so those can be counted where the service logs them alone")
    if settings.padding and not settings.history:
        mistakes.append('padding is what fills a column of histories up: name that too, history = "column"')
    if schema.history_length and not settings.ad_id:
        mistakes.append('ad_id = "" says that the table has no ads, but the schema has a history of them')
    if settings.propensity and not settings.ad_id:
        mistakes.append('ad_id = "" says that the table has no ads, so none has a propensity')
    return [f"[table]: {mistake}" for mistake in mistakes]


def _misnamed(paths: set[str], settings: TableSettings) -> list[str]:
    columns = settings.columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        return ['columns must name columns by field, such as { "ad.genres" = "genre_list" }']
    identities = {f"{side}.{name}": name for side, name in IDENTITY.items()}
    mistakes = [f"the column of {path} is named by {name} = …" for path, name in identities.items() if path in columns]
    absent = sorted(set(columns) - paths - set(identities))
    return mistakes + ([f"columns names {absent}, which are no fields; fields are {sorted(paths)}"] if absent else [])


def _with_tokens(schema: Schema, settings: TableSettings) -> Schema:
    """The schema with what means missing, nobody and padding, so that a request is read as the table is."""
    tokens = settings.missing or ()
    replaced = tuple(
        replace(each, missing_values=tuple(dict.fromkeys((*plain_all(each.missing_values), *each.fitting(tokens)))))
        for each in schema.fields
    )
    nobody = tuple(dict.fromkeys((*schema.nobody, *settings.nobodies)))
    padding = tuple(dict.fromkeys((*schema.history_padding, *(settings.padding or ()), *(tokens if schema.history_length else ()))))
    return replace(schema, fields=replaced, nobody=nobody, history_padding=padding)
