"""Arguments shared by the measuring commands, their checks, and text tables. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.argtypes import at_least, ratio
from llava.table import text_table

DTYPES = ("float32", "float16", "bfloat16")


def add_measuring(parser: argparse.ArgumentParser, repeats: int, warmup: int = 1) -> None:
    """Add --device, --vs, --repeats, --warmup and --seed."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    group.add_argument(
        "--vs",
        type=lambda text: "baseline" if text == "plain" else text,
        choices=("baseline",),
        help="also measure the naive baseline, in the same run (former name of the value: plain)",
    )
    group.add_argument(
        "--repeats",
        type=at_least(1),
        default=repeats,
        help="measured passes, reported by their median (default: %(default)s)",
    )
    group.add_argument(
        "--warmup", type=at_least(0), default=warmup, help="passes before measuring (default: %(default)s)"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of random weights, images and prompts (default: %(default)s)",
    )


def add_dummy_model(group: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add --dummy-model, formerly --shapes."""
    group.add_argument(
        "--dummy-model",
        "--shapes",
        choices=DUMMY_MODELS,
        default=default,
        help="use a model of these sizes with random weights (former name of the option: --shapes"
        + (f"; default: {default})" if default else ")"),
    )


def add_dtypes(group: argparse._ActionsContainer) -> None:
    """Add --dtype and --tower-dtype."""
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the language model (default: float16 on CUDA, else float32)"
    )
    group.add_argument(
        "--tower-dtype", choices=DTYPES, help="dtype of the vision tower (default: as --dtype)"
    )


def add_runtime(group: argparse._ActionsContainer) -> None:
    """Add --no-graphs and --compile."""
    group.add_argument(
        "--no-graphs",
        action="store_true",
        help="launch every kernel by itself instead of replaying CUDA graphs (also VISPRUNER_GRAPHS=0)",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile layers, on CUDA: faster, with other last bits"
    )


def check_runtime(args: argparse.Namespace) -> None:
    """Raise ValueError for --compile on a device that has no compiled layers; `args.device` is checked."""
    import torch

    from llava.model.settings import choose_runtime

    choose_runtime(None, args.compile, torch.device(args.device))


def add_ratio(group: argparse._ActionsContainer) -> None:
    """Add --ratio."""
    group.add_argument(
        "--ratio",
        type=ratio,
        default=0.5,
        help="share r of tokens kept for their attention, in [0, 1] (default: %(default)s)",
    )


def add_budget(group: argparse._ActionsContainer) -> None:
    """Add --tokens and --ratio for one budget."""
    group.add_argument(
        "--tokens",
        type=at_least(0),
        default=64,
        help="visual tokens T to keep per crop (default: %(default)s)",
    )
    add_ratio(group)


def check_device(args: argparse.Namespace) -> None:
    """Fill in `args.device`.

    Raises:
        ValueError: for a device that does not exist, and for an invalid VISPRUNER_ROUNDS.
    """
    import torch

    from llava.pruning.kernels import rounds_backend

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: no such device ({str(error).splitlines()[0]})") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: only cpu and cuda are timed. Use one of them")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA devices here")
    rounds_backend(device)


def numbers(text: str) -> list[int]:
    """Parse comma-separated integers >= 1."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected integers >= 1, separated by commas")
    return found


def table(columns: Mapping[str, Callable[[Any], Any]], rows: Sequence[Any]) -> str:
    """Align a text table: a function per column title gives the value for a row; None leaves it empty."""
    values = [[_cell(value_of(row)) for value_of in columns.values()] for row in rows]
    return text_table(list(columns), values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
