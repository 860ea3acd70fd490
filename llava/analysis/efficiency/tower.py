"""Measure the vision tower with its [CLS] row and selection, compared with a bare tower and the baseline.

    python -m llava.analysis.efficiency tower --device cpu --vs baseline

Variants with the same weights are interleaved: `optimized`, images in and kept indices out (tower cut at the
select layer, its [CLS] row computed in addition to fused attention, selection); `bare`, the same layers with
SDPA and nothing else, the least that any method costs; on CUDA `captured`, optimized in one graph; where they
differ `one_pass`, optimized with all crops together instead of in the passes that the tower or --group
chooses (which keep the bits of a crop independent of its batch); and with --vs baseline `baseline`, all
layers with eager attention, the attention probabilities of every layer returned. Weights are random, because
the time does not depend on them.

ViT-L/14-336 takes seconds on a CPU, so the default is a few passes: none starts after --max-seconds, and
their number is printed. Memory is the peak of a first, unmeasured pass; the difference from the peak of a
tower of one layer is what further layers add.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from llava.analysis.efficiency import options
from llava.argtypes import at_least

VARIANTS = ("optimized", "captured", "one_pass", "bare", "baseline")
GOALS = (  # quotients of times that should not be exceeded
    ("optimized_over_bare", "optimized", "bare", 1.05),
    ("optimized_over_baseline", "optimized", "baseline", 0.6),
    ("one_pass_over_bare", "one_pass", "bare", 1.05),
    ("captured_over_bare", "captured", "bare", 1.05),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_measuring(parser, repeats=3, warmup=0)
    group = parser.add_argument_group("tower")
    group.add_argument(
        "--max-seconds",
        "--limit",
        type=at_least(0, float),
        default=60.0,
        help="seconds per batch size after which no new pass starts (default: %(default)g; "
        "former name of the option: --limit)",
    )
    options.add_dummy_model(group, default="llava-1.5-7b")
    group.add_argument(
        "--group",
        type=at_least(1),
        help="crops per optimized pass (default: the tower chooses by device, dtype and number of crops)",
    )
    group.add_argument(
        "--dtype", choices=options.DTYPES, help="dtype of the tower (default: float16 on CUDA, else float32)"
    )
    group.add_argument(
        "--batch-sizes",
        type=options.numbers,
        help="crops per batch, comma-separated (default: 1; 1,5,32 on CUDA)",
    )
    options.add_budget(group)


def check(args: argparse.Namespace) -> None:
    options.check_device(args)
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "float16")
    args.batch_sizes = args.batch_sizes or ([1] if on_cpu else [1, 5, 32])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.dummy_models import build_tower
    from llava.analysis.efficiency.timing import machine
    from llava.model.settings import parse_dtype

    towers = [
        build_tower(
            args.dummy_model, args.device, parse_dtype(args.dtype), select_layer=layer, seed=args.seed
        )
        for layer in (-2, 1)
    ]
    rows = [_measure(args, batch, *towers) for batch in args.batch_sizes]
    document = {
        "machine": machine(args.device),
        "dummy_model": args.dummy_model,
        "dtype": args.dtype,
        "kernels": towers[0].attn_implementation,
        "crops_per_pass": args.group or towers[0].crops_per_pass,
        "tokens": args.tokens,
        "important_ratio": args.ratio,
        "passes": min(row["optimized"]["passes"] for row in rows),
        "rows": rows,
    }
    for name, *_, goal in GOALS:
        for key in (name, f"{name}_processor"):
            if any(key in row for row in rows):
                document[key] = max(row[key] for row in rows if key in row)
        if name in document:
            document[f"{name}_goal"] = goal
    if args.vs:
        document["speedup"] = round(1 / document["optimized_over_baseline"], 3)
    return document


def _measure(args: argparse.Namespace, batch: int, tower: Any, one_layer: Any) -> dict[str, Any]:
    """Time all variants at one batch size; returns a row of the document."""
    import torch

    from llava.analysis.efficiency.baseline import baseline_select, baseline_tower
    from llava.analysis.efficiency.selection import select_deferred
    from llava.analysis.efficiency.timing import add_captured, compare, peak_bytes, quotient
    from llava.model import flops
    from llava.pruning import get_pruner

    pruner = get_pruner("vispruner", args.tokens, args.ratio)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(batch, 3, tower.image_size, tower.image_size, generator=generator)
    images = images.to(args.device, tower.dtype)

    def optimized(tower: Any = tower, crops: int | None = args.group) -> Any:
        tower.group_size = crops
        return pruner.select(*tower(images))

    def whole(images: Any) -> Any:
        tower.group_size = args.group
        return select_deferred(pruner, *tower(images))

    def baseline(tower: Any = tower, depth: int | None = None) -> Any:
        features, attention = baseline_tower(tower, images, depth)
        return baseline_select(features.float(), attention.float(), args.tokens, args.ratio)

    runs = {"optimized": optimized, "bare": lambda: bare(tower, images)}
    if (args.group or (batch if tower.merges_images else 1)) != batch:
        runs["one_pass"] = lambda: optimized(crops=batch)
    if args.vs:
        runs["baseline"] = baseline
    failed = add_captured(runs, "captured", whole, (images,)) if images.is_cuda else {}
    with torch.inference_mode():
        memory, first, start = {}, {}, time.perf_counter()
        for name, variant in runs.items():  # this is also the warm-up
            memory[name] = peak_bytes(lambda n=name, v=variant: first.update({n: v()}), args.device)
        left = args.max_seconds - (time.perf_counter() - start)
        spent = compare(runs, args.device, args.repeats, args.warmup, left)
        memory_of_one_layer = {"optimized": peak_bytes(lambda: optimized(one_layer), args.device)}
        if args.vs:
            memory_of_one_layer["baseline"] = peak_bytes(lambda: baseline(one_layer, 1), args.device)
    row = {
        "batch": batch,
        **failed,
        **{name: {**timing.as_json(), "peak_bytes": memory[name]} for name, timing in spent.items()},
    }
    for name, above, below, _ in GOALS:
        if above in spent and below in spent:
            row |= quotient(name, spent[above], spent[below])
    for name, least in memory_of_one_layer.items():
        row[name]["peak_bytes_of_one_layer"] = least
        row[name]["peak_bytes_of_more_layers"] = memory[name] - least
    if args.vs:
        row["kept_as_baseline"] = agreement(first["optimized"], first["baseline"])
    vision = flops.VisionShape.from_config(tower.config)
    row["gflops"] = 2 * batch * flops.vision_tower_macs(vision, -2) / 1e9
    return row


def bare(tower: Any, images: Any) -> Any:
    """Run only the embedding and the layers of a tower: (B, 3, S, S) -> features (B, N, C)."""
    from llava.analysis.efficiency.baseline import run_layer

    hidden = tower.embed(images)
    for layer in tower.layers():
        hidden = run_layer(layer, hidden)
    return hidden[:, 1:]


def agreement(a: Any, b: Any) -> float:
    """Compute the share of kept indices (B, K) that two selections have in common."""
    both = [len(set(x) & set(y)) / max(len(x), 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return round(sum(both) / len(both), 4)


def render(document: dict[str, Any]) -> str:
    lines = [(row, name, row[name]) for row in document["rows"] for name in VARIANTS if name in row]
    columns = {
        "batch": lambda line: line[0]["batch"],
        "variant": lambda line: line[1],
        "ms": lambda line: line[2]["median_ms"],
        "fastest": lambda line: line[2]["fastest_ms"],
        "slowest": lambda line: line[2]["slowest_ms"],
        "processor ms": lambda line: line[2].get("processor_ms"),
        "peak MiB": lambda line: line[2]["peak_bytes"] / 2**20,
        "MiB of further layers": lambda line: _mebibytes(line[2].get("peak_bytes_of_more_layers")),
        "GFLOP/s": lambda line: (
            None if line[1] == "baseline" else line[0]["gflops"] / line[2]["median_ms"] * 1000
        ),
    }
    goals = []
    for name, *_, goal in GOALS:
        if name in document:
            processor = document.get(f"{name}_processor")
            also = "" if processor is None else f", by processor time {processor:.3g}"
            goals.append(f"{name} {document[name]:.3g}{also} (goal {goal:g})")
    return (
        f"Tower of {document['dummy_model']}, {document['dtype']}, {document['kernels']}, on "
        f"{document['machine']['name']}; medians of {document['passes']} passes\n"
        f"{options.table(columns, lines)}\n{'; '.join(goals)}"
    )


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
