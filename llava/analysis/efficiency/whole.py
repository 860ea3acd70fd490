"""Measure a whole model: tokens, FLOPs, KV cache, memory and time of every stage, per method and budget.

    python -m llava.analysis.efficiency --dummy-model tiny --device cpu --vs baseline
    python -m llava.analysis.efficiency --dummy-model llava-next-7b --device cuda --vs baseline --peak
    python -m llava.analysis.efficiency --model FOLDER --tokens none,64 --methods vispruner,fastervlm

A dummy model has random weights, which are created on the device. Every stage is timed alone (image decoding
and resizing on CPU, vision, selection, projector and merging, prefill, one decoded token), and the stages
from vision to prefill are timed together: time to first token (TTFT), without the decoding of the image. With
--vs baseline the first token is also computed by the naive baseline, one question at a time; the document's
`speedup` is baseline time over optimized time, the smallest of all budgets. These times are eager. On CUDA
the model's own `generate` follows, which replays captured graphs: TTFT and TPOT of `graph`, with --compile of
compiled layers as well.

FLOPs are analytic, 2 per multiply-accumulate of matrix products, attention in full; norms, softmax,
activations, embedding table and output head are not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.analysis.efficiency import options
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.argtypes import at_least

CONVENTION = (
    "FLOPs: 2 per multiply-accumulate of matrix products, attention in full; without norms, "
    "softmax, activations, embedding table and output head"
)
STAGES = ("vision", "selection", "projector", "prefill", "decoded_token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    model = group.add_mutually_exclusive_group()
    options.add_dummy_model(model)
    model.add_argument("--model", help="folder of a LLaVA checkpoint (default: the bundled model)")
    options.add_dtypes(group)
    options.add_runtime(group)
    group.add_argument(
        "--attn-implementation",
        default="sdpa",
        choices=("eager", "sdpa", "flash_attention_2"),
        help="attention kernels of tower and language model (default: %(default)s)",
    )
    group.add_argument(
        "--anyres",
        choices=("paper", "llava"),
        default="paper",
        help="how crops are merged, with and without pruning (default: %(default)s)",
    )
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--methods",
        type=argtypes.comma_separated(),
        default=["vispruner"],
        help="pruning methods, comma-separated (default: vispruner)",
    )
    group.add_argument(
        "--tokens",
        type=_budgets,
        help="visual tokens T to keep per crop, comma-separated; none keeps all "
        "(default: none and the paper's budgets for the model)",
    )
    options.add_ratio(group)
    group.add_argument(
        "--batch-size",
        type=at_least(1),
        default=1,
        help="images per batch, one question each (default: %(default)s)",
    )
    group.add_argument(
        "--text-tokens", type=at_least(2), default=80, help="text tokens per prompt (default: %(default)s)"
    )
    group.add_argument(
        "--new-tokens",
        type=at_least(1),
        default=8,
        help="tokens to decode when timing one decoded token (default: %(default)s)",
    )
    group.add_argument("--image", type=Path, help="image file to use (default: a synthetic 640 x 480 JPEG)")
    group.add_argument(
        "--peak",
        action="store_true",
        help="also measure the device's matrix rate and bandwidth, and print roofline bounds",
    )
    options.add_measuring(parser, repeats=5)


def _budgets(text: str) -> list[int | str]:
    return argtypes.comma_separated(argtypes.tokens)(text)


def check(args: argparse.Namespace) -> None:
    from llava.pruning import get_pruner

    for method in args.methods:
        if get_pruner(method, 1).acts_in == "decoder":
            raise ValueError(
                f"--methods: {method!r} prunes inside the language model, which these stages do not run. "
                "Compare its prefill GFLOPs with llava.eval.sweep."
            )
    if args.image is not None and not args.image.is_file():
        raise ValueError(f"--image {args.image}: no such file")
    if args.model is None and args.dummy_model is None:
        args.model = str(paths.require_bundled(paths.BUNDLED_MODEL, "--model or --dummy-model"))
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--model {args.model}: not a checkpoint folder, there is no config.json")
    options.check_device(args)
    options.check_runtime(args)
    budgets = DUMMY_MODELS[args.dummy_model].budgets if args.dummy_model else (128, 64, 32)
    args.tokens = args.tokens or ["none", *budgets]


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.peak import bandwidth, matrix_rate
    from llava.analysis.efficiency.stages import PipelineStages, load_model, weights_bytes
    from llava.analysis.efficiency.timing import machine
    from llava.model.transformers_compat import attention_of
    from llava.pruning.kernels import rounds_backend

    model = load_model(args)
    stages = PipelineStages.prepare(model, args)
    rows = stages.measure(args)
    tower = model.get_vision_tower()
    document: dict[str, Any] = {
        "model": args.dummy_model or args.model,
        "weights": "random" if args.dummy_model else "loaded",
        "machine": machine(args.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tower_dtype": str(tower.dtype).removeprefix("torch."),
        "kernels": {
            "language_model": attention_of(model.config),
            "tower": tower.attn_implementation,
            "selection": rounds_backend(args.device),
        },
        "runtime": {"graphs": model.runtime.graphs, "compiled": model.runtime.compiled},
        "batch_size": args.batch_size,
        "text_tokens": args.text_tokens,
        "crops": stages.crops,
        "anyres": model.anyres,
        "flops_convention": CONVENTION,
        "weights_bytes": weights_bytes(model),
        "decode_image": stages.decoding.as_json(),
        "rows": rows,
    }
    if args.peak:
        document["peak"] = {
            "matrix_flops_per_second": matrix_rate(args.device, model.dtype),
            "tower_matrix_flops_per_second": matrix_rate(args.device, tower.dtype),
            "bytes_per_second": bandwidth(args.device),
        }
        for row in rows:
            row["roofline"] = roofline(row, document)
    compared = [row for row in rows if "speedup" in row]
    if compared:
        pruned = [row for row in compared if row["method"] != "none"]
        document["speedup"] = min(row["speedup"] for row in pruned or compared)
    return document


def roofline(row: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Compute the roofline bound of stages, in ms, and how many times longer they take.

    A bound is FLOPs over the matrix rate, or bytes over the bandwidth. Bytes are the weights once (language
    model; a decoded token needs nothing else but its cache) and the KV cache.
    """
    peak, flops = document["peak"], row["flops"]
    weights = document["weights_bytes"]["language_model"]
    rate, width = peak["matrix_flops_per_second"], peak["bytes_per_second"]
    bounds = {
        "vision": flops["vision_tower"] / peak["tower_matrix_flops_per_second"],
        "prefill": max(flops["language_model"] / rate, (weights + row["kv_bytes"]) / width),
        "decoded_token": (weights + row["kv_bytes"]) / width,
    }
    found = {
        stage: {
            "roofline_ms": round(1000 * seconds, 4),
            "times_roofline": round(row["stages"][stage]["median_ms"] / 1000 / seconds, 3),
        }
        for stage, seconds in bounds.items()
    }
    prefill = row["stages"]["prefill"]["median_ms"] / 1000
    found["prefill"]["share_of_matrix_rate"] = round(flops["language_model"] / prefill / rate, 4)
    return found


def render(document: dict[str, Any]) -> str:
    rows = document["rows"]
    name = {"setting": _setting}
    parts = ("vision_tower", "selection", "projector", "language_model", "total")
    cost = {
        **name,
        "visual tokens": lambda row: row["visual_tokens"],
        **{f"{part} GFLOPs": lambda row, part=part: row["flops"][part] / 1e9 for part in parts},
        "KV MiB": lambda row: row["kv_bytes"] / 2**20,
        "peak MiB": lambda row: row["peak_bytes"] / 2**20,
    }
    spent = {
        **name,
        **{
            "TPOT" if stage == "decoded_token" else stage: lambda row, s=stage: row["stages"][s]["median_ms"]
            for stage in STAGES
        },
        "TTFT": lambda row: row["first_token"]["median_ms"],
    }
    if any("baseline" in row for row in rows):
        spent["baseline TTFT"] = lambda row: row.get("baseline", {}).get("median_ms")
        spent["speedup"] = lambda row: row.get("speedup")
    if any("graph_first_token" in row for row in rows):
        spent["graph TTFT"] = lambda row: row["graph_first_token"]["median_ms"]
        spent["graph TTFT / eager"] = lambda row: row["graph_of_eager"]
        if any("graph_speedup" in row for row in rows):
            spent["baseline / graph"] = lambda row: row.get("graph_speedup")
        spent["graph TPOT"] = lambda row: row["graph_decoded_token_ms"]
        spent["graph TTFT / unpruned"] = lambda row: row.get("graph_first_token_of_unpruned")
    spent["TTFT / unpruned"] = lambda row: row.get("first_token_of_unpruned")
    text = (
        f"{document['model']} ({document['weights']} weights), {document['dtype']}, tower "
        f"{document['tower_dtype']}, on {document['machine']['name']}; batch {document['batch_size']}, "
        f"{document['crops']} crop(s), {document['text_tokens']} text tokens\n"
        f"{document['flops_convention']}\n\n{options.table(cost, rows)}\n\n"
        "Milliseconds (medians); TTFT: time to first token, TPOT: time per output token; decoding and "
        f"resizing an image takes another {document['decode_image']['median_ms']:.4g} ms\n"
        f"{options.table(spent, rows)}"
    )
    if "peak" in document:
        bounds = dict(name)
        for stage, title in (("vision", "vision"), ("prefill", "prefill"), ("decoded_token", "TPOT")):
            bounds[f"{title} ms"] = lambda row, s=stage: row["roofline"][s]["roofline_ms"]
            bounds[f"x {title}"] = lambda row, s=stage: row["roofline"][s]["times_roofline"]
        bounds["prefill of matrix rate"] = lambda row: row["roofline"]["prefill"]["share_of_matrix_rate"]
        text += f"\n\nRoofline bounds, and measured time as a multiple of them\n{options.table(bounds, rows)}"
    return text


def _setting(row: dict[str, Any]) -> str:
    return row["method"] if row["tokens"] is None else f"{row['method']} {row['tokens']}"
