"""The rows about what is learned from: predictions, models, catalogue, events, and the log."""

from collections.abc import Sequence

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

from .panels import buckets, facts, lines, steps
from .queries import JOB, JOINER, MODEL, RANKER, grown, mean, quantile, rate

Panels = Sequence[Builder[model.Panel]]


def predictions() -> Panels:
    """Whether p(click) is a probability still."""
    ratio = "Sum of p(click) over clicks: 1 is right, 2 predicts twice too many. From the joiner, by what it has written."
    by_model = {
        "{{model}}, last hour": f"model:adrank_calibration:ratio_rate1h{{{MODEL}}}",
        "{{model}}, last rows": f"adrank_calibration_ratio{{{MODEL}}}",
    }
    by_place = {"{{model}} at {{position}}": f"adrank_position_calibration_ratio{{{MODEL}}}"}
    entropy = "Log loss over that of a model that always says the mean: below 1 is better than nothing."
    chosen = f'{RANKER}, model=~"$model"'
    drifted = {"{{model}} {{field}}": f"max by (model, field) (adrank_field_drift_psi{{{MODEL}}})"}
    return (
        buckets("p(click)", "Of all candidates that were ranked.", "percentunit", grown("adrank_p_click", chosen)),
        lines(
            "Mean p(click)",
            "Of all candidates that were ranked.",
            "percentunit",
            {"{{model}}": mean("adrank_p_click", "model", where=chosen)},
        ),
        lines("Calibration", ratio, "short", by_model, (0.8, 1.25)).thresholds(steps("red", (0.8, "green"), (1.25, "red"))),
        lines("Calibration by position", ratio, "short", by_place, (0.67, 1.5)).thresholds(steps("red", (0.67, "green"), (1.5, "red"))),
        lines("Normalised entropy", entropy, "short", {"{{model}}": f"adrank_normalised_entropy{{{MODEL}}}"}, (1,)),
        lines(
            "Drift by field",
            "Population stability index against the training data; above 0.25 much has changed.",
            "short",
            drifted,
            (0.1, 0.25),
        ),
    )


def models() -> Panels:
    """Which versions are at work, and how a challenger does."""
    age = {"{{model}}": f'time() - max by (model) (adrank_model_version_timestamp_seconds{{{JOB}, model=~"$model"}})'}
    loaded = {"{{model}} on {{instance}}": f'time() - adrank_model_loaded_timestamp_seconds{{{RANKER}, model=~"$model"}}'}
    apart = {f"{{{{model}}}} p{q:.0f}": quantile(q / 100, "adrank_shadow_difference", "model") for q in (50, 99)}
    stopped = {"{{model}} {{reason}}": f"sum by (model, reason) (increase(adrank_challenger_rollback_total{{{RANKER}}}[1h]))"}
    return (
        facts(
            "Versions",
            "Of live models and challengers, by instance.",
            f'adrank_model_info{{{RANKER}, model=~"$model"}}',
            ("Time", "Value", "__name__"),
        ),
        lines("Age of the live version", "Since it was made; three days is a warning.", "s", age, (259_200,)),
        lines("Since a model was loaded", "A drop is a swap, or a restart.", "s", loaded),
        lines(
            "Loaded, refused, let go of",
            "Versions, an hour.",
            "short",
            {"{{result}}": f"sum by (result) (increase(adrank_model_reload_total{{{RANKER}}}[1h]))"},
        ),
        lines(
            "Challenger",
            "Requests by what became of them.",
            "reqps",
            {"{{model}} {{mode}} {{outcome}}": rate("adrank_challenger_requests_total", "model", "mode", "outcome")},
        ),
        lines("Shadow", "By how much its p(click) differs from what was answered.", "percentunit", apart),
        lines("Challengers stopped", "In an hour, by the bound that was left.", "short", stopped),
    )


def catalogue() -> Panels:
    """The ads, and what comes in about them and their users."""
    rejected = {"{{job}}": f"job:adrank_events_rejected:ratio_rate5m{{{JOB}}}"}
    return (
        lines("Ads", "Active ones in the catalogue, by instance.", "short", {"{{instance}}": f"adrank_catalogue_ads{{{RANKER}}}"}),
        lines(
            "Lag of the catalogue",
            "Since it was last in step with the store.",
            "s",
            {"{{instance}}": f"adrank_catalogue_lag_seconds{{{RANKER}}}"},
            (60,),
        ),
        lines("Events", "What became of them, or why they were refused.", "short", {"{{result}}": rate("adrank_events_total", "result")}),
        lines("Events taken", "By type.", "short", {"{{type}}": rate("adrank_events_total", "type", where=f'{RANKER}, result="accepted"')}),
        lines("Events refused", "The share; senders were told why.", "percentunit", rejected, (0.05,)),
    )


def log() -> Panels:
    """What is logged, and how the joiner keeps up."""
    written = {f"{what} of {{{{model}}}}": rate(f"adrank_join_{what}_total", "model", where=MODEL) for what in ("rankings", "impressions")}
    events = {"{{type}} {{outcome}}": rate("adrank_join_events_total", "type", "outcome", where=JOINER)}
    incidents = {"{{kind}}": f"sum by (kind) (increase(adrank_join_incidents_total{{{JOINER}}}[15m]))"}
    dropped = {"{{job}}": f"job:adrank_served_log_dropped:ratio_rate5m{{{JOB}}}"}
    return (
        lines(
            "Rankings logged",
            "By what became of their records.",
            "reqps",
            {"{{result}}": rate("adrank_served_log_total", "result")},
            stacked=True,
        ),
        lines("Not logged", "The share that was dropped or failed.", "percentunit", dropped, (0.01,)),
        lines("Records that wait", "To be written, by instance.", "short", {"{{instance}}": f"adrank_served_log_queue{{{RANKER}}}"}),
        lines(
            "Lag of the joiner",
            "Age of the oldest entry of each stream.",
            "s",
            {"{{stream}}": f"adrank_join_lag_seconds{{{JOINER}}}"},
            (600,),
        ),
        lines("Backlog of the joiner", "Entries of each stream.", "short", {"{{stream}}": f"adrank_join_backlog{{{JOINER}}}"}),
        lines("Written to the log", "A ranking becomes one impression for each ad shown.", "short", written),
        lines("Events joined", "Or why not; docs/log.md says what the words mean.", "short", events),
        lines("What should not happen", "In 15 minutes, by kind; docs/log.md says what comes of each.", "short", incidents),
    )
