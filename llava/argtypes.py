"""Argument types shared by all command lines: token budgets, ratios, bounded numbers.

Imports nothing heavy, so that `--help` and invalid arguments are answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def tokens(text: str) -> int | str:
    """A token budget: a number (0 keeps no visual token at all), or none/full/all for an unpruned run."""
    if text.lower() in ("none", "full", "all"):
        return "none"
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no token budget: a number from 0 on, or none")
    return number


def ratio(text: str) -> float:
    """A share in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio: a number from 0 to 1")
    return number


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: a number not below `low`."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not number >= low:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {low} on is wanted")
        return number

    return parse
