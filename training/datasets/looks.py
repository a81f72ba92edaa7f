"""What the columns of an unknown table look like: numbers or names, lists, whose they are. `first_schema.py` makes a schema of it."""

import re

import polars as pl
from sklearn.metrics import roc_auc_score

from .plausible import USUAL
from .source import Table
from .times import COMPACT, UNITS, from_formats, from_iso, from_numbers, plausible

FEW = 50
"""Whole numbers that are no more than so many are names of something."""
SAME, TELLS, OWN = 0.8, 0.99, 0.95
CODES = {
    "id",
    "code",
    "zip",
    "city",
    "region",
    "country",
    "category",
    "cat",
    "brand",
    "type",
    "hash",
    "site",
    "app",
    "device",
    "model",
    "os",
}
"""Whole numbers in columns so called are names of something, however many."""
SEPARATORS = ("|", ";", ",", " ")
SPOKEN = ("%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M:%S", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p", "%d.%m.%Y %H:%M:%S", "%d/%m/%Y %H:%M:%S")
Entries = dict[str, object]


def words_of(name: str) -> list[str]:
    """The words of a column's name, in small letters: `userId` and `user-id` have two."""
    return [word for word in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if word]


class Looks:
    """The columns of some rows as texts, without the words that programs write where there is no value."""

    def __init__(self, table: Table) -> None:
        self.missing = dict[str, None]()
        """Those words, as they were found."""
        self.dtypes = table.frame.schema
        self.texts = {name: self._texts(table.column(name)) for name in table.frame.columns}

    def _texts(self, column: pl.Series) -> pl.Series:
        if isinstance(column.dtype, pl.List | pl.Array):
            column = column.cast(pl.List(pl.String)).list.join("|")
        texts = column.cast(pl.String, strict=False)
        usual = texts.filter(texts.is_in(USUAL)).value_counts(sort=True)
        words = [word for word, count in usual.rows() if count > 1 and word != "-"]
        self.missing |= dict.fromkeys(words)
        return texts.set(texts.is_in(words), None) if words else texts

    def numbers(self, name: str) -> pl.Series | None:
        """A column as numbers, None where some text is none."""
        texts = self.texts[name]
        numbers = texts.cast(pl.Float64, strict=False)
        return numbers if numbers.null_count() == texts.null_count() < len(numbers) else None

    def is_binary(self, name: str) -> bool:
        """Whether a column holds 0 and 1, or false and true."""
        found = set(self.texts[name].str.to_lowercase().unique())
        return bool(found) and (found <= {"0", "1"} or found <= {"false", "true"} or found <= {"0.0", "1.0"})

    def alike(self, name: str, key: str) -> float | None:
        """How much more alike two rows of one `key` are in a column than any two: 1 is always, 0 no more; None: too few to say."""
        frame = pl.DataFrame({"value": self.texts[name], "key": self.texts[key]}).drop_nulls("key")

        def pairs(*by: str) -> int:
            counts = frame.group_by(by).len()["len"].cast(pl.Int64)
            return int((counts * (counts - 1)).sum())

        every, of_one_key = len(frame) * (len(frame) - 1), pairs("key")
        by_chance = pairs("value") / every if every else 1.0
        if of_one_key < FEW or by_chance == 1:
            return None
        return (pairs("key", "value") / of_one_key - by_chance) / (1 - by_chance)

    def useless(self, name: str, labels: pl.Series) -> str:
        """Why a column is no field, "" where it may be one; `labels` are the clicks."""
        texts, numbers = self.texts[name], self.numbers(name)
        distinct = texts.drop_nulls().n_unique()
        if distinct <= 1:
            return "it has no value, or one and no other"
        if len(texts) >= FEW and distinct > OWN * len(texts) and not _fractions(numbers) and not self.separator(name):
            return "nearly every row has a value of its own, of which nothing is learned"
        if labels.n_unique() == 2 and (numbers is not None or distinct == 2):
            ranks = numbers if numbers is not None else texts.rank("dense").cast(pl.Float64)
            auc = float(roc_auc_score(labels.to_numpy(), ranks.fill_null(-1.0).to_numpy()))
            if max(auc, 1 - auc) > TELLS:
                return f"it tells clicks by itself (AUC {max(auc, 1 - auc):.3f}), as what is known only afterwards does"
        return ""

    def field(self, name: str) -> tuple[Entries, str]:
        """The entries of a field, and why."""
        texts, numbers = self.texts[name].drop_nulls(), self.numbers(name)
        distinct, separator = texts.n_unique(), self.separator(name)
        if separator:
            lengths = texts.str.count_matches(separator, literal=True) + 1
            if getattr(self.dtypes[name], "inner", pl.String()).is_float() and lengths.n_unique() == 1 and lengths[0] > 1:
                return {"kind": "vector", "length": int(lengths[0])}, "so many numbers each"
            most = int(lengths.quantile(0.95, "higher") or 1)
            return {"kind": "list", "length": most}, f"lists, most of at most {most}"
        if numbers is None or (not _fractions(numbers) and (distinct <= FEW or set(words_of(name)) & CODES)):
            return {"kind": "category"}, f"{distinct:,} values"
        low, middle, high = (float(numbers.drop_nulls().quantile(at) or 0.0) for at in (0, 0.5, 1))
        transform = "log" if low >= 0 and high > 20 * max(middle, 0.05) else "standard"
        return {"kind": "number", "transform": transform}, f"{low:g} to {high:g}, in the middle {middle:g}"

    def separator(self, name: str) -> str:
        """What separates the elements of texts that are lists, "" where they are none: pieces are fewer than texts."""
        if isinstance(self.dtypes[name], pl.List | pl.Array):
            return "|"
        texts = self.texts[name].drop_nulls()
        for separator in SEPARATORS:
            pieces = texts.str.split(separator).explode()
            if len(pieces) > 1.1 * len(texts) and pieces.n_unique() < texts.n_unique() and not pieces.str.contains(r"^\s*$").any():
                return separator
        return ""

    def times(self, name: str) -> list[tuple[Entries, str]]:
        """Every way in which all values are times that impressions may have: entries of `[table]`, and what they say."""
        texts = self.texts[name].drop_nulls().unique(maintain_order=True).head(2_000)
        first, last = (second * 1_000_000 for second in plausible())
        ways: list[tuple[Entries, str, pl.Series]] = [({}, "ISO 8601", from_iso(texts))]
        ways += [({"ts_unit": unit}, f"numbers in {unit} since 1970", from_numbers(texts, unit)) for unit in UNITS]
        ways += [({"ts_format": form}, "by how it looks", from_formats(texts, (form,))) for form in (*COMPACT, *SPOKEN)]
        return [(entries, why) for entries, why, found in ways if found.is_between(first, last).fill_null(value=False).all() and len(found)]


def _fractions(numbers: pl.Series | None) -> bool:
    return numbers is not None and bool((numbers.drop_nulls() % 1 != 0).any())
