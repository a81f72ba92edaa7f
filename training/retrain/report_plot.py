"""The plot of a report, as an SVG: how p(click) and click rate agree, and each difference with its interval."""

from collections.abc import Container, Mapping, Sequence
from io import StringIO
from math import isfinite

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare import Interval

COLOURS = {"champion": "#8a8f98", "challenger": "#1f6feb"}
SAME, BETTER, WORSE = "#8a8f98", "#1f6feb", "#cf222e"


def plot(reliability: Mapping[str, Sequence[tuple[float, float]]], differences: Mapping[str, Interval], higher: Container[str]) -> str:
    """The SVG's text. `reliability` has (mean p(click), click rate) of bins by model; `differences` are challenger less champion.

    A metric is better where it is lower, but for those that `higher` names.
    """
    svg = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adrank"}):  # texts stay texts, and the same figures give the same file
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _reliability(left, reliability)
        _differences(right, differences, higher)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _reliability(axes: Axes, models: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, bins in models.items():
        axes.plot([p for p, _ in bins], [rate for _, rate in bins], "o-", color=COLOURS[name], label=name)
    axes.axline((0, 0), slope=1, color=SAME, linestyle="--")
    axes.set(xlabel="mean p(click) of about a twentieth of the rows", ylabel="click rate", xlim=(0, None), ylim=(0, None))
    axes.legend()


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
