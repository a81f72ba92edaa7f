"""The joiner: rankings and events from the streams, held for the attribution window, then written to the log, each once.

An entry is taken into the state and only then acknowledged; a file is planned in the state, written, and only then forgotten
there. So whatever stops the joiner, the next one goes on, and nothing that was acknowledged is lost or written twice.
"""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable

from features.state import StateError as RecordError
from features.state import StoreError
from features.streams import EVENTS, SERVED, STREAMS, TOO_OLD, WRONG_TYPE, Batch, Entry, Owner, Stream, StreamLostError, Streams

from .clock import Clock
from .log import JoinError, LogWriter, only_joiner
from .plan import JoinSettings, plan, sweep
from .quality import Windows
from .records import DAMAGED, damaged, new_event, new_ranking
from .state import NewEvent, NewRanking, NoRoomError, State, StatePart
from .summary import JoinWatch, Told, held
from .write import PartWriter

READ = 500
"""Entries of a read, of `BATCH_BYTES` at most: what is in memory and in one transaction at once."""
LEASE_SECONDS = 30
"""How long after its last word a joiner is thought to be at work, so that no other log takes its streams."""
IDLE_SECONDS = 0.2
LOOK_SECONDS = 5.0
"""How often the streams' extents are asked for."""
TELL_SECONDS = 60.0
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
TRIMMED, STREAM_LOST, CLOCK_JUMPED, DISK_FULL, UNREACHABLE = "trimmed", "stream_lost", "clock_jumped", "disk_full", "unreachable"
OTHER_LOG = "other_log"
DUPLICATE = "duplicate"

log = logging.getLogger(__name__)


async def join_log(
    streams: Callable[[], Streams],
    into: LogWriter,
    settings: JoinSettings,
    watch: JoinWatch,
    once: str | None = None,
    take_over: bool = False,
) -> str:
    """Join until SIGTERM or SIGINT, or `once`: what is `due`, or `everything`. What was done, and what is held, in a line.

    Raises:
        JoinError: the log has a joiner or cannot be written, or another log's joiner is at work on the streams, unless to `take_over`.
        HeldError: its state cannot be used.
        NoRoomError, StoreError: the disk is full, or Redis does not answer, at the start or where it is done once.
    """
    with only_joiner(into.folder):
        reader = streams()
        joiner = Joiner(reader, into, settings, watch)
        joiner.take_over = take_over
        for ending in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(ending, joiner.stop)
        log.info(
            "joining into %s: windows %g s of clicks, %g s of conversions, lateness %g s, shown as %s; %s",
            into.folder,
            settings.click_window,
            settings.conversion_window,
            settings.lateness,
            settings.shown,
            joiner.held(),
        )
        try:
            await (joiner.drain(once == "everything") if once else joiner.run())
            return f"{joiner.summary()}; {joiner.held()}"
        finally:
            joiner.close()
            await reader.close()


class Joiner:
    """Reads, holds, joins and writes until it is stopped."""

    def __init__(self, streams: Streams, log_: LogWriter, settings: JoinSettings, watch: JoinWatch, clock: Clock | None = None) -> None:
        """The lock of the log is to be held.

        Raises:
            HeldError: the log's state cannot be used.
            NoRoomError: the disk is full.
        """
        self._streams, self._log, self._settings = streams, log_, settings
        self._clock = clock or Clock()
        self._state = State(log_.state, log_.first_part)
        self._told = Told(watch, Windows(log_.models))
        self._writer = PartWriter(log_, self._state, settings, self._told)
        self.take_over = False
        """Whether to take the streams from another log whose joiner is at work."""
        self._owned = -math.inf
        self._read_to: dict[Stream, float] = dict.fromkeys(STREAMS, -math.inf)
        """By stream, up to when it has been read."""
        self._drained: set[Stream] = set()
        """The streams that had no more to read at some time."""
        self._swept = self._looked = self._logged = -math.inf
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End soon, between two steps."""
        self._stop.set()

    async def run(self) -> None:
        """Join until `stop` is called, whatever Redis and the disk do."""
        await self._keep_trying(self._redo)
        while not self._stop.is_set():
            busy = await self._keep_trying(self._step)
            self._tell()
            if not busy:
                await self._rest(IDLE_SECONDS)
        await self._let_go()

    async def drain(self, everything: bool) -> None:
        """Take what the streams have now, write what is due, or everything, and return.

        Raises:
            StoreError: Redis does not answer.
            NoRoomError: the disk is full.
        """
        await self._own()
        await self._redo()
        self._drained.clear()
        while not self._stop.is_set() and len(self._drained) < len(STREAMS):
            await self._take_both()
        await self._look()
        while not self._stop.is_set() and (part := self._plan(True, everything)) is not None:
            self._write(part)
        await self._let_go()

    def close(self) -> None:
        """Let go of the state."""
        self._state.close()

    async def _step(self) -> bool:
        """Take what has come and write a part, if one is due; whether there was anything to do."""
        self._watch_clock()
        await self._own()
        busy = await self._take_both()
        if self._clock.now() - self._looked >= LOOK_SECONDS:
            await self._look()
        part = self._plan(False, False)
        if part is not None:
            self._write(part)
        return busy or part is not None

    async def _own(self) -> None:
        """Say now and then that the streams are joined into this log.

        Raises:
            JoinError: they are joined into another one, whose joiner is at work.
        """
        now = time.monotonic()
        if now - self._owned < LOOK_SECONDS:
            return
        other = await self._streams.own(self._owner(LEASE_SECONDS), self.take_over)
        if other is not None and other.seconds and not self.take_over:
            raise JoinError(
                f"the streams are joined into another log, {other.place}, whose joiner was at work {LEASE_SECONDS - other.seconds} s ago; "
                f"two logs would each lack what the other takes: stop that one and wait {LEASE_SECONDS} s, or say --take-over"
            )
        if other is not None:
            self._told.incident(OTHER_LOG)
            log.warning(
                "the streams were joined into another log before, %s: what it holds and has not written is not in this one", other.place
            )
        self._owned, self.take_over = now, False

    async def _let_go(self) -> None:
        """Say that this log's joiner is at work no more."""
        with contextlib.suppress(StoreError):
            await self._streams.own(self._owner(0))

    def _owner(self, seconds: int) -> Owner:
        return Owner(self._log.id, self._log.place, seconds)

    async def _take_both(self) -> bool:
        return any([await self._take(stream) for stream in STREAMS])

    async def _keep_trying(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """Do a step until it succeeds or the joiner is stopped: a full disk and a Redis that is away are waited for.

        Raises:
            StoreError: what it is about is not mended by waiting.
            JoinError: as the step does.
        """
        tries = 0
        while not self._stop.is_set():
            try:
                busy = await step()
            except (StoreError, NoRoomError) as error:
                if isinstance(error, StoreError) and error.reason in (TOO_OLD, WRONG_TYPE):
                    raise  # waiting mends neither
                self._told.incident(DISK_FULL if isinstance(error, NoRoomError) else UNREACHABLE)
                if not tries:
                    log.warning("waiting: %s", error)
                await self._rest(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1
            else:
                if tries:
                    log.info("going on")
                return busy
        return False

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    # Taking

    async def _take(self, stream: Stream) -> int:
        """Take a batch: into the state, then out of the stream. How many entries there were."""
        if not self._state.knows(stream):
            await self._begin(stream)
        began = self._clock.now()
        try:
            batch = await self._streams.read(stream, READ)
        except StreamLostError as error:
            await self._lost(stream, error)
            return 0
        last = self._state.taken(stream)
        fresh = [entry for entry in batch.entries if entry.value is not None and _order(entry.id) > _order(last)]
        if fresh:
            try:
                self._keep(stream, fresh, began)
            except NoRoomError:
                self._streams.rewind(stream)
                raise
        await self._streams.acknowledge(stream, [entry.id for entry in batch.entries])
        self._read_to[stream] = began if batch.drained else self._reached(stream, batch, began)
        if batch.drained:
            self._drained.add(stream)
        return len(batch.entries)

    async def _begin(self, stream: Stream) -> None:
        await self._streams.begin(stream)
        extent = await self._streams.extent(stream)
        self._state.begin(stream, extent.added - extent.length)

    async def _lost(self, stream: Stream, error: Exception) -> None:
        log.warning("%s: Redis has been emptied, and entries that were not yet taken are lost", error)
        self._state.forget(stream)
        self._told.incident(STREAM_LOST)
        await self._begin(stream)

    def _reached(self, stream: Stream, batch: Batch, began: float) -> float:
        """A stream with more to read has been read up to its last entry, by the clock of Redis but never beyond ours."""
        return max(self._read_to[stream], min(began, batch.entries[-1].ts)) if batch.entries else self._read_to[stream]

    def _keep(self, stream: Stream, entries: list[Entry], now: float) -> None:
        rankings: list[NewRanking] = []
        events: list[NewEvent] = []
        types: dict[bytes, str] = {}
        for entry in entries:
            try:
                if stream == SERVED:
                    rankings.append(new_ranking(entry, now))
                else:
                    type_, event = new_event(stream, entry)
                    events.append(event)
                    types[event.key] = type_
            except RecordError:
                events.append(damaged(stream, entry))
        last, count = entries[-1].id, len(entries)
        if stream == SERVED:
            self._state.take_rankings(stream, last, count, rankings, events)
            if early := sum(ranking.ahead > self._settings.lateness for ranking in rankings):
                self._told.incident(CLOCK_JUMPED, early)
            return
        for repeated in self._state.take_events(stream, last, count, events, now):
            self._told.event(types.get(repeated.key, DAMAGED), DUPLICATE)

    # Writing

    def _plan(self, now: bool, everything: bool) -> StatePart | None:
        """The next part: one that is planned and could not be written, or one of rows whose window is over, or of stray events.

        Of the latter there are to be many, or they have waited for long, or any will do if `now`. An event that came within its
        window and lateness has been read once the events have been read so far.
        """
        if unwritten := self._state.parts():
            return unwritten[0]
        closed, settled = self._read_to[EVENTS] - self._settings.closes, min(self._read_to.values())
        if everything:
            closed = settled = math.inf
        part = plan(self._state, self._settings, closed - self._settings.lateness, now)
        if part is None and (now or self._clock.now() - self._swept >= self._settings.hold):
            part = sweep(self._state, settled - self._settings.lateness)
            self._swept = self._clock.now()
        return part

    async def _redo(self) -> bool:
        """Write the parts that a joiner which was killed has planned."""
        for part in self._state.parts():
            self._write(part)
        return False

    def _write(self, part: StatePart) -> None:
        self._writer.write(part, self._clock.now())

    # Telling

    def _watch_clock(self) -> None:
        if jump := self._clock.jumped():
            self._told.incident(CLOCK_JUMPED)
            log.warning(
                "the clock jumped by %+.0f s; no window closes early for it. If the new time is right, start the joiner again", jump
            )

    async def _look(self) -> None:
        """See how long the streams are, and whether somebody has trimmed them."""
        self._looked = self._clock.now()
        for stream in STREAMS:
            try:
                extent = await self._streams.extent(stream)
            except StreamLostError:
                continue  # the next read finds out
            self._told.watch.stream(stream, extent.length, 0.0 if extent.oldest is None else max(0.0, self._looked - extent.oldest))
            if gone := self._state.trimmed(stream, extent.added, extent.length):
                self._told.incident(TRIMMED, gone)
                log.warning("%d entries of %s were trimmed before they were read; they are lost", gone, stream)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._logged >= TELL_SECONDS:
            self._logged = now
            log.info("%s; %s", self.summary(), self.held())
            if untrained := self._told.untrained():
                log.warning("%s", untrained.removeprefix("; "))

    def summary(self) -> str:
        """What has happened since the start, in a line."""
        return self._told.summary()

    def held(self) -> str:
        """What is held, and until when, in a line."""
        return held(*self._state.waiting(), self._state.oldest(), self._settings)


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
