"""The charts of the reports of a training and of a retraining, as SVG. Knows numbers alone: no text of a data set is drawn."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from io import StringIO
from math import isfinite
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..retrain.compare import Interval

COLOURS = {"champion": "#8a8f98", "challenger": "#1f6feb"}
SAME, BETTER, WORSE = "#8a8f98", "#1f6feb", "#cf222e"
TEXT, SOFT, LINE, ACCENT, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Colours that a page chooses: each becomes a variable of its style."""
VARIABLES = {TEXT: "--text", SOFT: "--soft", LINE: "--line", ACCENT: "--accent", OTHER: "--other"}
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "adrank"}  # texts stay texts, and the same figures give the same file
THEMED = {
    **STYLE,
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "grid.color"), LINE),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor", "axes.labelcolor"), SOFT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "text.color": TEXT,
    "axes.prop_cycle": cycler(color=[ACCENT, OTHER]),
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
BARE = re.compile(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->|(?<=<g) id=\"[^\"]*\"", re.DOTALL)
"""What would clash with another chart of the same page, or is of no use there."""
LEAST_HEIGHT = 0.002
"""Of a learning curve: what moves less is flat, and ticks of more digits leave no room for what the axis is."""

Points = Sequence[tuple[float, float]]


def plot(points: Mapping[str, Points], differences: Mapping[str, Interval], higher: Container[str]) -> str:
    """The SVG of a comparison. `points` are (mean p(click), click rate) of bins by model; `differences` are challenger less champion.

    A metric is better where it is lower, but for those that `higher` names.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, bins in points.items():
            left.plot([p for p, _ in bins], [rate for _, rate in bins], "o-", color=COLOURS[name], label=name)
        _diagonal(left, SAME)
        left.legend()
        _differences(right, differences, higher)
        return _svg(figure)


def themed(draw: Callable[[Axes], None]) -> str:
    """A chart to stand in a page, in the colours of that page; `draw` is given its axes."""
    with mpl.rc_context(THEMED):
        figure = Figure(figsize=(4.6, 3.0))
        draw(figure.add_axes((0.175, 0.16, 0.795, 0.79)))
        figure.patch.set_visible(False)
        figure.axes[0].patch.set_visible(False)
        text = BARE.sub("", _svg(figure))
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")


def _svg(figure: Figure) -> str:
    svg = StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def learning(axes: Axes, epochs: Sequence[Mapping[str, Any]], lines: Mapping[str, str], what: str) -> None:
    """Something of the epochs, a line for each of `lines`: what it is called there, by its name in an epoch."""
    for name, label in lines.items():
        axes.plot([each["number"] for each in epochs], [np.nan if each[name] is None else each[name] for each in epochs], "o-", label=label)
    middle, half = np.mean(axes.get_ylim()), max(float(np.ptp(axes.get_ylim())) / 2, LEAST_HEIGHT / 2)
    axes.set(xlabel="epoch", ylabel=what, ylim=(middle - half, middle + half))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        axes.legend()


def curve(axes: Axes, points: Points, level: float | None, labels: tuple[str, str]) -> None:
    """A curve in the unit square, and what chance gives: the diagonal, or a `level`."""
    axes.plot([x for x, _ in points], [y for _, y in points])
    axes.axline((0, level or 0), slope=0 if level is not None else 1, color=SOFT, linestyle="--", linewidth=1)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1), ylim=(0, 1.01))


def calibrated(axes: Axes, bins: Sequence[Mapping[str, float]], head: str = "click") -> None:
    """The reliability diagram of a head, with the intervals of its rates."""
    p, rate, low, high = (np.array([each[name] for each in bins]) for name in ("p", "rate", "low", "high"))
    axes.errorbar(p, rate, [rate - low, high - rate], fmt="o-", elinewidth=1)
    _diagonal(axes, SOFT, head)


def examined(axes: Axes, places: Sequence[Mapping[str, float]]) -> None:
    """How likely each place is clicked, of the same ad, with intervals."""
    place, value, low, high = (np.array([each[name] for each in places]) for name in ("place", "examination", "low", "high"))
    axes.errorbar(place, value, [value - low, high - value], fmt="o-", elinewidth=1)
    axes.set(xlabel="place", ylabel="a click, as a share of the first place", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _diagonal(axes: Axes, colour: str, head: str = "click") -> None:
    axes.axline((0, 0), slope=1, color=colour, linestyle="--", linewidth=1)
    axes.set(xlabel=f"mean p({head}) of about a twentieth of the rows", ylabel=f"{head} rate", xlim=(0, None), ylim=(0, None))


def scores(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """How p(click) is spread over the rows that were clicked, and over the others."""
    for name, label, colour in (("clicked", "clicked", ACCENT), ("others", "not clicked", OTHER)):
        axes.stairs(shares[name], shares["edges"], label=label, color=colour, linewidth=1.6)
    axes.set(xlabel="p(click)", ylabel="share of the rows", xlim=(0, shares["edges"][-1]), ylim=(0, None))
    axes.legend()


def rates(axes: Axes, moments: Sequence[Mapping[str, float]]) -> None:
    """The click rate over time, with its intervals."""
    at = np.array([each["ts"] for each in moments]).astype("datetime64[s]")
    rate, low, high = (np.array([each[name] for each in moments]) for name in ("rate", "low", "high"))
    axes.fill_between(at, low, high, alpha=0.25, linewidth=0)
    axes.plot(at, rate)
    axes.xaxis.set_major_locator(locator := AutoDateLocator(minticks=2, maxticks=6))  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.set(ylabel="click rate", ylim=(0, None))


def _differences(axes: Axes, differences: Mapping[str, Interval], higher: Container[str]) -> None:
    """A row a metric, each to a scale of its own, 0 in its middle."""
    for row, (name, each) in enumerate(differences.items()):
        if not all(map(isfinite, (each.value, each.low, each.high))):
            axes.text(0, row, "not to be had")
            continue
        scale = max(abs(each.low), abs(each.high), abs(each.value)) or 1.0
        colour = SAME if each.covers(0) else BETTER if (each.value > 0) == (name in higher) else WORSE
        axes.hlines(row, each.low / scale, each.high / scale, color=colour, linewidth=3)
        axes.plot(each.value / scale, row, "o", color=colour)
        axes.text(0, row + 0.35, f"{each.value:+.5f} ({each.low:+.5f} to {each.high:+.5f})", ha="center")
    axes.axvline(0, color=SAME)
    axes.set(xlim=(-1.05, 1.05), ylim=(len(differences), -0.5), xticks=(), title="challenger less champion, with 95 % intervals")
    axes.set_yticks(range(len(differences)), list(differences))
