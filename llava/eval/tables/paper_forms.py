"""A table with what was measured as text, Markdown, CSV, LaTeX and HTML (see `tables`).

Every published row has a line; below it, where any cell was measured, one with the measured numbers and one
with the differences. Cells without a number are empty. CSV has one line per cell instead, with intervals
and the file behind a measured score. The HTML page needs nothing but itself.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from html import escape

from llava.eval import cli
from llava.eval.tables.__main__ import Line, Report, flops_of
from llava.eval.tables.plots import Series, colours, legend, line_chart
from llava.eval.tables.published import COLUMNS, TEXT_TOKENS

METHODS = {
    "none": "All tokens",
    "tome": "ToMe",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "prumerge": "PruMerge",
    "prumerge+": "PruMerge+",
    "visionzip": "VisionZip",
    "vispruner": "VisPruner",
    "fastervlm": "FasterVLM",
    "random": "Random",
}
# a method has one colour in all tables
COLOURED = ("VisPruner", "FastV", "ToMe", "SparseVLM", "PruMerge+", "VisionZip", "FasterVLM", "Random")
_DOUBTS = (
    ("*", "* not the full set of questions (for Acc. and Rel.: of some column)."),
    ("+", "+ scored with --fixed, not by the official rule."),
)
STYLE = """
body { font: 14px/1.45 sans-serif; color: #222; background: #fff; margin: 1.5em auto; max-width: 1200px;
       padding: 0 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: 2px 9px; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #444; }
th.words, td.words { text-align: left; }
tr.budget td { border-top: 1px solid #bbb; }
tr.measured td { font-weight: bold; background: #eef5fb; }
tr.difference td { color: #555; background: #eef5fb; }
.charts { display: flex; flex-wrap: wrap; gap: 14px; }
.charts svg { max-width: 100%; height: auto; }
.legend span { display: inline-block; margin-right: 1.3em; }
.legend svg { vertical-align: middle; }
.notes { color: #444; max-width: 60em; }
"""


def label(line: Line) -> str:
    """A method as papers write it, with its ratio where that is not the usual one."""
    return method_label(line.method, line.ratio)


def method_label(method: str, ratio: float | None) -> str:
    """A method as papers write it, with the ratio if there is one to say."""
    name = METHODS.get(method, method)
    return name if ratio is None else f"{name} (r = {ratio:g})"


def _strips(report: Report) -> Iterator[tuple[Line, str, list[str]]]:
    """(line, published | measured | difference, one text per column) in the order of reading."""
    for line in report.lines:
        kinds = ["published"] if line.published else []
        if line.measured:
            kinds += ["measured", "difference"] if line.difference else ["measured"]
        for kind in kinds:
            yield line, kind, [_text(line, kind, column) for column in report.table.columns]


def _text(line: Line, kind: str, column: str) -> str:
    value = getattr(line, kind).get(column)
    if value is None:
        return ""
    digits = COLUMNS[column].digits
    text = format(value, f"+.{digits}f" if kind == "difference" else f".{digits}f")
    if float(text) == 0:
        text = text.lstrip("+-")
    return text + line.doubts(column) if kind == "measured" else text


def _head(report: Report) -> list[str]:
    model = ["model"] if len(report.table.models) > 1 else []
    return [*model, "method", "tokens", "", *(COLUMNS[name].title for name in report.table.columns)]


def _rows(report: Report) -> Iterator[tuple[Line, str, list[str]]]:
    """As `_strips`, with model, method and tokens in front (only on a line's first strip)."""
    before = model_before = None
    for line, kind, cells in _strips(report):
        first = line is not before
        model = report.table.models[line.model].title
        front = [model if line.model != model_before else ""] if len(report.table.models) > 1 else []
        front += [label(line), str(line.tokens)] if first else ["", ""]
        before, model_before = line, line.model
        yield line, kind, [*front, kind, *cells]


def notes(report: Report) -> list[str]:
    """What stands below a table."""
    marks = {mark for line in report.lines for name in line.measured for mark in line.doubts(name)}
    return report.notes + [text for mark, text in _DOUBTS if mark in marks]


def as_text(report: Report) -> str:
    """For a terminal."""
    rows = [cells for _, _, cells in _rows(report)]
    return "\n".join([report.table.title, cli.table(_head(report), rows), *notes(report)])


def _bold(cell: str) -> str:
    """Marks outside: an asterisk is Markdown's own."""
    bare = cell.rstrip("*+")
    return f"**{bare}**" + cell[len(bare) :].replace("*", "\\*")


def as_markdown(report: Report) -> str:
    """A heading, a pipe table and notes."""
    head = _head(report)
    text = 2 if len(report.table.models) > 1 else 1
    lines = [
        f"# {report.table.title}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "|".join([" :-- "] * text + [" --: "] * (len(head) - text)) + "|",
    ]
    for _, kind, cells in _rows(report):
        shown = [_bold(cell) if kind == "measured" and cell else cell for cell in cells]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in shown) + " |")
    starred = [note.replace("*", "\\*", 1) if note.startswith("*") else note for note in notes(report)]
    return "\n".join([*lines, "", *(f"{note}\n" for note in starred)])


_FIELDS = (
    "table",
    "model",
    "method",
    "important_ratio",
    "tokens",
    "column",
    "published",
    "measured",
    "difference",
    "low",
    "high",
    "visual_tokens",
    "answered",
    "full_set",
    "official_rule",
    "file",
)


def as_csv(report: Report) -> str:
    """One line per cell, every cell of every row; numbers are not rounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_FIELDS)
    for line in report.lines:
        for column in report.table.columns:
            found = line.results.get(column)
            scored = found is not None and COLUMNS[column].detail is None and COLUMNS[column].benchmark
            writer.writerow(
                [
                    report.table.name,
                    line.model,
                    line.method,
                    line.ratio,
                    line.tokens,
                    column,
                    line.published.get(column),
                    line.measured.get(column),
                    line.difference.get(column),
                    found.low if scored else None,
                    found.high if scored else None,
                    found.visual_tokens if found else None,
                    found.answered if found else None,
                    str(found.whole).lower() if found else None,
                    str(not found.fixed).lower() if found else None,
                    found.path if found else None,
                ]
            )
    return out.getvalue()


def _tex(text: str) -> str:
    table = {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    return "".join(table.get(character, character) for character in text)


def as_latex(report: Report) -> str:
    """A tabular with booktabs' rules (\\usepackage{booktabs})."""
    head = _head(report)
    text = 2 if len(report.table.models) > 1 else 1
    lines = [f"% {note}" for note in notes(report)]
    lines += [
        rf"\begin{{tabular}}{{{'l' * text}{'r' * (len(head) - text)}}}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
    ]
    before = None
    for line, kind, cells in _rows(report):
        if (line.model, line.tokens) != before:
            lines.append(r"\midrule")
            before = line.model, line.tokens
        shown = [_tex(cell) for cell in cells]
        if kind == "measured":
            shown = [rf"\textbf{{{cell}}}" if cell else "" for cell in shown]
        if kind == "difference":
            shown = [f"${cell}$" if cell[:1] in ("+", "-") else cell for cell in shown]
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_html(reports: list[Report]) -> str:
    """One page of all reports, nothing loaded from elsewhere."""
    title = "Measured beside published" + (f": {reports[0].table.title}" if len(reports) == 1 else "")
    body = "\n".join(_section(report) for report in reports)
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<h1>{escape(title)}</h1>\n'
        f"{body}\n</body>\n</html>\n"
    )


def _section(report: Report) -> str:
    def tagged(tag: str, cells: list[str]) -> str:
        words = 2 if len(report.table.models) > 1 else 1
        return "".join(
            f"<{tag}{' class=words' if place < words else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    lines = [
        f"<h2>{escape(report.table.title)}</h2>",
        '<div class="wide">',
        "<table>",
        f"<tr>{tagged('th', _head(report))}</tr>",
    ]
    before = None
    for line, kind, cells in _rows(report):
        begins = (line.model, line.tokens) != before
        before = line.model, line.tokens
        lines.append(f'<tr class="{kind}{" budget" if begins else ""}">{tagged("td", cells)}</tr>')
    lines += [
        "</table>",
        "</div>",
        '<div class="notes">',
        *(f"<p>{escape(note)}</p>" for note in notes(report)),
        "</div>",
    ]
    return "\n".join(lines + [_charts(report, model) for model in report.table.models])


def _charts(report: Report, model: str) -> str:
    """Sum against tokens and FLOPs, and every measured benchmark against tokens, of one model."""
    table, summary = report.table, report.table.summary
    lines = [line for line in report.lines if line.model == model]
    if summary is None:
        return ""
    drawn = [line for line in lines if line.published or line.measured]
    colour = colours([*COLOURED, *(label(line) for line in drawn)]) | {METHODS["none"]: "#222"}
    ticks = sorted({float(line.tokens) for line in lines})
    what = table.models[model].title
    about = f"{what}: {COLUMNS[summary].title} against"
    charts = [
        _chart(lines, summary, False, f"{about} tokens", colour, report, ticks),
        _chart(lines, summary, True, f"{about} FLOPs", colour, report),
    ]
    measured = [name for name in table.scored if any(name in line.measured for line in lines)]
    charts += [
        _chart(lines, name, False, f"{what}: {COLUMNS[name].title}", colour, report, ticks, 380, 260)
        for name in measured
    ]
    names = [name for name in colour if any(label(line) == name for line in drawn)]
    return "\n".join(
        [
            legend(names, colour),
            '<div class="charts">',
            *filter(None, charts),
            "</div>",
            '<p class="notes">The dotted line is the published score with all tokens. FLOPs: '
            "prefill of the language model, 2 per multiply-accumulate; measured points as a sweep "
            f"recorded them, all others from the model's shapes with {TEXT_TOKENS} text tokens. "
            "FastV's first two layers count all tokens; SparseVLM is left out, its tokens per "
            "layer are not published. Whiskers: 95% bootstrap intervals over pictures.</p>",
        ]
    )


def _chart(
    lines: list[Line],
    column: str,
    flops: bool,
    title: str,
    colour: dict[str, str],
    report: Report,
    ticks: list[float] | None = None,
    width: int = 520,
    height: int = 340,
) -> str:
    series = []
    for measured in (False, True):
        points: dict[str, list] = {}
        for line in lines:
            value = (line.measured if measured else line.published).get(column)
            x = flops_of(report.table, line, measured) if flops else float(line.tokens)
            if value is None or not x:
                continue
            found = line.results.get(column) if measured and not COLUMNS[column].detail else None
            interval = (found.low, found.high) if found else (None, None)
            points.setdefault(label(line), []).append((x, value, *interval))
        series += [Series(name, tuple(inside), measured) for name, inside in points.items()]
    if not series:
        return ""
    level = next((line.published[column] for line in lines if line.method == "none" and line.published), None)
    x_label = "TFLOPs of the prefill" if flops else "visual tokens"
    unit = "points" if column == "mme" else "score" if column.endswith("_score") else "%"
    y_label = f"{COLUMNS[column].title} ({unit})"
    return line_chart(title, x_label, y_label, series, colour, ticks, level, width, height)
