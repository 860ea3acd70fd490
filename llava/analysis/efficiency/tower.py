"""The vision tower: features, [CLS] row and selection, against a bare tower and against the plain way's.

    python -m llava.analysis.efficiency tower --device cpu --vs plain

One set of weights, several ways, in turns: `ours`, images in and kept indices out (tower cut at the select
layer, its [CLS] row beside fused attention, selection); `bare`, the same layers with SDPA and nothing else,
the least that any method pays; where they differ `one_pass`, ours with all crops together instead of passes
of a fixed size (which keep a crop's bits independent of its batch, at the cost of filling up the last one);
and with --vs plain `plain`, all layers, eager, the attention probabilities of every one returned. Weights are
random, time does not depend on them. ViT-L/14-336 takes seconds on a CPU, so few passes are made there, none
begins after --limit seconds, and their number is printed. Memory: the peak of a first pass, which is not
timed, less that of a pass through a tower of one layer, is what further layers add.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

from llava.analysis.efficiency.options import DTYPES, add_budget, add_measuring, check_device, numbers, table
from llava.analysis.efficiency.shapes import SHAPES, shape_named
from llava.argtypes import at_least

RATIOS = (
    ("ours_over_bare", "ours", "bare", 1.05),
    ("ours_over_plain", "ours", "plain", 0.6),
    ("one_pass_over_bare", "one_pass", "bare", 1.05),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser, repeats=3, warmup=0)
    group = parser.add_argument_group("tower")
    group.add_argument(
        "--limit",
        type=at_least(0, float),
        default=60.0,
        help="seconds per batch size after which no new pass begins (default %(default)g)",
    )
    group.add_argument(
        "--shapes",
        choices=SHAPES,
        default="llava-1.5-7b",
        help="model whose tower to build (default %(default)s: ViT-L/14-336)",
    )
    group.add_argument(
        "--group", type=at_least(1), help="crops per pass of ours; default the tower's own: 1, on CUDA 5"
    )
    group.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, float16 on CUDA")
    group.add_argument("--batch-sizes", type=numbers, help="crops at a time; default 1; 1,5,32 on CUDA")
    add_budget(group)


def check(args: argparse.Namespace) -> None:
    check_device(args)
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "float16")
    args.batch_sizes = args.batch_sizes or ([1] if on_cpu else [1, 5, 32])


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from llava.analysis.efficiency.plain import plain_select, plain_tower
    from llava.analysis.efficiency.shapes import build_tower
    from llava.analysis.efficiency.timing import compare, machine, peak_bytes
    from llava.model import flops
    from llava.model.settings import parse_dtype
    from llava.pruning import get_pruner

    dtype = parse_dtype(args.dtype)
    shape = shape_named(args.shapes)
    tower = build_tower(shape, args.device, dtype, seed=args.seed)
    short = build_tower(shape, args.device, dtype, select_layer=1, seed=args.seed)
    pruner = get_pruner("vispruner", args.tokens, args.ratio)
    vision = flops.VisionShape.from_config(tower.config)
    generator = torch.Generator().manual_seed(args.seed)
    default = tower.crops_per_pass
    rows = []
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, tower.image_size, tower.image_size, generator=generator)
        images = images.to(args.device, dtype)

        def ours(one=tower, images=images, group=args.group):
            one.group_size = group
            features, attention = one(images)
            return pruner.select(features, attention)

        def plain(one=tower, images=images):
            features, attention = plain_tower(SimpleNamespace(get_vision_tower=lambda: one), images)
            return plain_select(features.float(), attention.float(), args.tokens, args.ratio)

        runs = {"ours": ours, "bare": lambda images=images: bare(tower, images)}
        if (args.group or default) != batch:
            runs["one_pass"] = lambda run=ours, batch=batch: run(group=batch)
        if args.vs:
            runs["plain"] = plain
        with torch.inference_mode():
            memory, first, start = {}, {}, time.perf_counter()
            for name, way in runs.items():  # also the warm-up
                memory[name] = peak_bytes(lambda n=name, w=way, f=first: f.update({n: w()}), args.device)
            spent = compare(
                runs, args.device, args.repeats, args.warmup, args.limit - (time.perf_counter() - start)
            )
            one_layer = {"ours": peak_bytes(lambda run=ours: run(short), args.device)}
            if args.vs:
                alone = SimpleNamespace(
                    **{
                        **vars_of(short),
                        "config": SimpleNamespace(
                            num_hidden_layers=1, num_attention_heads=short.config.num_attention_heads
                        ),
                    }
                )
                one_layer["plain"] = peak_bytes(lambda run=plain, one=alone: run(one), args.device)
        row = {
            "batch": batch,
            **{name: {**timing.as_json(), "peak_bytes": memory[name]} for name, timing in spent.items()},
        }
        for name, above, below, _ in RATIOS:
            if above in spent and below in spent:
                row[name] = round(spent[above].median / spent[below].median, 3)
                if spent[above].processor:
                    row[f"{name}_processor"] = round(spent[above].processor / spent[below].processor, 3)
        for name, least in one_layer.items():
            row[name]["peak_bytes_of_one_layer"] = least
            row[name]["peak_bytes_of_more_layers"] = memory[name] - least
        if args.vs:
            row["kept_as_plain"] = agreement(first["ours"], first["plain"])
        row["gflops"] = 2 * batch * flops.vision_tower_macs(vision, -2) / 1e9
        rows.append(row)
    document = {
        "part": "tower",
        "machine": machine(args.device),
        "shapes": args.shapes,
        "dtype": args.dtype,
        "kernels": tower.attn_implementation,
        "crops_per_pass": args.group or default,
        "tokens": args.tokens,
        "important_ratio": args.ratio,
        "passes": min(row["ours"]["passes"] for row in rows),
        "rows": rows,
    }
    for name, *_, goal in RATIOS:
        for key in (name, f"{name}_processor"):
            if any(key in row for row in rows):
                document[key] = max(row[key] for row in rows if key in row)
        if name in document:
            document[f"{name}_goal"] = goal
    if args.vs:
        document["ratio"] = round(1 / document["ours_over_plain"], 3)
    return document


def vars_of(tower: Any) -> dict[str, Any]:
    """What the plain way asks a tower for, so that it can be shown another number of layers."""
    return {
        name: getattr(tower, name)
        for name in ("embed", "layers", "attention_parts", "vision_tower", "device", "dtype")
    }


def bare(tower: Any, images: Any) -> Any:
    """Images (B, 3, S, S) -> features (B, N, C): embedding and layers of a tower, nothing beside them."""
    hidden = tower.embed(images)
    for layer in tower.layers():
        output = layer(hidden, None)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden[:, 1:]


def agreement(a: Any, b: Any) -> float:
    """Share of kept indices (B, K) that two selections have in common."""
    both = [len(set(x) & set(y)) / max(len(x), 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return round(sum(both) / len(both), 4)


def render(document: dict[str, Any]) -> str:
    ways = ("ours", "one_pass", "bare", "plain")
    titles = [
        "batch",
        "way",
        "ms",
        "fastest",
        "slowest",
        "processor ms",
        "peak MiB",
        "MiB of further layers",
        "GFLOP/s",
    ]
    lines = []
    for row in document["rows"]:
        for name in (name for name in ways if name in row):
            one = row[name]
            more = one.get("peak_bytes_of_more_layers")
            rate = row["gflops"] / one["median_ms"] * 1000 if name != "plain" else None
            lines.append(
                [
                    row["batch"],
                    name,
                    one["median_ms"],
                    one["fastest_ms"],
                    one["slowest_ms"],
                    one.get("processor_ms"),
                    one["peak_bytes"] / 2**20,
                    None if more is None else more / 2**20,
                    rate,
                ]
            )
    closing = []
    for name, *_, goal in RATIOS:
        if name in document:
            busy = document.get(f"{name}_processor")
            also = "" if busy is None else f", by processor time {busy:.3g}"
            closing.append(f"{name} {document[name]:.3g}{also} (goal {goal:g})")
    return (
        f"Tower of {document['shapes']}, {document['dtype']}, {document['kernels']}, on "
        f"{document['machine']['name']}; medians of {document['passes']} passes\n"
        + table(titles, lines)
        + "\n"
        + "; ".join(closing)
    )
