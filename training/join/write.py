"""Writes a planned part of the log: its rows, the ads that they refer to, conversions that came late, and events that joined nothing."""

from collections import Counter

from features.events import Event
from features.served import unpack_served
from features.state import StateError

from .files import NOTHING, Builder, Columns, Content, conversions, grouped, unjoined
from .log import JoinError, LogWriter, hour_folder, write_parquet
from .plan import DEFERRED, JOINED, UNKNOWN, JoinSettings
from .records import DAMAGED, read_event, revision_key
from .state import NO_ROOM, Held, NoRoomError, State, StatePart
from .summary import Told

Settled = list[tuple[Held, Event | None]]


class PartWriter:
    """Writes parts of one log."""

    def __init__(self, log: LogWriter, state: State, settings: JoinSettings, told: Told) -> None:
        self._folder, self._columns = log.folder, Columns(log.schema)
        self._state, self._settings, self._told = state, settings, told

    def write(self, part: StatePart, now: float) -> None:
        """Write a part's files, the ads before the rows that refer to them, and forget what they hold.

        Raises:
            NoRoomError: the disk is full; the part stays planned.
            JoinError: the log cannot be written.
        """
        settled = [(held, _event(held)) for held in self._state.settled(part)]
        content, rankings = self._content(part, settled)
        try:
            new = self._write(part, content, settled)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise NoRoomError(f"the disk of {self._folder} is full: {error.strerror}") from error
            raise JoinError(f"the log {self._folder} cannot be written: {error}") from error
        self._state.done(part, new, now)
        self._told.written(content, rankings, settled)

    def _content(self, part: StatePart, settled: Settled) -> tuple[Content, Counter[str]]:
        joined = [(held.ranking, event) for held, event in settled if held.outcome == JOINED and event is not None]
        came = grouped((n, event) for n, event in joined if n is not None)
        builder, models = Builder(self._columns), Counter[str]()
        for n, record in self._state.rankings(part):
            served = unpack_served(record)
            models[served.model] += 1
            builder.add(served, came.get(n, NOTHING), len(self._settings.counted(served)))
        return builder.content(), models

    def _write(self, part: StatePart, content: Content, settled: Settled) -> set[tuple[str, bytes]]:
        """Write the files; the revisions of ads that are new."""
        keys = {(ad_id, revision_key(packed)): (ad_id, packed) for ad_id, packed in content.ads}
        new = self._state.new_revisions(keys)
        if new:
            write_parquet(self._folder / "ads", part.number, self._columns.ads(pair for key, pair in keys.items() if key in new))
        if len(content.rows) and part.hour is not None:
            write_parquet(hour_folder(self._folder, part.hour), part.number, content.rows)
        later = [(held, event) for held, event in settled if event is not None and _may_be_later(held, event)]
        if later:
            write_parquet(self._folder / "conversions", part.number, conversions(later, self._settings.conversion_window))
        astray = [(held, event) for held, event in settled if held.outcome not in (JOINED, DEFERRED)]
        if astray:
            rows = ((held.outcome or "", held.stream, held.id, held.packed, event) for held, event in astray)
            write_parquet(self._folder / "unjoined", part.number, unjoined(rows))
        return new


def _may_be_later(held: Held, event: Event) -> bool:
    """Whether a conversion may belong to rows that were written: also to some that are remembered no more."""
    return event.type == "conversion" and held.outcome in (DEFERRED, UNKNOWN)


def _event(held: Held) -> Event | None:
    try:
        return None if held.outcome == DAMAGED else read_event(held.packed)
    except StateError:
        return None
