"""Tables and their text, Markdown, LaTeX and HTML forms; every printed or written table is one of these.

    print(text_table(["method", "score"], [["vispruner", number(80.4, ".1f")]]))
    Table("POPE", header, rows, notes).markdown()

The library tabulate lays out columns. Written by hand are only the rules of text and of LaTeX (tabulate
widens columns by its own header, and before 0.10 drops rules between rows of LaTeX) and HTML (tabulate's has
no classes and no second line in a cell). Names of checkpoints and files come from other people: every form
shows them as text, without markup, formulas, line breaks or control characters. Imports nothing else of this
package.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from tabulate import tabulate

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$^\dagger$"}
)


@dataclass(frozen=True)
class TableCell:
    """A cell. `note`, such as an interval, is shown by Markdown and HTML only; `strong` cells are bold."""

    text: str = ""
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row. `kind` is its HTML class; a rule is drawn above a row that starts a group."""

    cells: Sequence[TableCell]
    kind: str = ""
    starts_group: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a title above and notes below it.

    `kinds` are the HTML classes of the first columns; those of kind "left" come first and are aligned to the
    left in all forms, and all others to the right.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[TableRow]
    notes: Sequence[str] = ()
    kinds: Sequence[str] = ("left",)

    def _layout(self, form: str, show: Callable[[TableCell], str]) -> str:
        """Lay out header and rows in a form of tabulate."""
        rows = [[TableCell(title) for title in self.header], *(row.cells for row in self.rows)]
        return _layout([[show(cell) for cell in cells] for cells in rows], form, self.kinds.count("left"))

    def text(self) -> str:
        """Return the table with title and notes for a terminal, without the notes of cells."""
        rows = [[cell.text for cell in row.cells] for row in self.rows]
        table = text_table(self.header, rows, self.kinds.count("left"))
        return "\n".join([_one_line(self.title), table, *map(_one_line, self.notes)])

    def markdown(self, level: int = 1) -> str:
        """Return a heading of this level, a pipe table and the notes as paragraphs."""
        parts = [f"{'#' * level} {_escape_markdown(self.title)}", self._layout("pipe", _markdown_cell)]
        return "\n\n".join([*parts, *map(_markdown_note, self.notes)]) + "\n"

    def latex(self) -> str:
        r"""Return a tabular with the rules of booktabs (\usepackage{booktabs}); notes are comments."""
        begin, _, header, *body, _, end = self._layout("latex_raw", _latex_cell).splitlines()
        lines = [*(f"% {_one_line(note)}" for note in self.notes), begin, r"\toprule", header, r"\midrule"]
        for place, (row, line) in enumerate(zip(self.rows, body, strict=True)):
            lines += [r"\midrule", line] if row.starts_group and place else [line]
        return "\n".join([*lines, r"\bottomrule", end, ""])

    def html(self, level: int = 2) -> str:
        """Return a section of heading, table and notes; `plots.html_page` has the style for it."""
        lines = [f"<section>\n<h{level}>{_html(self.title)}</h{level}>", '<div class="wide"><table>']
        header = TableRow([TableCell(title) for title in self.header])
        for tag, row in [("th", header), *(("td", row) for row in self.rows)]:
            lines.append(f'<tr class="{row.kind}{" group" * row.starts_group}">')
            for cell, kind in zip_longest(row.cells, self.kinds, fillvalue=""):
                note = f"<small>{_html(cell.note)}</small>" if cell.note else ""
                strong = " strong" * cell.strong
                lines.append(f'<{tag} class="{kind}{strong}">{_html(cell.text)}{note}</{tag}>')
            lines.append("</tr>")
        notes = [f'<p class="notes">{_html(note)}</p>' for note in self.notes]
        return "\n".join([*lines, "</table></div>", *notes, "</section>"])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align columns for a terminal, the first to the left and the others to the right, under a header."""
    texts = [["" if cell is None else _one_line(str(cell)) for cell in row] for row in [header, *rows]]
    first, *lines = _layout(texts, "plain", left).split("\n")
    return "\n".join([first, "-" * max(map(len, [first, *lines])), *lines])


def number(value: Any, form: str) -> str:
    """Format a number for a table; None becomes a dash."""
    return "-" if value is None else format(value, form)


def csv_text(fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV with a header line; numbers are not rounded, None is an empty field.

    Spreadsheets take a text that starts with = + - @ for a formula, which may run commands. Such a text gets
    an apostrophe in front, unless it is a number.
    """
    out = io.StringIO()
    lines = [[_csv_cell(value) for value in row] for row in (fields, *rows)]
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = _one_line(str(value))
    with suppress(ValueError):
        float(text)
        return text
    return f"'{text}" if re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", text) else text


def _one_line(text: str) -> str:
    """Replace line breaks and control characters, such as a terminal's escape sequences, by spaces.

    What UTF-8 cannot encode, such as bytes of a file name in another encoding, is escaped.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def _html(text: str) -> str:
    return escape(_one_line(text))


def _layout(rows: Sequence[Sequence[str]], form: str, left: int) -> str:
    header = "firstrow" if form == "pipe" else ()
    align = ["left"] * left + ["right"] * (len(rows[0]) - left)
    return tabulate(rows, header, tablefmt=form, colalign=align, disable_numparse=True)


def _escape_markdown(text: str) -> str:
    """Escape Markdown's markup, HTML, and GitHub's formulas."""
    return re.sub(r"([\\`*_<>|~#$]|\](?=[(\[:])|&(?=#?\w+;))", r"\\\1", _one_line(text))


def _markdown_note(text: str) -> str:
    """Escape a paragraph, also where it would start a list or a rule."""
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", _escape_markdown(text).strip())


def _markdown_cell(cell: TableCell) -> str:
    text = _escape_markdown(cell.text)
    return f"{f'**{text}**' if cell.strong and text else text} {_escape_markdown(cell.note)}".strip()


def _latex_cell(cell: TableCell) -> str:
    """Escape LaTeX's special characters; a signed number is set in math mode, for a true minus sign."""
    text = _one_line(cell.text)
    signed = re.fullmatch(r"([+-][\d.]+)([*+#~]*)", text)
    text = f"${signed[1]}${signed[2].translate(_LATEX)}" if signed else text.translate(_LATEX)
    text = "{}" + text if text.startswith(("[", "*")) else text  # arguments of the line break before
    return rf"\textbf{{{text}}}" if cell.strong and text else text
