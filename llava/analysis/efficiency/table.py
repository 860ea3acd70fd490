"""The paper's efficiency table (LLaVA-NeXT-7B at 2880, 640 and 160 tokens) with ours beside it. Runs nothing.

    bash scripts/tables/efficiency.sh
    python -m llava.analysis.efficiency table --measured outputs/efficiency

FLOPs and KV cache follow from the shapes and are always there; memory and time to first token are filled in
from reports on the whole model that --output left under --measured, and stay empty where there is none.
The paper's FLOPs are those of the language model with about 80 tokens of text, and 0.7 T for everything else;
ours are given in the same way, with the parts apart beside. Its rows of 640 tokens follow only with 720.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llava.analysis.efficiency.options import table
from llava.analysis.efficiency.shapes import SHAPES
from llava.model import flops

MODEL = "llava-next-7b"
TEXT_TOKENS = 80
REST = 0.7e12  # FLOPs of everything but the language model, as the published rows imply
COMMAND = (
    "python -m llava.analysis.efficiency --shapes llava-next-7b --device cuda --dtype float16 "
    "--tokens none,128,32 --vs plain --peak --output outputs/efficiency/llava-next-7b.json"
)
_FASTV_LAYERS = 2  # that see all tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measured",
        type=Path,
        default=Path("outputs", "efficiency"),
        metavar="DIR",
        help="folder of reports that --output wrote, or one of them (default %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")


def check(args: argparse.Namespace) -> None:
    if args.markdown is not None and not args.markdown.parent.is_dir():
        raise ValueError(f"--markdown {args.markdown}: there is no folder {args.markdown.parent}")


def analytic(method: str, tokens: int, text_tokens: int = TEXT_TOKENS) -> dict[str, float]:
    """FLOPs by part, and KV bytes of the visual tokens in half precision, of one row of the table.

    flops_as_published: the language model's and the paper's 0.7 T for the rest.
    """
    shape = SHAPES[MODEL]
    language = flops.LanguageShape.from_config(shape.language)
    vision = flops.VisionShape.from_config(shape.tower)
    full = shape.crops * shape.patches
    early = _FASTV_LAYERS if method == "fastv" else 0
    visual = [full] * early + [tokens] * (language.layers - early)
    llm = 2 * flops.llm_prefill_macs([n + text_tokens for n in visual], language)
    per_crop = tokens // shape.crops if method == "vispruner" else None
    projected = tokens if method == "vispruner" else full
    other = flops.pipeline_cost(language, vision, projected, text_tokens, shape.crops, per_crop).flops()
    return {
        "language_model": llm,
        "vision_tower": other["vision_tower"],
        "selection": other["selection"],
        "projector": other["projector"],
        "flops_as_published": llm + REST,
        "kv_bytes": flops.kv_cache_bytes(visual, language),
    }


def read_measured(place: Path) -> list[dict[str, Any]]:
    """Reports on a whole model of the table's shape, oldest first. Raises ValueError naming a broken file."""
    files = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime) if place.is_dir() else [place]
    found = []
    for file in files:
        if not file.exists():
            continue
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document.get("part") == "whole" and document["model"] == MODEL:
                found.append({**document, "file": str(file)})
        except (ValueError, KeyError, AttributeError) as error:
            raise OSError(f"{file}: no report of this program ({error}); measure again") from error
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.eval.tables.published import load_published

    published = load_published()["efficiency"]
    reports = read_measured(args.measured)
    rows = []
    for row in published.rows:
        ours = analytic(row.method, row.tokens)
        difference = ours["flops_as_published"] / 1e12 / row.values["flops_T"] - 1
        rows.append(
            {
                "method": row.method,
                "tokens": row.tokens,
                "published": dict(row.values),
                "analytic": ours,
                "flops_difference": round(difference, 4),
                "measured": _measured(reports, row.method, row.tokens),
            }
        )
    document = {
        "part": "table",
        "source": published.source,
        "rows": rows,
        "measured": [
            {key: one.get(key) for key in ("file", "machine", "dtype", "batch_size")} for one in reports
        ],
        "command": COMMAND,
    }
    if args.markdown is not None:
        args.markdown.write_text(f"```\n{render(document)}\n```\n", encoding="utf-8")
    return document


def _measured(reports: list[dict[str, Any]], method: str, tokens: int) -> dict[str, float] | None:
    found = None
    for report in reports:  # the newest wins
        for row in report["rows"]:
            if row["method"] == method and row["visual_tokens"] == tokens and report["batch_size"] == 1:
                found = {
                    "first_token_ms": row["first_token"]["median_ms"],
                    "memory_GB": (sum(report["weights_bytes"].values()) + row["peak_bytes"]) / 1e9,
                    "of_unpruned": row.get("first_token_of_unpruned"),
                    "device": report["machine"]["name"],
                }
    return found


def render(document: dict[str, Any]) -> str:
    lines = []
    for row in document["rows"]:
        paper, ours, took = row["published"], row["analytic"], row["measured"] or {}
        lines.append(
            [
                f"{row['method']} {row['tokens']}",
                paper["flops_T"],
                round(ours["flops_as_published"] / 1e12, 2),
                f"{100 * row['flops_difference']:+.1f} %",
                *(
                    round(ours[part] / 1e12, 3)
                    for part in ("language_model", "vision_tower", "selection", "projector")
                ),
                paper["kv_cache_MB"],
                round(ours["kv_bytes"] / 2**20),
                paper["gpu_memory_GB"],
                took.get("memory_GB"),
                paper["cuda_time_ms"],
                took.get("first_token_ms"),
            ]
        )
    titles = [
        "",
        "TFLOP paper",
        "ours",
        "difference",
        "LLM",
        "tower",
        "selection",
        "projector",
        "KV MiB paper",
        "ours",
        "GB paper",
        "measured",
        "ms paper",
        "measured",
    ]
    text = [
        f"Efficiency of LLaVA-NeXT-7B. Published: {document['source']}.",
        table(titles, lines),
        f"TFLOP: 2 per multiply-accumulate; ours as published, the language model with {TEXT_TOKENS} "
        f"tokens of text and {REST / 1e12:g} T for the rest,",
        "then the parts as they are here (tower: 5 crops). The published rows of 640 tokens, their KV "
        "cache too, follow with 720 only:",
    ]
    for method in ("vispruner", "fastv"):
        flops_T = analytic(method, 720)["flops_as_published"] / 1e12
        text.append(f"  {method} with 720 in place of 640: {flops_T:.1f} T")
    text += [
        "KV cache: of the visual tokens, half precision. FastV's is given by its own layers' lengths.",
        "Measured: weights and peak of activations; vision, selection, projector and prefill of one picture.",
    ]
    devices = {row["measured"]["device"] for row in document["rows"] if row["measured"]}
    if devices:
        text.append(f"Measured on {', '.join(sorted(devices))}.")
    else:
        text += [
            "Memory and time were not measured; on a GPU:",
            f"  mkdir -p outputs/efficiency && {COMMAND}",
        ]
    return "\n".join(text)
