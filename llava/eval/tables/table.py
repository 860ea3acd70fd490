"""Tables and their text, Markdown, LaTeX and HTML forms; every printed or written table is one of these.

    print(text_table(["method", "score"], [["vispruner", number(80.4, ".1f")]]))
    Table("POPE", columns, rows, notes).markdown()

The library tabulate lays out columns. Written by hand are only the rules of text and of LaTeX (tabulate
widens columns by its own header, and before 0.10 drops rules between rows of LaTeX) and HTML (tabulate's has
no classes and no second line in a cell). Imports nothing else of this package.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tabulate import tabulate

_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "†": r"$^\dagger$",
    }
)


@dataclass(frozen=True)
class TableColumn:
    """A column: its header, alignment, and the HTML class of all its cells."""

    title: str
    left: bool = False
    kind: str = ""

    @classmethod
    def of(cls, *titles: str) -> list[TableColumn]:
        """Build columns of which the first is aligned to the left."""
        return [cls(title, left=place == 0) for place, title in enumerate(titles)]


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

    @classmethod
    def of(cls, *texts: str) -> TableRow:
        """Build a row of plain texts."""
        return cls([TableCell(text) for text in texts])


@dataclass(frozen=True)
class Table:
    """A table with a title above and notes below it."""

    title: str
    columns: Sequence[TableColumn]
    rows: Sequence[TableRow]
    notes: Sequence[str] = ()

    def _layout(self, form: str, show: Callable[[TableCell], str]) -> str:
        """Lay out header and rows in a form of tabulate."""
        rows = [[TableCell(column.title) for column in self.columns], *(row.cells for row in self.rows)]
        shown = [[show(cell) for cell in cells] for cells in rows]
        return _layout(shown, [column.left for column in self.columns], form)

    def text(self) -> str:
        """Return the table with title and notes for a terminal, without the notes of cells."""
        table = _ruled(self._layout("plain", lambda cell: cell.text))
        return "\n".join([self.title, table, *self.notes])

    def markdown(self, level: int = 1) -> str:
        """Return a heading of this level, a pipe table and the notes as paragraphs."""
        title, *notes = map(escape_markdown, [self.title, *self.notes])
        table = self._layout("pipe", _markdown_cell)
        return "\n\n".join([f"{'#' * level} {title}", table, *notes]) + "\n"

    def latex(self) -> str:
        r"""Return a tabular with the rules of booktabs (\usepackage{booktabs}); notes are comments."""
        begin, _, header, *body, _, end = self._layout("latex_raw", _latex_cell).splitlines()
        lines = [*(f"% {note}" for note in self.notes), begin, r"\toprule", header, r"\midrule"]
        for place, (row, line) in enumerate(zip(self.rows, body, strict=True)):
            lines += [r"\midrule", line] if row.starts_group and place else [line]
        return "\n".join([*lines, r"\bottomrule", end, ""])

    def html(self, level: int = 2) -> str:
        """Return a section of heading, table and notes; `page.html_page` has the style for it."""
        lines = [f"<section>\n<h{level}>{escape(self.title)}</h{level}>", '<div class="wide"><table>']
        header = [TableCell(column.title) for column in self.columns]
        lines.append(f"<tr>{self._html_cells('th', header)}</tr>")
        for row in self.rows:
            group = "group" if row.starts_group else ""
            lines.append(f"<tr{_classes(row.kind, group)}>{self._html_cells('td', row.cells)}</tr>")
        lines.append("</table></div>")
        lines += [f'<p class="notes">{escape(note)}</p>' for note in self.notes]
        return "\n".join([*lines, "</section>"])

    def _html_cells(self, tag: str, cells: Iterable[TableCell]) -> str:
        shown = ""
        for column, cell in zip(self.columns, cells, strict=True):
            classes = _classes("left" if column.left else "", column.kind, "strong" if cell.strong else "")
            note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
            shown += f"<{tag}{classes}>{escape(cell.text)}{note}</{tag}>"
        return shown


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal, the first to the left and the others to the right, under a header."""
    return _ruled(_layout([header, *rows], [place == 0 for place in range(len(header))], "plain"))


def number(value: Any, form: str) -> str:
    """Format a number for a table; None becomes a dash."""
    return "-" if value is None else format(value, form)


def csv_text(fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV with a header line; numbers are not rounded, None is an empty field."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([fields, *rows])
    return out.getvalue()


def escape_markdown(text: str) -> str:
    """Escape what Markdown, and a pipe table in it, would take for markup."""
    return re.sub(r"([\\`*_<|])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Escape LaTeX's special characters; a signed number is set in math mode, for a true minus sign."""
    return f"${text}$" if re.fullmatch(r"[+-][\d.]+", text) else text.translate(_LATEX)


def _layout(rows: Sequence[Sequence[str]], left: Sequence[bool], form: str) -> str:
    align = ["left" if one else "right" for one in left]
    header = "firstrow" if form == "pipe" else ()
    return tabulate(rows, header, tablefmt=form, colalign=align, disable_numparse=True)


def _ruled(text: str) -> str:
    """Draw a rule below the first line."""
    header, *lines = text.split("\n")
    return "\n".join([header, "-" * max(map(len, [header, *lines])), *lines])


def _markdown_cell(cell: TableCell) -> str:
    text = escape_markdown(cell.text)
    return f"{f'**{text}**' if cell.strong and text else text} {escape_markdown(cell.note)}".strip()


def _latex_cell(cell: TableCell) -> str:
    text = escape_latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.strong and text else text


def _classes(*names: str) -> str:
    found = " ".join(filter(None, names))
    return f' class="{found}"' if found else ""
