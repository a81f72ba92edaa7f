"""The sink: what stands in the streams, written to raw files as it came. Several share the work, each at any moment to be killed.

An entry is acknowledged once a file that holds it stands in the log. So a kill may repeat an entry, which whoever reads the log drops,
and never loses one: what a sink held that ended is claimed by another, or by the next, after a while.
"""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import polars as pl

from features.state import StoreError
from features.streams import SERVED, STREAMS, TOO_OLD, WRONG_TYPE, Entry, Owner, Stream, StreamLostError, Streams

from .attribution import ASIDE, IMPRESSIONS, RAW, SETTINGS, WATERMARK, Attribution, hour_name, settings_text
from .attribution import EVENTS as RAW_EVENTS
from .figures import Figures
from .live import Live
from .log import OWN, JoinError, LogFolder, NoRoomError, room, write_file, write_parquet
from .raw import ASIDE_TYPES, HOUR, LogColumns, RawBatch, events_of, impressions_of, revision
from .summary import JoinSummary, JoinWatch

READ = 500
"""Entries of a read, of `BATCH_BYTES` at most."""
LEASE_SECONDS = 30
"""How long after its last word a sink is thought to be at work, so that no other log takes its streams."""
IDLE_SECONDS = 0.2
LOOK_SECONDS = 5.0
"""How often the streams' extents are asked for."""
HOLD_SECONDS, LIVE_SECONDS, TELL_SECONDS = 30.0, 60.0, 60.0
CLAIM_HOLDS, LEAST_CLAIM_SECONDS = 4, 2.0
REMEMBERED = 1_000_000
"""Revisions of ads that are known to be written: at most so many, and of one day."""
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
STREAM_LOST, TRIMMED, DISK_FULL, UNREACHABLE, OTHER_LOG = "stream_lost", "trimmed", "disk_full", "unreachable", "other_log"
NOT_FORWARDED = "not_forwarded"
Forward = Callable[[Sequence[Entry]], Awaitable[int]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """How to write."""

    attribution: Attribution = field(default_factory=Attribution)
    """What readers of the log take, unless they say otherwise, and live figures."""
    rows_per_file: int = 100_000
    """Entries that are held at once, at most."""
    bytes_per_file: int = 32 * 2**20
    """The same in bytes: what is in memory at once, several times over."""

    @property
    def hold(self) -> float:
        """How many seconds entries wait for more, so that a quiet log is not made of tiny files."""
        return min(HOLD_SECONDS, self.attribution.closes)

    @property
    def claim(self) -> float:
        """After how many seconds what another sink holds is thought to be abandoned."""
        return max(LEAST_CLAIM_SECONDS, CLAIM_HOLDS * self.hold)


async def join_log(
    streams: Callable[[], Streams],
    into: LogFolder,
    settings: SinkSettings,
    watch: JoinWatch,
    once: str | None = None,
    take_over: bool = False,
    forward: Forward | None = None,
) -> str:
    """Write until SIGTERM or SIGINT, or `once`: what is `due`, or `everything`. What was done, in a line.

    Raises:
        JoinError: the log cannot be written, or another log's sink is at work on the streams, unless to `take_over`.
        NoRoomError, StoreError: the disk is full, or Redis does not answer, where it is done once.
    """
    reader = streams()
    sink = Sink(reader, into, settings, watch)
    sink.take_over, sink.forward = take_over, forward
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, sink.stop)
    with room(into.folder):
        write_file(into.folder / SETTINGS, settings_text(settings.attribution), into.folder / OWN)
    log.info("joining into %s: %s", into.folder, settings.attribution)
    try:
        await (sink.drain(once == "everything") if once else sink.run())
        return sink.summary()
    finally:
        sink.close()
        await reader.close()


class Sink:
    """Reads and writes until it is stopped."""

    def __init__(self, streams: Streams, into: LogFolder, settings: SinkSettings, watch: JoinWatch) -> None:
        self._streams, self._log, self._settings = streams, into, settings
        self._columns = LogColumns(into.schema)
        self._summary = JoinSummary(watch, into.models)
        self._live, self._figures = Live(into, settings.attribution, self._summary), Figures(streams, self._summary)
        self.take_over = False
        """Whether to take the streams from another log whose sink is at work."""
        self.forward: Forward | None = None
        """Who is to have rankings too, before they are acknowledged; how many it will never take."""
        self._held: dict[Stream, list[Entry]] = {stream: [] for stream in STREAMS}
        self._size, self._begun, self._drained = 0, set[Stream](), set[Stream]()
        self._unacknowledged: dict[Stream, list[str]] = {stream: [] for stream in STREAMS}
        self._ads: tuple[int, set[tuple[str, int]]] = (0, set())
        """The day since 1970, and the revisions of ads that were written in it."""
        self._owned = self._looked = self._claimed = self._measured = self._summed = -math.inf
        self._since = math.inf
        """Since when something is held."""
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End soon, between two steps."""
        self._stop.set()

    async def run(self) -> None:
        """Write until `stop` is called, whatever Redis and the disk do; what is held then too, if that can be done at once."""
        while not self._stop.is_set():
            if not await self._keep_trying(self._step):
                await self._rest(IDLE_SECONDS)
        with contextlib.suppress(StoreError, NoRoomError):
            await self._flush()
            await self._let_go()

    async def drain(self, everything: bool) -> None:
        """Write what the streams have now, and return. `everything`: also what other sinks hold, and let all impressions be closed.

        Raises:
            StoreError: Redis does not answer.
            NoRoomError: the disk is full.
        """
        await self._own()
        self._drained.clear()
        while len(self._drained) < len(STREAMS) and not self._stop.is_set():
            await self._take()
        await self._flush()
        until = time.monotonic() + 2 * self._settings.claim  # others that live may always hold some
        while everything and any([await self._streams.pending(stream) for stream in STREAMS]):
            self._claimed, waited = -math.inf, time.monotonic() >= until
            took = await self._take()
            await self._flush()
            if waited or self._stop.is_set():  # what had been abandoned was to be had by now
                break
            await self._rest(0 if took else IDLE_SECONDS)
        await self._look(math.inf if everything else None)
        await self._measure()
        await self._let_go()

    def close(self) -> None:
        """Let another sink tell the live figures."""
        self._live.close()

    def summary(self) -> str:
        """What has happened since the start, in a line."""
        return self._summary.summary()

    async def _step(self) -> bool:
        """Take what has come, write it if it is due, and look about; whether there was anything to do."""
        await self._own()
        busy, now = await self._take(), time.monotonic()
        if now - self._since >= self._settings.hold:
            await self._flush()
        if now - self._looked >= min(LOOK_SECONDS, self._settings.hold):
            await self._look()
        if now - self._measured >= min(LIVE_SECONDS, self._settings.attribution.closes):
            await self._measure()
            self._measured = time.monotonic()
        self._tell()
        return busy

    async def _keep_trying(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """Do a step until it succeeds or the sink is stopped: a full disk and a Redis that is away are waited for.

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
                self._summary.incident(DISK_FULL if isinstance(error, NoRoomError) else UNREACHABLE)
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

    # Whose streams they are

    async def _own(self) -> None:
        """Say now and then that the streams are written into this log.

        Raises:
            JoinError: they are written into another one, whose sink is at work.
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
            self._summary.incident(OTHER_LOG)
            log.warning("the streams were joined into another log before, %s: what that one has is not in this one", other.place)
        self._owned, self.take_over = now, False

    async def _let_go(self) -> None:
        """Say that this log's sink is at work no more; where there are others they say within seconds that they are."""
        with contextlib.suppress(StoreError):
            await self._streams.own(self._owner(0))

    def _owner(self, seconds: int) -> Owner:
        return Owner(self._log.id, self._log.place, seconds)

    # Taking and writing

    async def _take(self) -> bool:
        """Hold a batch more of each stream, and what others have abandoned; whether there was any. What is full is written first."""
        claiming = time.monotonic() - self._claimed >= self._settings.claim / 2
        took = False
        for stream in STREAMS:
            if self._size >= self._settings.bytes_per_file or sum(map(len, self._held.values())) >= self._settings.rows_per_file:
                await self._flush()
            took |= await self._take_from(stream, claiming)
        if claiming:
            self._claimed = time.monotonic()
        return took

    async def _take_from(self, stream: Stream, claiming: bool) -> bool:
        try:
            if stream not in self._begun:
                await self._streams.begin(stream)
                self._begun.add(stream)
            batch = await self._streams.read(stream, READ)
            entries = list(batch.entries)
            if batch.drained:
                self._drained.add(stream)
            if claiming:
                mine = {entry.id for entry in (*self._held[stream], *entries)}
                entries += [each for each in await self._streams.claim(stream, READ, self._settings.claim) if each.id not in mine]
        except StreamLostError as error:
            log.warning("%s: Redis has been emptied, and entries that were not yet written are lost", error)
            self._summary.incident(STREAM_LOST)
            self._begun.discard(stream)
            return False
        if entries:
            self._since = min(self._since, time.monotonic())
        self._held[stream] += entries
        self._size += sum(len(entry.value) for entry in entries)
        return bool(entries)

    async def _flush(self) -> None:
        """Write what is held, and then acknowledge it.

        Raises:
            NoRoomError, StoreError: the disk is full, or who is to have it too does not take it; what is not written is held on.
        """
        for stream, entries in self._held.items():
            if entries:
                with room(self._log.folder):
                    batch = self._write(stream, entries)
                if self.forward and stream == SERVED and (left := await self.forward(entries)):
                    self._summary.incident(NOT_FORWARDED, left)
                self._summary.written(batch)
                self._held[stream] = []
                self._size -= sum(len(entry.value) for entry in entries)
                self._unacknowledged[stream] += [entry.id for entry in entries]
            if ids := self._unacknowledged[stream]:
                with contextlib.suppress(StreamLostError):  # which the next read tells
                    await self._streams.acknowledge(stream, ids)
                ids.clear()
        self._since = math.inf

    def _write(self, stream: Stream, entries: list[Entry]) -> RawBatch:
        """Write a batch under a name that is the same if it is tried again: the ads before the rows that refer to them."""
        batch = impressions_of(entries, stream, self._columns) if stream == SERVED else events_of(entries, stream)
        folder, file = self._log.folder, f"{entries[0].id}-{self._streams.consumer}.parquet"
        kind = IMPRESSIONS if stream == SERVED else RAW_EVENTS
        if new := self._new_ads(batch):
            write_parquet(folder, folder / "ads" / file, self._columns.ads(new.values()))
        for hour, frame in batch.frames.items():
            write_parquet(folder, folder / RAW / kind / hour_name(hour, "date") / file, frame)
        if batch.aside:
            write_parquet(folder, folder / RAW / ASIDE / f"{kind}-{file}", pl.DataFrame(batch.aside, ASIDE_TYPES, orient="row"))
        self._ads[1].update(new)
        return batch

    def _new_ads(self, batch: RawBatch) -> dict[tuple[str, int], tuple[str, bytes]]:
        """Ads with features that have not been written today, by id and revision."""
        today = int(time.time() // (24 * HOUR))
        if today != self._ads[0] or len(self._ads[1]) > REMEMBERED:
            self._ads = today, set()
        revised = {(ad_id, revision(packed)): (ad_id, packed) for ad_id, packed in sorted(batch.ads)}
        return {key: ad for key, ad in revised.items() if key not in self._ads[1]}

    # Telling

    async def _look(self, watermark: float | None = None) -> None:
        """See how long the streams are, whether somebody has trimmed them, and up to when the log is whole, if that is not given."""
        self._looked, kept = time.monotonic(), list[float]()
        for stream in STREAMS:
            try:
                extent = await self._streams.extent(stream)
            except StreamLostError:
                return  # the next read finds out
            kept.append(extent.kept)
            self._summary.stream(stream, extent.length, 0.0 if extent.oldest is None else max(0.0, extent.now - extent.oldest))
            if extent.trimmed:
                self._summary.incident(TRIMMED, extent.trimmed)
                log.warning("%d entries of %s were trimmed before they were read; they are lost", extent.trimmed, stream)
        with room(self._log.folder):
            whole = min(kept) if watermark is None else watermark
            write_file(self._log.folder / RAW / WATERMARK, str(whole).encode(), self._log.folder / OWN)

    async def _measure(self) -> None:
        if self._live.measure():
            await self._figures.tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._summed >= TELL_SECONDS:
            self._summed = now
            log.info("%s", self.summary())
            if untrained := self._summary.untrained():
                log.warning("%s", untrained.removeprefix("; "))
