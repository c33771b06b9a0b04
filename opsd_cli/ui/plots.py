"""Charts as SVG for a page, drawn by matplotlib. Colours are those of the page's style sheet, so that one picture suits
a light and a dark page; text stays text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opsd_cli.insight.charts import Chart, Series, moving_mean

COLOURS = 8  # variables --c0 ... --c7 of the style sheet
LEGEND_AT_MOST = 8  # names beside the lines; more would hide them

# Stand-ins that matplotlib accepts and that occur nowhere else.
_TEXT, _GRID = "#0a0b0c", "#0a0b0d"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "opsd",
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify_threshold": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _GRID),
}


def svg(chart: Chart, *, width: float = 5.2, height: float = 2.7) -> str:
    """The chart as an SVG element, `width` by `height` inches of 100 pixels, that scales with its place."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        _DRAW[chart.kind](axes, chart.series)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.grid(visible=True, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if chart.x_names:
            axes.set_xticks(range(len(chart.x_names)), [name[:24] for name in chart.x_names])
        elif chart.logarithmic_x:
            axes.set_xscale("log")
        elif chart.kind != "dots":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 1 < len(chart.series) <= LEGEND_AT_MOST:
            axes.legend(frameon=False, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_a_page(
        text.getvalue(), label=f"{chart.title}: {', '.join(series.label for series in chart.series[:12])}"
    )


def _lines(axes: Axes, all_series: Sequence[Series]) -> None:
    crowded = len(all_series) > LEGEND_AT_MOST
    for place, series in enumerate(all_series):
        colour = _colour(place)
        marker = "o" if len(series.x) < 12 and not crowded else ""
        values = list(series.y)
        if series.low is not None and series.high is not None:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
        if series.smooth and len(values) >= 12:
            if not crowded:
                axes.plot(series.x, values, color=colour, linewidth=0.8, alpha=0.3)
            values = moving_mean(values)
        axes.plot(
            series.x, values, color=colour, label=series.label, marker=marker, markersize=3.5,
            linewidth=0.9 if crowded else 1.5,
        )  # fmt: skip


def _stack(axes: Axes, all_series: Sequence[Series]) -> None:
    colours = [_colour(place) for place in range(len(all_series))]
    labels = [series.label for series in all_series]
    axes.stackplot(all_series[0].x, *(series.y for series in all_series), labels=labels, colors=colours, alpha=0.75)


def _dots(axes: Axes, all_series: Sequence[Series]) -> None:
    for place, series in enumerate(all_series):
        errors = None
        if series.low is not None and series.high is not None:
            errors = [
                [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)],
                [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)],
            ]
        axes.errorbar(series.x, series.y, yerr=errors, fmt="o", color=_colour(place), markersize=5, linewidth=1)


_DRAW = {"line": _lines, "stack": _stack, "dots": _dots}


def _colour(place: int) -> str:
    return f"#0a0c{place % COLOURS:02x}"


def _for_a_page(document: str, *, label: str) -> str:
    """Only the element: with the page's colours, without a size of its own, and with the names of groups, which would
    occur twice on a page, left out."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", element)  # m..., p...: markers and clips, which are used
    element = re.sub(r"font-family: [^;\"]*;? ?", "", element)
    element = element.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
    element = re.sub(r"#0a0c0([0-7])", r"var(--c\1)", element)
    box = re.search(r'viewBox="([^"]*)"', element)
    assert box is not None
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">'
    element = opening + element[element.index(">") + 1 :]
    places = re.compile(r'(?<= d=")[^"]*|(?<= [xy]=")[^"]*')  # a hundredth of a point is enough for them
    element = places.sub(lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), element)
    return re.sub(r"\n\s*", "\n", element)
