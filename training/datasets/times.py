"""Times as tables write them, to microseconds since 1970: numbers in a unit, ISO 8601 text, or text in a given format.

Says as well what numbers look like that make no sense in the unit that they are said to be in.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import polars as pl

from .texts import LOST

UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds in each."""
SECOND = 1_000_000
LATEST = 253_402_300_799
"""The last second of the year 9999: a later time is one in another unit."""
ISO_FORMATS = ("%+", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
WIDTHS = {"Y": 4, "y": 2, "m": 2, "d": 2, "H": 2, "I": 2, "M": 2, "S": 2, "j": 3}
COMPACT = (
    *("%Y%m%d", "%y%m%d%H", "%Y%m%d%H", "%y%m%d%H%M", "%Y%m%d%H%M", "%y%m%d%H%M%S", "%Y%m%d%H%M%S", "%Y%m%d%H%M%S%f"),
    *("%y%m%d", "%Y%m", "%d%m%Y", "%m%d%Y"),
)
"""How logs write a time as digits alone."""
NAMES = {"%Y": "yyyy", "%y": "yy", "%m": "mm", "%d": "dd", "%H": "HH", "%M": "MM", "%S": "SS", "%f": "f"}
LOOKED_AT = 2_000
"""Distinct numbers that are looked at for what they look like."""


CUT = "a number with an exponent, or a float in so few bits, has lost digits, and with them minutes or days"


def cut(values: pl.Series) -> pl.Series:
    """Which times are numbers that have lost digits: text with an exponent, and large floats in fewer than 64 bits."""
    if values.dtype == pl.String:
        return values.str.contains(LOST).fill_null(value=False)
    if values.dtype.is_float() and values.dtype != pl.Float64:
        return (values.abs() >= 2 ** (24 if values.dtype == pl.Float32 else 11)).fill_null(value=False)
    return pl.repeat(False, len(values), dtype=pl.Boolean, eager=True)


def plausible() -> tuple[int, int]:
    """The first and the last second that an impression may be from: those of 1990, and of next year."""
    end = datetime(datetime.now(UTC).year + 2, 1, 1, tzinfo=UTC)
    return int(datetime(1990, 1, 1, tzinfo=UTC).timestamp()), int(end.timestamp()) - 1


def wrong_format(form: str) -> str | None:
    """What is wrong with a format of `strptime`, None where nothing is."""
    sample = datetime(2001, 2, 3, 16, 5, 6, tzinfo=UTC)
    try:
        read = datetime.strptime(sample.strftime(form), form)
    except (ValueError, re.error) as error:
        return f"is {form!r}, which cannot be read: {error}; it takes the directives of Python's strptime, such as %Y-%m-%d %H:%M:%S"
    return None if read.year == sample.year else f"is {form!r}, which does not tell the year"


def from_numbers(values: pl.Series, unit: str) -> pl.Series:
    """Microseconds of numbers, or of text that is one; null where it is none, or lies before 1970 or after 9999."""
    nanoseconds = UNITS[unit]
    rough = values.cast(pl.Float64, strict=False)
    fits = (rough >= 0) & (rough <= LATEST * 1e9 / nanoseconds)
    if values.dtype.is_integer() or values.dtype == pl.String:  # every digit of a whole number counts
        whole = values.cast(pl.Int64, strict=False)
        whole = whole * (nanoseconds // 1000) if nanoseconds >= 1000 else whole // (1000 // nanoseconds)
    else:
        whole = pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
    scaled = (rough.zip_with(fits, pl.repeat(None, len(values), dtype=pl.Float64, eager=True)) * (nanoseconds / 1000)).round()
    frame = pl.DataFrame({"fits": fits, "whole": whole, "scaled": scaled.cast(pl.Int64, strict=False)})
    return frame.select(t=pl.when("fits").then(pl.coalesce("whole", "scaled")))["t"]


def from_iso(texts: pl.Series) -> pl.Series:
    """Microseconds of ISO 8601 text, UTC where it names no zone; null where it is none."""
    values = pl.col("t").str.replace(" ", "T", literal=True)
    parsed = [values.str.to_datetime(form, time_unit="us", time_zone="UTC", strict=False) for form in ISO_FORMATS]
    return texts.alias("t").to_frame().select(pl.coalesce(parsed))["t"].dt.epoch("us")


def from_formats(texts: pl.Series, forms: Sequence[str]) -> pl.Series:
    """Microseconds of text in the first of the formats that it has, UTC where that names no zone; null where it has none."""
    distinct = texts.drop_nulls().unique()
    found = [next((at for form in forms if (at := _read(text, form)) is not None), None) for text in distinct]
    return texts.replace_strict(distinct, pl.Series(found, dtype=pl.Int64), default=None, return_dtype=pl.Int64)


def _read(text: str, form: str) -> int | None:
    if not _fits_width(text, form):
        return None
    try:
        at = datetime.strptime(text, form)
    except ValueError:
        return None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def _fits_width(text: str, form: str) -> bool:
    """Whether digits alone are as many as the format has: strptime would take the day 1 and the hour 12 out of 112."""
    directives = re.findall("%(.)", form)
    if "".join(f"%{each}" for each in directives) != form or not set(directives) <= {*WIDTHS, "f"}:
        return True
    width = sum(WIDTHS.get(each, 0) for each in directives)
    return width < len(text) <= width + 6 if "f" in directives else len(text) == width


def looks_like(values: pl.Series, unit: str) -> str | None:
    """What numbers look like that no impression has in `unit`: a sentence with the fix; None where they may be what they are."""
    whole = values.cast(pl.Int64, strict=False) if values.dtype.is_float() else values
    texts = whole.cast(pl.String).drop_nulls().unique(maintain_order=True).head(LOOKED_AT)
    first, last = (second * SECOND for second in plausible())
    if texts.is_empty() or from_numbers(texts, unit).is_between(first, last).any():
        return None
    others = [(f'ts_unit = "{other}"', at) for other in UNITS if (at := _all_between(from_numbers(texts, other), first, last))]
    formats = [
        (f'{_spelt(form)}: ts_format = "{form}"', at) for form in COMPACT if (at := _all_between(from_formats(texts, (form,)), first, last))
    ]
    hints = [f"{fix} ({_moment(at)})" for fix, at in [*others, *formats]]
    return "it looks like " + ", or ".join(hints) if hints else None


def _all_between(instants: pl.Series, first: int, last: int) -> int | None:
    return int(instants[0]) if instants.is_between(first, last).fill_null(value=False).all() else None


def _spelt(form: str) -> str:
    return "".join(NAMES[each] for each in re.findall("%.", form))


def _moment(instant: int) -> str:
    return f"{EPOCH + timedelta(microseconds=instant):%Y-%m-%d %H:%M}"


def span(instants: pl.Series) -> str:
    """The first and the last of some times."""
    known = instants.drop_nulls()
    return f"{_moment(int(known.min()))} to {_moment(int(known.max()))}" if len(known) else "none"  # type: ignore[arg-type]  # of numbers
