"""Measure token selection, compared with the algorithm line by line: one float32 product per round.

    python -m llava.analysis.efficiency selection --device cpu --vs baseline
    python -m llava.analysis.efficiency selection --device cpu --methods all

Features and attention are random, because the time does not depend on their values. The optimized selection
computes in float64 whatever its inputs. Before anything is timed, its indices are compared with those of the
baseline in float64 for every row; a difference is an error. The speedup is the time of the baseline over the
optimized time; the document's `speedup` is the smallest of all rows. On CUDA the selection is also captured
in a graph (`graph`); its checks of unusual inputs then become a flag.

--n 4096,16384 measures time and peak memory of one long row per number (`long_rows.py`), which is selected
without the matrix of all pairs; with --vs baseline next to the selection with it, where that fits.

--methods times other methods that prune before the language model, and compares them with VisPruner's time
and with the prefill of --dummy-model.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from llava.analysis.efficiency.options import (
    add_dummy_model,
    add_measuring,
    add_ratio,
    check_device,
    numbers,
    table,
)
from llava.argtypes import at_least
from llava.model import flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser, repeats=15)
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--batch-sizes", type=numbers, help="crops per batch, comma-separated (default: 1,5; 1,5,32 on CUDA)"
    )
    group.add_argument(
        "--tokens",
        type=numbers,
        default=[128, 64, 32],
        help="visual tokens T to keep per crop, comma-separated (default: 128,64,32)",
    )
    add_ratio(group)
    group.add_argument(
        "--patches", type=at_least(2), default=576, help="patches N per crop (default: %(default)s)"
    )
    group.add_argument(
        "--n",
        type=numbers,
        help="patches of long rows to measure one by one instead, comma-separated, such as 4096,16384",
    )
    group.add_argument(
        "--channels", type=at_least(1), default=1024, help="channels C of a feature (default: %(default)s)"
    )
    group.add_argument(
        "--heads", type=at_least(1), default=16, help="attention heads H (default: %(default)s)"
    )
    group.add_argument(
        "--methods", nargs="+", metavar="NAME", help="time these methods, or all, next to vispruner"
    )
    group.add_argument(
        "--text-tokens",
        type=at_least(0),
        default=60,
        help="text tokens of the prefill that --methods compares with (default: %(default)s)",
    )
    add_dummy_model(group, default="llava-1.5-7b")


def check(args: argparse.Namespace) -> None:
    option, least = ("--n", min(args.n)) if args.n else ("--patches", args.patches)
    if max(args.tokens) >= least:
        raise ValueError(f"--tokens {max(args.tokens)}: expected fewer than {option} {least}")
    check_device(args)
    if args.n and args.batch_sizes:
        raise ValueError("--batch-sizes: --n measures one row. Leave it out")
    if args.methods and args.vs and not args.n:
        raise ValueError("--methods: compares with vispruner, not with --vs baseline. Use one of them")
    args.methods = args.methods and _methods(args.methods)
    args.batch_sizes = args.batch_sizes or ([1, 5] if args.device == "cpu" else [1, 5, 32])


def _methods(names: list[str]) -> list[str]:
    """Return the names of methods that prune before the language model; "all" is all of them."""
    from llava.pruning import get_pruner, list_pruners

    if names == ["all"]:
        names = [name for name in list_pruners() if name != "none"]
        return [name for name in names if get_pruner(name).acts_in == "image"]
    inside = [name for name in names if get_pruner(name).acts_in != "image"]
    if inside:
        raise ValueError(f"--methods {inside[0]}: it prunes inside the language model. Leave it out")
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.n:
        from llava.analysis.efficiency.long_rows import measure_long_rows

        return measure_long_rows(args)
    if args.methods:
        from llava.analysis.efficiency.methods import measure_methods

        return measure_methods(args, args.methods)
    import torch

    from llava.analysis.efficiency.baseline import baseline_select
    from llava.analysis.efficiency.timing import add_captured, compare, machine, peak_bytes, quotient
    from llava.pruning import get_pruner
    from llava.pruning.kernels import rounds_backend

    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for batch in args.batch_sizes:
        features = torch.randn(batch, args.patches, args.channels, generator=generator).to(args.device)
        attention = torch.rand(batch, args.heads, args.patches, generator=generator).to(args.device)
        for tokens in args.tokens:
            pruner = get_pruner("vispruner", tokens, args.ratio)
            expected = baseline_select(features.double(), attention.double(), tokens, args.ratio)
            if not torch.equal(pruner.select(features, attention), expected):
                raise RuntimeError(f"batch {batch}, T = {tokens}: indices differ from the float64 baseline's")
            runs = {"optimized": lambda p=pruner, f=features, a=attention: p.select(f, a)}
            if args.vs:
                runs["baseline"] = lambda t=tokens, f=features, a=attention: baseline_select(
                    f, a, t, args.ratio
                )
            failed = {}
            if features.is_cuda:
                inputs = (features, attention)
                failed = add_captured(runs, "graph", partial(select_deferred, pruner), inputs)
            if "graph" in runs and not torch.equal(runs["graph"]()[0], expected):
                raise RuntimeError(f"batch {batch}, T = {tokens}: indices of the graph differ")
            spent = compare(runs, args.device, args.repeats, args.warmup)
            macs = {
                name: batch * flops.selection_macs(args.patches, args.channels, tokens, args.ratio, per_round)
                for name, per_round in (("optimized", False), ("baseline", True))
            }
            rows.append(
                {
                    "batch": batch,
                    "tokens": tokens,
                    "equal_indices": True,
                    **{f"{name}_gflops": 2 * count / 1e9 for name, count in macs.items()},
                    "optimized_peak_bytes": peak_bytes(runs["optimized"], args.device),
                    **{name: timing.as_json() for name, timing in spent.items()},
                    **failed,
                    **(quotient("speedup", spent["baseline"], spent["optimized"]) if args.vs else {}),
                    **(
                        quotient("graph_speedup", spent["baseline"], spent["graph"])
                        if args.vs and "graph" in spent
                        else {}
                    ),
                }
            )
    document = {
        "machine": machine(args.device),
        "patches": args.patches,
        "channels": args.channels,
        "heads": args.heads,
        "important_ratio": args.ratio,
        "dtypes": {"inputs": "float32", "optimized": "float64", "baseline": "float32"},
        "rounds": rounds_backend(args.device),
        "rows": rows,
    }
    if args.vs:
        document["speedup"] = min(row["speedup"] for row in rows)
    return document


def select_deferred(pruner: Any, features: Any, attention: Any) -> tuple[Any, Any]:
    """Select without waiting for the device: indices (B, K), and a flag that is True if they may be wrong."""
    kept, doubt = pruner.keep_deferred(features, attention)
    return kept.indices, doubt


def render(document: dict[str, Any]) -> str:
    if "long_rows" in document:
        from llava.analysis.efficiency.long_rows import render_long_rows

        return render_long_rows(document)
    if "methods" in document:
        from llava.analysis.efficiency.methods import render_methods

        return render_methods(document)
    columns = {
        "batch": lambda row: row["batch"],
        "T": lambda row: row["tokens"],
        "optimized ms": lambda row: row["optimized"]["median_ms"],
        "baseline ms": lambda row: row.get("baseline", {}).get("median_ms"),
        "speedup": lambda row: row.get("speedup"),
        "graph ms": lambda row: row.get("graph", {}).get("median_ms"),
        "graph speedup": lambda row: row.get("graph_speedup"),
        "optimized GFLOPs": lambda row: row["optimized_gflops"],
        "baseline GFLOPs": lambda row: row["baseline_gflops"],
        "optimized MiB": lambda row: row["optimized_peak_bytes"] / 2**20,
    }
    if not any("graph" in row for row in document["rows"]):
        del columns["graph ms"], columns["graph speedup"]
    return (
        f"Selection of N = {document['patches']}, C = {document['channels']}, "
        f"r = {document['important_ratio']:g} on {document['machine']['name']}; medians, equal indices in "
        f"float64, rounds in {document['rounds']}\n{table(columns, document['rows'])}"
    )
