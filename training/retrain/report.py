"""What a retraining came to, as JSON, as a page with its verdict in the first line, as a picture and as tables in a terminal."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import exp, inf, log
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from features.bundle import replace_file
from features.errors import AdrankError

from ..evaluate import Measures
from .compare import METRICS, Comparison, Gate, Interval
from .data_checks import Limits, PastLog, Profile, click_rate

PAGE, PICTURE, DONE = "report.md", "report.svg", "report.json"
"""In the order in which they are written: a report that has the last is whole."""
TRAINED_PAGE = "training.html"
"""Before them: the `report.html` of a challenger that was refused, which has no bundle."""
TITLES = dict(
    zip(METRICS, ("AUC", "GAUC", "log loss", "normalised entropy", "calibration error", "log of p(click) / clicks, from 0"), strict=True)
)


class ReportError(AdrankError, RuntimeError):
    """A report cannot be written; the message says where and why."""


@dataclass(frozen=True)
class Report:
    """One run of `adrank retrain`. What it did not come to is None."""

    name: str
    started: int
    """Seconds since 1970."""
    published: int | None
    """The new version."""
    champion: int | None
    """The version that was live."""
    reasons: list[str]
    """Why it was refused; empty where it was published."""
    training: dict[str, Any]
    """How it was trained: network, start, seed, settings, epochs."""
    window: Profile
    past: PastLog
    limits: Limits
    gate: Gate
    comparison: Mapping[str, Comparison] = field(default_factory=dict)
    """By head."""
    warnings: list[str] = field(default_factory=list)
    trained_page: str = ""

    @property
    def verdict(self) -> str:
        """In a line."""
        if self.published is None:
            return f"Refused {self.name}: {self.reasons[0]}" + (f" (and {len(self.reasons) - 1} more)" if self.reasons[1:] else "")
        click = self.comparison.get("click")
        if click is None or click.champion is None:
            return f"Published {self.name} {self.published}, its first version"
        loss, before = click.differences["log_loss"], click.champion.log_loss
        change = f"log loss {loss.value / before:+.2%} (95 % interval {loss.low / before:+.2%} to {loss.high / before:+.2%})"
        return f"Published {self.name} {self.published}: {change} against {self.champion}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        comparison = told(self.comparison)
        decision = {"verdict": self.verdict, "accepted": self.published is not None, "reasons": self.reasons, "warnings": self.warnings}
        model = {"name": self.name, "version": self.published, "champion": self.champion, "started": self.started}
        seen = {**self.window.as_dict(), "limits": asdict(self.limits)}
        past = {"rows": self.past.rows, "click_rate": self.past.click_rate}
        return {**decision, **model, "training": self.training, "window": seen, "before": past, "gate": asdict(self.gate), **comparison}

    def markdown(self) -> str:
        """As a page."""
        lines = [f"**{self.verdict}**", ""]
        lines += [f"- {reason}" for reason in self.reasons[1:]] + [""] * bool(self.reasons[1:])  # the verdict has the first
        lines += [f"> {warning}\n" for warning in self.warnings]
        for head, found in self.comparison.items():
            title, picture = ("## On the newest slice", ["![](report.svg)", ""]) if head == "click" else (f"### p({head})", [])
            lines += [title, "", *_markdown(METRIC_HEAD, metric_rows(found, head)), "", *picture]
        lines += ["## The window", "", *_markdown(("", "rows", "clicks", "click rate"), window_rows(self.window, self.past)), ""]
        lines += ["## The training", "", *_markdown(("", ""), [(k, str(v)) for k, v in self._training_rows()]), ""]
        return "\n".join(lines)

    def _training_rows(self) -> Iterable[tuple[str, Any]]:
        yield "started", f"{datetime.fromtimestamp(self.started, UTC):%Y-%m-%d %H:%M:%S} UTC"
        yield "live version then", self.champion or "none"
        for name, value in self.training.items():
            if not isinstance(value, dict | list):
                yield name, value
        yield "gate", ", ".join(f"{name} {value}" for name, value in asdict(self.gate).items())

    def tables(self) -> Group:
        """For a terminal, with the verdict."""
        parts: list[Any] = [_table(("", "rows", "clicks", "click rate"), window_rows(self.window, self.past))]
        parts += [_table(METRIC_HEAD, metric_rows(found, head)) for head, found in self.comparison.items()]
        parts += [*(f"note: {warning}" for warning in self.warnings), self.verdict, *(f"and: {reason}" for reason in self.reasons[1:])]
        return Group(*parts)

    def write(self, folder: Path) -> None:
        """Write the files, each whole or not at all.

        Raises:
            ReportError: the folder cannot be written.
        """
        texts = {PAGE: self.markdown(), DONE: json.dumps(self.as_dict(), indent=1)}
        if self.comparison:
            texts = {PICTURE: drawn(self.comparison["click"]), **texts}
        if self.trained_page:
            texts = {TRAINED_PAGE: self.trained_page, **texts}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (TRAINED_PAGE, PAGE, PICTURE, DONE):
                (folder / name).unlink(missing_ok=True)  # of an earlier run into the same folder
            for name, text in texts.items():
                replace_file(folder / name, text.encode())
        except OSError as error:
            raise ReportError(f"cannot write the report to {folder}: {error.strerror or error}") from error


METRIC_HEAD = ("", "champion", "challenger", "difference", "95 % interval")


def metric_rows(found: Comparison, head: str = "click") -> list[tuple[str, ...]]:
    """A row a metric of a head: champion, challenger, difference and interval."""
    rows: list[tuple[str, ...]] = []
    for name, title in TITLES.items():
        before, after = (_value(m, name) for m in (found.champion, found.challenger))
        rows.append((title.replace("click", head), before, after, *_interval(found.differences.get(name))))
    ratios = (_value(m, "calibration_ratio") for m in (found.champion, found.challenger))
    rows.append((f"p({head}) / {head}s", *ratios, "", f"{exp(found.calibration.low):.5f} to {exp(found.calibration.high):.5f}"))
    return [*rows, ("rows", "", f"{found.challenger.rows:,}", "", ""), (f"{head}s", "", f"{found.challenger.clicks:,}", "", "")]


def _value(metrics: Measures | None, name: str) -> str:
    if metrics is None:
        return ""
    if name != "calibration_distance":
        return f"{getattr(metrics, name):.5f}"
    ratio = metrics.calibration_ratio
    return f"{abs(log(ratio)) if ratio else inf:.5f}"


def _interval(found: Interval | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.value:+.5f}", f"{found.low:+.5f} to {found.high:+.5f}")


def window_rows(window: Profile, past: PastLog) -> list[tuple[str, ...]]:
    """A row a slice of the window, and what is known of before."""
    names = {"train": "to train on", "valid": "for early stopping and calibration", "test": "held out, the newest"}
    rows: list[tuple[str, ...]] = [
        (names[s], f"{n:,}", f"{window.clicks[s]:,}", f"{click_rate(window.clicks[s], n, window.negative_sampling):.2%}")
        for s, n in window.rows.items()
    ]
    if past.rows is not None:
        rows.append(("the window before", f"{past.rows:,}", "", ""))
    if past.click_rate is not None:
        rows.append(("what the live version was measured on", "", "", f"{past.click_rate:.2%}"))
    return rows


def drawn(found: Comparison) -> str:
    """The picture of a comparison."""
    from ..report.charts import plot  # noqa: PLC0415  # matplotlib takes a second to import

    return plot(found.reliability, {TITLES[name]: each for name, each in found.differences.items()}, (TITLES["auc"], TITLES["gauc"]))


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*head)
    for cells in rows:
        table.add_row(*cells)
    return table


def told(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """For JSON: the click's, and under `heads` those of other heads."""
    others = {head: each.as_dict() for head, each in found.items() if head != "click"}
    return ({**found["click"].as_dict(), **({"heads": others} if others else {})}) if found else {}


def brief(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """What a bundle's manifest keeps of a comparison."""
    kept = told(found)
    for each in (kept, *kept.get("heads", {}).values()):
        each.pop("reliability", None)
    return kept
