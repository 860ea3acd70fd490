"""Line charts as SVG for the pages, drawn by matplotlib (extra `plot`), which is imported when it is used.

Scores over a logarithmic axis of tokens or FLOPs. Published points are open rings on dashed lines, measured
points are filled dots on solid lines with 95% intervals as whiskers. Every method has one color on all pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from xml.etree import ElementTree

# Names as papers write them. The colors are those of Okabe and Ito, which most color-blind people can tell
# apart, and some darker ones.
METHODS = {
    "none": ("All tokens", "#222222"),
    "vispruner": ("VisPruner", "#0072b2"),
    "fastv": ("FastV", "#cc79a7"),
    "tome": ("ToMe", "#009e73"),
    "sparsevlm": ("SparseVLM", "#e69f00"),
    "prumerge+": ("PruMerge+", "#56b4e9"),
    "visionzip": ("VisionZip", "#8c6d1f"),
    "fastervlm": ("FasterVLM", "#d55e00"),
    "random": ("Random", "#4b3fa0"),
    "prumerge": ("PruMerge", "#b00020"),
}
# of further methods and ratios, as far as they are free
_SPARE = ("#56b4e9", "#8c6d1f", "#cc79a7", "#009e73", "#e69f00", "#882255", "#44aa99", "#999933")
_GREY = "#7f7f7f"  # of what is left
SMALL = (3.9, 2.7)  # size of charts of single benchmarks
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Series:
    """Points (x, y, ci_low, ci_high) of one method; x > 0; None where there is no interval."""

    name: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    measured: bool = True


@dataclass(frozen=True)
class Chart:
    """What a chart shows. `ticks` of the x axis default to round numbers; `level` is a dotted line."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[float] | None = None
    level: float | None = None
    size: tuple[float, float] = (5.4, 3.5)  # inches of 96 pixels


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
            found[label] = next((color for color in _SPARE if color not in found.values()), _GREY)
    return {label: found[label] for label in labels}


def has_matplotlib() -> bool:
    """True if plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def charts_html(charts: Sequence[Chart], colors: Mapping[str, str], note: str) -> str:
    """Draw charts under one legend and above a note; return "" without charts or without matplotlib."""
    charts = [chart for chart in charts if chart.series]
    if not charts or not has_matplotlib():
        return ""
    series = [one for chart in charts for one in chart.series]
    shown = [name for name in colors if name in {one.name for one in series}]
    legend = "\n".join(
        f'<span><b style="color:{colors[name]}">&#9679;</b> {escape(name)}</span>' for name in shown
    )
    if not all(one.measured for one in series):
        legend += "\n<span>&#9679; measured, solid</span> <span>&#9675; published, dashed</span>"
    drawn = "\n".join(draw(chart, colors) for chart in charts)
    return f'<p class="legend">{legend}</p>\n<div class="charts">{drawn}</div>\n<p class="notes">{note}</p>'


def draw(chart: Chart, colors: Mapping[str, str]) -> str:
    """Draw a chart as an SVG element; the same chart always gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9, "font.sans-serif": ["DejaVu Sans", "Arial"]}
    style |= {"svg.fonttype": "none", "svg.hashsalt": chart.title}  # text stays text
    with matplotlib.rc_context(style):
        figure = Figure(figsize=chart.size, dpi=96, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title, loc="left", fontweight="bold", fontsize=10)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label, xscale="log")
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if chart.level is not None:
            axes.axhline(chart.level, color="#444444", linestyle=":", linewidth=1)
        series = sorted(chart.series, key=lambda one: one.measured)  # measured ones on top
        for place, one in enumerate(series):
            _draw_series(axes, one, colors[one.name], f"series-{place}", _spread(series, one))
        _set_ticks(axes, chart.ticks)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(out.getvalue(), chart.title, series)


def _spread(series: Sequence[Series], one: Series) -> dict[float, float]:
    """Return where to draw the x values of a series, so that whiskers at one x stand side by side."""
    xs = [math.log(point[0]) for other in series for point in other.points]
    step = 0.012 * (max(xs) - min(xs))
    found = {}
    for x, _, low, _ in one.points:
        here = [other for other in series if any(p[0] == x and p[2] is not None for p in other.points)]
        place = here.index(one) - (len(here) - 1) / 2 if low is not None else 0
        found[x] = x * math.exp(step * place)
    return found


def _draw_series(axes: Any, one: Series, color: str, gid: str, x_of: Mapping[float, float]) -> None:
    points = sorted(one.points, key=lambda point: point[:2])
    for x, _, low, high in points:
        if low is not None and high is not None:
            axes.plot([x_of[x]] * 2, [low, high], color=color, linewidth=1.2)
    line = {"linewidth": 1.8} if one.measured else {"linewidth": 1.2, "dashes": (4, 3)}
    marker = {"markersize": 5} if one.measured else {"markersize": 7.5, "markerfacecolor": "white"}
    xs, ys = [x_of[point[0]] for point in points], [point[1] for point in points]
    axes.plot(xs, ys, color=color, marker="o", markeredgewidth=1.2, gid=gid, **line, **marker)


def _set_ticks(axes: Any, ticks: Sequence[float] | None) -> None:
    from matplotlib.ticker import LogLocator

    low, high = axes.get_xlim()
    kept: list[float] = []
    for tick in sorted(ticks or LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)).tick_values(low, high)):
        if low <= tick <= high and math.log(tick / (kept or [1e-9])[-1]) > 0.07 * math.log(high / low):
            kept.append(tick)  # labels do not overlap
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.minorticks_off()


def _inline(svg: str, title: str, series: Sequence[Series]) -> str:
    """Turn matplotlib's file into an element for a page: without prolog and ids, with texts to point at."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    root.set("role", "img")
    head = ElementTree.Element(f"{{{_SVG}}}title")
    head.text = title
    root.insert(0, head)
    for place, one in enumerate(series):
        group = root.find(f".//*[@id='series-{place}']")
        marks = group.iter(f"{{{_SVG}}}use") if group is not None else ()
        kind = "measured" if one.measured else "published"
        for mark, (x, y, _, _) in zip(marks, sorted(one.points, key=lambda point: point[:2]), strict=False):
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = f"{one.name}, {kind}: {x:.4g}, {y:.2f}"
    return re.sub(r' id="[\w.]+[-_]\d+"', "", ElementTree.tostring(root, encoding="unicode"))
