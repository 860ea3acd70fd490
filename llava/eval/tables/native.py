"""Tables of a model of transformers at several budgets, with text-reading benchmarks in columns of their own.

    tables = native_tables("Qwen3-VL-8B", "qwen3_vl", cards)      # cards: all scorecards of the run
    print(tables[0].text())

The first table has the measured scores, the second the published ones (`natives.json`, second hand). The two
are not subtracted: they follow different rules and count other questions. "Rel." is the mean of score /
score with all tokens, in percent, as in the paper; it is given for the two groups of benchmarks separately,
because methods that do not read the question lose most on benchmarks that ask for text in the image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import get_benchmark
from llava.eval.metrics.scorecard import Scorecard, is_number
from llava.eval.tables.published import relative
from llava.table import Table, TableCell, TableRow, number

NATIVES = Path(__file__).with_name("natives.json")
READING = ("textvqa", "mme:OCR", "mmvet:ocr")  # benchmarks, and parts of them, that ask for text in the image
# Parts: where the details of a score have them
_PARTS = {"mme:OCR": ("perception", "subtasks", "OCR"), "mmvet:ocr": ("capability", "ocr")}
_TITLES = {"mme:OCR": "MME OCR", "mmvet:ocr": "MM-Vet OCR"}
_OTHER = "Rel."
_TEXT = "Rel. text"


def published_natives(host: str) -> list[dict[str, Any]]:
    """Return the published results of a family of models, second hand; empty if there are none."""
    document = json.loads(NATIVES.read_bytes())
    shared = {name: document[name] for name in ("source", "certainty", "rules", "columns")}
    return [{**shared, **one} for one in document["models"].values() if one["host"] == host]


def native_tables(title: str, host: str, cards: Sequence[Scorecard], note: str = "") -> list[Table]:
    """Return the table of measured scores, and one of published scores for every model of the family.

    Args:
        title: Name of the model.
        host: Family, as in `natives.json`.
        cards: Of all benchmarks and settings, in the order of the table.
        note: Shown first below every table.
    """
    found: dict[str, dict[str, Scorecard]] = {}
    for card in cards:
        found.setdefault(_label(card), {})[card.benchmark] = card
    benchmarks = list(dict.fromkeys(card.benchmark for card in cards))
    plain = [name for name in benchmarks if name not in READING]
    reading = [name for name in READING if name.partition(":")[0] in benchmarks]
    values = {label: _values(of, [*plain, *reading]) for label, of in found.items()}
    full = next((values[label] for label, of in found.items() if _is_full(next(iter(of.values())))), None)
    reading = [name for name in reading if any(name in one for one in values.values())]
    rows = []
    for label, of in found.items():
        own = values[label]
        counts = [card.visual_tokens for card in of.values() if card.visual_tokens is not None]
        cells = [label, number(sum(counts) / len(counts) if counts else None, ".1f")]
        for group in (plain, reading):
            cells += [number(own.get(name), ".1f") for name in group]
            cells.append(number(_relative(own, full, group), ".1f"))
        rows.append(TableRow([TableCell(cell) for cell in cells]))
    header = ["setting", "visual tokens", *map(_title, plain), _OTHER, *map(_title, reading), _TEXT]
    notes = [note] if note else []
    notes.append(
        f"{_TEXT}: benchmarks, and parts of them, that ask for text in the image. {_OTHER}: all others. "
        "Both are relative to all tokens of the same model as measured here."
    )
    tables = [Table(f"{title}: measured", header, rows, notes, ["left"])]
    return [*tables, *[_published(one, found, note) for one in published_natives(host)]]


def _published(table: dict[str, Any], found: dict[str, dict[str, Scorecard]], note: str) -> Table:
    """Return a published table, with the measured scores of the same settings beside it."""
    header, rows = ["method", "tokens"], []
    for name in table["columns"]:
        header += [_title(name), "measured"]
    for row in table["rows"]:
        cells = [row["method"], "all" if row["tokens"] is None else str(row["tokens"])]
        own = next(
            (
                of
                for of in found.values()
                for card in [next(iter(of.values()))]
                if card.keep is None and card.method == row["method"] and card.tokens == row["tokens"]
            ),
            {},
        )
        for name, value in zip(table["columns"], row["values"], strict=True):
            cells += [f"{value:.1f}", number(own[name].score if name in own else None, ".1f")]
        rows.append(TableRow([TableCell(cell) for cell in cells]))
    rules = "; ".join(f"{_title(name)}: {rule}" for name, rule in table["rules"].items())
    notes = [note] if note else []
    notes += [
        f"Published: {table['source']}. {table['certainty'][0].upper()}{table['certainty'][1:]}.",
        f"Rules of the published scores: {rules}. Measured: the rules of this repository, as in the table "
        "above, so that the two columns of a benchmark are not the same number.",
    ]
    return Table(f"{table['title']}: published, second hand", header, rows, notes, ["left"])


def _values(cards: dict[str, Scorecard], names: Sequence[str]) -> dict[str, float]:
    """Return the scores of one setting, and of parts of benchmarks, as far as there are any."""
    found = {}
    for name in names:
        card = cards.get(name.partition(":")[0])
        value: Any = None if card is None else card.score
        if card is not None and name in _PARTS:
            value = card.details
            for key in _PARTS[name]:
                value = value.get(key) if isinstance(value, dict) else None
        if is_number(value):
            found[name] = float(value)
    return found


def _relative(own: dict[str, float], full: dict[str, float] | None, names: Sequence[str]) -> float | None:
    """Return Rel. over some columns; None unless all of them are measured, also with all tokens."""
    if full is None or not names or not all(own.get(name) is not None and full.get(name) for name in names):
        return None
    return float(relative({name: own[name] for name in names}, {name: full[name] for name in names}))


def _is_full(card: Scorecard) -> bool:
    return card.tokens is None and card.keep is None


def _label(card: Scorecard) -> str:
    if _is_full(card):
        return "all tokens"
    ratio = "" if card.important_ratio in (None, 0.5) else f" r={card.important_ratio:g}"
    budget = str(card.tokens) if card.keep is None else f"{100 * card.keep:g}%"
    return f"{card.method}{ratio} {budget}"


def _title(name: str) -> str:
    return _TITLES.get(name) or get_benchmark(name).title
