"""Streams to join and a log to look at, for tests of the joiner."""

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import bundles
import msgspec
import numpy as np
import polars as pl
from processes import ROOT, environment
from redis_servers import client_of

from features.events import Event, pack_event
from features.schema import Schema
from features.served import ServedRecord, pack_served
from features.state import pack_features
from features.streams import EVENTS, SERVED, Entry
from service.store.streams import RedisStreams
from training.join.attributed import attribute
from training.join.attribution import EVENTS as RAW_EVENTS
from training.join.attribution import IMPRESSIONS, RAW, WATERMARK, Attribution, hour_name, settings_of
from training.join.log import open_log
from training.join.raw import LogColumns, events_of, impressions_of
from training.join.sink import Sink, SinkSettings

JOIN = (sys.executable, "-m", "adrank", "join")
T0 = 1_763_800_200.0
"""Half past eight in the morning of 22 November 2025, UTC."""
ADS = {ad_id: pack_features(features) for ad_id, features in bundles.ADS.items()}


def ranking(request_id: str = "r1", ts: float = T0, ad_ids: Sequence[str] = ("a1", "a2", "a3"), **more: Any) -> ServedRecord:
    """A ranking of ads that the catalogue has."""
    count = len(ad_ids)
    known = {ad_id: ADS[ad_id] for ad_id in (*ad_ids, "a4", "a5") if ad_id in ADS}
    base = ServedRecord(
        request_id,
        ts,
        "din",
        20251122000000,
        "u1",
        {"age": "25", "interests": ["news", "drama"], "income": 9.5},
        {"slot": "feed"},
        ["a4", "gone", "a5"],
        list(ad_ids),
        [round(0.5 / (i + 1), 6) for i in range(count)],
        [1.0] * count,
        ads=known,
        shown=count,
    )
    return replace(base, **more)


def click(request_id: str = "r1", ad_id: str = "a1", ts: float = T0 + 5, event_id: str | None = None, user_id: str = "u1") -> Event:
    return Event("click", event_id or f"click {request_id} {ad_id} {ts}", ts, user_id, request_id, ad_id)


def impression(request_id: str = "r1", ad_id: str = "a1", ts: float = T0 + 1, position: int | None = None) -> Event:
    return Event("impression", f"seen {request_id} {ad_id} {ts}", ts, request_id=request_id, ad_id=ad_id, position=position)


def conversion(request_id: str = "r1", ad_id: str = "a1", ts: float = T0 + 9, value: float | None = 2.5, user_id: str = "u1") -> Event:
    return Event("conversion", f"bought {request_id} {ad_id} {ts}", ts, user_id, request_id, ad_id, value=value)


def packed(record: ServedRecord | Event) -> tuple[str, bytes]:
    """A record's stream, and the value that stands there."""
    return (SERVED, pack_served(record)) if isinstance(record, ServedRecord) else (EVENTS, pack_event(record))


class Writer:
    """The service's side of the streams. What has a time is appended at that time, but never before what stands there."""

    def __init__(self, url: str) -> None:
        self.redis = client_of(url)
        self._last: dict[str, int] = {}

    def add(self, *records: ServedRecord | Event | tuple[str, bytes], at: float | None = None) -> None:
        """Append records, or raw values to a stream."""
        with self.redis.pipeline(transaction=False) as pipe:
            for record in records:
                stream, value = record if isinstance(record, tuple) else packed(record)
                ts = at or (T0 if isinstance(record, tuple) else min(record.ts, time.time()))
                self._last[stream] = max(self._last.get(stream, 0), int(ts * 1000) if ts < 1e11 else 0)
                pipe.xadd(stream, {"v": value}, id=f"{self._last[stream]}-*")
            pipe.execute()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.redis.close()

    def lengths(self) -> tuple[int, int]:
        return self.redis.xlen(SERVED), self.redis.xlen(EVENTS)


class Watch:
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.known: Counter[str] = Counter()
        """Rankings by how it is known what of them was shown."""
        self.clicks = self.p_click = 0.0
        self.qualities: dict[str, tuple[float, Mapping[str, float], float]] = {}
        self.drifts: dict[str, Mapping[str, float]] = {}
        self.streams: dict[str, tuple[int, float]] = {}

    def events(self, type_: str, outcome: str, count: int) -> None:
        self.counts[type_, outcome] += count

    def incident(self, kind: str, count: int) -> None:
        self.counts[(kind,)] += count

    def rankings(self, model: str, count: int) -> None:
        self.counts["rankings", model] += count

    def shown(self, how: str, count: int) -> None:
        self.known[how] += count

    def rows(self, model: str, position: str, count: int, clicks: int, p_click: float) -> None:
        self.counts["rows", model, position] += count
        self.clicks += clicks
        self.p_click += p_click

    def converted(self, model: str, count: int, conversions: int, p_conversion: float) -> None:
        self.counts["converted", model] += count
        self.counts["conversions", model] += conversions
        self.counts["p_conversion", model] += round(p_conversion, 6)  # type: ignore[assignment]  # a sum all the same

    def quality(self, model: str, calibration: float, by_position: Mapping[str, float], entropy: float) -> None:
        self.qualities[model] = calibration, by_position, entropy

    def drift(self, model: str, by_field: Mapping[str, float]) -> None:
        self.drifts[model] = by_field

    def stream(self, stream: str, backlog: int, lag: float) -> None:
        self.streams[stream] = backlog, lag


class Joining:
    """A sink of a log in this process. `at` is up to when the log is whole, in place of what Redis says."""

    def __init__(self, url: str, folder: Path, models: Path, at: float | None = None, **settings: Any) -> None:
        self.url, self.folder, self.models, self.settings = url, folder, models, Attribution(**settings)
        self.sizes: dict[str, int] = {}
        self.forward = None
        self.at, self.watch = at, Watch()

    @property
    def counts(self) -> dict[str, int]:
        return {" ".join(key): count for key, count in self.watch.counts.items()}

    @contextlib.asynccontextmanager
    async def joiner(self, streams: RedisStreams | None = None) -> AsyncIterator[Sink]:
        reader = streams or RedisStreams(self.url)
        sink = Sink(reader, open_log(self.folder, self.models, "din"), SinkSettings(self.settings, **self.sizes), self.watch)
        sink.forward = self.forward
        try:
            yield sink
        finally:
            sink.close()
            await reader.close()

    async def once(self, everything: bool = False) -> None:
        async with self.joiner() as sink:
            look = sink._look
            sink._look = lambda watermark=None: look(self.at if watermark is None else watermark)  # type: ignore[method-assign]
            await sink.drain(everything)

    def rows(self) -> pl.DataFrame:
        return rows(self.folder, self.settings)


def rows(folder: Path, settings: Attribution | None = None) -> pl.DataFrame:
    """All rows of a log, by ranking and position."""
    with tempfile.TemporaryDirectory() as into:
        attribute(folder, Path(into), settings or settings_of(folder))
        files = sorted(Path(into).glob("day=*/hour=*/*.parquet"))
        return pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files]).sort("request_id", "ts", "position")


def raw(folder: Path, kind: str) -> pl.DataFrame:
    """All raw rows of `impressions` or `events`, repeated ones too."""
    return pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in sorted(folder.glob(f"{RAW}/{kind}/*/*/*.parquet"))])


def table(folder: Path, name: str) -> pl.DataFrame:
    """All rows of `ads` or `raw/aside`."""
    files = sorted((folder / name).glob("*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files])


def join_process(url: str, folder: Path, models: Path, *options: str, **more: Any) -> "subprocess.Popen[bytes]":
    """A joiner in a process of its own."""
    command = [*JOIN, "--redis", url, "--log", str(folder), "--models", str(models), "--name", "din", *options]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def join_once(url: str, folder: Path, models: Path, *options: str) -> str:
    """A joiner that drains and must succeed; what it printed."""
    process = join_process(url, folder, models, *options)
    out, err = process.communicate(timeout=300)  # a slow machine has had more to join meanwhile, too
    assert process.returncode == 0, err.decode()
    return out.decode()


def tensor_bytes(*values: float, kind: Any = np.int64) -> bytes:
    return np.array(values, kind).tobytes()


def messy(chance: random.Random, rankings: int = 120, events: int = 900) -> tuple[list[ServedRecord], list[Event]]:
    """Rankings and events, in order of time: request ids that come again, events of all kinds, repeated, early, late, of others."""
    ids = rankings // 3
    log = [
        ranking(f"r{chance.randrange(ids)}", T0 + i * 97, ad_ids=chance.sample([f"a{j}" for j in range(5)], 3), shown=chance.randrange(4))
        for i in range(rankings)
    ]
    log = [replace(each, user_id=f"u{chance.randrange(2)}") for each in log]
    made = [
        Event(
            chance.choice(["click", "impression", "conversion"]),
            f"e{i}",
            chance.choice(log).ts + chance.choice([-100, -30, 0, 5, 800, 3999, 8999]),
            chance.choice(["u0", "u1", "u2"]),
            chance.choice(log).request_id if chance.random() < 0.97 else "none",
            f"a{chance.randrange(6)}",
        )
        for i in range(events)
    ]
    made = [each if each.type == "click" else msgspec.structs.replace(each, user_id=chance.choice(["", each.user_id])) for each in made]
    made = [msgspec.structs.replace(e, position=chance.choice([None, 1, 7])) if e.type == "impression" else e for e in made]
    made = [msgspec.structs.replace(e, value=chance.choice([None, 1.5, 2.0])) if e.type == "conversion" else e for e in made]
    return log, sorted([*made, *chance.sample(made, events // 15)], key=lambda event: event.ts)


def write_raw(folder: Path, schema: Schema, log: Sequence[ServedRecord], events: Sequence[Event], watermark: float = inf) -> None:
    """A log as a sink writes it, without Redis; every third file stands twice, as after a kill."""
    (folder / RAW).mkdir(parents=True)
    (folder / "schema.toml").write_text(schema.to_toml())
    (folder / RAW / WATERMARK).write_text(str(watermark))
    kinds: dict[str, Sequence[ServedRecord | Event]] = {IMPRESSIONS: log, RAW_EVENTS: events}
    for kind, records in kinds.items():
        entries = [Entry(f"{int(each.ts * 1000)}-{i}", packed(each)[1]) for i, each in enumerate(records)]
        batch = impressions_of(entries, SERVED, LogColumns(schema)) if kind == IMPRESSIONS else events_of(entries, EVENTS)
        for hour, frame in batch.frames.items():
            path = folder / RAW / kind / hour_name(hour, "date")
            path.mkdir(parents=True)
            for copy in range(1 + (hour % 3 == 0)):
                frame.write_parquet(path / f"{copy}.parquet")
