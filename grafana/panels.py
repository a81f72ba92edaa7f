"""Panels as the dashboard uses them: a title, what it tells, a unit, and queries by their legends. Knows Grafana, and nothing of adrank."""

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as query
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT, COLUMNS = 8, 24
Queries = Mapping[str, str]
"""PromQL by legend."""


def lines(title: str, about: str, unit: str, queries: Queries, limits: Sequence[float] = (), stacked: bool = False) -> timeseries.Panel:
    """A time series; dashed lines at up to three limits, each worse than the one before."""
    panel = timeseries.Panel().title(title).description(about).unit(unit).datasource(SOURCE).height(HEIGHT).span(COLUMNS // 3)
    panel.min(0).fill_opacity(30 if stacked else 0).show_points(options.VisibilityMode.NEVER)
    panel.legend(
        common.VizLegendOptions().show_legend(True).display_mode(options.LegendDisplayMode.LIST).placement(options.LegendPlacement.BOTTOM)
    )
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if limits:
        colours = {1: ("red",), 2: ("orange", "red"), 3: ("orange", "red", "dark-red")}[len(limits)]
        panel.thresholds(steps("green", *zip(limits, colours, strict=True)))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    return panel.targets(asked(queries))


def number(title: str, about: str, unit: str, queries: Queries, levels: Builder[model.ThresholdsConfig]) -> stat.Panel:
    """The newest value, coloured by level."""
    panel = stat.Panel().title(title).description(about).unit(unit).datasource(SOURCE).height(HEIGHT // 2).span(COLUMNS // 4)
    panel.thresholds(levels).color_mode(options.BigValueColorMode.BACKGROUND).reduce_options(
        common.ReduceDataOptions().calcs(["lastNotNull"])
    )
    return panel.targets(asked(queries))


def buckets(title: str, about: str, unit: str, expression: str) -> heatmap.Panel:
    """A histogram over time; `expression` gives the increase of its buckets by `le`."""
    panel = heatmap.Panel().title(title).description(about).datasource(SOURCE).height(HEIGHT).span(COLUMNS // 3).calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(options.AxisPlacement.LEFT))
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)).cell_values(
        heatmap.CellValues().unit("short")
    )
    return panel.targets(asked({"{{le}}": expression}, query.PromQueryFormat.HEATMAP))


def facts(title: str, about: str, expression: str, hidden: Sequence[str]) -> table.Panel:
    """The labels of series as rows of a table, some hidden."""
    panel = table.Panel().title(title).description(about).datasource(SOURCE).height(HEIGHT).span(COLUMNS // 3 * 2)
    exclude: dict[str, Any] = {"excludeByName": dict.fromkeys(hidden, True)}
    panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=exclude))
    target = prometheus.Dataquery().expr(expression).instant().format(query.PromQueryFormat.TABLE).ref_id("A").datasource(SOURCE)
    return panel.with_target(target)


def asked(queries: Queries, form: query.PromQueryFormat = query.PromQueryFormat.TIME_SERIES) -> list[Builder[Dataquery]]:
    """The queries as targets over time."""
    return [
        prometheus.Dataquery().expr(text).legend_format(legend).range().format(form).ref_id(chr(65 + i)).datasource(SOURCE)
        for i, (legend, text) in enumerate(queries.items())
    ]


def steps(lowest: str, *above: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Colours: the lowest, and those from a value on."""
    levels = [model.Threshold(None, lowest), *(model.Threshold(value, colour) for value, colour in above)]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(levels)


def choice(name: str, metric: str) -> dashboard.QueryVariable:
    """A variable: one, several or all of a label's values. All matches series without the label, too."""
    variable = dashboard.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(f"label_values({metric}, {name})")
    variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*").current(model.VariableOption(text="All", value="$__all"))
