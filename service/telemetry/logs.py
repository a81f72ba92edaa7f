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
from types import TracebackType
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

from ..settings import Settings

REQUEST: ContextVar[Mapping[str, Any] | None] = ContextVar("request", default=None)
"""The request that is being answered: its `request_id` and, where it is in a trace, its `trace_id`."""
RESERVED = {*RESERVED_ATTRS, "color_message"}
"""What a record brings that is no field of its own: the latter is Uvicorn's, its message once more."""
NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"}
SYSTEM_ERRORS = (OSError, MemoryError)
"""What these say is the system's word, and holds nothing that a caller sent."""


class PrivateFormatter(logging.Formatter):
    """Leaves out messages of exceptions, if it is `private`; None: of those within a request."""

    private: bool | None

    def formatException(self, ei: Any) -> str:  # noqa: N802  # the library's name
        """See `logging.Formatter`."""
        hidden = REQUEST.get() is not None if self.private is None else self.private
        return "".join(_places(ei[1], set()) if hidden else traceback.format_exception(ei[1])).rstrip()


class TextLines(PrivateFormatter):
    """A line of text; those of an exception follow, indented, so that whatever begins at the margin is a record."""

    def __init__(self, private: bool | None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
        self.private = private

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See `logging.Formatter`."""
        extra = " ".join(f"{name}={value}" for name, value in merge_record_extra(record, {}, RESERVED).items())
        return printable(super().formatMessage(record) + (f" [{extra}]" if extra else ""))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See `logging.Formatter`."""
        return "\n".join(f"    {printable(line)}" for line in super().formatException(ei).splitlines())


class JsonLines(PrivateFormatter, JsonFormatter):
    """A JSON object, in UTC."""

    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self, private: bool | None) -> None:
        fields = ["asctime", "levelname", "name", "process", "message"]
        JsonFormatter.__init__(self, fields, rename_fields=NAMES, reserved_attrs=[*RESERVED])
        self.private, self.converter = private, time.gmtime

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """See `JsonFormatter`."""
        return log_data | {"level": log_data["level"].lower()}


class RequestFilter(logging.Filter):
    """Gives a record the ids of the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        request = REQUEST.get() or {}
        record.__dict__ |= {name: request[name] for name in ("request_id", "trace_id") if name in request}
        return True


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
            record.left_out_before, self._left_out = self._left_out, 0
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
            "filters": {"request": {"()": RequestFilter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request"]}},
            "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        }
    )
    logging.captureWarnings(True)
    sys.excepthook = _ended
    threading.excepthook = lambda failed: _ended(failed.exc_type, failed.exc_value, failed.exc_traceback)


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
