"""What a sweep adds up to (see `grid`) as plain text, Markdown, CSV and LaTeX; `grid_page` has the HTML page.

Every number is a measured one; sets that do not count towards the means are marked, with a footnote.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from llava.eval import cli
from llava.eval.tables.grid import FULL, Column, Contrast, Grid, Interval, Row
from llava.eval.tables.paper_forms import method_label


def label(row: Row) -> str:
    """A row's method, with its ratio."""
    return method_label(row.method, row.ratio)


def budget(row: Row) -> str:
    """The tokens of a row."""
    return "all" if row.tokens is None else str(row.tokens)


def score_of(column: Column, row: Row) -> tuple[float, float, float] | None:
    """(score, low, high) of a row on a set; None where it was not measured."""
    cell = column.cells.get(row.name)
    if cell is None or cell.document["score"] is None:
        return None
    return cell.document["score"], cell.document["low"], cell.document["high"]


def title(column: Column) -> str:
    """A set's name, marked if it does not count."""
    return column.benchmark.title + ("" if column.counted else "†")


def notes(grid: Grid) -> list[str]:
    """What a reader has to know."""
    found = [
        f"Model: {grid.model}. Brackets: 95% bootstrap intervals over pictures; they say nothing about "
        "other training runs. Majority: the best score that one answer to all questions can get."
    ]
    counted = ", ".join(column.benchmark.title for column in grid.counted)
    found.append(
        f"Acc.: mean over {counted or 'no set'} (MME as a share of its highest score). Rel.: 100 x "
        "mean of score / score with all tokens."
        + (" Bold: the best of a budget." if len(grid.rows) > 1 else "")
    )
    out = [column for column in grid.columns if not column.counted]
    if out:
        found.append(
            "† Not in the means, as the model with all tokens is not clearly above the majority "
            f"there: {', '.join(column.benchmark.title for column in out)}."
        )
    if grid.unscored:
        found.append(f"Answered, but without a number here: {', '.join(grid.unscored)}.")
    found.append(
        "GFLOPs: the language model's prefill of one question, visual and text tokens, 2 per "
        "multiply-accumulate; mean over the sets."
    )
    return found


def _best(grid: Grid, value: Any) -> set[str]:
    """Names of the rows that are best among the pruned ones of their budget."""
    best: dict[int | None, tuple[float, str]] = {}
    count: dict[int | None, int] = {}
    for row in grid.rows:
        found = value(row)
        if row.method == FULL or found is None:
            continue
        count[row.tokens] = count.get(row.tokens, 0) + 1
        if row.tokens not in best or found > best[row.tokens][0]:
            best[row.tokens] = found, row.name
    return {name for tokens, (_, name) in best.items() if count[tokens] > 1}


def whole_table(grid: Grid) -> tuple[list[str], list[list[tuple[str, str, str]]]]:
    """(head, rows of (text, interval, class)) of the table over all sets; the first row is the majority."""
    head = ["Method", "Tokens", "Acc.", "Rel.", *map(title, grid.columns)]
    constant = [("Majority", "", "words"), ("", "", ""), ("", "", "mean"), ("", "", "mean")]
    constant += [
        (cli.cell(column.majority, ".1f"), "", "" if column.counted else "out") for column in grid.columns
    ]
    rows = [constant]
    best = [
        _best(grid, lambda row, column=column: (score_of(column, row) or (None,))[0])
        for column in grid.columns
    ]
    best_acc, best_rel = _best(grid, lambda row: row.acc), _best(grid, lambda row: row.rel)
    for row in grid.rows:
        cells = [(label(row), "", "words"), (budget(row), "", "")]
        for value, interval, winners in (
            (row.acc, row.acc_interval, best_acc),
            (row.rel, row.rel_interval, best_rel),
        ):
            kind = "mean best" if row.name in winners else "mean"
            cells.append(("", "", kind) if value is None else (f"{value:.1f}", span_of(interval), kind))
        for column, winners in zip(grid.columns, best, strict=True):
            found = score_of(column, row)
            kind = "out" if not column.counted else "best" if row.name in winners else ""
            cells.append(("", "", kind) if found is None else (f"{found[0]:.1f}", span_of(found[1:]), kind))
        rows.append(cells)
    return head, rows


def span_of(interval: Interval) -> str:
    """An interval as text."""
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]"


def as_text(grid: Grid) -> str:
    """The table over all sets for a terminal, without intervals."""
    head, rows = whole_table(grid)
    return cli.table(head, [[text for text, _, _ in row] for row in rows])


def as_markdown(grid: Grid) -> str:
    """The table over all sets with intervals, the differences, and notes."""
    head, rows = whole_table(grid)
    lines = [f"# {heading(grid)}", "", "| " + " | ".join(head) + " |", "| :-- |" + " --: |" * (len(head) - 1)]
    for row in rows:
        shown = [f"**{text}**" if "best" in kind else text for text, _, kind in row]
        shown = [f"{text} {span}".strip() for text, (_, span, _) in zip(shown, row, strict=True)]
        lines.append("| " + " | ".join(shown) + " |")
    lines += ["", *(f"{note}\n" for note in notes(grid))]
    if grid.contrasts:
        lines += ["| Difference in Acc. | Tokens | Points | 95% interval |", "| :-- | --: | --: | --: |"]
        lines += ["| " + " | ".join(difference(one)) + " |" for one in grid.contrasts]
    return "\n".join(lines) + "\n"


def difference(one: Contrast) -> list[str]:
    """Rows, tokens, points and interval of a difference, as texts."""
    return [
        f"{label(one.first)} - {label(one.second)}",
        budget(one.first),
        f"{one.difference:+.1f}",
        f"[{one.interval[0]:+.1f}, {one.interval[1]:+.1f}]",
    ]


_FIELDS = (
    "set",
    "counted",
    "questions",
    "pictures",
    "majority",
    "method",
    "important_ratio",
    "tokens",
    "score",
    "low",
    "high",
    "visual_tokens",
    "llm_gflops",
    "questions_per_second",
    "answers",
)
_TEX = (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("†", r"$^\dagger$"))


def as_csv(grid: Grid) -> str:
    """One line per set and cell, Acc. and Rel. as sets of their own; numbers are not rounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_FIELDS)
    for column in grid.columns:
        for row in grid.rows:
            cell, found = column.cells.get(row.name), score_of(column, row)
            if cell is None or found is None:
                continue
            document = cell.document
            writer.writerow(
                [
                    column.benchmark.name,
                    str(column.counted).lower(),
                    column.questions,
                    column.pictures,
                    column.majority,
                    row.method,
                    row.ratio,
                    row.tokens,
                    *found,
                    document["visual_tokens"],
                    document["llm_gflops"],
                    (document["speed"] or {}).get("questions_per_second"),
                    document["answers"],
                ]
            )
    for row in grid.rows:
        for name, value, interval in (("acc", row.acc, row.acc_interval), ("rel", row.rel, row.rel_interval)):
            if value is not None:
                writer.writerow(
                    [
                        name,
                        "",
                        "",
                        "",
                        "",
                        row.method,
                        row.ratio,
                        row.tokens,
                        value,
                        *interval,
                        row.visual_tokens,
                        row.gflops,
                        "",
                        "",
                    ]
                )
    return out.getvalue()


def as_latex(grid: Grid) -> str:
    """The table over all sets, with booktabs' rules (\\usepackage{booktabs})."""

    def tex(text: str) -> str:
        for a, b in _TEX:
            text = text.replace(a, b)
        return text

    head, rows = whole_table(grid)
    lines = [f"% {note}" for note in notes(grid)]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(tex, head)) + r" \\",
    ]
    before: Any = ...
    for row, cells in zip([None, *grid.rows], rows, strict=True):
        if row is None or row.tokens != before:
            lines.append(r"\midrule")
            before = row.tokens if row else ...
        shown = [rf"\textbf{{{tex(text)}}}" if "best" in kind else tex(text) for text, _, kind in cells]
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def heading(grid: Grid) -> str:
    """The page's title."""
    return f"{grid.model}: {len(grid.rows)} cells on {len(grid.columns)} sets"
