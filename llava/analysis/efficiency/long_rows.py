"""Time and memory of the selection of long rows: `selection --n 4096,16384`.

A row is an image of Qwen's size, or all crops of an image. More than `llava.pruning.base.LARGEST` tokens are
selected without the matrix of all pairs; --vs baseline measures the selection with that matrix too, where it
takes at most `MATRIX_BYTES`, and compares the kept tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.analysis.efficiency.methods import REFERENCE, selection_run
from llava.analysis.efficiency.timing import compare, machine, peak_bytes, quotient
from llava.model.flops import LanguageShape
from llava.pruning import base, get_pruner

MATRIX_BYTES = 2**28  # of all pairs in float64, which the selection copies parts of in every round
REPEATS = 3  # at most: one selection may take seconds


def measure_long_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every row length, budget and method of `args`.

    Raises:
        RuntimeError: the kept tokens differ from those with the matrix.
    """
    width = LanguageShape.from_config(DUMMY_MODELS[args.dummy_model].language).width
    rows = []
    for patches in args.n:
        inputs = argparse.Namespace(**{**vars(args), "patches": patches})
        for tokens in args.tokens:
            for name in args.methods or [REFERENCE]:
                run = selection_run(get_pruner(name, tokens, args.ratio), inputs, 1, width)
                matrix = 8 * patches * patches
                runs = {"selection": run}
                if args.vs and matrix <= MATRIX_BYTES and base.is_large(patches):
                    runs["matrix"] = _with_matrix(run)
                    if not torch.equal(run().indices, runs["matrix"]().indices):
                        raise RuntimeError(f"{name}: N = {patches}, T = {tokens}: kept tokens differ")
                spent = compare(runs, args.device, min(args.repeats, REPEATS), min(args.warmup, 1))
                speedup = quotient("speedup", spent["matrix"], spent["selection"]) if "matrix" in runs else {}
                rows.append(
                    {
                        "patches": patches,
                        "tokens": tokens,
                        "method": name,
                        "matrix_bytes": matrix,
                        **{f"{key}_peak_bytes": peak_bytes(one, args.device) for key, one in runs.items()},
                        **{key: timing.as_json() for key, timing in spent.items()},
                        **speedup,
                    }
                )
    return {
        "machine": machine(args.device),
        "largest": base.LARGEST,
        "channels": args.channels,
        "heads": args.heads,
        "projected": width,
        "important_ratio": args.ratio,
        "long_rows": rows,
    }


def _with_matrix(run: Callable[[], Any]) -> Callable[[], Any]:
    def with_matrix() -> Any:
        before, base.LARGEST = base.LARGEST, 2**62
        try:
            return run()
        finally:
            base.LARGEST = before

    return with_matrix


def render_long_rows(document: dict[str, Any]) -> str:
    """Return the document as a text table."""
    from llava.analysis.efficiency.options import table

    columns = {
        "N": lambda row: row["patches"],
        "T": lambda row: row["tokens"],
        "method": lambda row: row["method"],
        "ms": lambda row: row["selection"]["median_ms"],
        "peak MiB": lambda row: row["selection_peak_bytes"] / 2**20,
        "N x N MiB": lambda row: row["matrix_bytes"] / 2**20,
        "matrix ms": lambda row: row.get("matrix", {}).get("median_ms"),
        "matrix peak MiB": lambda row: row["matrix_peak_bytes"] / 2**20 if "matrix" in row else None,
    }
    if not any("matrix" in row for row in document["long_rows"]):
        del columns["matrix ms"], columns["matrix peak MiB"]
    return (
        f"Selection of one row, C = {document['channels']}, D = {document['projected']} (projected) on "
        f"{document['machine']['name']}; medians. Rows of more than {document['largest']} tokens are "
        f"selected without the matrix of all pairs\n{table(columns, document['long_rows'])}"
    )
