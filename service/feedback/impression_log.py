"""The log of what was served: a ranking becomes a record, and waits in a bounded queue until it is written to the store.

A request pays for a place in the queue and no more: its record is made after its answer has gone out, a millisecond's worth at a
time, and is appended by a task of its own. Nothing that goes wrong here reaches a caller; every ranking is counted by what became
of its record. Knows nothing about HTTP or Redis.
"""

import asyncio
import contextlib
import contextvars
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from features.encode import Features
from features.served import ServedRecord, pack_served
from features.state import Store, StoreError, StoreRoom
from features.streams import SERVED

from ..ranking.bids import BID_TYPES, MICRO
from ..ranking.query import Ranking
from ..settings import Settings
from ..telemetry.logs import where
from ..telemetry.metrics import Metrics

LINGER_SECONDS = 0.01
"""How long records wait for others to be written with them."""
SLICE_SECONDS = 0.001
"""How long records are made before other work gets a turn on the event loop."""
UNMADE_ADS = 200_000
"""Candidates and behaviours of the rankings whose records are still to be made: they hold their requests in memory."""
QUEUE_BYTES = 64 * 2**20
BATCH_RECORDS, BATCH_BYTES = 200, 2**20
BACK_OFF_SECONDS = (0.1, 2.0)
FLUSH_SECONDS = 1.0
LOOK_SECONDS = 1.0
"""How often the store is asked what the log takes of its memory; what this process appends meanwhile is added."""
BACKLOG, MEMORY = "dropped_backlog", "dropped_memory"
TELL_SECONDS = 60.0
NO_REQUEST = contextvars.Context()
"""What is done for several requests is no one's."""

log = logging.getLogger(__name__)


def served(ranking: Ranking, ts: float, most: int, with_tensors: bool) -> ServedRecord:
    """The record of a ranking with so many of its ads at most; `ts` in seconds since 1970."""
    query, model, encoded = ranking.query, ranking.model, ranking.encoded
    request, encoder = encoded.request, model.bundle.encoder
    shown, history = ranking.ad_ids[:most], encoder.newest(request.history)
    candidates = _candidates(ranking)
    unknown = _unknown(ranking, shown)
    named = candidates or shown
    known = [ad_id for ad_id in named if ad_id not in unknown] if unknown else named
    return ServedRecord(
        request_id=query.request_id,
        ts=ts,
        model=model.name,
        version=model.bundle.version,
        user_id=request.user_id,
        user={**request.stored, **encoder.usable("user", request.user)[0]},
        context=encoder.usable("context", request.context)[0],
        history=history,
        ad_ids=shown,
        p_click=ranking.p_click[:most],
        propensity=[1.0] * len(shown) if ranking.propensity is None else ranking.propensity[:most],
        candidates=candidates,
        ads=encoded.view.features([*known, *history]),
        sent=_sent(ranking, named) if request.sent else {},
        unknown=list(unknown),
        policy=str(query.policy or "greedy"),
        tensors=_tensors(ranking, shown) if with_tensors else {},
        shown=min(len(shown), _said_shown(ranking)),
        history_ts=encoder.newest_times(request.history, request.history_ts) if encoder.schema.history_ages else (),
        objective=query.objective,
        experiment=query.experiment,
        p_conversion=(ranking.p_conversion or ())[:most],
        counted=_counted(ranking, most),
        **_money(ranking, most),
    )


def _money(ranking: Ranking, most: int) -> Mapping[str, Sequence[Any]]:
    """What the ads of the record bid, and would have had to pay."""
    if ranking.bids is None:
        return {}
    bids = ranking.bids.take(ranking.rows if ranking.explored else ranking.kept[:most])
    prices = [] if ranking.price is None else [round((price or 0) * MICRO) for price in ranking.price[:most]]
    return {"bids": bids.bid.tolist(), "bid_types": [BID_TYPES[kind] for kind in bids.kind.tolist()], "prices": prices}


def _said_shown(ranking: Ranking) -> int:
    """How many ads the caller said that it shows; 0 where it did not: what nobody may have seen is no impression."""
    query = ranking.query
    return (query.top_k or 0) if query.shown is None else query.shown


def _candidates(ranking: Ranking) -> list[str]:
    """All that were ranked, where the policy explored."""
    if not ranking.explored:
        return []
    return list(map(ranking.encoded.request.candidates.__getitem__, ranking.rows.tolist()))


def _unknown(ranking: Ranking, shown: Sequence[str]) -> dict[str, None]:
    """Those of the ads of the record that were ranked as unknown, in order."""
    known = ranking.known
    if ranking.explored:
        ad_ids = ranking.encoded.request.candidates
        return dict.fromkeys(ad_ids[row] for row in ranking.rows[~ranking.encoded.known.take(ranking.rows)].tolist())
    return {} if known is None else {ad_id: None for ad_id, is_known in zip(shown, known, strict=False) if not is_known}


def _sent(ranking: Ranking, ad_ids: Sequence[str]) -> Mapping[str, Features]:
    """What came with candidates."""
    request, encoder, wanted = ranking.encoded.request, ranking.model.bundle.encoder, set(ad_ids)
    sent = ((request.candidates[row], features) for row, features in request.sent.items())
    return {ad_id: encoder.usable("ad", features)[0] for ad_id, features in sent if ad_id in wanted}


def _counted(ranking: Ranking, most: int) -> Mapping[str, bytes]:
    """What adrank counted for the ads of the record."""
    counted = ranking.encoded.request.counted
    if counted is None:
        return {}
    columns = counted.take(ranking.rows if ranking.explored else ranking.kept[:most], 1)
    return {name: column.tobytes() for name, column in zip(ranking.model.bundle.encoder.counted, columns, strict=True)}


def _tensors(ranking: Ranking, shown: Sequence[str]) -> Mapping[str, bytes]:
    places = {ad_id: row for row, ad_id in enumerate(ranking.encoded.request.candidates)}
    rows = [places[ad_id] for ad_id in shown]
    return {name: (tensor[:, rows] if name.startswith("ad_") else tensor).tobytes() for name, tensor in ranking.encoded.feeds.items()}


class ServedLog:
    """The queue, and what empties it. Everything here runs on the event loop."""

    def __init__(self, store: Store, metrics: Metrics, settings: Settings, chance: Callable[[], float] = random.random) -> None:
        """`chance` gives numbers from 0 to 1, for the shares that are logged."""
        self._store, self._metrics, self._settings, self._chance = store, metrics, settings, chance
        self._unlogged: deque[tuple[Ranking, float]] = deque()
        self._unlogged_ads = 0
        self._records: deque[bytes] = deque()
        self._bytes = 0
        self._turn: asyncio.Handle | None = None
        self._some = asyncio.Event()
        self._full, self._why = "", ""
        """What becomes of new records while the store has no room for them, and a sentence about it; empty while it has."""
        self._room, self._looked = StoreRoom(), -LOOK_SECONDS
        self._since = self._appended = self._appended_records = 0
        """Bytes appended since it was looked, and all that were appended, in bytes and records."""
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._last_line = -TELL_SECONDS

    def left(self) -> None:
        """Count a ranking whose caller had left before its answer went out: nobody saw it, so it is no record."""
        self._count("caller_left")

    def put(self, ranking: Ranking) -> None:
        """Take a ranking that was answered, or drop it; its record is made later."""
        if ranking.query.version is not None:  # nobody's share chose who ranks: a trial
            self._count("version_named")
        elif self._chance() >= self._settings.log_share:
            self._count("sampled_out")
        elif self._full:
            self._count(self._full)
        elif self._waiting >= self._settings.log_queue or self._unlogged_ads >= UNMADE_ADS or self._bytes >= QUEUE_BYTES or self._closing:
            self._count("dropped_queue")
        else:
            self._unlogged.append((ranking, ranking.encoded.request.ts))
            self._unlogged_ads += _size(ranking)
            self._metrics.served_waiting = self._waiting
            if self._turn is None:
                self._turn = asyncio.get_running_loop().call_soon(self._make_soon, context=NO_REQUEST)

    def status(self) -> dict[str, str | None]:
        """For `/readyz`: whether rankings are logged, and why not."""
        return {"status": "full" if self._full else "open", "detail": self._why or None}

    @property
    def _waiting(self) -> int:
        return len(self._unlogged) + len(self._records)

    def _count(self, result: str, count: int = 1) -> None:
        self._metrics.served[result] += count

    def _make_soon(self) -> None:
        """In the next turn of the loop but one, when the answer has been written to its socket. Not much later: a request that is kept
        costs the next ones the memory that the processor still has in its caches.
        """
        self._turn = asyncio.get_running_loop().call_soon(self._make)

    def _make(self) -> None:
        """Make records until a slice of time is over."""
        until = time.perf_counter() + SLICE_SECONDS
        while self._unlogged:
            self._make_one(*self._unlogged.popleft())
            if time.perf_counter() >= until:
                break
        self._turn = asyncio.get_running_loop().call_soon(self._make) if self._unlogged else None
        self._some.set()

    def _make_one(self, ranking: Ranking, ts: float) -> None:
        self._unlogged_ads -= _size(ranking)
        try:
            record = pack_served(served(ranking, ts, self._settings.log_shown, self._chance() < self._settings.log_tensors_share))
        except Exception as error:  # noqa: BLE001  # whatever it is, the next ranking is to be logged
            self._count("failed")
            self._tell("a ranking could not be logged", error)
        else:
            self._records.append(record)
            self._bytes += len(record)

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Write what waits, for `FLUSH_SECONDS` at most; nothing is taken any more."""
        self._closing = True
        self._some.set()
        task, self._task = self._task, None
        if task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await task
        self._count(self._full or "dropped_store", self._waiting)
        self._unlogged.clear()
        self._records.clear()
        self._metrics.served_waiting = 0

    async def _write(self) -> None:
        """Append the records in batches, until there are no more after the closing."""
        while self._unlogged or self._records or not self._closing:
            await self._some.wait()
            if not self._records:
                self._some.clear()
                continue
            if not self._closing:
                await asyncio.sleep(LINGER_SECONDS)
            if not await self._append(self._batch()) or self._full:
                await self._wait_for_the_store()

    def _batch(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        while self._records and len(batch) < BATCH_RECORDS and size < BATCH_BYTES:
            batch.append(self._records.popleft())
            size += len(batch[-1])
        self._bytes -= size
        self._metrics.served_waiting = self._waiting
        return batch

    async def _append(self, batch: Sequence[bytes]) -> bool:
        """Append once, whatever comes of it: a batch whose reply did not come may have been written. Whether it was, for sure."""
        result = "dropped_store"
        try:
            kept = await self._store.append_served(batch)
            result = "written"
            self._added(batch)
            await self._see_room(kept)
        except StoreError as error:
            self._tell("what was served is not logged for now", error)
        except Exception as error:  # noqa: BLE001  # as above
            result = "failed"
            self._tell("what was served could not be written", error)
        finally:
            self._count(result, len(batch))
        return result == "written"

    def _added(self, batch: Sequence[bytes]) -> None:
        size = sum(map(len, batch))
        self._since, self._appended, self._appended_records = self._since + size, self._appended + size, self._appended_records + len(batch)

    async def _see_room(self, kept: int) -> None:
        """See whether the store has room for more than the `kept` records that it has."""
        now, settings = time.monotonic(), self._settings
        if now - self._looked >= LOOK_SECONDS:
            self._room, self._looked, self._since = await self._store.served_room(), now, 0
        each = self._appended / self._appended_records if self._appended_records else 0.0
        size = kept * each if self._room.stream is None else self._room.stream + self._since
        used, most = (self._room.used or 0) + self._since, settings.log_memory_share * self._room.most
        fix = "see whether adrank join runs and keeps up"
        if kept >= settings.log_kept or size >= settings.log_kept_bytes:
            said = f"{kept:,} records of {size / 2**20:,.0f} MB wait in {SERVED}; {settings.log_kept:,} and"
            self._now_full(BACKLOG, f"{said} {settings.log_kept_bytes / 2**20:,.0f} MB are kept: {fix}")
        elif most and used >= most:
            said = (
                f"the store uses {used / 2**20:,.0f} of its {self._room.most / 2**20:,.0f} MB (maxmemory), and what is left is for events"
            )
            self._now_full(MEMORY, f"{said}: raise maxmemory, or {fix}")
        else:
            self._full = self._why = ""

    def _now_full(self, result: str, why: str) -> None:
        if not self._full:
            log.warning("rankings are not logged for now: %s", why)
        self._full, self._why = result, why

    async def _wait_for_the_store(self) -> None:
        """Ask now and then until it answers and has room. Meanwhile the queue fills."""
        pause, waiting = BACK_OFF_SECONDS[0], True
        while waiting:
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, BACK_OFF_SECONDS[1])
            waiting = not await self._append(()) or bool(self._full)

    def _tell(self, what: str, error: Exception) -> None:
        """Log a failure, unless one was logged just now."""
        if time.monotonic() - self._last_line >= TELL_SECONDS:
            self._last_line = time.monotonic()
            why = str(error) if isinstance(error, StoreError) else where(error)
            log.warning("%s; adrank_served_log_total counts it: %s", what, why)


def _size(ranking: Ranking) -> int:
    return len(ranking.encoded.request.candidates) + len(ranking.encoded.request.history)
