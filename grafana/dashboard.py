"""The dashboard: python -m grafana.dashboard writes grafana/dashboards/adrank.json.

Series of rules (`job:…`) are by job; `$instance` chooses among those that are asked for here. What fields mean is said in
docs/log.md and docs/runbook.md; thresholds are the bounds of the alerts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from .learning import catalogue, log, models, predictions
from .panels import SOURCE, choice
from .queries import JOB
from .serving import Panels, latency, objectives, ranked, traffic

TARGET = Path(__file__).parent / "dashboards" / "adrank.json"
ROWS: Mapping[str, Callable[[], Panels]] = {
    "Objectives": objectives,
    "Traffic": traffic,
    "Latency": latency,
    "What is ranked": ranked,
    "Predictions": predictions,
    "Models": models,
    "Catalogue and events": catalogue,
    "Log and joiner": log,
}


def build() -> model.Dashboard:
    """All of it."""
    board = dashboard.Dashboard("adrank").uid("adrank").tags(["adrank"]).refresh("30s").time("now-3h", "now").timezone("browser")
    board.description("What adrank ranks, how fast and how well. Generated: see grafana/dashboard.py.").tooltip(
        model.DashboardCursorSync.CROSSHAIR
    )
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    board.with_variable(choice("namespace", "adrank_inflight_requests"))
    board.with_variable(choice("job", 'adrank_inflight_requests{namespace=~"$namespace"}'))
    board.with_variable(choice("instance", f"adrank_inflight_requests{{{JOB}}}"))
    board.with_variable(choice("model", f"adrank_model_info{{{JOB}}}"))
    swaps = f"changes(adrank_model_loaded_timestamp_seconds{{{JOB}}}[2m]) > 0"
    board.annotation(dashboard.AnnotationQuery().name("Models loaded").datasource(SOURCE).enable(True).icon_color("blue").expr(swaps))
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title))
        for panel in panels():
            board.with_panel(panel)
    built = board.build()
    for place, built_panel in enumerate(built.panels or (), 1):
        built_panel.id_val = place
    return built


def text() -> str:
    """As it is written."""
    return JSONEncoder(indent=2, sort_keys=True).encode(build()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
