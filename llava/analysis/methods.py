"""All pruning methods in one table: score, tokens and cost at one budget, best score first.

    python -m llava.eval.sweep --methods ... --output outputs/sweep --report outputs/methods
    python -m llava.analysis.efficiency selection --device cpu --methods all --output selection.json
    python -m llava.analysis.methods --grid outputs/methods/grid.csv --selection selection.json

Scores come from the grid of a sweep (grid.csv), selection times from `efficiency selection`; both may be
left out. Tokens and FLOPs are computed for the sizes of --dummy-model, one image and --text-tokens of text.
Methods that cannot meet a budget are named below the table. Writes methods.md, methods.csv and, with scores,
a plot (PNG, SVG), and one JSON document as the last line of standard output.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.analysis.figures.drawing import new_figure, render
from llava.argtypes import at_least
from llava.eval.store.atomic import write_atomically
from llava.model.flops import LanguageShape, VisionShape
from llava.model.method_cost import MethodCost, method_cost
from llava.pruning import get_pruner, list_pruners
from llava.table import Table, TableCell, TableRow, csv_text, number

COLUMNS = ("acc", "pope")  # of grid.csv
Scores = Mapping[tuple[str, int], Mapping[str, tuple[float, float | None, float | None]]]


def read_grid(path: Path) -> tuple[Scores, dict[str, float]]:
    """Read grid.csv of a sweep.

    Returns:
        (method, tokens) -> column -> (score, ends of the 95% interval), and column -> score with all tokens.

    Raises:
        ValueError: the file is not such a grid.
    """
    scores: dict[tuple[str, int], dict[str, Any]] = {}
    full: dict[str, float] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                column, method, score = row["set"], row["method"], row["score"]
                values = float(score), *(float(row[end]) if row[end] else None for end in ("low", "high"))
                ratio, tokens = row["important_ratio"], row["tokens"]
                if method == "vispruner" and ratio and float(ratio) != 0.5:
                    method += f" r={float(ratio):g}"
                if column in COLUMNS and tokens:
                    scores.setdefault((method, int(tokens)), {})[column] = values
                elif column in COLUMNS:
                    full[column] = values[0]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}:{line}: not a line of a sweep's grid ({error}). Give the grid.csv that "
                    "llava.eval.sweep --report writes."
                ) from error
    return scores, full


def read_selection(path: Path) -> dict[tuple[str, int], float]:
    """Read (method, tokens) -> time over VisPruner's of one crop. Raises ValueError for another file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(row["method"], row["tokens"]): row["vs_vispruner"] for row in rows if row["batch"] == 1}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not an output of `efficiency selection --methods all` ({error!r}). Give what it writes "
            "to --output."
        ) from error


def costs(
    names: Sequence[str], budgets: Sequence[int], dummy_model: str, text_tokens: int
) -> tuple[dict[tuple[str, int], MethodCost], list[str]]:
    """Compute the cost of every method and budget; return it with the reasons of those that cannot be had."""
    sizes = DUMMY_MODELS[dummy_model]
    language, vision = LanguageShape.from_config(sizes.language), VisionShape.from_config(sizes.tower)
    found: dict[tuple[str, int], MethodCost] = {}
    missing = []
    for name, tokens in itertools.product(names, budgets):
        try:
            pruner = get_pruner(name.partition(" ")[0], tokens, 0.0 if name.endswith("r=0") else 0.5)
            found[name, tokens] = method_cost(pruner, language, vision, text_tokens)
        except ValueError as error:
            missing.append(f"{name} at {tokens}: {error}")
    return found, missing


def spans(counts: Sequence[int]) -> str:
    """Write tokens per layer as runs: "576 x 2, 64 x 30"."""
    runs = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    return ", ".join(f"{count} x {length}" for count, length in runs) if len(runs) > 1 else str(counts[0])


def build_table(
    tokens: int,
    found: Mapping[tuple[str, int], MethodCost],
    scores: Scores,
    times: Mapping[tuple[str, int], float],
    full: MethodCost,
) -> Table:
    """Build the table of one budget, best Acc. first; methods without a score at the end, by their name."""

    def order(name: str) -> tuple[float, str]:
        score = scores.get((name, tokens), {}).get("acc") or scores.get((name, tokens), {}).get("pope")
        return (-score[0] if score else float("inf"), name)

    rows = []
    for name in sorted((name for name, budget in found if budget == tokens), key=order):
        cost, cells = found[name, tokens], [TableCell(name)]
        for column in COLUMNS:
            score = scores.get((name, tokens), {}).get(column)
            interval = f"[{score[1]:.1f}, {score[2]:.1f}]" if score and score[1] is not None else ""
            cells.append(TableCell(f"{score[0]:.1f}" if score else "", interval))
        flops = cost.flops()
        cells += [
            TableCell(f"{cost.entering_mean:.0f}"),
            TableCell(spans(cost.visual_per_layer)),
            TableCell(f"{flops['total'] / 1e12:.2f}"),
            TableCell(f"{100 * flops['total'] / full.total:.0f}"),
            TableCell(f"{(flops['cues'] + flops['selection']) / 1e9:.2f}"),
            TableCell(f"{flops['projector'] / 1e9:.1f}"),
            TableCell(number(times.get((name, tokens)), ".2f")),
        ]
        rows.append(TableRow(cells))
    header = ["method", "Acc.", "POPE", "tokens", "per layer", "TFLOPs", "% of all", "own GFLOPs"]
    return Table(f"{tokens} tokens", [*header, "projector", "time"], rows, kinds=("left",))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.analysis.methods", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--grid", type=Path, metavar="FILE", help="grid.csv of a sweep with --report (default: no scores)")
    add("--selection", type=Path, metavar="FILE", help="JSON of efficiency selection (default: no times)")
    budgets = "visual tokens to keep per crop (default: 128 64 32)"
    add("--tokens", type=at_least(1), nargs="+", default=[128, 64, 32], metavar="N", help=budgets)
    shapes = "model whose sizes give tokens per layer and FLOPs; no weights are read (default: %(default)s)"
    add("--dummy-model", choices=list(DUMMY_MODELS), default="llava-1.5-7b", help=shapes)
    text = "text tokens of the prompt (default: %(default)s)"
    add("--text-tokens", type=at_least(0), default=80, metavar="N", help=text)
    output = "folder to write to (default: outputs/methods)"
    add("--output", type=Path, default=Path("outputs", "methods"), metavar="DIR", help=output)
    args = parser.parse_args(argv)
    try:
        scores, full_scores = read_grid(args.grid) if args.grid else ({}, {})
        times = read_selection(args.selection) if args.selection else {}
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}. Correct the path.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = [name for name in list_pruners() if name != "none"] + ["vispruner r=0"]
    found, missing = costs(names, args.tokens, args.dummy_model, args.text_tokens)
    full = costs(["none"], [1], args.dummy_model, args.text_tokens)[0]["none", 1]
    tables = [build_table(tokens, found, scores, times, full) for tokens in args.tokens]
    note = (
        f"Acc. and POPE: the sweep's scores, with 95% intervals over images{_all_tokens(full_scores)}. "
        f"Tokens, FLOPs: {args.dummy_model}, one crop, {args.text_tokens} text tokens; tokens: visual tokens "
        "that enter a layer of the language model, mean over its layers. % of all: of the FLOPs without "
        f"pruning ({full.total / 1e12:.2f} T). Own GFLOPs: the selection and what it reads. Projector: "
        "GFLOPs. Time: of the selection, over VisPruner's."
    )
    lost = ["", "Not available:", "", *(f"* {reason}" for reason in missing)] if missing else []
    text = "\n\n".join(table.markdown(3).rstrip() for table in tables)
    text = "\n".join([text, "", note, *lost, ""])
    write_atomically(args.output / "methods.md", text)
    write_atomically(args.output / "methods.csv", _csv(found, scores, times, full))
    print("\n\n".join(table.text() for table in tables) + f"\n\n{note}")
    for reason in missing:
        print(f"not available: {reason}")
    files = ["methods.md", "methods.csv"]
    if scores and find_spec("matplotlib") is not None:
        drawn = _draw(args.tokens, scores, full_scores)
        for name, content in drawn.items():
            write_atomically(args.output / name, content)
        files += drawn
    document = {"output": str(args.output), "files": files, "not_available": missing, "rows": len(found)}
    print(json.dumps(document))
    return 0


def _all_tokens(full: Mapping[str, float]) -> str:
    known = ", ".join(f"{name} {score:.1f}" for name, score in full.items())
    return f" ({known} with all tokens)" if known else ""


def _csv(
    found: Mapping[tuple[str, int], MethodCost],
    scores: Scores,
    times: Mapping[tuple[str, int], float],
    full: MethodCost,
) -> str:
    parts = ("vision_tower", "cues", "selection", "projector", "language_model", "total")
    header = ["method", "tokens", *(f"{c}{end}" for c in COLUMNS for end in ("", "_ci_low", "_ci_high"))]
    header += ["entering_mean", "visual_per_layer", *(f"{part}_flops" for part in parts)]
    header += ["total_tflops", "percent_of_all", "own_gflops", "projector_gflops", "selection_time"]
    rows = []
    for (name, tokens), cost in found.items():
        known = scores.get((name, tokens), {})
        row: list[Any] = [name, tokens]
        for column in COLUMNS:
            row += known.get(column, (None, None, None))
        row += [cost.entering_mean, spans(cost.visual_per_layer), *(cost.flops()[part] for part in parts)]
        row += [cost.total / 1e12, 100 * cost.total / full.total, (cost.cues + cost.selection) / 1e9]
        rows.append([*row, cost.projector / 1e9, times.get((name, tokens))])
    return csv_text(header, rows)


def _draw(tokens: Sequence[int], scores: Scores, full: Mapping[str, float]) -> dict[str, str | bytes]:
    """Draw the scores of every budget, best last; return methods.png and methods.svg."""
    column = "acc" if any("acc" in known for known in scores.values()) else "pope"
    caption = (
        f"{'Acc.' if column == 'acc' else 'POPE, F1'} (%) of all methods, with 95% intervals over images. "
        "Dotted: all tokens. Methods inside the language model have all tokens in its first layers, so their "
        "mean is more than the budget."
    )
    marks = {"decoder": ("inside the LM", "#d55e00", "s"), "image": ("before the LM", "#0072b2", "o")}
    with new_figure(4.6, caption) as figure:
        panels = figure.subplots(1, len(tokens), squeeze=False, sharex=True)[0]
        for axes, budget in zip(panels, tokens, strict=True):
            known = [
                (one[column], name) for (name, at), one in scores.items() if at == budget and column in one
            ]
            known.sort(key=lambda pair: pair[0][0])
            for place, ((score, low, high), name) in enumerate(known):
                label, color, marker = marks[get_pruner(name.partition(" ")[0], 1).acts_in]
                axes.plot(score, place, marker, color=color, label=label, markersize=4)
                if low is not None:
                    axes.plot([low, high], [place, place], color=color, linewidth=1)
            axes.set_yticks(range(len(known)), [name for _, name in known])
            axes.grid(axis="x", color="#e4e4e4")
            axes.set_title(f"{budget} tokens")
            axes.set_xlabel("score (%)")
            if column in full:
                axes.axvline(full[column], color="#444444", linestyle=":", linewidth=1)
        found = [axes.get_legend_handles_labels() for axes in panels]
        handles = {label: line for lines, labels in found for line, label in zip(lines, labels, strict=True)}
        panels[-1].legend(handles.values(), handles.keys(), loc="lower right")
        return render(figure, "methods")


if __name__ == "__main__":
    sys.exit(main())
