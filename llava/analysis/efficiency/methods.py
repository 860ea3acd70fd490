"""Selection time and FLOPs of pruning methods, compared with VisPruner's and with the prefill they shorten.

Used by `selection --methods`. Features, attention and all other cues are random and given: what computes them
is counted with the tower. Methods differ in what they read, so VisPruner's time is the common measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.analysis.efficiency.timing import Timing, compare, machine, measure, quotient
from llava.model import flops
from llava.model.flops import LanguageShape
from llava.pruning import Pruner, TextCue, get_pruner
from llava.pruning.base import parse_cue

EMBED_WIDTH = 768  # of the space in which CLIP-L compares images and texts
REFERENCE = "vispruner"


def measure_methods(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Time every method at every batch size and budget, and VisPruner with them.

    Returns:
        A document with one row per batch size, budget and method. `vs_vispruner` is the method's time over
        VisPruner's, `of_prefill` over the estimated time of the prefill, and `flops_of_prefill` the same of
        FLOPs.
    """
    shape = LanguageShape.from_config(DUMMY_MODELS[args.dummy_model].language)
    rows = []
    for batch in args.batch_sizes:
        for tokens in args.tokens:
            pruners = {name: get_pruner(name, tokens, args.ratio) for name in [REFERENCE, *names]}
            runs = {name: selection_run(pruner, args, batch, shape.width) for name, pruner in pruners.items()}
            spent = compare(runs, args.device, args.repeats, args.warmup)
            prefill = batch * 2 * flops.llm_prefill_macs(tokens + args.text_tokens, shape)
            prefill_ms = _prefill_ms(args, batch * (tokens + args.text_tokens), shape, prefill)
            for name in names:
                counted = batch * pruners[name].flops(args.patches, args.channels, shape.width)
                rows.append(
                    {
                        "batch": batch,
                        "tokens": tokens,
                        "method": name,
                        **_row(spent[name], spent[REFERENCE]),
                        "gflops": counted / 1e9,
                        "prefill_gflops": prefill / 1e9,
                        "flops_of_prefill": counted / prefill,
                        "prefill_ms": prefill_ms,
                        "of_prefill": 1000 * spent[name].median / prefill_ms,
                    }
                )
    return {
        "machine": machine(args.device),
        "patches": args.patches,
        "channels": args.channels,
        "heads": args.heads,
        "projected": shape.width,
        "important_ratio": args.ratio,
        "dummy_model": args.dummy_model,
        "text_tokens": args.text_tokens,
        "methods": names,
        "rows": rows,
    }


def _row(own: Timing, reference: Timing) -> dict[str, Any]:
    return {"selection": own.as_json(), **quotient("vs_vispruner", own, reference)}


def selection_run(
    pruner: Pruner, args: argparse.Namespace, batch: int, projected: int
) -> Callable[[], object]:
    """Return the selection of random features as a function."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(args.device)

    n, channels = args.patches, args.channels
    shapes = {
        "received": (batch, n),
        "features": (batch, n, channels),
        "keys": (batch, n + 1, max(channels // args.heads, 1)),
        "cls": (batch, channels),
        "last_query": (batch, channels),
        "last_keys": (batch, n + 1, channels),
        "projected": (batch, n, projected),
        "image_embeds": (batch, n, EMBED_WIDTH),
        "text_embeds": (1, EMBED_WIDTH),
    }
    features = draw(batch, n, channels)
    attention = torch.rand(batch, args.heads, n, generator=generator).to(args.device)
    cues = {}
    for cue in pruner.cues:
        name, number = parse_cue(cue, 24)
        if name == "merged":
            cues[cue] = draw(batch, number, channels)
        elif name == "merged_groups":
            cues[cue] = torch.arange(n, device=args.device).remainder(number).repeat(batch, 1)
        elif name != "attention":
            cues[cue] = draw(*shapes[name])
    ids = [str(row) for row in range(batch)]
    return partial(pruner.keep, features, attention, ids, TextCue("", None), cues)


def _prefill_ms(args: argparse.Namespace, tokens: int, shape: LanguageShape, prefill: float) -> float:
    """Estimate the time of a prefill: that of one product of an MLP, times its share of the FLOPs."""
    dtype = torch.float32 if torch.device(args.device).type == "cpu" else torch.float16
    x = torch.ones(tokens, shape.width, dtype=dtype, device=args.device)
    weight = torch.ones(shape.width, shape.mlp, dtype=dtype, device=args.device)
    spent = measure(lambda: x @ weight, args.device, args.repeats, max(1, args.warmup))
    return 1000 * spent.median * prefill / (2 * tokens * shape.width * shape.mlp)


def render_methods(document: dict[str, Any]) -> str:
    """Return the document as a text table."""
    from llava.analysis.efficiency.options import table

    columns = {
        "batch": lambda row: row["batch"],
        "T": lambda row: row["tokens"],
        "method": lambda row: row["method"],
        "ms": lambda row: row["selection"]["median_ms"],
        "x VisPruner": lambda row: row["vs_vispruner"],
        "% of prefill time": lambda row: 100 * row["of_prefill"],
        "GFLOPs": lambda row: row["gflops"],
        "% of prefill FLOPs": lambda row: 100 * row["flops_of_prefill"],
    }
    return (
        f"Selection of N = {document['patches']}, C = {document['channels']}, D = {document['projected']} "
        f"(projected) on {document['machine']['name']}; medians. Prefill of {document['dummy_model']} with T "
        f"+ {document['text_tokens']} tokens, its time estimated from one matrix product\n"
        f"{table(columns, document['rows'])}"
    )
