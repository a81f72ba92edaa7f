"""A training's report as a page: `page.html` of this folder, filled. Whatever comes from a data set is text there, never markup."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import charts

MEASURES = ("auc", "gauc", "log_loss", "normalised_entropy", "calibration_error", "calibration_ratio", "rows", "clicks")


def page(found: Mapping[str, Any]) -> str:
    """The page of what `numbers.findings` found."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"number": number, "share": share}
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return pages.get_template("page.html").render(found, measures=MEASURES, charts=drawn(found), when=when)


def drawn(found: Mapping[str, Any]) -> dict[str, Markup]:
    """The charts, by their names in the page."""
    rate = found["metrics"]["test"]["clicks"] / found["metrics"]["test"]["rows"]
    losses, areas = {"train_loss": "train", "valid_loss": "valid"}, {"valid_auc": "valid"}
    draw = {
        "losses": partial(charts.learning, epochs=found["epochs"], lines=losses, what="log loss"),
        "areas": partial(charts.learning, epochs=found["epochs"], lines=areas, what="AUC"),
        "roc": partial(charts.curve, points=found["roc"], level=None, labels=("false positive rate", "true positive rate")),
        "recall": partial(charts.curve, points=found["precision_recall"], level=rate, labels=("recall", "precision")),
        "reliability": partial(charts.calibrated, bins=found["reliability"]),
        "scores": partial(charts.scores, shares=found["scores"]),
        "examination": partial(charts.examined, places=found["examination"]),
        "moments": partial(charts.rates, moments=found["moments"]),
    }
    draw |= {f"p({head})": partial(charts.calibrated, bins=bins, head=head) for head, bins in found["heads"].items()}
    return {name: Markup(charts.themed(each)) for name, each in draw.items() if found.get(name, True)}  # noqa: S704  # of numbers alone


def number(value: float | None) -> str:
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{value:.2%}"
