"""Argument types shared by all command lines: token budgets, ratios, bounded numbers.

Imports nothing heavy, so that `--help` and invalid arguments are answered immediately.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def tokens(text: str) -> int | str:
    """Parse a token budget: an integer (0 keeps no visual token), or none/full/all for an unpruned run."""
    if text.lower() in ("none", "full", "all"):
        return "none"
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 0 or 'none'")
    return number


def ratio(text: str) -> float:
    """Parse a ratio in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return number


def share(text: str) -> float:
    """Parse a share in (0, 1]."""
    found = ratio(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0, up to 1")
    return found


def failures(text: str) -> int | float:
    """Parse a number of failures, or a share of the questions: a number in [0, 1] with a point."""
    try:
        number: int | float = int(text) if text.strip("+").isdecimal() else float(text)
    except ValueError:
        number = -1
    if not number >= 0 or (isinstance(number, float) and number > 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 0, or a share such as 0.01")
    return number


def batch_size(text: str) -> int | None:
    """Parse a batch size: an integer >= 1, or auto, which is None."""
    if text.lower() == "auto":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1 or 'auto'")
    return number


def comma_separated(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """Make an argparse type for values of one kind, separated by commas; empty ones are skipped."""
    return lambda text: [kind(part.strip()) for part in text.split(",") if part.strip()]


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """Make an argparse type for numbers >= `low`."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not number >= low:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number >= {low}")
        return number

    return parse
