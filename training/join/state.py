"""What the joiner holds between the streams and the log: a SQLite file in `LOG/.join/`, so that a kill at any moment loses nothing.

A ranking or an event is taken in one transaction, with how far its stream has been read. A file of the log is planned in one
transaction, written, and done in another that forgets what it holds. Knows nothing about Redis or Parquet.
"""

import errno
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from features.errors import AdrankError
from features.streams import Stream

REMEMBERED_SECONDS = 24 * 3600
"""How long what was written is remembered: to tell a late event from one of an unknown ranking, and to find repetitions."""
REMEMBERED_ROWS = 5_000_000
"""The most rankings, events and revisions, each, that are remembered."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_SHMSIZE}
VERSION = 2

TABLES = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE rankings (n INTEGER PRIMARY KEY, id TEXT NOT NULL, request_id TEXT NOT NULL, since REAL NOT NULL, hour INTEGER NOT NULL,
    ads INTEGER NOT NULL, record BLOB NOT NULL, part INTEGER, bytes INTEGER NOT NULL, UNIQUE (request_id, id));
CREATE INDEX rankings_due ON rankings (part, since, hour, ads, bytes);
CREATE TABLE events (n INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, stream TEXT NOT NULL, id TEXT NOT NULL, request_id TEXT NOT NULL,
    taken REAL NOT NULL, packed BLOB NOT NULL, part INTEGER, ranking INTEGER, outcome TEXT);
CREATE INDEX events_request ON events (request_id);
CREATE INDEX events_waiting ON events (part, taken);
CREATE TABLE parts (number INTEGER PRIMARY KEY AUTOINCREMENT, hour INTEGER);
CREATE TABLE written (n INTEGER PRIMARY KEY, id TEXT NOT NULL, request_id TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX written_request ON written (request_id, id);
CREATE INDEX written_at ON written (at);
CREATE TABLE seen (n INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, at REAL NOT NULL);
CREATE INDEX seen_at ON seen (at);
CREATE TABLE revisions (n INTEGER PRIMARY KEY, ad_id TEXT NOT NULL, revision BLOB NOT NULL, at REAL NOT NULL, UNIQUE (ad_id, revision));
CREATE INDEX revisions_at ON revisions (at);
CREATE TABLE streams (name TEXT PRIMARY KEY, last TEXT NOT NULL, taken INTEGER NOT NULL, gone INTEGER NOT NULL);
"""

FROM_VERSION_1 = """
ALTER TABLE rankings ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE rankings SET bytes = length(record);
DROP INDEX IF EXISTS rankings_due;
CREATE INDEX rankings_due ON rankings (part, since, hour, ads, bytes);
PRAGMA user_version = 2;
"""
EVENT_BYTES = 1_000
"""What an event takes in memory beside what was packed."""
SWEPT_BYTES = 8 * 2**20
"""Of the events that no ranking is held for, so many bytes are settled at once."""

NAMING = "FROM rankings m CROSS JOIN events e ON e.request_id = m.request_id WHERE m.part = ?1 AND +e.part IS NULL AND e.outcome IS NULL"
"""Events that name a request id of a part. CROSS and + tell the planner to go from the part's rankings to their events, one by one."""


class HeldError(AdrankError, RuntimeError):
    """The joiner's state cannot be used; the message says why."""


class NoRoomError(AdrankError, RuntimeError):
    """The disk is full: nothing was changed, and it may be tried again when there is room."""


@dataclass(frozen=True, slots=True)
class NewRanking:
    """A served ranking as it was taken; `since` is its window's beginning, `hour` that of its rows, `ads` how many it has."""

    id: str
    request_id: str
    since: float
    ahead: float
    """By how many seconds its clock was ahead of ours."""
    hour: int
    ads: int
    record: bytes


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event as it was taken, or an entry of either stream whose `outcome` is known at once; `key` finds its repetitions."""

    key: bytes
    stream: Stream
    id: str
    request_id: str
    packed: bytes
    outcome: str | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """An event that is held: its number, where it came from, and, once it is settled, the ranking's number and the outcome."""

    n: int
    stream: str
    id: str
    request_id: str
    taken: float
    packed: bytes
    ranking: int | None
    outcome: str | None


@dataclass(frozen=True, slots=True)
class StatePart:
    """Files that are to be written under one number: rows of an hour (since 1970), or only events, where it is None."""

    number: int
    hour: int | None


@dataclass(frozen=True, slots=True)
class Due:
    """Of the rankings of one hour that are due: how many ads they have, how large their records are, and when the oldest began."""

    hour: int
    ads: int
    bytes: int
    oldest: float


class State:
    """The file. Every method that changes it does so in one transaction, and raises NoRoomError where the disk is full."""

    def __init__(self, path: Path, first_part: Callable[[], int]) -> None:
        """Open the file, or make it; a new one numbers its parts from what `first_part` gives.

        Raises:
            HeldError: it cannot be opened, or another version of this program made it.
            NoRoomError: the disk is full.
        """
        try:
            with _room():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(0o600)  # SQLite gives the files beside it the same mode
                self._db = sqlite3.connect(path, isolation_level=None, timeout=5)
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 67108864", "temp_store = MEMORY"):
                    self._db.execute(f"PRAGMA {pragma}")
                if self._one("PRAGMA user_version") == 0:
                    self._create(first_part())
                elif self._one("PRAGMA user_version") == 1:
                    self._change(FROM_VERSION_1)
            version = self._one("PRAGMA user_version")
        except sqlite3.Error as error:
            raise HeldError(f"{path} cannot be used: {error}") from error
        if version != VERSION:
            raise HeldError(f"{path} is of version {version}, this program knows {VERSION}; drain it with the program that made it")

    def _create(self, first_part: int) -> None:
        self._change(TABLES + f"INSERT INTO sqlite_sequence (name, seq) VALUES ('parts', {first_part - 1});")  # noqa: S608  # a number

    def _change(self, statements: str) -> None:
        with self._changing():
            for statement in statements.split(";"):
                self._db.execute(statement)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _one(self, statement: str, *values: object) -> int:
        row = self._db.execute(statement, values).fetchone()
        return int(row[0] or 0) if row else 0

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with _room():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    # What comes in

    def knows(self, stream: Stream) -> bool:
        """Whether the stream has been read before."""
        return bool(self._one("SELECT count(*) FROM streams WHERE name = ?", stream))

    def forget(self, stream: Stream) -> None:
        """The stream is lost: another one of its name is to be begun."""
        with self._changing():
            self._db.execute("DELETE FROM streams WHERE name = ?", (stream,))

    def begin(self, stream: Stream, gone: int) -> None:
        """The stream is a new one, of which `gone` entries had already gone when its group was made."""
        with self._changing():
            self._db.execute("INSERT OR REPLACE INTO streams VALUES (?, '0-0', 0, ?)", (stream, gone))

    def taken(self, stream: Stream) -> str:
        """The last entry that was taken: those up to it are not taken again."""
        row = self._db.execute("SELECT last FROM streams WHERE name = ?", (stream,)).fetchone()
        return str(row[0]) if row else "0-0"

    def take_rankings(self, stream: Stream, last: str, entries: int, rankings: Sequence[NewRanking], broken: Sequence[NewEvent]) -> int:
        """Keep rankings, and entries that are none; `entries` up to `last` are then taken. How many rankings were new."""
        with self._changing():
            new = [r for r in rankings if not self._was_written(r)]
            rows = [(r.id, r.request_id, r.since, r.hour, r.ads, r.record, len(r.record)) for r in new]
            before = self._db.total_changes
            self._db.executemany(
                "INSERT OR IGNORE INTO rankings (id, request_id, since, hour, ads, record, bytes) VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )
            kept = self._db.total_changes - before
            self._keep(broken, 0.0)
            self._advance(stream, last, entries)
        return kept

    def take_events(self, stream: Stream, last: str, entries: int, events: Sequence[NewEvent], now: float) -> list[NewEvent]:
        """Keep events, and say which of them are repetitions; `entries` up to `last` are then taken."""
        with self._changing():
            repeated = self._keep(events, now)
            self._advance(stream, last, entries)
        return repeated

    def _was_written(self, ranking: NewRanking) -> bool:
        return bool(self._one("SELECT count(*) FROM written WHERE request_id = ? AND id = ?", ranking.request_id, ranking.id))

    def _keep(self, events: Iterable[NewEvent], now: float) -> list[NewEvent]:
        repeated = []
        for event in events:
            known = self._one(
                "SELECT EXISTS (SELECT 1 FROM seen WHERE key = ?1) OR EXISTS (SELECT 1 FROM events WHERE key = ?1)", event.key
            )
            if known:
                repeated.append(event)
                continue
            row = (event.key, event.stream, event.id, event.request_id, now, event.packed, event.outcome)
            self._db.execute("INSERT INTO events (key, stream, id, request_id, taken, packed, outcome) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return repeated

    def _advance(self, stream: Stream, last: str, entries: int) -> None:
        self._db.execute("UPDATE streams SET last = ?, taken = taken + ? WHERE name = ?", (last, entries, stream))

    def trimmed(self, stream: Stream, added: int, length: int) -> int:
        """How many more entries have gone from the stream untaken than when this was last asked.

        `added` entries were ever appended and `length` stand in it. Those that were taken and still stand hide as many that have
        gone until they are deleted, so this may tell late but never wrongly.
        """
        row = self._db.execute("SELECT taken, gone FROM streams WHERE name = ?", (stream,)).fetchone()
        more = added - length - row[0] - row[1] if row else 0
        if more > 0:
            with self._changing():
                self._db.execute("UPDATE streams SET gone = gone + ? WHERE name = ?", (more, stream))
        return max(0, more)

    # What goes out

    def parts(self) -> list[StatePart]:
        """The parts that are planned and not done: at most one, unless a write was given up."""
        return [StatePart(*row) for row in self._db.execute("SELECT number, hour FROM parts ORDER BY number")]

    def due(self, until: float) -> list[Due]:
        """The hours of rankings whose window began at `until` or before, the oldest ranking's first."""
        of = "WHERE part IS NULL AND since <= ? GROUP BY hour ORDER BY min(since)"
        statement = f"SELECT hour, sum(ads), sum(bytes), min(since) FROM rankings {of}"  # noqa: S608
        return [Due(*row) for row in self._db.execute(statement, (until,))]

    def oldest(self) -> float | None:
        """When the window of the oldest ranking that is held began; None where none is."""
        (oldest,) = self._db.execute("SELECT min(since) FROM rankings WHERE part IS NULL").fetchone()
        return None if oldest is None else float(oldest)

    def waiting(self) -> tuple[int, int]:
        """How many rankings and events are held."""
        return self._one("SELECT count(*) FROM rankings"), self._one("SELECT count(*) FROM events")

    @contextmanager
    def planning(self, hour: int | None) -> Iterator[StatePart]:
        """Begin a part; what is claimed and settled inside belongs to it, unless the block fails."""
        with self._changing():
            cursor = self._db.execute("INSERT INTO parts (hour) VALUES (?)", (hour,))
            yield StatePart(cursor.lastrowid or 0, hour)

    def claim(self, part: StatePart, until: float, rows: int, size: int) -> None:
        """Give the part the oldest rankings of its hour that are due: the first, and more while they are within both bounds.

        `rows` bounds their ads, `size` the bytes of their records.
        """
        statement = (
            "UPDATE rankings SET part = ?1 WHERE n IN (SELECT n FROM"
            " (SELECT n, row_number() OVER so AS place, sum(ads) OVER so AS ads, sum(bytes) OVER so AS bytes FROM"
            " (SELECT n, since, ads, bytes FROM rankings WHERE part IS NULL AND since <= ?2 AND hour = ?3 ORDER BY since, n LIMIT ?4)"
            " WINDOW so AS (ORDER BY since, n))"
            " WHERE place = 1 OR (ads <= ?4 AND bytes <= ?5))"
        )
        self._db.execute(statement, (part.number, until, part.hour, rows, size))

    def rankings(self, part: StatePart) -> Iterator[tuple[int, bytes]]:
        """Number and record of each ranking of a part, the oldest first; one at a time is in memory."""
        for (n,) in self._db.execute("SELECT n FROM rankings WHERE part = ? ORDER BY since, n", (part.number,)).fetchall():
            yield self._db.execute("SELECT n, record FROM rankings WHERE n = ?", (n,)).fetchone()

    def related(self, part: StatePart) -> Iterator[tuple[int, str, float, bytes, bool]]:
        """The rankings with a request id of the part that an event names: number, request id, `since`, record, whether of the part.

        One at a time is in memory: they are ordered before their records are read.
        """
        named = f"SELECT DISTINCT e.request_id AS named {NAMING}"
        statement = f"SELECT r.n FROM ({named}) CROSS JOIN rankings r ON r.request_id = named ORDER BY r.since, r.n"  # noqa: S608
        numbers = self._db.execute(statement, (part.number,)).fetchall()
        for (n,) in numbers:
            row = self._db.execute("SELECT n, request_id, since, record, part IS ? FROM rankings WHERE n = ?", (part.number, n)).fetchone()
            yield (*row[:4], bool(row[4]))

    def events_of(self, part: StatePart) -> list[Held]:
        """The events that are not settled and name a request id of the part's rankings."""
        return list(self._held(f"n IN (SELECT e.n {NAMING})", part.number))

    def strays(self, until: float) -> list[Held]:
        """The first of the events taken at `until` or before that no ranking is held for, and of entries that are no records.

        All where there are few, and about `SWEPT_BYTES` of them where there are many.
        """
        found, size = list[Held](), 0
        condition = (
            "part IS NULL AND taken <= ? AND (outcome IS NOT NULL OR NOT EXISTS"
            " (SELECT 1 FROM rankings r WHERE r.request_id = events.request_id))"
        )
        for stray in self._held(condition, until):
            found.append(stray)
            size += len(stray.packed) + EVENT_BYTES
            if size >= SWEPT_BYTES:
                break
        return found

    def settled(self, part: StatePart) -> list[Held]:
        """The events of a part."""
        return list(self._held("part = ?", part.number))

    def _held(self, condition: str, value: float) -> Iterator[Held]:
        columns = "n, stream, id, request_id, taken, packed, ranking, outcome"
        for (n,) in self._db.execute(f"SELECT n FROM events WHERE {condition} ORDER BY n", (value,)).fetchall():  # noqa: S608
            yield Held(*self._db.execute(f"SELECT {columns} FROM events WHERE n = ?", (n,)).fetchone())  # noqa: S608

    def was_written(self, request_id: str) -> bool:
        """Whether a ranking of that request id is remembered as written."""
        return bool(self._one("SELECT count(*) FROM written WHERE request_id = ?", request_id))

    def settle(self, part: StatePart, events: Iterable[tuple[int, int | None, str]]) -> None:
        """Give events to the part: number, the ranking's number and outcome of each."""
        rows = [(part.number, ranking, outcome, n) for n, ranking, outcome in events]
        self._db.executemany("UPDATE events SET part = ?, ranking = ?, outcome = ? WHERE n = ?", rows)

    def new_revisions(self, pairs: Iterable[tuple[str, bytes]]) -> set[tuple[str, bytes]]:
        """Those of the (ad id, revision) that are not remembered as written."""
        statement = "SELECT count(*) FROM revisions WHERE ad_id = ? AND revision = ?"
        return {pair for pair in pairs if not self._one(statement, *pair)}

    def done(self, part: StatePart, revisions: Iterable[tuple[str, bytes]], now: float) -> None:
        """The part's files stand: forget what they hold, and remember that it was written."""
        number = part.number
        with self._changing():
            self._db.execute(
                "INSERT INTO written (id, request_id, at) SELECT id, request_id, ? FROM rankings WHERE part = ?", (now, number)
            )
            self._db.execute("INSERT OR IGNORE INTO seen (key, at) SELECT key, ? FROM events WHERE part = ?", (now, number))
            rows = [(ad_id, revision, now) for ad_id, revision in revisions]
            self._db.executemany("INSERT OR IGNORE INTO revisions (ad_id, revision, at) VALUES (?, ?, ?)", rows)
            for table in ("rankings", "events"):
                self._db.execute(f"DELETE FROM {table} WHERE part = ?", (number,))  # noqa: S608
            self._db.execute("DELETE FROM parts WHERE number = ?", (number,))
            for table in ("written", "seen", "revisions"):
                # A clock that was set back leaves times ahead of it; the number of rows bounds them all the same.
                old = f"at < ? OR n <= (SELECT max(n) FROM {table}) - ?"  # noqa: S608
                self._db.execute(f"DELETE FROM {table} WHERE {old}", (now - REMEMBERED_SECONDS, REMEMBERED_ROWS))  # noqa: S608


@contextmanager
def _room() -> Iterator[None]:
    """Tell a full disk from what cannot be mended by waiting."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in FULL:
            raise NoRoomError(f"the disk is full: {error}") from error
        raise HeldError(f"the joiner's state cannot be written: {error}") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            raise NoRoomError(f"the disk is full: {error}") from error
        raise
