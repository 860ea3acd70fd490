"""The HTML page and its line charts as SVG, drawn by matplotlib (extra `plot`), imported when it is used.

Scores over a logarithmic axis of tokens or FLOPs, or over the values of an ablation. Published points are
open rings on dashed lines, measured points are filled dots on solid lines with 95% intervals as whiskers.
Every method has one color on all pages. A page is one file that loads nothing from elsewhere.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from llava.eval.tables.published import METHODS

# of further methods and ratios, as far as they are free
_SPARE = ("#56b4e9", "#8c6d1f", "#cc79a7", "#009e73", "#e69f00", "#882255", "#44aa99", "#999933")
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # of lines that are not methods
SMALL = (3.9, 2.7)  # size of charts of single benchmarks
NO_PLOTS = "This page has no plots because matplotlib is not installed: pip install 'vispruner[plot]'"


class ChartPoint(NamedTuple):
    """A point of the line `name`; x > 0 on a logarithmic axis; without an interval its ends are None."""

    name: str
    x: float
    y: float
    ci_low: float | None = None
    ci_high: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class Chart:
    """What a chart shows. `ticks` of the x axis default to round numbers; `level` is a dotted line.

    `scale` of the x axis: "log", "linear", or "names": the ticks are the texts `names`, and points of
    different names are not joined.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[ChartPoint]
    ticks: Sequence[float] | None = None
    level: float | None = None
    size: tuple[float, float] = (5.4, 3.5)  # inches of 96 pixels
    scale: str = "log"
    names: Sequence[str] = ()


def method_label(method: str, ratio: float | None) -> str:
    """Return a method as papers write it, with the ratio if there is one to name."""
    name = METHODS[method][0] if method in METHODS else method
    return name if ratio is None else f"{name} (r = {ratio:g})"


def method_colors(settings: Iterable[tuple[str, float | None]]) -> dict[str, str]:
    """Choose a color for every label of (method, ratio); a method's first ratio has the method's color."""
    labels = {method_label(*setting): setting[0] for setting in settings}
    own = {method: label for label, method in reversed(labels.items()) if method in METHODS}
    found = {label: METHODS[method][1] for method, label in own.items()}
    for label in labels:
        if label not in found:
            found[label] = next((color for color in _SPARE if color not in found.values()), "#7f7f7f")
    return {label: found[label] for label in labels}


def line_colors(names: Sequence[str]) -> dict[str, str]:
    """Choose a color for lines that are not methods, such as budgets."""
    return {name: _LINES[place % len(_LINES)] for place, name in enumerate(names)}


def html_page(title: str, parts: Sequence[str]) -> str:
    """Fill `page.html` with this heading and HTML parts; without matplotlib, warn and name the extra."""
    body = list(parts)
    if find_spec("matplotlib") is None:
        print(f"warning: {NO_PLOTS}", file=sys.stderr)
        body.insert(0, f'<p class="notes">{escape(NO_PLOTS)}</p>')
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), body="\n".join(body))


def charts_html(charts: Sequence[Chart], colors: Mapping[str, str], note: str) -> str:
    """Draw charts under one legend and above a note; return "" without charts or without matplotlib."""
    charts = [chart for chart in charts if chart.points]
    if not charts or find_spec("matplotlib") is None:
        return ""
    points = [point for chart in charts for point in chart.points]
    shown = [name for name in colors if name in {point.name for point in points}]
    legend = "\n".join(
        f'<span><b style="color:{colors[name]}">&#9679;</b> {escape(name)}</span>' for name in shown
    )
    if not all(point.measured for point in points):
        legend += "\n<span>&#9679; measured, solid</span> <span>&#9675; published, dashed</span>"
    drawn = "\n".join(draw(chart, colors) for chart in charts)
    parts = [f'<p class="legend">{legend}</p>', f'<div class="charts">{drawn}</div>']
    return "\n".join([*parts, f'<p class="notes">{escape(note)}</p>'])


def draw(chart: Chart, colors: Mapping[str, str], legend: bool = False) -> str:
    """Draw a chart as an SVG element; the same chart always gives the same text.

    Args:
        legend: Name the lines in the chart, which is then complete as a file of its own.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style = {"font.size": 9, "font.sans-serif": ["DejaVu Sans", "Arial"]}
    style |= {"svg.fonttype": "none", "svg.hashsalt": chart.title}  # text stays text
    style |= {"text.parse_math": False}  # also with dollar signs
    with matplotlib.rc_context(style):
        figure = Figure(figsize=chart.size, dpi=96, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title, loc="left", fontweight="bold", fontsize=10)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_xscale("log" if chart.scale == "log" else "linear")
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if chart.level is not None:
            axes.axhline(chart.level, color="#444444", linestyle=":", linewidth=1)
        texts = _draw_lines(axes, chart, colors)
        if chart.scale == "log":
            _set_ticks(axes, chart.ticks)
        elif chart.ticks is not None:
            names = [name.replace(", ", ",\n") for name in chart.names]  # short enough for a tick
            axes.set_xticks(chart.ticks, names or [f"{tick:g}" for tick in chart.ticks])
        if chart.names:
            axes.set_xlim(-0.4, len(chart.names) - 0.6)
        if legend:
            shown = [name for name in colors if name in {point.name for point in chart.points}]
            marks = [Line2D([], [], color=colors[name], marker="o") for name in shown]
            place = {"loc": "outside lower center", "ncols": len(shown)}
            figure.legend(marks, shown, frameon=False, fontsize=8, **place)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = out.getvalue()  # in a page: without prolog and ids, with texts to point at
    svg = svg[svg.index("<svg") :].replace(">", f' role="img">\n<title>{escape(chart.title)}</title>', 1)
    svg = re.sub(r' id="point_(\d+)">', lambda found: f"><title>{escape(texts[int(found[1])])}</title>", svg)
    return re.sub(r' id="[\w.]+[-_]\d+"', "", svg)


def _draw_lines(axes: Any, chart: Chart, colors: Mapping[str, str]) -> list[str]:
    """Draw all lines, measured ones on top; return the text of the elements point_0, point_1, ..."""
    texts: list[str] = []
    points, is_log = chart.points, chart.scale == "log"
    least, most = min(point.x for point in points), max(point.x for point in points)
    spread = 0.012 * (math.log(most / least) if is_log else most - least)
    spread = max(spread, 0.06) if chart.scale == "names" else spread
    lines: dict[tuple[bool, str], list[ChartPoint]] = {}
    for point in sorted(points, key=lambda point: point.measured):
        lines.setdefault((point.measured, point.name), []).append(point)
    whiskers = {(point.measured, point.name, point.x) for point in points if point.ci_low is not None}
    for (measured, name), line in lines.items():
        line.sort(key=lambda point: (point.x, point.y))
        color, xs = colors[name], []
        for point in line:
            xs.append(point.x)
            if point.ci_low is not None:  # whiskers at one x are drawn side by side
                same = [key for key in lines if (*key, point.x) in whiskers]
                shift = spread * (same.index((measured, name)) - (len(same) - 1) / 2)
                xs[-1] = xs[-1] * math.exp(shift) if is_log else xs[-1] + shift
                axes.plot([xs[-1]] * 2, [point.ci_low, point.ci_high], color=color, linewidth=1.2)
        dashes = {"linewidth": 1.8} if measured else {"linewidth": 1.2, "dashes": (4, 3)}
        if chart.scale != "names":
            axes.plot(xs, [point.y for point in line], color=color, **dashes)
        marker = {"markersize": 5} if measured else {"markersize": 7.5, "markerfacecolor": "white"}
        for x, point in zip(xs, line, strict=True):
            gid = f"point_{len(texts)}"
            axes.plot(x, point.y, color=color, marker="o", markeredgewidth=1.2, gid=gid, **marker)
            place = chart.names[int(point.x)] if chart.names else f"{point.x:.4g}"
            texts.append(f"{name}, {'measured' if measured else 'published'}: {place}, {point.y:.2f}")
    return texts


def _set_ticks(axes: Any, ticks: Sequence[float] | None) -> None:
    from matplotlib.ticker import LogLocator

    low, high = axes.get_xlim()
    kept: list[float] = []
    for tick in sorted(ticks or LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)).tick_values(low, high)):
        if low <= tick <= high and math.log(tick / (kept or [1e-9])[-1]) > 0.07 * math.log(high / low):
            kept.append(tick)  # labels do not overlap
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.minorticks_off()
