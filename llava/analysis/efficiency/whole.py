"""The whole model: tokens, FLOPs, KV cache, memory and the time of every stage, per method and budget.

    python -m llava.analysis.efficiency --shapes tiny --device cpu --vs plain
    python -m llava.analysis.efficiency --shapes llava-next-7b --device cuda --vs plain --peak --output FILE
    python -m llava.analysis.efficiency --model FOLDER --tokens none,64 --methods vispruner,fastervlm

Shapes are models with random weights, made on the device. Stages are timed one by one (decode and resize a
picture on CPU, vision, selection, projector and merging, prefill, one decoded token) and once together: time
to first token is vision, selection, projector and prefill in one go, the picture's decoding apart. With
--vs plain the same first token is also reached the plain way, one question after the other; `ratio` is
plain / ours, the smallest of the budgets. FLOPs are analytic, 2 per multiply-accumulate of matrix products;
attention is counted in full; norms, softmax, activations, embedding table and output head are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.analysis.efficiency.options import DTYPES, add_measuring, check_device, table
from llava.analysis.efficiency.shapes import SHAPES
from llava.argtypes import at_least, ratio

CONVENTION = (
    "FLOPs: 2 per multiply-accumulate of matrix products, attention in full; without norms, "
    "softmax, activations, embedding table and output head"
)
STAGES = ("vision", "selection", "projector", "prefill", "decoded_token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--shapes", choices=SHAPES, help="a model of this shape with random weights")
    which.add_argument("--model", help="folder of a LLaVA checkpoint; default: the embedded one")
    group.add_argument("--dtype", choices=DTYPES, help="language model; default float32, float16 on CUDA")
    group.add_argument("--tower-dtype", choices=DTYPES, help="vision tower; default as --dtype")
    group.add_argument(
        "--attn-implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2")
    )
    group.add_argument(
        "--anyres",
        choices=("paper", "llava"),
        default="paper",
        help="how crops are merged, with and without pruning (default %(default)s)",
    )
    group = parser.add_argument_group("load")
    group.add_argument("--methods", type=_words, default=["vispruner"], help="by commas (default vispruner)")
    group.add_argument(
        "--tokens",
        type=_budgets,
        help="T per crop by commas, none for all of them; default none and the paper's for the shape",
    )
    group.add_argument("--ratio", type=ratio, default=0.5, help="r (default %(default)s)")
    group.add_argument("--batch-size", type=at_least(1), default=1, help="pictures, a question each")
    group.add_argument(
        "--text-tokens", type=at_least(2), default=80, help="of a prompt (default %(default)s)"
    )
    group.add_argument("--new-tokens", type=at_least(1), default=8, help="decoded, for the time of one")
    group.add_argument("--image", type=Path, help="picture to decode (default: a drawn one, 640 x 480 JPEG)")
    group.add_argument(
        "--peak",
        action="store_true",
        help="measure the machine's matrix rate and bandwidth, too, and print the floors",
    )
    add_measuring(parser, repeats=5)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _budgets(text: str) -> list[int | str]:
    return [argtypes.tokens(part) for part in _words(text)]


def check(args: argparse.Namespace) -> None:
    from llava.pruning import get_pruner

    for method in args.methods:
        get_pruner(method, 1)
    if args.image is not None and not args.image.is_file():
        raise ValueError(f"--image {args.image}: no such file")
    if args.model is None and args.shapes is None:
        args.model = str(paths.BUNDLED_MODEL)
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--model {args.model}: not the folder of a checkpoint, there is no config.json")
    check_device(args)
    args.tokens = args.tokens or ["none", *(SHAPES[args.shapes].budgets if args.shapes else (128, 64, 32))]


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency import load
    from llava.analysis.efficiency.peak import bandwidth, matrix_rate
    from llava.analysis.efficiency.timing import machine
    from llava.pruning.diversity import rounds_backend

    model, processor = load.load(args)
    job = load.Load.prepare(model, processor, args)
    rows = job.measure(args)
    tower = model.get_vision_tower()
    document: dict[str, Any] = {
        "part": "whole",
        "model": args.shapes or args.model,
        "weights": "random" if args.shapes else "loaded",
        "machine": machine(args.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tower_dtype": str(tower.dtype).removeprefix("torch."),
        "kernels": {
            "language_model": model.config._attn_implementation,
            "tower": tower.attn_implementation,
            "selection": rounds_backend(args.device),
        },
        "batch_size": args.batch_size,
        "text_tokens": args.text_tokens,
        "crops": job.crops,
        "anyres": model.anyres,
        "flops_convention": CONVENTION,
        "weights_bytes": job.weights_bytes,
        "decode_image": job.decoding.as_json(),
        "rows": rows,
    }
    if args.peak:
        document["peak"] = {
            "matrix_flops_per_second": matrix_rate(args.device, model.dtype),
            "tower_matrix_flops_per_second": matrix_rate(args.device, tower.dtype),
            "bytes_per_second": bandwidth(args.device),
        }
        for row in rows:
            row["floor"] = floors(row, document)
    ratios = [row["ratio"] for row in rows if "ratio" in row and row["method"] != "none"]
    if args.vs:
        document["ratio"] = min(ratios or [row["ratio"] for row in rows if "ratio" in row])
    return document


def floors(row: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Least milliseconds of a stage, FLOPs over rate or bytes over bandwidth, and time taken over it.

    Bytes: the weights once (language model; all a decoded token needs besides its cache), and the KV cache.
    """
    peak, flops = document["peak"], row["flops"]
    weights = document["weights_bytes"]["language_model"]
    rate, width = peak["matrix_flops_per_second"], peak["bytes_per_second"]
    least = {
        "vision": flops["vision_tower"] / peak["tower_matrix_flops_per_second"],
        "prefill": max(flops["language_model"] / rate, (weights + row["kv_bytes"]) / width),
        "decoded_token": (weights + row["kv_bytes"]) / width,
    }
    found = {}
    for stage, seconds in least.items():
        found[stage] = {
            "floor_ms": round(1000 * seconds, 4),
            "times_floor": round(row["stages"][stage]["median_ms"] / 1000 / seconds, 3),
        }
    prefill = row["stages"]["prefill"]["median_ms"] / 1000
    found["prefill"]["share_of_matrix_rate"] = round(flops["language_model"] / prefill / rate, 4)
    return found


def render(document: dict[str, Any]) -> str:
    rows = document["rows"]
    head = (
        f"{document['model']} ({document['weights']} weights), {document['dtype']}, tower "
        f"{document['tower_dtype']}, on {document['machine']['name']}; batch {document['batch_size']}, "
        f"{document['crops']} crop(s), {document['text_tokens']} text tokens\n" + document["flops_convention"]
    )
    parts = ("vision_tower", "selection", "projector", "language_model", "total")
    cost = table(
        ["method", "visual tokens", *(f"{name} GFLOP" for name in parts), "KV MiB", "peak MiB"],
        [
            [
                _name(row),
                row["visual_tokens"],
                *(row["flops"][part] / 1e9 for part in parts),
                row["kv_bytes"] / 2**20,
                row["peak_bytes"] / 2**20,
            ]
            for row in rows
        ],
    )
    plain = any("plain" in row for row in rows)
    spent = table(
        ["ms", *STAGES, "first token", *(["plain way", "plain / ours"] if plain else []), "of unpruned"],
        [
            [
                _name(row),
                *(row["stages"][stage]["median_ms"] for stage in STAGES),
                row["first_token"]["median_ms"],
                *([row.get("plain", {}).get("median_ms"), row.get("ratio")] if plain else []),
                row.get("first_token_of_unpruned"),
            ]
            for row in rows
        ],
    )
    first = document["decode_image"]["median_ms"]
    text = f"{head}\n\n{cost}\n\nMedians; a picture is decoded and resized in {first:.4g} ms beside\n{spent}"
    if "peak" in document:
        lines = [
            [
                _name(row),
                *(
                    value
                    for stage in row["floor"].values()
                    for value in (stage["floor_ms"], stage["times_floor"])
                ),
                row["floor"]["prefill"]["share_of_matrix_rate"],
            ]
            for row in rows
        ]
        text += "\n\nFloors, and times the floor\n" + table(
            ["", "vision ms", "x", "prefill ms", "x", "token ms", "x", "prefill of matrix rate"], lines
        )
    return text


def _name(row: dict[str, Any]) -> str:
    return row["method"] if row["tokens"] is None else f"{row['method']} {row['tokens']}"
