"""Every metric of the service, on an injected registry. The only module that knows prometheus_client.

With several workers the serve command sets PROMETHEUS_MULTIPROC_DIR before this is imported: each worker writes files
there, and whichever worker is scraped adds them up. No label holds what a caller can choose.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from features.vocabulary import Numbers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
BEHAVIOURS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
ROWS = (1, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192)
CLICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)

Registry = CollectorRegistry


@dataclass(slots=True)
class Observed:
    """How a request went, filled in while it is answered."""

    model: str = "none"
    outcome: str = "cut_off"

    def finish(self) -> None:
        """The request was answered: well, unless something else has been noted."""
        if self.outcome == "cut_off":
            self.outcome = "ok"


class Stages:
    """Seconds that the stages of one request took. Observed when the request ends, however it ends."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stretch of a stage; stretches add up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add a stretch that was timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def total(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self.began


class Metrics:
    """The metrics, and the ways to record them."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = r = registry or CollectorRegistry()
        self._requests = Counter("adrank_requests", "Requests answered", ["route", "model", "outcome"], registry=r)
        labels = ["route", "outcome"]
        self._durations = Histogram("adrank_request_duration_seconds", "From a request to its answer", labels, buckets=SECONDS, registry=r)
        self._stages = Histogram("adrank_stage_duration_seconds", "Stages of a ranking", ["stage"], buckets=SECONDS, registry=r)
        self._candidates = Histogram("adrank_candidates", "Candidates of a request", buckets=CANDIDATES, registry=r)
        self._history = Histogram("adrank_history_length", "Behaviours that a request is ranked with", buckets=BEHAVIOURS, registry=r)
        self._p_click = Histogram("adrank_p_click", "Predicted probabilities of a click", ["model"], buckets=CLICKS, registry=r)
        self._batch_rows = Histogram("adrank_batch_rows", "Candidates that are scored together", buckets=ROWS, registry=r)
        self._flushes = Counter("adrank_batch_flush", "Batches by why they began", ["reason"], registry=r)
        self._inflight = Gauge("adrank_inflight_requests", "Rankings under way", registry=r, multiprocess_mode="livesum")
        self._shed = Counter("adrank_shed", "Rankings refused to protect the service", ["reason"], registry=r)
        self._degraded = Counter("adrank_degraded", "Rankings that did without something", ["stage", "reason"], registry=r)
        self._lookups = Counter("adrank_feature_lookups", "Users and ads looked up", ["group", "result"], registry=r)
        self._ads = Gauge("adrank_catalogue_ads", "Active ads, of the worker with the fewest", registry=r, multiprocess_mode="livemin")
        lag = "Since the catalogue last was in step with the store, of the worker furthest behind"
        self._lag = Gauge("adrank_catalogue_lag_seconds", lag, registry=r, multiprocess_mode="livemax")
        facts = ["model", "version", "provider", "schema"]
        self._info = Gauge("adrank_model_info", "1 for each model that is loaded", facts, registry=r, multiprocess_mode="livemax")
        loaded = "When a model was loaded, of the worker that did so last"
        self._loaded = Gauge("adrank_model_loaded_timestamp_seconds", loaded, ["model"], registry=r, multiprocess_mode="livemax")

    @contextmanager
    def request(self, route: str) -> Iterator[Observed]:
        """Count and time a request, whatever becomes of it."""
        observed, began = Observed(), time.perf_counter()
        try:
            yield observed
        finally:
            self._requests.labels(route, observed.model, observed.outcome).inc()
            self._durations.labels(route, observed.outcome).observe(time.perf_counter() - began)

    @contextmanager
    def ranking(self) -> Iterator[Stages]:
        """Time the stages of a ranking that is under way."""
        stages = Stages()
        with self._inflight.track_inprogress():
            try:
                yield stages
            finally:
                for name, seconds in dict(stages.seconds).items():  # a copy: a caller who left leaves a thread adding to it
                    self._stages.labels(name).observe(seconds)

    @contextmanager
    def lookup(self, group: str) -> Iterator[list[object]]:
        """Count a look-up: a miss unless something is put into the list, an error if it raises."""
        found: list[object] = []
        result = "error"
        try:
            yield found
            result = "hit" if found else "miss"
        finally:
            self._lookups.labels(group, result).inc()

    def ranked_with(self, behaviours: int, known: int, candidates: int) -> None:
        """Observe the sizes of a request, and how many of its candidates the catalogue has."""
        self._candidates.observe(candidates)
        self._history.observe(behaviours)
        self._lookups.labels("ad", "hit").inc(known)
        self._lookups.labels("ad", "miss").inc(candidates - known)

    def clicks(self, model: str, scores: Numbers) -> None:
        """Observe probabilities `(C,)`; in bulk, since `observe` for each of 10,000 would take longer than scoring them."""
        histogram = self._p_click.labels(model)
        finite = scores[np.isfinite(scores)].astype(np.float64)
        for bucket, count in enumerate(np.bincount(np.searchsorted(CLICKS, finite), minlength=len(CLICKS) + 1)):
            if count:
                histogram._buckets[bucket].inc(int(count))
        histogram._sum.inc(float(finite.sum()))

    def batch(self, rows: int, reason: str) -> None:
        """Count a batch of so many candidates, and why it began when it did."""
        self._batch_rows.observe(rows)
        self._flushes.labels(reason).inc()

    def shed(self, reason: str) -> None:
        """Count a ranking that was refused."""
        self._shed.labels(reason).inc()

    def degraded(self, stage: str, reason: str, count: int = 1) -> None:
        """Count something that was done without."""
        self._degraded.labels(stage, reason).inc(count)

    def catalogue(self, ads: int, lag: float) -> None:
        """Set how many ads the catalogue has, and the seconds since it was last in step with the store."""
        self._ads.set(ads)
        self._lag.set(lag)

    def model(self, name: str, version: str, provider: str, schema: str) -> None:
        """Note that a model has been loaded now."""
        self._info.labels(name, version, provider, schema).set(1)
        self._loaded.labels(name).set(time.time())

    def exposition(self) -> bytes:
        """All metrics as Prometheus reads them; those of every worker where there are several."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not folder:
            return generate_latest(self.registry)
        _bury_the_dead(Path(folder))
        together = CollectorRegistry()
        MultiProcessCollector(together, folder)  # type: ignore[no-untyped-call]
        return generate_latest(together)


def _bury_the_dead(folder: Path) -> None:
    """Drop the gauges of workers that are gone; what those counted stays counted."""
    for pid in {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")}:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
        except PermissionError:
            pass
