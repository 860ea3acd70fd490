"""Line charts as SVG text: points of several methods over a logarithmic axis. No drawing library needed.

Published points are rings on dashed lines, measured ones dots on solid lines; a method has one colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which most colour-blind people tell apart, some more, and a grey for what is left
_COLOURS = (
    "#0072b2",
    "#cc79a7",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#8c6d1f",
    "#d55e00",
    "#4b3fa0",
    "#b00020",
    "#7f7f7f",
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 34, 46


@dataclass(frozen=True)
class Series:
    """Points (x, y, low, high) of one method; x > 0; low and high are None where there is no interval."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    measured: bool


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per name, in order of first appearance; the last one serves all that are left."""
    return {name: _COLOURS[min(place, len(_COLOURS) - 1)] for place, name in enumerate(dict.fromkeys(names))}


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    colour: dict[str, str],
    x_ticks: Sequence[float] | None = None,
    level: float | None = None,
    width: int = 480,
    height: int = 320,
) -> str:
    """One chart. x_ticks: default round numbers; level: dotted line at this y. Raises ValueError if empty."""
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError("a chart of no points")
    ys = [value for point in points for value in point[1:] if value is not None]
    ys += [] if level is None else [level]
    ticks = _ticks(min(ys), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    xs = [math.log(point[0]) for point in points]
    left, right = min(xs), max(xs)
    margin = 0.06 * (right - left) or 0.5
    left, right = left - margin, right + margin

    def x_of(value: float) -> float:
        return _LEFT + (math.log(value) - left) / (right - left) * (width - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return height - _BOTTOM - (value - low) / (high - low) * (height - _TOP - _BOTTOM)

    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<text x="{_LEFT}" y="18" font-size="13" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in ticks:
        out += [
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}" '
            'stroke="#e4e4e4"/>',
            f'<text x="{_LEFT - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    shown = -math.inf
    for tick in sorted(x_ticks or _log_ticks(math.exp(left), math.exp(right))):
        x = x_of(tick)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{height - _BOTTOM}" y2="{height - _BOTTOM + 4}" '
            'stroke="#444"/>'
        )
        if x - shown >= 26:  # labels must not run into each other
            out.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
            shown = x
    out += [
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{height - _BOTTOM}" y2="{height - _BOTTOM}" '
        'stroke="#444"/>',
        f'<text x="{(_LEFT + width - _RIGHT) / 2:.1f}" y="{height - 10}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate(14 {(_TOP + height - _BOTTOM) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    if level is not None:
        out.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y_of(level):.1f}" y2="{y_of(level):.1f}" '
            'stroke="#444" stroke-dasharray="1 3"/>'
        )
    for one in sorted(series, key=lambda one: one.measured):  # measured on top
        out += _drawn(one, colour[one.name], x_of, y_of)
    return "\n".join([*out, "</svg>"])


def _drawn(one: Series, colour: str, x_of, y_of) -> list[str]:  # type: ignore[no-untyped-def]
    points = sorted(one.points, key=lambda point: point[:2])
    places = [(x_of(x), y_of(y)) for x, y, _, _ in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = 'stroke-width="2"' if one.measured else 'stroke-width="1.3" stroke-dasharray="5 4"'
    out = [f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>'] if len(places) > 1 else []
    for (x, y), (raw, value, low, high) in zip(places, points, strict=True):
        if low is not None and high is not None:
            out.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(low):.1f}" y2="{y_of(high):.1f}" '
                f'stroke="{colour}" stroke-width="1.5"/>'
            )
        label = f"{one.name}, {'measured' if one.measured else 'published'}: {raw:.4g}, {value:.2f}"
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if one.measured else 4.8}" stroke="{colour}" '
            f'fill="{colour if one.measured else "#fff"}" stroke-width="1.5">'
            f"<title>{escape(label)}</title></circle>"
        )
    return out


def legend(names: Sequence[str], colour: dict[str, str], published: bool = True) -> str:
    """Names and colours as HTML, for all charts of a page's section; `published`: of both kinds of points."""

    def mark(fill: str, ink: str, dashed: bool) -> str:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        return (
            f'<svg width="30" height="12" aria-hidden="true"><line x1="1" x2="29" y1="6" y2="6" '
            f'stroke="{ink}" stroke-width="2"{dash}/><circle cx="15" cy="6" r="3.5" stroke="{ink}" '
            f'fill="{fill}" stroke-width="1.5"/></svg>'
        )

    items = [f"<span>{mark(colour[name], colour[name], False)} {escape(name)}</span>" for name in names]
    if published:
        items.append(f"<span>{mark('#444', '#444', False)} measured</span>")
        items.append(f"<span>{mark('#fff', '#444', True)} published</span>")
    return '<p class="legend">' + "\n".join(items) + "</p>"


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from the last not above `low` to the first not below `high`."""
    if low == high:
        high = low + (abs(low) * 0.1 or 1.0)
    span = high - low
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers of every power of ten between the ends, the fewer the more powers there are."""
    span = math.log10(high / low)
    factors = (1,) if span > 3 else (1, 2, 5) if span > 1.3 else (1, 1.5, 2, 3, 4, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high] or [low]
