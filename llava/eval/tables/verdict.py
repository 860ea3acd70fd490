"""Verdict on every published number: was it reproduced?

    found = verdicts(build_paper_table(table, results))
    verdict_table(table, found).text()

A measured score with a 95% interval over images is compared with the published number, which is rounded as
printed. The interval says how much the score would move with other images; a run over the paper's own images
should come closer than that. Numbers of another model are never compared with published ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.metrics.scorecard import Scorecard
from llava.eval.tables.paper import PaperLine, PaperTable, is_own
from llava.eval.tables.published import COLUMNS, PublishedModel
from llava.table import Table, TableCell, TableRow, csv_text

# status -> meaning, in the order of summaries
STATUSES = {
    "equal": "the measured score, rounded as printed, is the published one",
    "inside": "the published number lies in the 95% interval of the measured score",
    "outside": "it lies outside of that interval",
    "no interval": "not equal, and the number has no interval to judge the difference by",
    "reprinted": "the published number is the predecessor's for another budget; not counted as missed",
    "not comparable": "measured with another model, on part of the set, or by another rule",
    "missing": "not measured",
}
_REASONS = {
    "*": "not the full set of questions",
    "+": "scored with --fixed",
    "#": "another number of visual tokens",
}
_FIELDS = ("table", "model", "method", "tokens", "column", "status", "measured", "published", "difference")
_FIELDS += ("ci_low", "ci_high", "inside", "why")


@dataclass(frozen=True)
class CellVerdict:
    """The verdict on one published number.

    Attributes:
        inside: True if the published number is in the interval of the measured score; None without one.
        why: Reason of the status, where it is not the numbers.
    """

    table: str
    model: str
    method: str
    tokens: int
    column: str
    status: str
    published: float
    measured: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    inside: bool | None = None
    why: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus published."""
        return None if self.measured is None else self.measured - self.published


def verdicts(paper: PaperTable) -> list[CellVerdict]:
    """Return the verdict on every published number of a table, in its order.

    Rel. of the rows with all tokens is 100 by definition and gets none.
    """
    return [
        _verdict(paper, line, column)
        for line in paper.lines
        for column in line.published
        if not (line.method == "none" and COLUMNS[column].relative)
    ]


def count_statuses(found: Sequence[CellVerdict]) -> dict[str, int]:
    """Return the number of cells of every status that occurs."""
    counts = Counter(one.status for one in found)
    return {status: counts[status] for status in STATUSES if counts[status]}


def verdict_table(paper: PaperTable, found: Sequence[CellVerdict]) -> Table:
    """Build the table of all cells that were measured; missing ones are only counted."""
    several = len(paper.published.models) > 1
    rows = []
    for line in paper.lines:
        own = [one for one in found if one.measured is not None and _key(one) == _key(line)]
        front = [paper.published.models[line.model].title] * several + [line.label(), str(line.tokens)]
        for place, one in enumerate(own):
            digits = paper.published.digits(one.column)
            numbers = [f"{one.measured:.{digits}f}", f"{one.published:.{digits}f}"]
            interval = "-" if one.ci_low is None else f"[{one.ci_low:.{digits}f}, {one.ci_high:.{digits}f}]"
            texts = [*front, COLUMNS[one.column].title, *numbers, f"{one.difference:+.{digits}f}", interval]
            texts.append(f"{one.status}: {one.why}" if one.why else one.status)
            rows.append(TableRow([TableCell(text) for text in texts], starts_group=place == 0))
    header = ["model"] * several + ["method", "tokens", "column", "measured", "published", "difference"]
    counts = count_statuses(found)
    notes = ["; ".join(f"{status}: {count}" for status, count in counts.items()) + "."]
    notes += [f"{status}: {STATUSES[status]}." for status in counts]
    title = f"{paper.published.title}: measured against published"
    return Table(title, [*header, "95% CI", "verdict"], rows, notes, ["left"] * (1 + several))


def verdict_csv(found: Sequence[CellVerdict]) -> str:
    """Return one row per published number."""
    return csv_text(_FIELDS, [[getattr(one, name) for name in _FIELDS] for one in found])


def verdict_documents(found: Sequence[CellVerdict]) -> list[dict[str, Any]]:
    """Return the verdicts as JSON values."""
    return [{name: getattr(one, name) for name in _FIELDS} for one in found]


def _key(one: CellVerdict | PaperLine) -> tuple[str, str, int]:
    return one.model, one.method, one.tokens


def _verdict(paper: PaperTable, line: PaperLine, column: str) -> CellVerdict:
    published, measured = line.published[column], line.measured.get(column)
    front = (paper.published.name, line.model, line.method, line.tokens, column)
    if measured is None:
        return CellVerdict(*front, "missing", published)
    low, high = line.interval(column)
    # a printed number stands for all that are rounded to it
    half = 0.5 * 10.0 ** -paper.published.digits(column)
    inside = None if low is None or high is None else low - half <= published <= high + half
    equal = abs(measured - published) <= half * (1 + 1e-9)
    why = _other_model(paper.published.models[line.model], line, column)
    why = why or ", ".join(text for mark, text in _REASONS.items() if mark in line.marks(column))
    if why:
        return CellVerdict(*front, "not comparable", published, measured, low, high, why=why)
    if line.is_reprinted(column):
        of = line.row.reprint if line.row is not None else None
        why = f"{of.method} at {of.tokens}" if of else ""
        return CellVerdict(*front, "reprinted", published, measured, low, high, inside, why)
    status = {None: "no interval", True: "inside", False: "outside"}[inside]
    if "~" in line.marks(column):
        why = "another configuration than most cells"
    return CellVerdict(*front, "equal" if equal else status, published, measured, low, high, inside, why)


def _other_model(model: PublishedModel, line: PaperLine, column: str) -> str:
    """Return why a measured number, or a part of a mean, is not of the published model; "" if it is."""
    names = [column] if column in line.results else list(line.results)
    for result in (line.results[name] for name in names):
        sizes = _sizes(result.card)
        if sizes is not None and sizes != tuple(model.language):
            return (
                f"{result.card.model} has layers, width, MLP {sizes}, {model.title} {tuple(model.language)}"
            )
        if sizes is None and not is_own(model, result):
            return f"{result.card.model} is not a published checkpoint, and its size was not recorded"
    return ""


def _sizes(card: Scorecard) -> tuple[int, int, int] | None:
    """Return layers, width and MLP width of the language model of a run; None if they were not recorded."""
    shape = (card.prefill or {}).get("shape")
    return (int(shape[0]), int(shape[1]), int(shape[2])) if shape and None not in shape[:3] else None
