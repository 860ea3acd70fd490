"""Compare the paper's efficiency table (LLaVA-NeXT-7B at 2880, 640 and 160 tokens) with this repository.

    bash scripts/tables/efficiency.sh
    python -m llava.analysis.efficiency table --measured outputs/efficiency

No model is run. FLOPs and KV cache are computed from the sizes of the model. Memory and time to first token
are read from the newest report in --measured, of the whole model (its --output) or of scripts/gpu_check.sh,
and are empty without one. The time is that of captured graphs where they were measured.

The published FLOPs equal those of the language model with about 80 text tokens, plus 0.7 T for everything
else. The computed FLOPs are given in the same way, followed by their parts. The published rows of 640 tokens
can be reproduced only with 720 tokens: they repeat numbers that the predecessor (arXiv:2412.01818v1) prints
for 720. Such numbers are marked with ^.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.analysis.efficiency.options import table
from llava.eval.tables.paper import REPRINTED
from llava.eval.tables.published import TEXT_TOKENS, load_published
from llava.model import flops

MODEL = "llava-next-7b"
OTHER_FLOPS = 0.7e12  # of everything but the language model, as the published rows imply
COMMAND = (
    "python -m llava.analysis.efficiency --dummy-model llava-next-7b --device cuda --dtype float16 "
    "--tokens none,128,32 --vs baseline --peak --output outputs/efficiency/llava-next-7b.json"
)
_FASTV_LAYERS = 2  # layers that process all tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[Path("outputs", "efficiency"), Path("outputs", "gpu")],
        metavar="DIR",
        help="folders of reports, or single ones (default: outputs/efficiency outputs/gpu)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to FILE")


def check(args: argparse.Namespace) -> None:
    if args.markdown is not None and not args.markdown.parent.is_dir():
        raise ValueError(f"--markdown {args.markdown}: there is no folder {args.markdown.parent}")


def analytic(method: str, tokens: int, text_tokens: int = TEXT_TOKENS) -> dict[str, float]:
    """Compute FLOPs by part, and KV bytes of the visual tokens in half precision, of one row of the table.

    `flops_as_published` is the sum of the language model and the paper's 0.7 T for everything else.
    """
    sizes = DUMMY_MODELS[MODEL]
    language = flops.LanguageShape.from_config(sizes.language)
    vision = flops.VisionShape.from_config(sizes.tower)
    full = sizes.crops * sizes.patches
    early = _FASTV_LAYERS if method == "fastv" else 0
    visual = [full] * early + [tokens] * (language.layers - early)
    llm = 2 * flops.llm_prefill_macs([n + text_tokens for n in visual], language)
    per_crop = tokens // sizes.crops if method == "vispruner" else None
    projected = tokens if method == "vispruner" else full
    other = flops.pipeline_cost(language, vision, projected, text_tokens, sizes.crops, per_crop).flops()
    return {
        "language_model": llm,
        "vision_tower": other["vision_tower"],
        "selection": other["selection"],
        "projector": other["projector"],
        "flops_as_published": llm + OTHER_FLOPS,
        "kv_bytes": flops.kv_cache_bytes(visual, language),
    }


def read_measured(places: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the reports on the table's model, oldest first, and those of `gpu_check` in the same form.

    Raises:
        OSError: for a file that is not a report.
    """
    files = [file for place in places for file in (place.glob("*.json") if place.is_dir() else [place])]
    found = []
    for file in sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document.get("part") == "gpu_check":
                document = _from_check(document)
            if document.get("part") == "whole" and document["model"] == MODEL:
                measured = _measured(document) if document["batch_size"] == 1 else {}
                found.append({**document, "file": str(file), "measured": measured})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise OSError(f"{file}: not a report of this command ({error}). Measure again.") from error
    return found


def _measured(report: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the measured columns by method and visual tokens."""
    weights = sum(report["weights_bytes"].values())
    return {
        (row["method"], row["visual_tokens"]): {
            "first_token_ms": row.get("graph_first_token", row["first_token"])["median_ms"],
            "memory_GB": (weights + row["peak_bytes"]) / 1e9,
            "of_unpruned": row.get("graph_first_token_of_unpruned", row.get("first_token_of_unpruned")),
            "device": report["machine"]["name"],
        }
        for row in report["rows"]
    }


def _from_check(document: dict[str, Any]) -> dict[str, Any]:
    """Bring the part of `gpu_check` about LLaVA-NeXT into the form of a report on a whole model."""
    records = document["parts"].get("first-token-next", {}).get("measurements", {})
    # the part also measures how long the card is busy; a budget that was not captured has no "graph"
    records = {name: one for name, one in records.items() if "tokens" in one and "graph" in one}
    if document["environment"]["dummy_model"] != "llava-1.5-7b" or not records:
        return {}
    rows = [
        {
            "method": "none" if one["tokens"] is None else "vispruner",
            "visual_tokens": one["visual_tokens"],
            "first_token": one["graph"],
            "peak_bytes": one["peak_bytes"],
            "first_token_of_unpruned": round(
                one["graph"]["median_ms"] / records["none"]["graph"]["median_ms"], 4
            )
            if "none" in records
            else None,
        }
        for one in records.values()
    ]
    weights = next(iter(records.values()))["weights_bytes"]
    same = {"machine": document["machine"], "dtype": "float16", "batch_size": 1, "weights_bytes": weights}
    return {"part": "whole", "model": MODEL, "rows": rows, **same}


def run(args: argparse.Namespace) -> dict[str, Any]:
    published = load_published()["efficiency"]
    reports = read_measured(args.measured)
    measured = {key: one for report in reports for key, one in report["measured"].items()}  # the newest
    rows = []
    for row in published.rows:
        ours = analytic(row.method, row.tokens)
        difference = ours["flops_as_published"] / 1e12 / row.values["flops_T"] - 1
        rows.append(
            {
                "method": row.method,
                "tokens": row.tokens,
                "published": dict(row.values),
                "reprinted": [name for name in row.values if row.is_reprinted(name)],
                "analytic": ours,
                "flops_difference": round(difference, 4),
                "measured": measured.get((row.method, row.tokens)),
            }
        )
    document = {
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


def render(document: dict[str, Any]) -> str:
    def parts(name: str) -> Any:
        return lambda row: round(row["analytic"][name] / 1e12, 3)

    def measured(name: str) -> Any:
        return lambda row: (row["measured"] or {}).get(name)

    def published(name: str) -> Any:
        return lambda row: f"{row['published'][name]}{REPRINTED * (name in row['reprinted'])}"

    columns = {
        "setting": lambda row: f"{row['method']} {row['tokens']}",
        "TFLOPs published": published("flops_T"),
        "computed": lambda row: round(row["analytic"]["flops_as_published"] / 1e12, 2),
        "difference": lambda row: f"{100 * row['flops_difference']:+.1f} %",
        "LLM": parts("language_model"),
        "tower": parts("vision_tower"),
        "selection": parts("selection"),
        "projector": parts("projector"),
        "KV MiB published": published("kv_cache_MB"),
        "KV computed": lambda row: round(row["analytic"]["kv_bytes"] / 2**20),
        "GB published": published("gpu_memory_GB"),
        "GB measured": measured("memory_GB"),
        "ms published": published("cuda_time_ms"),
        "ms measured": measured("first_token_ms"),
    }
    text = [
        f"Efficiency of LLaVA-NeXT-7B. Published: {document['source']}.",
        table(columns, document["rows"]),
        "TFLOPs: 2 per multiply-accumulate. Computed as published: the language model with "
        f"{TEXT_TOKENS} text tokens, plus {OTHER_FLOPS / 1e12:g} T;",
        "then the parts as they are here (tower: 5 crops). The published rows of 640 tokens, including their "
        "KV cache, can be reproduced only with 720:",
    ]
    for method in ("vispruner", "fastv"):
        flops_T = analytic(method, 720)["flops_as_published"] / 1e12
        text.append(f"  {method} with 720 instead of 640: {flops_T:.1f} T")
    text += [
        f"{REPRINTED} repeats what the predecessor (arXiv:2412.01818v1) prints for 720 (rows of 640) or "
        "145 tokens (rows of 160).",
        "KV cache: of the visual tokens, in half precision. FastV's follows from the lengths of its layers.",
        "Measured: weights and peak of activations; vision, selection, projector and prefill of one image.",
    ]
    devices = {row["measured"]["device"] for row in document["rows"] if row["measured"]}
    if devices:
        text.append(f"Measured on {', '.join(sorted(devices))}.")
    else:
        text += [
            "Memory and time were not measured; to measure them on a GPU:",
            f"  mkdir -p outputs/efficiency && {COMMAND}",
            "or: bash scripts/gpu_check.sh first-token-next",
        ]
    return "\n".join(text)
