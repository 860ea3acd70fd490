"""Measure the limits of the device: matrix products per second and bytes per second.

    python -m llava.analysis.efficiency peak --device cpu

These are measured and not taken from a data sheet: the best of several square products of growing size in
each dtype, and the best of several copies of a buffer that is larger than any cache (bytes read plus
written).
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.analysis.efficiency.options import DTYPES, add_measuring, check_device, table

_ALL_DTYPES = (*DTYPES, "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser, repeats=5)
    parser.add_argument(
        "--dtypes",
        type=lambda text: text.split(","),
        help=f"comma-separated, of {', '.join(_ALL_DTYPES)} (default: all on CUDA, else float32,float64)",
    )


def check(args: argparse.Namespace) -> None:
    check_device(args)
    args.dtypes = args.dtypes or (["float32", "float64"] if args.device == "cpu" else list(_ALL_DTYPES))
    unknown = [name for name in args.dtypes if name not in _ALL_DTYPES]
    if unknown:
        raise ValueError(f"--dtypes: unknown dtype {unknown[0]!r} (choose from {', '.join(_ALL_DTYPES)})")


def matrix_rate(device: Any, dtype: Any, repeats: int = 5) -> float:
    """Measure the FLOP/s of the best square matrix product tried, 2 FLOPs per multiply-accumulate."""
    import torch

    from llava.analysis.efficiency.timing import seconds_of

    best = 0.0
    # Small products end before another program gets the core, and are tried often.
    sides = (
        {512: 16 * repeats, 1024: 4 * repeats, 2048: 1}
        if torch.device(device).type == "cpu"
        else {4096: repeats, 8192: repeats}
    )
    for side, tries in sides.items():
        a = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
        b, out = torch.randn_like(a), torch.empty_like(a)
        for turn in range(tries + 1):
            spent = seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)[0]
            best = max(best, 2 * side**3 / spent if turn else 0.0)
    return best


def bandwidth(device: Any, repeats: int = 5) -> float:
    """Measure the bytes per second of the best copy tried, read and written bytes added up."""
    import torch

    from llava.analysis.efficiency.timing import seconds_of

    size = 2**27 if torch.device(device).type == "cpu" else 2**31
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return max(2 * size / seconds_of(lambda: b.copy_(a), device)[0] for _ in range(2 * repeats))


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.timing import machine
    from llava.model.settings import parse_dtype

    rates = {name: matrix_rate(args.device, parse_dtype(name), args.repeats) for name in args.dtypes}
    return {
        "machine": machine(args.device),
        "matrix_flops_per_second": rates,
        "bytes_per_second": bandwidth(args.device, args.repeats),
        "repeats": args.repeats,
    }


def render(document: dict[str, Any]) -> str:
    rows = [
        (f"matrix product, {name}", rate / 1e12, "TFLOP/s")
        for name, rate in document["matrix_flops_per_second"].items()
    ]
    rows.append(("copy", document["bytes_per_second"] / 1e9, "GB/s"))
    columns = {"operation": lambda row: row[0], "rate": lambda row: row[1], "unit": lambda row: row[2]}
    return f"{document['machine']['name']}: best of {document['repeats']}\n{table(columns, rows)}"
