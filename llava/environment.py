"""The VISPRUNER_* environment variables: what they mean, which values are valid.

    check_environment()    # ValueError for an unknown name or an invalid value

Called by `load_pretrained_model` and by the commands, so that a typing error is reported instead of silently
doing nothing. Imports nothing heavy; the variables are read where they are used.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

PREFIX = "VISPRUNER_"


@dataclass(frozen=True)
class EnvironmentVariable:
    """A variable, what its value must be (in words) and the test for it."""

    meaning: str
    expected: str
    is_valid: Callable[[str], bool]


def _whole(low: int) -> Callable[[str], bool]:
    return lambda text: text.strip().isdecimal() and int(text) >= low


def _is_share(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and 0 <= float(text) <= 1
    except ValueError:
        return False


def _is_size(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _one_of(*choices: str) -> tuple[str, Callable[[str], bool]]:
    return "one of " + ", ".join(choices), lambda text: text in choices


def _dtype(text: str) -> bool:
    return text.lower().removeprefix("torch.") in _DTYPES


_DTYPES = "float32 fp32 float float16 fp16 half bfloat16 bf16 float64 double auto".split()

VARIABLES = {
    # `get_pruner` checks the name: methods are discovered, and a method of yours may be among them.
    "VISPRUNER_METHOD": EnvironmentVariable(
        "pruning method", "a method's name, such as vispruner", lambda text: bool(text.strip())
    ),
    "VISPRUNER_TOKENS": EnvironmentVariable("visual tokens to keep per crop", "an integer >= 0", _whole(0)),
    "VISPRUNER_RATIO": EnvironmentVariable(
        "share of tokens selected by importance", "a number from 0 to 1", _is_share
    ),
    "VISPRUNER_ANYRES": EnvironmentVariable("how crops are merged", *_one_of("paper", "llava")),
    "VISPRUNER_PRESET": EnvironmentVariable("preset of dtypes and pixels", *_one_of("exact", "published")),
    "VISPRUNER_TOWER_DTYPE": EnvironmentVariable(
        "dtype of the vision tower", "float32, float16, bfloat16 or float64", _dtype
    ),
    "VISPRUNER_ROUNDS": EnvironmentVariable(
        "implementation of the token selection on CUDA", *_one_of("triton", "torch")
    ),
    "VISPRUNER_GRAPHS": EnvironmentVariable("0: no CUDA graphs", *_one_of("0", "1")),
    "VISPRUNER_CACHE": EnvironmentVariable("cache folder", "a folder", lambda text: bool(text.strip())),
    "VISPRUNER_VISION_CACHE": EnvironmentVariable(
        "GiB of encoded images that are kept on disk", "a number >= 0, 0 for none", _is_size
    ),
    "VISPRUNER_ALLOW_OUTSIDE": EnvironmentVariable(
        "1: weight indices may name files outside of the checkpoint", *_one_of("0", "1")
    ),
    "VISPRUNER_PROCESSES": EnvironmentVariable("processes to launch", "an integer >= 1", _whole(1)),
    "VISPRUNER_SLOW": EnvironmentVariable("1: also tests that install, compile or train", *_one_of("0", "1")),
    "VISPRUNER_SYSTEM_PYTHON": EnvironmentVariable(
        "1: the scripts use the current Python as it is", *_one_of("0", "1")
    ),
}


def check_environment(overridden: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> None:
    """Check the name and value of every VISPRUNER_* variable. An empty value counts as not set.

    Args:
        overridden: variables whose value is not used, because an argument was given instead.
        environment: names and values (default: `os.environ`).

    Raises:
        ValueError: unknown name (the message gives the nearest known one) or invalid value.
    """
    unused = set(overridden)
    for name, value in sorted((os.environ if environment is None else environment).items()):
        if not name.startswith(PREFIX):
            continue
        if name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0)[0]
            raise ValueError(
                f"{name}: unknown environment variable. Use {near}, or unset it; known are "
                f"{', '.join(VARIABLES)}."
            )
        if value and name not in unused and not VARIABLES[name].is_valid(value):
            raise ValueError(
                f"{name}: {value!r} is not valid for the {VARIABLES[name].meaning}. Set it to "
                f"{VARIABLES[name].expected}, or unset it."
            )
