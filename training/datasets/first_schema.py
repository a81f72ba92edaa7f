"""A first schema file for a table that nobody has described: what its columns seem to be, each guess beside its reason.

Looks at the first rows alone, and writes a text for a person to read and change: names and values can mislead.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .looks import SAME, Entries, Looks, words_of
from .plausible import NO_ID
from .prepared import SPLITS, DataError
from .tables import first_rows

ROLES: Mapping[str, tuple[str, ...]] = {
    "label": ("label", "click", "clicked", "clicks", "is_click", "isclick", "is_clicked", "y", "target"),
    "user_id": ("user_id", "user", "userid", "uid", "member_id", "customer_id", "visitor_id", "device_id"),
    "ad_id": (
        *("ad_id", "ad", "adid", "item_id", "item", "itemid", "creative_id", "creative", "banner_id", "product_id", "sku"),
        *("movie_id", "article_id", "campaign_id"),
    ),
    "ts": ("ts", "timestamp", "time", "datetime", "event_time", "created_at", "date", "hour"),
    "history": ("history", "hist", "behaviours", "behaviors"),
    "propensity": ("propensity", "propensity_score", "pscore"),
}
"""What columns are usually called, the first that is there counts."""
CONVERSIONS = ("conversion", "converted", "bought", "purchase", "purchased", "order", "ordered", "install", "installed")
OWN_WORDS = {
    "user": {"user", "u", "member", "customer", "visitor", "gender", "age"},
    "ad": {"ad", "item", "creative", "product", "movie", "article", "campaign", "advertiser", "brand"},
}
HISTORY = 50


@dataclass
class FirstSchema:
    """The entries of `[table]` and the fields by side, each with its reason, and the columns that are left out."""

    rows: int
    table: dict[str, tuple[object, str]] = field(default_factory=dict)
    fields: dict[str, dict[str, tuple[Entries, str]]] = field(default_factory=lambda: {"user": {}, "context": {}, "ad": {}})
    left_out: dict[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """The schema file."""
        lines = [f"# Guessed from the first {self.rows:,} rows: read it, and change what is not so. docs/data.md explains the entries."]
        lines += [f"name = {json.dumps(name)}", self._history(), "", "[table]"]
        lines += [_line(key, *entry) for key, entry in self.table.items()]
        for side, fields in self.fields.items():
            lines += ["", f"[{side}]", *(_line(name, *entry) for name, entry in fields.items())] if fields else []
        lines += ["", "# Left out:"] if self.left_out else []
        return "\n".join([*lines, *(f"# {_key(column)}: {reason}" for column, reason in self.left_out.items())]) + "\n"

    def _history(self) -> str:
        if not (self.table["user_id"][0] and self.table["ad_id"][0]):
            return "# No history, since no column names the user, or the ad."
        more = [name for name, (entries, _) in self.fields["ad"].items() if entries["kind"] == "category"]
        return _line("history", {"length": HISTORY, "fields": more[:2]}, "what a user clicked before, and what networks see of it")


def first_schema(source: Path, named: Mapping[str, str]) -> FirstSchema:
    """Guess from the first rows of a table; `named`: the columns of some roles, as a person said them.

    Raises:
        DataError: it cannot be read or has no header, a named column is missing, or none tells the clicks.
    """
    table, dialect = first_rows(source)
    columns = table.frame.columns
    if absent := [name for name in named.values() if name not in columns]:
        raise DataError(f"{table.path}: column {absent[0]} is missing; it has {', '.join(columns)}")
    looks, found = Looks(table), FirstSchema(len(table))
    roles = {role: named.get(role) or _usual(columns, role) for role in ROLES}
    binary = [name for name in columns if looks.is_binary(name)]
    if roles["label"] not in binary:
        told = f"0 and 1 alone are in {', '.join(binary)}: name one of them" if binary else "a log needs one of 0 and 1"
        raise DataError(f"{table.path}: no column of clicks was found (label, click and the like); {told}, --label COLUMN")
    for role in ("label", "user_id", "ad_id"):
        found.table[role] = (roles[role], "" if roles[role] else "no column is called so")
    _times(looks, roles["ts"], found)
    if dialect.separator != ",":
        found.table["separator"] = (dialect.separator, "")
    if not dialect.quote:
        found.table["quote"] = ("", "quotes do not pair: they are plain text")
    _more(looks, roles, found)
    _fields(looks, roles, found)
    return found


def _usual(columns: list[str], role: str) -> str:
    by_name = {"_".join(words_of(name)): name for name in reversed(columns)}
    return next((by_name[usual] for usual in ROLES[role] if usual in by_name), "")


def _times(looks: Looks, name: str, found: FirstSchema) -> None:
    ways = looks.times(name) if name else []
    if ways:
        (entries, why), *others = ways
        found.table["ts"] = (name, why + (f"; or {_value(others[0][0])}" if others else ""))
        found.table |= {key: (value, "") for key, value in entries.items() if value != "s"}
    else:
        found.table["ts"] = ("", f"{name} is read as no time: say ts_format" if name else "no column is called so: rows count as in order")


def _more(looks: Looks, roles: Mapping[str, str], found: FirstSchema) -> None:
    """What else the table may have: a split, conversions, histories, propensities, and words for nobody and nothing."""
    for name, texts in looks.texts.items():
        if set(texts.unique()) == set(SPLITS):
            found.table["split"] = (name, "")
        elif "_".join(words_of(name)) in CONVERSIONS and looks.is_binary(name):
            found.table["outcomes"] = ({"conversion": name}, "known afterwards, so no field; --set heads=click-conversion learns it too")
    if roles["history"] and roles["user_id"] and roles["ad_id"]:
        found.table["history"] = (roles["history"], "")
    propensities = looks.numbers(roles["propensity"]) if roles["propensity"] and roles["ad_id"] else None
    if propensities is not None and ((propensities > 0) & (propensities <= 1)).all():
        found.table["propensity"] = (roles["propensity"], "so adrank replay can be asked")
        if "position" in looks.texts and (places := looks.numbers("position")) is not None and (places >= 1).all():
            found.table["position"] = ("position", "")
    users = looks.texts[roles["user_id"]].drop_nulls() if roles["user_id"] else None
    if users is not None and (nobody := users.filter(users.str.contains(NO_ID)).unique().sort().to_list()):
        found.table["nobody"] = (nobody, "zeros: devices that do not tell their id")
    if looks.missing:
        found.table["missing"] = (list(looks.missing), "words that programs write where there is no value")


def _fields(looks: Looks, roles: Mapping[str, str], found: FirstSchema) -> None:
    taken = {roles["label"]}
    for value, _ in found.table.values():
        taken |= {value} if isinstance(value, str) and value else set(value.values()) if isinstance(value, dict) else set()
    for side, role in (("user", "user_id"), ("ad", "ad_id")):
        if roles[role]:
            found.fields[side][role] = ({"kind": "category"}, "the id itself")
    clicks = looks.texts[roles["label"]].str.to_lowercase().is_in(["1", "1.0", "true"])
    renamed = dict[str, str]()
    separators = [looks.separator(roles["history"]) or "|"] if "history" in found.table else []
    for name in looks.texts:
        if name in taken:
            continue
        if reason := looks.useless(name, clicks) if name else "it has no name":
            found.left_out[name] = reason
            continue
        (side, whose), (entries, what) = _side(looks, name, roles), looks.field(name)
        called = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "unnamed"
        while called in found.fields[side] or called in ("user_id", "ad_id"):
            called += "_too"
        found.fields[side][called] = (entries, f"{what}; {whose}")
        renamed |= {f"{side}.{called}": name} if called != name else {}
        separators += [looks.separator(name)] if entries["kind"] == "list" else []
    if separators and separators[0] != "|":
        found.table["list_separator"] = (separators[0], "")
    if renamed:
        found.table["columns"] = (renamed, "")


def _side(looks: Looks, name: str, roles: Mapping[str, str]) -> tuple[str, str]:
    """Whose a column is, and why: the values of one ad or user are alike, or else its name says so."""
    alike = {side: looks.alike(name, roles[role]) if roles[role] else None for side, role in (("ad", "ad_id"), ("user", "user_id"))}
    best = max(alike, key=lambda side: alike[side] or 0.0)
    if (alike[best] or 0.0) >= SAME:
        return best, f"stays with one {best}"
    named = [side for side, words in OWN_WORDS.items() if words & set(words_of(name))]
    if len(named) == 1 and alike[named[0]] is None:
        return named[0], "by its name"
    return "context", "changes from row to row"


def _line(key: str, value: object, reason: str) -> str:
    return f"{_key(key)} = {_value(value)}" + (f"  # {reason}" if reason else "")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)
