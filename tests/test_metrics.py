"""Metrics written in bulk are those that observing one by one would give."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service import metrics as module
from service.metrics import CLICKS, SECONDS, Metrics


def lines(metrics: Metrics, start: str) -> list[str]:
    return [line for line in metrics.exposition().decode().splitlines() if line.startswith(start)]


def one_by_one(name: str, bounds, values) -> list[str]:
    registry = CollectorRegistry()
    histogram = Histogram(name, "", buckets=bounds, registry=registry)
    for value in values:
        histogram.observe(value)
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith(f"{name}_bucket")]


def test_every_bucket_is_as_if_observed_one_by_one():
    metrics, chance = Metrics(), np.random.default_rng(1)
    values = np.concatenate([chance.exponential(0.02, 500), SECONDS, [0.0, 9.0]])
    scores = np.concatenate([chance.random(500), CLICKS, [0.0, 1.0, np.nan]]).astype(np.float32)
    for value in values:
        stages = metrics.begin("/rank")
        stages.add("inference", 0.0, float(value))
        stages.finish()
        metrics.end(stages)
    stages = metrics.begin("/rank")
    stages.model, stages.scores = "din", scores
    metrics.end(stages)
    metrics.flush()
    stage_lines = lines(metrics, "adrank_stage_duration_seconds_bucket")
    inference = [line.replace(',stage="inference"', "") for line in stage_lines if 'stage="inference"' in line]
    assert inference == one_by_one("adrank_stage_duration_seconds", SECONDS, values)
    clicks = [line.replace(',model="din"', "") for line in lines(metrics, "adrank_p_click_bucket")]
    assert clicks == one_by_one("adrank_p_click", CLICKS, scores[np.isfinite(scores)].astype(float))
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="ok"')[0].endswith(f" {len(values)}.0")


def test_rows_are_written_before_they_are_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS_KEPT", 3)
    metrics = Metrics()
    for _ in range(7):
        metrics.end(metrics.begin("/livez"))
    assert lines(metrics, "adrank_requests_total{")[0].endswith(" 6.0")
    metrics.flush()
    metrics.flush()
    assert lines(metrics, "adrank_requests_total{")[0].endswith(" 7.0")


def test_stretches_of_a_stage_add_up_and_the_open_one_ends_with_the_request():
    metrics = Metrics()
    stages = metrics.begin("/rank")
    stages.enter("features")
    stages.add("features", 0.0, 10.0)
    metrics.end(stages)
    assert 10.0 < stages.seconds["features"] < 11.0
    metrics.flush()
    assert lines(metrics, 'adrank_stage_duration_seconds_count{stage="features"}')[0].endswith(" 1.0")
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="cut_off"')[0].endswith(" 1.0")
