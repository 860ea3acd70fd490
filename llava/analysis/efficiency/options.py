"""Arguments that the parts share, their checks and the plain text of tables. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llava.argtypes import at_least, ratio
from llava.eval import cli

DTYPES = ("float32", "float16", "bfloat16")


def add_measuring(parser: argparse.ArgumentParser, repeats: int, warmup: int = 1) -> None:
    """--device, --vs, --repeats, --warmup, --seed."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ...; default cuda if there is one")
    group.add_argument("--vs", choices=("plain",), help="measure the plain way in the same run, too")
    group.add_argument(
        "--repeats",
        type=at_least(1),
        default=repeats,
        help="passes; figures are their medians (default %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=at_least(0),
        default=warmup,
        help="passes before, which do not count (default %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights, pictures and prompts")


def add_budget(group: argparse._ArgumentGroup) -> None:
    """--tokens, --ratio: one budget."""
    group.add_argument("--tokens", type=at_least(0), default=64, help="T (default %(default)s)")
    group.add_argument("--ratio", type=ratio, default=0.5, help="r (default %(default)s)")


def check_device(args: argparse.Namespace) -> None:
    """Fill in args.device. Raises ValueError for one that is not there."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: no such device ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA devices here")


def numbers(text: str) -> list[int]:
    """Positive whole numbers by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on, by commas, are wanted")
    return found


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns lined up, the first to the left, numbers to the right; None is an empty cell."""
    lines = cli.table([_cell(title) for title in titles], [[_cell(value) for value in row] for row in rows])
    return "\n".join(line.rstrip() for line in lines.split("\n"))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
