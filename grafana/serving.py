"""The rows about rankings: whether the objectives are met, what is asked, how long it takes, what is ranked."""

from collections.abc import Sequence

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

from .panels import buckets, lines, number, steps
from .queries import JOB, RANKER, RANKING, grown, mean, quantile, rate, share

Panels = Sequence[Builder[model.Panel]]
FAST_ENOUGH = 0.05
"""The latency objective in seconds, as prometheus/rules.yml has it."""


def objectives() -> Panels:
    """Whether the objectives are met, and how fast what they allow is used up."""
    burns = {name: f"job:adrank_{name}_burn:rate{{}}{{{{{JOB}}}}}" for name in ("availability", "latency")}
    windows = ("5m", "1h", "6h", "3d")
    spent = "The objective allows 1 over 30 days. 14.4 over an hour, or 6 over six, wakes somebody."
    kept = "1 - job:adrank_{0}_burn:rate1h{{{1}}} * (1 - scalar(adrank:{0}:objective))"
    return (
        number(
            "Answered",
            "Of the rankings of the last hour that callers did not get wrong themselves.",
            "percentunit",
            {"{{job}}": kept.format("availability", JOB)},
            steps("red", (0.99, "orange"), (0.999, "green")),
        ).decimals(3),
        number(
            "Answered within 50 ms",
            "Of the answers of the last hour.",
            "percentunit",
            {"{{job}}": kept.format("latency", JOB)},
            steps("red", (0.95, "orange"), (0.99, "green")),
        ).decimals(2),
        number("Rankings", "Asked for, a second.", "reqps", {"{{job}}": f"job:adrank_rankings:rate5m{{{JOB}}}"}, steps("blue")),
        number(
            "Alerts",
            "That fire now; the Alerts page of Prometheus names them, docs/runbook.md says what to do.",
            "short",
            {"firing": 'count(ALERTS{alertname=~"Adrank.*", alertstate="firing"}) or vector(0)'},
            steps("green", (1, "red")),
        ),
        lines(
            "Failed: how fast the budget is spent",
            spent,
            "short",
            {f"{{{{job}}}} {w}": burns["availability"].format(w) for w in windows},
            (1, 6, 14.4),
        ).span(12),
        lines(
            "Slow: how fast the budget is spent",
            spent,
            "short",
            {f"{{{{job}}}} {w}": burns["latency"].format(w) for w in windows},
            (1, 6, 14.4),
        ).span(12),
    )


def traffic() -> Panels:
    """What is asked, and what becomes of it."""
    refused = f"job_reason:adrank_shed:ratio_rate5m{{{JOB}}}"
    without = f"job_stage:adrank_degraded:ratio_rate5m{{{JOB}}}"
    outcomes = "ok, or the code of the error. The objective counts cut_off, deadline, not_ready, over_limit, scoring_failed and unexpected."
    reasons = "Why they did; store_… is Redis."
    return (
        lines(
            "Rankings by outcome", outcomes, "reqps", {"{{outcome}}": rate("adrank_requests_total", "outcome", where=RANKING)}, stacked=True
        ),
        lines(
            "Requests by route",
            "All that was asked for, probes and scrapes too.",
            "reqps",
            {"{{route}}": rate("adrank_requests_total", "route")},
        ),
        lines(
            "Under way",
            "Rankings at this moment, by instance.",
            "short",
            {"{{instance}}": f"sum by (instance) (adrank_inflight_requests{{{RANKER}}})"},
        ),
        lines("Refused", "The share of rankings that were shed at once.", "percentunit", {"{{job}} {{reason}}": refused}, (0.01,)),
        lines("Degraded", "The share of answers that did without something.", "percentunit", {"{{job}} {{stage}}": without}, (0.05,)),
        lines("Degraded by reason", reasons, "reqps", {"{{stage}} {{reason}}": rate("adrank_degraded_total", "stage", "reason")}),
    )


def latency() -> Panels:
    """Where the time goes."""
    routes = f'{{{JOB}, route=~"/rank|/v1/rank|/v1/events"}}'
    total = "adrank_request_duration_seconds"
    answered = f'{RANKING}, outcome="ok"'
    spent = share(rate("adrank_stage_duration_seconds_sum", "stage"), rate(f"{total}_count", where=answered))
    return (
        lines(
            "Latency by route",
            "Answers that went well; the line is the objective.",
            "s",
            {f"{{{{job}}}} {{{{route}}}} {q}": f"job_route:{total}:{q}_rate5m{routes}" for q in ("p50", "p95", "p99")},
            (FAST_ENOUGH,),
        ),
        buckets("Latency of rankings", "How many answers took how long.", "s", grown(total, answered)),
        lines(
            "p99 by instance",
            "One that is slower than the others is the machine's.",
            "s",
            {"{{instance}}": quantile(0.99, total, "instance", where=answered)},
            (FAST_ENOUGH,),
        ),
        lines(
            "Stages, p99",
            "queue is the wait for a processor.",
            "s",
            {"{{job}} {{stage}}": f"job_stage:adrank_stage_duration_seconds:p99_rate5m{{{JOB}}}"},
        ),
        lines(
            "Stages, median",
            "features is Redis and encoding.",
            "s",
            {"{{job}} {{stage}}": f"job_stage:adrank_stage_duration_seconds:p50_rate5m{{{JOB}}}"},
        ),
        lines("Stages of a mean ranking", "Time of each stage an answer; together, the mean.", "s", {"{{stage}}": spent}, stacked=True),
    )


def ranked() -> Panels:
    """What is ranked, and with what."""
    batches = {"rows of a batch": mean("adrank_batch_rows"), "batches a second ({{reason}})": rate("adrank_batch_flush_total", "reason")}
    lookups = "adrank_feature_lookups_total"
    found = share(rate(lookups, "group", "result"), rate(lookups, "group"), "group")
    return (
        buckets("Candidates", "Of a request.", "short", grown("adrank_candidates")),
        buckets(
            "Rows scored together",
            "On a device (--device cuda) only; a processor scores request by request.",
            "short",
            grown("adrank_batch_rows"),
        ),
        lines("Batches", "Their mean size, and why they began: full, timer, deadline, or the device was idle.", "short", batches),
        lines("Found", "Shares of users in the store and of candidates in the catalogue.", "percentunit", {"{{group}} {{result}}": found}),
        lines(
            "Not found",
            "The same shares as the alert on unknown ads sees them; the line is its bound for ads.",
            "percentunit",
            {"{{job}} {{group}}": f"job_group:adrank_feature_lookups_missed:ratio_rate5m{{{JOB}}}"},
            (0.2,),
        ),
        buckets("History", "Behaviours that a request is ranked with.", "short", grown("adrank_history_length")),
    )
