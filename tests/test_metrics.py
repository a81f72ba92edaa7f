"""Metrics written in bulk are those that observing one by one would give."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.telemetry import metrics as module
from service.telemetry import series
from service.telemetry.metrics import CLICKS, SECONDS, JoinMetrics, Metrics


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
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="ok",route="/rank"}')[0].endswith(f" {len(values)}.0")


def test_rows_are_written_before_they_are_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS_KEPT", 3)
    metrics = Metrics()
    for _ in range(7):
        metrics.end(metrics.begin("/livez"))
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="cut_off",route="/livez"}')[0].endswith(" 6.0")
    metrics.flush()
    metrics.flush()
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="cut_off",route="/livez"}')[0].endswith(" 7.0")


def test_stretches_of_a_stage_add_up_and_the_open_one_ends_with_the_request():
    metrics = Metrics()
    stages = metrics.begin("/rank")
    stages.enter("features")
    stages.add("features", 0.0, 10.0)
    metrics.end(stages)
    assert 10.0 < stages.seconds["features"] < 11.0
    metrics.flush()
    assert lines(metrics, 'adrank_stage_duration_seconds_count{stage="features"}')[0].endswith(" 1.0")
    assert lines(metrics, 'adrank_requests_total{model="none",outcome="cut_off",route="/rank"}')[0].endswith(" 1.0")


def test_what_is_known_beforehand_is_there_at_zero():
    metrics, joined = Metrics(), generate_latest(JoinMetrics().registry).decode()
    for name, labels in (
        ("adrank_requests_total", [f'model="none",outcome="{outcome}",route="/rank"' for outcome in series.FAULTS]),
        ("adrank_shed_total", [f'reason="{reason}"' for (reason,) in series.SHED]),
        ("adrank_degraded_total", [f'reason="{reason}",stage="{stage}"' for stage, reason in series.DEGRADED]),
        ("adrank_events_total", [f'result="{result}",type="{type_}"' for type_, result in series.EVENTS]),
        ("adrank_served_log_total", [f'result="{result}"' for (result,) in series.SERVED]),
        ("adrank_model_reload_total", [f'result="{result}"' for (result,) in series.RELOADS]),
    ):
        for label in labels:
            assert lines(metrics, f"{name}{{{label}}}") == [f"{name}{{{label}}} 0.0"]
    for kind in series.INCIDENTS:
        assert f'adrank_join_incidents_total{{kind="{kind}"}} 0.0' in joined
    assert "_created" not in joined + metrics.exposition().decode()


def test_what_a_model_and_its_challenger_can_come_to_is_there_at_zero():
    metrics = Metrics()
    metrics.model("din", "7", "CPUExecutionProvider", "f")
    metrics.challenger("din", "canary")
    assert lines(metrics, 'adrank_requests_total{model="din",outcome="deadline",route="/rank"}')[0].endswith(" 0.0")
    assert {line.rpartition(" ")[2] for line in lines(metrics, 'adrank_challenger_rollback_total{model="din"')} == {"0.0"}
    assert lines(metrics, "adrank_shadow_difference_count") == []
    metrics.challenger("din", "shadow")
    assert lines(metrics, "adrank_shadow_difference_count")[0].endswith(" 0.0")


def test_the_age_of_a_version_is_told_by_its_number():
    metrics = Metrics()
    metrics.live("din", 20251122083000)
    metrics.live("odd", 7)
    metrics.live("gone", 20251122083000)
    metrics.live("gone", None)
    (line,) = lines(metrics, "adrank_model_version_timestamp_seconds")
    assert line.startswith('adrank_model_version_timestamp_seconds{model="din"} ')
    assert float(line.split()[1]) == 1_763_800_200
