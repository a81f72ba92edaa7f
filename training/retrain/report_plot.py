"""The picture of a report, as an SVG: how p(click) and click rate agree, and each difference with its interval."""

from collections.abc import Container, Mapping, Sequence
from math import isfinite

from .compare import Interval

WIDTH, HEIGHT, SIDE, LEFT, TOP = 980, 420, 300, 70, 60
COLOURS = {"champion": "#8a8f98", "challenger": "#1f6feb"}
SAME, BETTER, WORSE = "#8a8f98", "#1f6feb", "#cf222e"
FONT = 'font-family="system-ui, sans-serif" font-size="13" fill="#24292f"'
FOREST, ROW = (650, 290), 48
"""Left end and width of the differences' axis; the height of each."""


def picture(reliability: Mapping[str, Sequence[tuple[float, float]]], differences: Mapping[str, Interval], higher: Container[str]) -> str:
    """The SVG's text. `reliability` has (mean p(click), click rate) of bins by model; `differences` are challenger less champion.

    A metric is better where it is lower, but for those that `higher` names.
    """
    rows = enumerate(differences.items())
    parts = [_reliability(reliability), *(_difference(i, name, each, name in higher) for i, (name, each) in rows)]
    if differences:
        parts.insert(1, _text(FOREST[0], TOP - 22, "challenger less champion, with 95 % intervals", "middle", FOREST[1] / 2))
    body = "\n".join(parts)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "start", shift: float = 0) -> str:
    return f'<text x="{x + shift:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT}>{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _reliability(models: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    top = max((value for bins in models.values() for point in bins for value in point), default=0.0) * 1.05 or 1.0
    axis, bottom = 'stroke="#d0d7de"', TOP + SIDE
    parts = [f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" {axis}/>']
    parts.append(_line(LEFT, bottom, LEFT + SIDE, TOP, 'stroke="#8a8f98" stroke-dasharray="4 4"'))
    for share in (0.0, 0.5, 1.0):
        parts.append(_text(LEFT + share * SIDE, bottom + 18, f"{share * top:.3g}", "middle"))
        parts.append(_text(LEFT - 8, bottom - share * SIDE + 4, f"{share * top:.3g}", "end"))
    parts.append(_text(LEFT + SIDE / 2, bottom + 40, "mean p(click) of about a twentieth of the rows", "middle"))
    parts.append(_text(LEFT, TOP - 22, "click rate"))
    for i, (name, bins) in enumerate(models.items()):
        points = [(LEFT + p / top * SIDE, bottom - rate / top * SIDE) for p, rate in bins]
        colour = COLOURS[name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(f'<circle cx="{LEFT + 16}" cy="{TOP + 18 + 20 * i}" r="4" fill="{colour}"/>')
        parts.append(_text(LEFT + 28, TOP + 22 + 20 * i, name))
    return "\n".join(parts)


def _difference(i: int, name: str, each: Interval, higher: bool) -> str:
    """A row on an axis of its own, 0 in its middle."""
    (left, width), y = FOREST, TOP + 20 + ROW * i
    middle = left + width / 2
    parts = [_text(left - 14, y + 5, name, "end"), _line(middle, y - 12, middle, y + 12, 'stroke="#8a8f98"')]
    if not all(map(isfinite, (each.value, each.low, each.high))):
        return "\n".join([*parts, _text(middle + 8, y + 5, "not to be had")])
    scale = width / 2 / (max(abs(each.low), abs(each.high), abs(each.value)) * 1.05 or 1.0)
    low, value, high = (middle + v * scale for v in (each.low, each.value, each.high))
    colour = SAME if each.covers(0) else BETTER if (each.value > 0) == higher else WORSE
    parts.append(_line(low, y, high, y, f'stroke="{colour}" stroke-width="3"'))
    parts.append(f'<circle cx="{value:.1f}" cy="{y}" r="5" fill="{colour}"/>')
    return "\n".join([*parts, _text(middle, y + 24, f"{each.value:+.5f} ({each.low:+.5f} to {each.high:+.5f})", "middle")])
