"""The page of a sweep (see `grid`): tables and plots as one self-contained HTML file.

    python -m llava.eval.sweep ... --report FOLDER       # writes FOLDER/grid.{html,md,csv,tex}

Every number is a measured one. Sets that do not count towards the means are grey, with a footnote.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.grid import FULL, Column, Grid
from llava.eval.tables.grid_forms import (
    as_csv,
    as_latex,
    as_markdown,
    budget,
    difference,
    heading,
    label,
    notes,
    score_of,
    span_of,
    title,
    whole_table,
)
from llava.eval.tables.paper_forms import COLOURED, METHODS, STYLE
from llava.eval.tables.plots import Series, colours, legend, line_chart

NAME = "grid"
_MORE_STYLE = """
body { max-width: 1380px; }
.whole th, .whole td { padding: 2px 7px; }
.whole th { white-space: normal; vertical-align: bottom; }
td small { display: block; color: #666; font-weight: normal; font-size: 11px; line-height: 1.1; }
tr.constant td { color: #555; font-style: italic; border-bottom: 1px solid #444; }
td.best { font-weight: bold; }
td.out, th.out { color: #999; font-weight: normal; }
td.out small { color: #aaa; }
th.mean, td.mean { background: #eef5fb; }
h2 { margin-top: 2em; }
caption { text-align: left; padding: 1em 0 4px; font-weight: bold; }
caption span { font-weight: normal; color: #444; }
.sets { display: flex; flex-wrap: wrap; gap: 0 2.5em; align-items: flex-start; }
"""


def as_html(grid: Grid) -> str:
    """The page."""
    colour = _colours(grid)
    parts = [
        f"<h1>{escape(heading(grid))}</h1>",
        _whole(grid),
        *(f'<p class="notes">{escape(note)}</p>' for note in notes(grid)),
        _plots(grid, colour),
    ]
    if grid.contrasts:
        parts += [
            "<h2>Differences in Acc.</h2>",
            _html_table(
                ["", "Tokens", "Points", "95% interval", ""],
                [[*difference(one), "separated" if one.separates else ""] for one in grid.contrasts],
            ),
            '<p class="notes">Both sides are resampled alike, so that pictures that are hard for all methods '
            "do not blur a difference. Separated: the interval excludes 0.</p>",
        ]
    parts += [
        "<h2>Set by set</h2>",
        '<div class="sets">',
        *(_one_set(grid, column) for column in grid.columns),
        "</div>",
    ]
    head = (
        f'<meta charset="utf-8">\n<title>{escape(heading(grid))}</title>\n<style>{STYLE}{_MORE_STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _whole(grid: Grid) -> str:
    head, rows = whole_table(grid)
    kinds = ["words", "", "mean", "mean", *("" if column.counted else "out" for column in grid.columns)]
    lines = [
        '<div class="wide">',
        '<table class="whole">',
        "<tr>"
        + "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in zip(kinds, head, strict=True))
        + "</tr>",
    ]
    before: Any = ...
    for row, cells in zip([None, *grid.rows], rows, strict=True):
        names = ["constant"] if row is None else ["budget"] if row.tokens != before else []
        before = row.tokens if row else ...
        lines.append(
            f'<tr class="{" ".join(names)}">'
            + "".join(
                f'<td class="{kind}">{escape(text)}{f"<small>{escape(span)}</small>" if span else ""}</td>'
                for text, span, kind in cells
            )
            + "</tr>"
        )
    return "\n".join([*lines, "</table>", "</div>"])


def _html_table(head: list[str], rows: list[list[str]], caption: str = "") -> str:
    def line(tag: str, cells: list[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{'' if place else ' class=words'}>{escape(cell)}</{tag}>"
                for place, cell in enumerate(cells)
            )
            + "</tr>"
        )

    caption = f"<caption>{caption}</caption>" if caption else ""
    return "\n".join([f"<table>{caption}", line("th", head), *(line("td", row) for row in rows), "</table>"])


def _one_set(grid: Grid, column: Column) -> str:
    rows = []
    for row in grid.rows:
        cell, found = column.cells.get(row.name), score_of(column, row)
        if cell is None or found is None:
            continue
        speed = cell.document["speed"] or {}
        rows.append(
            [
                label(row),
                budget(row),
                f"{found[0]:.2f}",
                span_of(found[1:]),
                f"{cell.document['visual_tokens']:.1f}",
                cli.cell(cell.document["llm_gflops"], ".3g"),
                cli.cell(speed.get("questions_per_second"), ".0f"),
            ]
        )
    caption = (
        f"{escape(title(column))} <span>{escape(column.benchmark.metric)}; {column.questions:,} "
        f"questions, {column.pictures:,} pictures, majority {cli.cell(column.majority, '.1f')}</span>"
    )
    return _html_table(
        ["Method", "Tokens", "Score", "95% interval", "Real tokens", "GFLOPs", "q/s"], rows, caption
    )


def _colours(grid: Grid) -> dict[str, str]:
    """Colour by label; a method's first ratio has the method's own colour, as on the pages of the paper."""
    names = list(dict.fromkeys(label(row) for row in grid.rows))
    first: dict[str, str] = {}
    for row in grid.rows:
        first.setdefault(METHODS.get(row.method, row.method), label(row))
    own = {labelled: method for method, labelled in first.items()}
    every = colours([*COLOURED, *(own.get(name, name) for name in names)])
    # a second ratio would be grey, like everything beyond the palette
    spare = iter(("#56b4e9", "#8c6d1f", "#cc79a7", "#009e73"))
    found = {name: every[own[name]] if name in own else next(spare, "#7f7f7f") for name in names}
    return found | {METHODS[FULL]: "#222"} if METHODS[FULL] in found else found


def _plots(grid: Grid, colour: dict[str, str]) -> str:
    counts = [row.visual_tokens for row in grid.rows]
    ticks = sorted({round(count) for count in counts if count > 0})
    about = (
        ("Acc. against tokens", "visual tokens", lambda row: row.visual_tokens, ticks),
        ("Acc. against FLOPs", "GFLOPs of the prefill", lambda row: row.gflops, None),
    )
    charts = []
    for name, axis, x_of, marks in about:
        points = {row.name: (row.acc, *row.acc_interval) for row in grid.rows if row.acc is not None}
        charts.append(_chart(grid, name, axis, "Acc. (%)", x_of, points, colour, marks))
    for column in grid.columns:
        points = {row.name: found for row in grid.rows if (found := score_of(column, row))}
        unit = f"{column.benchmark.metric} ({column.benchmark.unit})"
        charts.append(
            _chart(
                grid,
                title(column),
                "visual tokens",
                unit,
                lambda row: row.visual_tokens,
                points,
                colour,
                ticks,
                column.majority,
                370,
                260,
            )
        )
    shown = "\n".join(filter(None, charts))
    return "\n".join(
        [
            legend(list(colour), colour, published=False),
            f'<div class="charts">{shown}</div>',
            '<p class="notes">Whiskers: 95% intervals. Dotted: the majority.</p>',
        ]
    )


def _chart(
    grid: Grid,
    name: str,
    axis: str,
    unit: str,
    x_of: Any,
    points: dict[str, tuple[float, float, float]],
    colour: dict[str, str],
    ticks: list[float] | None = None,
    level: float | None = None,
    width: int = 560,
    height: int = 340,
) -> str:
    """Lines of all methods; every line ends at the point of all tokens, which all methods share."""
    found: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    ends = [
        (x_of(row), points[row.name][0], None, None)
        for row in grid.rows
        if row.method == FULL and row.name in points and x_of(row)
    ]
    for row in grid.rows:
        if row.name in points and x_of(row):
            found.setdefault(label(row), []).append((x_of(row), *points[row.name]))
    series = [
        Series(one, tuple(inside if one == METHODS[FULL] else [*inside, *ends]), True)
        for one, inside in found.items()
    ]
    series.sort(key=lambda one: one.name == METHODS[FULL])  # on top
    return line_chart(name, axis, unit, series, colour, ticks, level, width, height) if series else ""


def write(grid: Grid, folder: Path) -> list[Path]:
    """Write all forms into a folder; the paths, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix, form in (("html", as_html), ("md", as_markdown), ("csv", as_csv), ("tex", as_latex)):
        files.append(folder / f"{NAME}.{suffix}")
        write_atomically(files[-1], form(grid))
    return files
