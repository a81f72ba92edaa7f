"""Every metric of the service, on an injected registry. The only module that knows prometheus_client.

With several workers the serve command sets PROMETHEUS_MULTIPROC_DIR before this is imported: each worker writes files
there, and whichever worker is scraped adds them up. No label holds what a caller can choose.
"""

import collections
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
    values,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from features.vocabulary import Numbers

from ..errors import MetricsGoneError
from . import FIRST, series
from .series import STAGES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
BEHAVIOURS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
ROWS = (1, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192)
CLICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
DIFFERENCES = (1e-7, 1e-6, 1e-5, 1e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series began: as many series again, which nobody asks for
Registry = CollectorRegistry


_slot = 0


def count_in_slot(slot: int) -> None:
    """Name this process's files after its place among the workers, before any metric is made.

    After the process, as prometheus_client names them, each worker that dies would leave five files for ever: a worker that takes its
    place goes on in them.
    """
    global _slot  # noqa: PLW0603  # of the process, as the class of values is
    _slot = slot
    values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]


ROWS_KEPT = 64
"""Requests noted before they are written into the metrics even if nobody asks: writing them all takes half a millisecond."""


class RequestTimings:
    """How one request goes: what it is counted under, the seconds that its stages take, and what it was ranked with.

    Plain attributes, filled in while it is answered: a metric of prometheus_client takes microseconds to observe, and a request
    has twenty, so `Metrics.flush` writes those of many requests at once.
    """

    def __init__(self, route: str) -> None:
        self.route, self.model, self.outcome = route, "none", "cut_off"
        self.began = self.since = time.perf_counter()
        self.ended = self.began
        self.seconds: dict[str, float] = {}
        self.stage: str | None = None
        self.user: str | None = None
        """Whether the store had the user: hit, miss or error, None where it was not asked."""
        self.candidates: int | None = None
        self.known = self.behaviours = 0
        self.degraded: Sequence[tuple[str, str]] = ()
        self.scores: Numbers | None = None
        self.version = 0
        self.experiment: Mapping[str, str] = {}
        """Of the setting's names and arms alone."""
        self.stretches: list[tuple[str, float, float]] | None = None
        """Where the request is traced: each stretch of a stage, when it began and when it ended."""

    def finish(self) -> None:
        """The request was answered: well, unless something else has been noted."""
        if self.outcome == "cut_off":
            self.outcome = "ok"

    def enter(self, stage: str | None) -> None:
        """A stage begins, so the one before it ends; None: only that. Stretches of a stage add up; one that goes on is one stretch."""
        if stage is not None and stage == self.stage:
            return
        now = time.perf_counter()
        if self.stage is not None:
            self.add(self.stage, self.since, now)
        self.stage, self.since = stage, now

    def add(self, stage: str, began: float, until: float) -> None:
        """Add a stretch that was timed elsewhere."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + until - began
        if self.stretches is not None:
            self.stretches.append((stage, began, until))

    def ranked_with(self, behaviours: int, known: int, candidates: int) -> None:
        """Note the sizes of the request, and how many of its candidates the catalogue has."""
        self.behaviours, self.known, self.candidates = behaviours, known, candidates

    @property
    def total(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self.began


class Metrics:
    """The metrics, and the ways to record them."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = r = registry or CollectorRegistry()
        self._rows: list[RequestTimings] = []
        self.under_way: Callable[[], float] = float
        """How many rankings are under way now."""
        self.served: collections.Counter[str] = collections.Counter()
        """Rankings by what became of their records, since the last flush."""
        self.served_waiting = 0
        """Records that wait to be written now."""
        self._requests = Counter("adrank_requests", "Requests answered", ["route", "model", "outcome"], registry=r)
        self._arms = Counter("adrank_experiment_requests", "Rankings answered well, by arm", ["experiment", "arm"], registry=r)
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
        self._events = Counter("adrank_events", "Events by what became of them", ["type", "result"], registry=r)
        self._ads = Gauge("adrank_catalogue_ads", "Active ads, of the worker with the fewest", registry=r, multiprocess_mode="livemin")
        lag = "Since the catalogue last was in step with the store, of the worker furthest behind"
        self._lag = Gauge("adrank_catalogue_lag_seconds", lag, registry=r, multiprocess_mode="livemax")
        facts = ["model", "version", "provider", "schema"]
        made = "When the live version of a model was made, as its number tells, of the worker with the oldest"
        self._made = Gauge("adrank_model_version_timestamp_seconds", made, ["model"], registry=r, multiprocess_mode="livemin")
        self._info = Gauge("adrank_model_info", "1 for each model that is loaded", facts, registry=r, multiprocess_mode="livemax")
        loaded = "When a model was loaded, of the worker that did so last"
        self._loaded = Gauge("adrank_model_loaded_timestamp_seconds", loaded, ["model"], registry=r, multiprocess_mode="livemax")
        self._reloads = Counter("adrank_model_reload", "Versions that were loaded, refused, or let go of", ["result"], registry=r)
        outcomes = ["model", "mode", "outcome"]
        self._challenged = Counter("adrank_challenger_requests", "Requests that were a challenger's to score", outcomes, registry=r)
        stopped = "Challengers that were stopped since they left a bound"
        self._rollbacks = Counter("adrank_challenger_rollback", stopped, ["model", "reason"], registry=r)
        moved = "By how much p(click) of a candidate differs between a model and its shadow"
        self._differences = Histogram("adrank_shadow_difference", moved, ["model"], buckets=DIFFERENCES, registry=r)

        about = f"Rankings by what became of their records: {', '.join(result for (result,) in series.SERVED)}"
        self._served = Counter("adrank_served_log", about, ["result"], registry=r)
        waiting = "Records of rankings that wait to be written"
        self._served_queue = Gauge("adrank_served_log_queue", waiting, registry=r, multiprocess_mode="livesum")
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        known: tuple[tuple[Counter | Histogram, Iterable[Sequence[str]]], ...] = (
            (self._requests, series.requests("none")),
            (self._durations, [("/rank", "ok")]),
            (self._stages, [(stage,) for stage in STAGES]),
            (self._flushes, series.FLUSHES),
            (self._shed, series.SHED),
            (self._degraded, series.DEGRADED),
            (self._lookups, series.LOOKUPS),
            (self._events, series.EVENTS),
            (self._reloads, series.RELOADS),
            (self._served, series.SERVED),
        )
        for metric, labels in known:
            for each in labels:
                metric.labels(*each)

    def begin(self, route: str) -> RequestTimings:
        """A request begins; `end` is to be called whatever becomes of it."""
        return RequestTimings(route)

    def end(self, stages: RequestTimings) -> None:
        """The request is over."""
        stages.enter(None)
        stages.ended = stages.since
        self._rows.append(stages)
        if len(self._rows) >= ROWS_KEPT:
            self.flush()

    def flush(self) -> None:
        """Write what has been noted into the metrics. To be called on the event loop: before a scrape, now and then, and at the end."""
        rows, self._rows = self._rows, []
        self._inflight.set(self.under_way())
        self._served_queue.set(self.served_waiting)
        for result, count in self.served.items():
            self._served.labels(result).inc(count)
        self.served.clear()
        for counted, count in collections.Counter((row.route, row.model, row.outcome) for row in rows).items():
            self._requests.labels(*counted).inc(count)
        arms = (arm for row in rows if row.experiment and row.outcome == "ok" for arm in row.experiment.items())
        for labels_of, count in collections.Counter(arms).items():
            self._arms.labels(*labels_of).inc(count)
        durations, clicks = collections.defaultdict(list), collections.defaultdict(list)
        for row in rows:
            durations[row.route, row.outcome].append(row.ended - row.began)
            if row.scores is not None:
                clicks[row.model].append(row.scores)
        for labels, seconds in durations.items():
            _observe(self._durations.labels(*labels), SECONDS, seconds)
        for model, scores in clicks.items():
            together = np.concatenate(scores)
            _observe(self._p_click.labels(model), CLICKS, together[np.isfinite(together)])
        if rankings := [row for row in rows if row.seconds]:
            self._flush_rankings(rankings)

    def _flush_rankings(self, rows: Sequence[RequestTimings]) -> None:
        for stage in STAGES:
            _observe(self._stages.labels(stage), SECONDS, [row.seconds[stage] for row in rows if stage in row.seconds])
        for result, count in collections.Counter(row.user for row in rows if row.user is not None).items():
            self._lookups.labels("user", result).inc(count)
        for degraded, count in collections.Counter(each for row in rows for each in row.degraded).items():
            self._degraded.labels(*degraded).inc(count)
        sized = [row for row in rows if row.candidates is not None]
        candidates, known = [row.candidates or 0 for row in sized], sum(row.known for row in sized)
        _observe(self._candidates, CANDIDATES, candidates)
        _observe(self._history, BEHAVIOURS, [row.behaviours for row in sized])
        self._lookups.labels("ad", "hit").inc(known)
        self._lookups.labels("ad", "miss").inc(sum(candidates) - known)

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

    def events(self, counted: Mapping[tuple[str, str], int]) -> None:
        """Count events by their type (`unknown` where it is none) and result: accepted, duplicate, or why they were not taken."""
        for labels, count in counted.items():
            self._events.labels(*labels).inc(count)

    def catalogue(self, ads: int, lag: float) -> None:
        """Set how many ads the catalogue has, and the seconds since it was last in step with the store."""
        self._ads.set(ads)
        self._lag.set(lag)

    def model(self, name: str, version: str, provider: str, schema: str) -> None:
        """Note that a model has been loaded now."""
        self._info.labels(name, version, provider, schema).set(1)
        self._loaded.labels(name).set(time.time())
        for each in series.requests(name):
            self._requests.labels(*each)

    def live(self, name: str, version: int | None) -> None:
        """Note which version of a model is live; None: none is any more."""
        made = 0.0 if version is None else _moment(version)
        self._made.labels(name).set(made)
        if not made and not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._made.remove(name)

    def no_model(self, name: str, version: str, provider: str, schema: str) -> None:
        """Note that a model is not loaded any more."""
        self._info.labels(name, version, provider, schema).set(0)
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):  # what is written for other processes cannot be unwritten
            self._info.remove(name, version, provider, schema)

    def reload(self, result: str) -> None:
        """Count a version that was loaded, refused, or let go of."""
        self._reloads.labels(result).inc()

    def challenger(self, model: str, mode: str) -> None:
        """A version begins to challenge the live one."""
        if mode == "shadow":
            self._differences.labels(model)
        for outcome in series.CHALLENGED[mode]:
            self._challenged.labels(model, mode, outcome)
        for reason in series.VERDICTS:
            self._rollbacks.labels(model, reason)

    def challenged(self, model: str, mode: str, outcome: str) -> None:
        """Count a request that was a challenger's to score."""
        self._challenged.labels(model, mode, outcome).inc()

    def shadow(self, model: str, differences: Numbers) -> None:
        """Note by how much a challenger's probabilities differ from those that were answered."""
        _observe(self._differences.labels(model), DIFFERENCES, differences)

    def rolled_back(self, model: str, reason: str) -> None:
        """Count a challenger that was stopped."""
        self._rollbacks.labels(model, reason).inc()

    def exposition(self) -> bytes:
        """All metrics that have been flushed, as Prometheus reads them; those of every worker where there are several.

        Raises:
            MetricsGoneError: something has removed the files that the workers count in.
        """
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if not folder:
            return generate_latest(self.registry)
        if not all(Path(folder, name).exists() for name in (FIRST, f"counter_{_slot}.db")):
            raise MetricsGoneError(
                "the files that the workers count in were removed: restart the service, and see that nothing cleans its temporary folder"
            )
        together = CollectorRegistry()
        together.register(_Present(folder))
        return generate_latest(together)


class _Present(Collector):
    """The metrics of all workers, without models that none of them has any more: theirs are the lines of these gauges that are 0."""

    def __init__(self, folder: str) -> None:
        self._all = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        for metric in self._all.collect():  # type: ignore[no-untyped-call]
            if metric.name in ("adrank_model_info", "adrank_model_version_timestamp_seconds"):
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric


def _observe(histogram: Histogram, bounds: Sequence[float], values: Sequence[float] | Numbers) -> None:
    """Observe many values. prometheus_client has only `observe`, one at a time: this adds to the counts that it adds to."""
    if len(values):
        exact = np.asarray(values, np.float64)
        for bucket, count in enumerate(np.bincount(np.searchsorted(bounds, exact)).tolist()):
            if count:
                histogram._buckets[bucket].inc(count)
        histogram._sum.inc(float(exact.sum()))


def _moment(version: int) -> float:
    """Seconds since 1970 of a version's number, which is UTC as yyyymmddhhmmss; 0 where it is another number."""
    try:
        return datetime.strptime(str(version), "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


class Scraped:
    """Metrics on a registry of their own."""

    registry: Registry

    def serve(self, port: int, host: str = "127.0.0.1") -> Callable[[], None]:
        """Answer scrapes on an address of this machine, in a thread of its own, until what this returns is called.

        Raises:
            OSError: the port is taken, or there is no such address.
        """
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


class BridgeMetrics(Scraped):
    """The metrics of the bridge: a `BridgeWatch` of `service.feedback.bridge`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._events = Counter("adrank_bridge_events", "Events of Kafka by what became of them", ["outcome"], registry=self.registry)
        self._incidents = Counter("adrank_bridge_incidents", "What should not happen", ["kind"], registry=self.registry)
        for kind in series.BRIDGE_INCIDENTS:
            self._incidents.labels(kind)

    def events(self, outcome: str, count: int) -> None:
        """Count events that ended so."""
        self._events.labels(outcome).inc(count)

    def incident(self, kind: str) -> None:
        """Count what should not happen."""
        self._incidents.labels(kind).inc()


class JoinMetrics(Scraped):
    """The metrics of the joiner, on a registry of its own: a `JoinWatch` of `training.join.run`. `model` is a name of the repository, or
    `_other`.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self._rankings = Counter("adrank_join_rankings", "Rankings written to the log", ["model"], registry=r)
        self._impressions = Counter("adrank_join_impressions", "Rows written to the log", ["model"], registry=r)
        shown = "Rankings written by how it is known what of them was shown: said, reported, assumed, or unknown, which are not trained on"
        self._shown = Counter("adrank_join_shown", shown, ["result"], registry=r)
        self._events = Counter("adrank_join_events", "Events by what became of them", ["type", "outcome"], registry=r)
        self._incidents = Counter("adrank_join_incidents", "What should not happen", ["kind"], registry=r)
        self._backlog = Gauge("adrank_join_backlog", "Entries that stand in a stream", ["stream"], registry=r)
        self._lag = Gauge("adrank_join_lag_seconds", "Age of the oldest entry that stands in a stream", ["stream"], registry=r)
        placed = ["model", "position"]
        self._p_click = Counter("adrank_p_click_sum", "Sum of p(click) of the rows written", placed, registry=r)
        self._clicks = Counter("adrank_clicks", "Clicks of the rows written", placed, registry=r)
        over = "of the rows with a p(conversion) whose window for it is over"
        self._conversions = Counter("adrank_conversions", f"Conversions {over}", ["model"], registry=r)
        self._p_conversion = Counter("adrank_p_conversion_sum", f"Sum of p(conversion) {over}", ["model"], registry=r)
        self._converted = Counter("adrank_conversion_impressions", f"Number {over}", ["model"], registry=r)
        about = "of the last 100,000 impressions, in whole files"
        self._calibration = Gauge("adrank_calibration_ratio", f"Sum of p(click) over clicks {about}", ["model"], registry=r)
        by_place = f"Sum of p(click) over clicks by position {about}"
        self._calibration_by_place = Gauge("adrank_position_calibration_ratio", by_place, placed, registry=r)
        entropy = f"Log loss over the entropy of the click rate {about}"
        self._entropy = Gauge("adrank_normalised_entropy", entropy, ["model"], registry=r)
        drift = f"Population stability index {about}, against the train split"
        self._drift = Gauge("adrank_field_drift_psi", drift, ["model", "field"], registry=r)
        self._fields: dict[str, set[str]] = {}
        for kind in series.INCIDENTS:
            self._incidents.labels(kind)
        for each in series.JOIN_EVENTS:
            self._events.labels(*each)
        for result in series.SHOWN:
            self._shown.labels(result)

    def events(self, type_: str, outcome: str, count: int) -> None:
        """Count events that ended so."""
        self._events.labels(type_, outcome).inc(count)

    def incident(self, kind: str, count: int) -> None:
        """Count what should not happen."""
        self._incidents.labels(kind).inc(count)

    def rankings(self, model: str, count: int) -> None:
        """Count rankings that were written."""
        self._rankings.labels(model).inc(count)

    def shown(self, how: str, count: int) -> None:
        """Count rankings by how it is known what of them was shown."""
        self._shown.labels(how).inc(count)

    def rows(self, model: str, position: str, count: int, clicks: int, p_click: float) -> None:
        """Count rows of a position that were written, their clicks, and the sum of their p(click)."""
        self._impressions.labels(model).inc(count)
        self._clicks.labels(model, position).inc(clicks)
        self._p_click.labels(model, position).inc(p_click)

    def converted(self, model: str, count: int, conversions: int, p_conversion: float) -> None:
        """Count rows whose conversions are all known, these, and the sum of their p(conversion)."""
        self._converted.labels(model).inc(count)
        self._conversions.labels(model).inc(conversions)
        self._p_conversion.labels(model).inc(p_conversion)

    def quality(self, model: str, calibration: float, by_position: Mapping[str, float], entropy: float) -> None:
        """Set what a model's newest rows come to."""
        self._calibration.labels(model).set(calibration)
        self._entropy.labels(model).set(entropy)
        for position, ratio in by_position.items():
            self._calibration_by_place.labels(model, position).set(ratio)

    def drift(self, model: str, by_field: Mapping[str, float]) -> None:
        """Set how far a model's fields have drifted; fields that are told no more are dropped."""
        for field in self._fields.get(model, set()) - by_field.keys():
            self._drift.remove(model, field)
        for field, index in by_field.items():
            self._drift.labels(model, field).set(index)
        self._fields[model] = set(by_field)

    def stream(self, stream: str, backlog: int, lag: float) -> None:
        """Set how many entries stand in a stream, and for how many seconds the oldest of them has."""
        self._backlog.labels(stream).set(backlog)
        self._lag.labels(stream).set(lag)
