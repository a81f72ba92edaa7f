"""Lines of the log, as text or as JSON: one for each record, with the ids of the request that it belongs to.

Who sends a request can neither forge a line nor, at the default level, be found in one: what an exception says of the values that it
met stays out of records that belong to a request.
"""

import logging
import logging.config
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson

from ..settings import Settings

REQUEST: ContextVar[Mapping[str, Any] | None] = ContextVar("request", default=None)
"""The request that is being answered: its `request_id` and, where it is in a trace, its `trace_id`."""
DETAILS = "details"
"""The key of `extra` under which a record brings fields of its own."""
SYSTEM_ERRORS = (OSError, MemoryError)
"""What these say is the system's word, and holds nothing that a caller sent."""


class TextLines(logging.Formatter):
    """A line of text; those of an exception follow, indented, so that whatever begins at the margin is a record."""

    def __init__(self, private: bool | None) -> None:
        """Whether messages of exceptions stay out; None: of those within a request."""
        super().__init__()
        self._private = private

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        at, facts = self.formatTime(record), _facts(record)
        told = " ".join(f"{name}={value}" for name, value in facts.items())
        line = f"{at} {record.levelname} {record.process} {record.name}: {record.getMessage()}{f' [{told}]' if told else ''}"
        below = "".join(f"\n    {printable(each)}" for each in _exception(record, self._private).splitlines())
        return printable(line) + below


class JsonLines(logging.Formatter):
    """A JSON object, in UTC."""

    def __init__(self, private: bool | None) -> None:
        """As for `TextLines`."""
        super().__init__()
        self._private = private

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_facts(record),
        }
        if exception := _exception(record, self._private):
            fields["exception"] = exception
        try:
            return orjson.dumps(fields, default=str).decode()
        except TypeError:  # a text that is no Unicode
            return orjson.dumps({name: printable(str(value)) for name, value in fields.items()}).decode()


class RateLimitFilter(logging.Filter):
    """Lets so many records pass in so many seconds; the next one that passes tells how many did not."""

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._since, self._passed, self._left_out = float("-inf"), 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        now = time.monotonic()
        if now - self._since >= self._seconds:
            self._since, self._passed = now, 0
        if self._passed >= self._most:
            self._left_out += 1
            return False
        self._passed += 1
        if self._left_out:
            record.left_out, self._left_out = self._left_out, 0
        return True


def start(settings: Settings, private: bool = False) -> None:
    """Log to standard error as the settings say: warnings and what ends the process too.

    `private`: all that the process does is about users, so that what any exception says stays out unless at the level debug.
    """
    lines = JsonLines if settings.log_format == "json" else TextLines
    hidden = False if settings.log_level == "debug" else True if private else None
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"()": lines, "private": hidden}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        }
    )
    logging.captureWarnings(True)
    sys.excepthook = _ended
    threading.excepthook = lambda told: _ended(told.exc_type, told.exc_value, told.exc_traceback)


def where(error: BaseException) -> str:
    """An exception without its message, which may quote what somebody sent: its type, and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


def printable(text: str) -> str:
    """The text with whatever could end a line, or hide in one, escaped."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()


def _ended(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger("adrank").critical("it ended in a way nobody foresaw", exc_info=(kind, error or kind(), trace))


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says besides its message."""
    request, facts = REQUEST.get(), dict[str, Any](getattr(record, DETAILS, {}))
    if request is not None:
        facts |= {name: request[name] for name in ("request_id", "trace_id") if name in request}
    if left_out := getattr(record, "left_out", 0):
        facts["left_out_before"] = left_out
    return facts


def _exception(record: logging.LogRecord, private: bool | None) -> str:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    hidden = REQUEST.get() is not None if private is None else private
    return "".join(_places(error, set()) if hidden else traceback.format_exception(error)).rstrip()


def _places(error: BaseException, seen: set[int]) -> Iterator[str]:
    """As Python prints it, but without what it says, and without the lines of the sources."""
    if id(error) in seen:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _places(before, seen)
        yield "which led to:\n"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f"{frame.filename}:{frame.lineno} in {frame.name}\n"
    message = f": {error}" if isinstance(error, SYSTEM_ERRORS) else " (its message is told at the level debug only)"
    yield f"{type(error).__module__}.{type(error).__qualname__}{message}\n"
    for each in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield "of which one:\n"
        yield from _places(each, seen)
