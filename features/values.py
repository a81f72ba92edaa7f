"""A value to the text that is looked up: one rule, whether it comes from a cell of a log, a request, an event or the store.

- Text stays as it is written, every character of it, but for two spellings that programs give to something else: a whole number with
  decimals that are all 0 (`25.0`, as pandas writes a column with gaps) is that number, and `True` or `FALSE` is `true` or `false`.
- A whole number is its digits, all of them, whatever its type: 25, 25.0 and Decimal("25.00") are `25`.
- A fraction is the shortest decimals that are it: 0.1 is `0.1`. A true or false is `true` or `false`; 1 is another value.
- A date or time is ISO 8601.
- Empty text, None and NaN are missing.

What has no one text is refused: a float so large that whole numbers beside it are the same float, and a fraction in 32 bits, which is
other decimals in 64.
"""

import re
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from math import isfinite, isnan
from typing import Any

import numpy as np

WHOLE = r"-?(?:0|[1-9][0-9]*)\.0+"
"""A whole number that is written with decimals, as a regular expression that polars reads too."""
SPELLINGS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
_WHOLE = re.compile(WHOLE)


class ValueTextError(ValueError):
    """A value has no one text; the message says why."""


def plain(text: str) -> str:
    """The text that a text is looked up by."""
    if ".0" in text and _WHOLE.fullmatch(text):
        whole = text.partition(".")[0]
        return "0" if whole == "-0" else whole
    return SPELLINGS.get(text, text)


def plain_all(texts: Sequence[str]) -> Sequence[str]:
    """Each as `plain` gives it; the same object where that is what they are already, which is told without a look at each."""
    if SPELLINGS.keys().isdisjoint(texts) and ".0" not in "\n".join(texts):
        return texts
    return [plain(text) for text in texts]


def text_of(value: object) -> str | None:
    """The text that a value is looked up by, None where it is missing.

    Raises:
        ValueTextError: it has none, or not one only.
    """
    if isinstance(value, str):
        return plain(value) or None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return _float(value)
    if isinstance(value, Decimal):
        return _decimal(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if value is None:
        return None
    raise ValueTextError("expected a text, a whole number, or true or false")


def _float(value: "float | np.floating[Any]") -> str | None:
    number = float(value)
    if isnan(number):
        return None
    digits = 1 + np.finfo(type(value)).nmant if isinstance(value, np.floating) else 53
    if not abs(number) < 2**digits:
        what = "is not finite" if not isfinite(number) else f"is 2**{digits} or more, where a float no longer tells whole numbers apart"
        raise ValueTextError(f"expected text or whole numbers; this float {what}")
    if number.is_integer():
        return str(int(number))
    text = repr(number)
    if digits < 53 and float(np.format_float_scientific(value)) != number:
        raise ValueTextError(f"expected text or whole numbers; this fraction in few bits is {text} elsewhere")
    return text


def _decimal(value: Decimal) -> str | None:
    if not value.is_finite():
        if value.is_nan():
            return None
        raise ValueTextError("expected text or whole numbers; this one is not finite")
    if abs(value.adjusted()) > 100:
        raise ValueTextError("expected text or whole numbers; this one has more than 100 digits")
    digits = format(value, "f")
    shortest = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if shortest == "-0" else shortest
