"""Figure 5: random, important or diverse tokens, or both; scores of the ablation "components"."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.analysis.ablation.__main__ import run as run_ablation
from llava.analysis.ablation.definitions import ABLATIONS
from llava.analysis.figures import drawing
from llava.analysis.figures.drawing import Table
from llava.eval.benchmarks import DataError, get_benchmark

NAME = "components"
Row = dict[str, Any]  # of an ablation: `AblationRow.document`
STYLES = {
    "random": ("#9a9a9a", ""),
    "important": ("#e69f00", "////"),
    "diverse": ("#56b4e9", "...."),
    "both": ("#009e73", ""),
}
_COLUMNS = 3
_FIELDS = (
    *("benchmark", "tokens", "value", "score", "ci_low", "ci_high", "difference", "difference_low"),
    *("difference_high", "significant", "visual_tokens", "questions", "images"),
)


def draw(rows: Sequence[Row], caption: str, folder: Path) -> list[str]:
    """Draw and write the figure."""
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    columns = min(len(names), _COLUMNS)
    lines = -(-len(names) // columns)
    with drawing.new_figure(2.5 * lines + 0.3, caption) as figure:
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, name in zip(panels, names, strict=False):
            draw_benchmark(axes, [row for row in rows if row["benchmark"] == name])
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        return drawing.write_figure(figure, folder, "fig5", caption, tables(rows))


def draw_benchmark(axes: Any, rows: Sequence[Row]) -> None:
    """Draw one benchmark: a group of bars per budget, with 95% intervals and the scores."""
    benchmark = get_benchmark(rows[0]["benchmark"])
    budgets = list(dict.fromkeys(row["tokens"] for row in rows))
    labels = [label for label in ABLATIONS[NAME].values if any(row["value"] == label for row in rows)]
    width = 0.84 / len(labels)
    for place, label in enumerate(labels):
        color, hatch = STYLES[label]
        for number, budget in enumerate(budgets):
            for row in rows:
                if (row["value"], row["tokens"]) != (label, budget):
                    continue
                x = number + (place - (len(labels) - 1) / 2) * width
                ends = [[row["score"] - row["ci_low"]], [row["ci_high"] - row["score"]]]
                axes.bar(
                    x, row["score"], 0.92 * width, color=color, hatch=hatch, edgecolor="white", linewidth=0.5,
                    label=label if number == 0 else None,
                )  # fmt: skip
                axes.errorbar(x, row["score"], ends, color="#222222", linewidth=1, capsize=1.5)
                axes.annotate(
                    f"{row['score']:.1f}" if abs(row["score"]) < 1000 else f"{row['score']:.0f}",
                    (x, row["ci_high"]), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=5.8,
                )  # fmt: skip
    low, high = min(row["ci_low"] for row in rows), max(row["ci_high"] for row in rows)
    margin = max(0.12 * (high - low), 0.5)
    axes.set_ylim(max(0, low - 2 * margin), high + 1.5 * margin)
    axes.set_xticks(range(len(budgets)), [f"{budget} tokens" for budget in budgets])
    axes.tick_params(axis="x", length=0)
    axes.set(title=benchmark.title, ylabel=f"{benchmark.metric} ({benchmark.unit})")


def tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Return the scores with their intervals and differences."""
    return {"scores": (list(_FIELDS), [[row[name] for name in _FIELDS] for row in rows])}


def caption(rows: Sequence[Row], model: str, is_bundled: bool) -> str:
    """Return what is shown, and what it can and cannot show."""
    questions = {get_benchmark(row["benchmark"]).title: row["questions"] for row in rows}
    sizes = ", ".join(f"{title} {count:,}" for title, count in questions.items())
    both = [row for row in rows if row["value"] == "both"]
    lower = [
        row for row in rows if row["value"] != "both" and row["significant"] and row["difference"] is not None
    ]
    below, above = (sum(sign * row["difference"] > 0 for row in lower) for sign in (-1, 1))
    compared = len(rows) - len(both)
    text = [
        f"{model}: VisPruner with some of its parts, by benchmark and budget (tokens per crop). Important: "
        "r = 1; diverse: r = 0; both: r = 0.5; random: tokens drawn at random. Whiskers: 95% bootstrap "
        f"intervals over images. Vertical axes need not start at 0. Questions: {sizes}.",
        f"Of {compared} differences to both, paired over images, {below} are negative and {above} positive "
        "with an interval that excludes 0.",
    ]
    if is_bundled:
        text.append(
            "A small model on drawn scenes: it shows that the comparison works; neither the order of the "
            "parts nor the scores carry over to LLaVA-1.5-7B."
        )
    return " ".join(text)


def run(args: argparse.Namespace, command: Sequence[str], is_bundled: bool) -> tuple[dict[str, Any], int]:
    """Run or resume the ablation and draw the figure.

    Args:
        command: Arguments of the ablation after its name.

    Returns:
        The document, and the exit code of the ablation.

    Raises:
        DataError: The ablation has no scores.
    """
    code, found = run_ablation([NAME, *command])
    rows = [row for row in found.get("rows", ()) if None not in (row["score"], row["ci_low"])]
    if not rows:
        raise DataError(f"{args.ablation / NAME}: the ablation has no scores. See the messages above.")
    text = caption(rows, found["model"], is_bundled)
    files = draw(rows, text, args.output / "fig5")
    document = {
        "figure": "fig5",
        "model": found["model"],
        "rows": rows,
        "ablation": found["files"],
        "files": files,
        "caption": text,
        "failures": found["failures"],
    }
    return document, code
