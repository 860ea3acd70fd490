"""Selection: ours against the algorithm line by line, with one float32 product of all channels per round.

    python -m llava.analysis.efficiency selection --device cpu --vs plain

Features and attention are random; time does not depend on what they say. Ours works in float64 whatever it is
given. Before anything is timed, its indices are compared with those of the plain way in float64, for every
row; a difference is an error. The ratio is plain / ours, the smallest of all rows in `ratio`.
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.analysis.efficiency.options import add_measuring, check_device, numbers, table
from llava.argtypes import at_least, ratio
from llava.model import flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser, repeats=15)
    group = parser.add_argument_group("selection")
    group.add_argument("--batch-sizes", type=numbers, help="rows at a time; default 1,5 and 32 on CUDA")
    group.add_argument("--tokens", type=numbers, default=[128, 64, 32], help="T (default 128,64,32)")
    group.add_argument("--ratio", type=ratio, default=0.5, help="r (default %(default)s)")
    group.add_argument("--patches", type=at_least(2), default=576, help="N (default %(default)s)")
    group.add_argument("--channels", type=at_least(1), default=1024, help="C (default %(default)s)")
    group.add_argument("--heads", type=at_least(1), default=16, help="H (default %(default)s)")


def check(args: argparse.Namespace) -> None:
    if max(args.tokens) >= args.patches:
        raise ValueError(f"--tokens {max(args.tokens)}: nothing to choose from {args.patches} patches")
    check_device(args)
    if args.batch_sizes is None:
        args.batch_sizes = [1, 5] if args.device == "cpu" else [1, 5, 32]


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from llava.analysis.efficiency.plain import plain_select
    from llava.analysis.efficiency.timing import compare, machine, peak_bytes
    from llava.pruning import get_pruner
    from llava.pruning.diversity import rounds_backend

    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for batch in args.batch_sizes:
        features = torch.randn(batch, args.patches, args.channels, generator=generator).to(args.device)
        attention = torch.rand(batch, args.heads, args.patches, generator=generator).to(args.device)
        for tokens in args.tokens:
            pruner = get_pruner("vispruner", tokens, args.ratio)
            found = pruner.select(features, attention)
            plain = plain_select(features.double(), attention.double(), tokens, args.ratio)
            if not torch.equal(found, plain):
                raise RuntimeError(f"batch {batch}, T = {tokens}: not the plain way's indices in float64")
            runs = {"ours": lambda p=pruner, f=features, a=attention: p.select(f, a)}
            if args.vs:
                runs["plain"] = lambda t=tokens, f=features, a=attention: plain_select(f, a, t, args.ratio)
            spent = compare(runs, args.device, args.repeats, args.warmup)
            cost = [
                batch * flops.selection_macs(args.patches, args.channels, tokens, args.ratio, per_round)
                for per_round in (False, True)
            ]
            row = {
                "batch": batch,
                "tokens": tokens,
                "equal_indices": True,
                "ours_gflops": 2 * cost[0] / 1e9,
                "plain_gflops": 2 * cost[1] / 1e9,
                "ours_peak_bytes": peak_bytes(runs["ours"], args.device),
                **{name: timing.as_json() for name, timing in spent.items()},
            }
            if args.vs:
                row["ratio"] = round(spent["plain"].median / spent["ours"].median, 3)
                if spent["ours"].processor:
                    row["ratio_processor"] = round(spent["plain"].processor / spent["ours"].processor, 3)
            rows.append(row)
    document = {
        "part": "selection",
        "machine": machine(args.device),
        "patches": args.patches,
        "channels": args.channels,
        "heads": args.heads,
        "important_ratio": args.ratio,
        "dtypes": {"inputs": "float32", "ours": "float64", "plain": "float32"},
        "rounds": rounds_backend(args.device),
        "rows": rows,
    }
    if args.vs:
        document["ratio"] = min(row["ratio"] for row in rows)
    return document


def render(document: dict[str, Any]) -> str:
    titles = ["batch", "T", "ours ms", "plain ms", "plain / ours", "ours GFLOP", "plain GFLOP", "ours MiB"]
    lines = [
        [
            row["batch"],
            row["tokens"],
            row["ours"]["median_ms"],
            row.get("plain", {}).get("median_ms"),
            row.get("ratio"),
            row["ours_gflops"],
            row["plain_gflops"],
            row["ours_peak_bytes"] / 2**20,
        ]
        for row in document["rows"]
    ]
    return (
        f"Selection of N = {document['patches']}, C = {document['channels']}, "
        f"r = {document['important_ratio']:g} on {document['machine']['name']}; "
        f"medians, same indices in float64, rounds run on {document['rounds']}\n" + table(titles, lines)
    )
