"""Settings of a loaded model and their precedence.

Arguments override the environment, which overrides the checkpoint's config.json; the default is no pruning.
The environment is for hosts that cannot pass our arguments (lmms-eval). A preset is a name for several
settings (see `Preset`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llava.model.anyres import PROTOCOLS
from llava.pruning import Pruner, get_pruner, has_float64

ENVIRONMENT = {
    "method": "VISPRUNER_METHOD",
    "tokens": "VISPRUNER_TOKENS",
    "ratio": "VISPRUNER_RATIO",
    "anyres": "VISPRUNER_ANYRES",
    "tower_dtype": "VISPRUNER_TOWER_DTYPE",
    "preset": "VISPRUNER_PRESET",
    "graphs": "VISPRUNER_GRAPHS",
}
ARGUMENTS = {
    "method": "method",
    "tokens": "visual_token_num",
    "ratio": "important_ratio",
    "anyres": "anyres",
}
CONFIG_KEYS = {
    "method": "pruning_method",
    "tokens": "visual_token_num",
    "ratio": "important_ratio",
    "anyres": "anyres_protocol",
}
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float64": torch.float64, "double": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Settings under one name; None leaves a setting to its own default.

    "published" is how the published numbers were measured: every client of LLaVA rounds the pixels to
    float16, also those for a float32 tower. "exact" sets nothing: pixels stay float32.
    """

    name: str
    dtype: torch.dtype | None = None  # of the language model; on a CPU, float32 is accepted and the default
    tower_dtype: torch.dtype | None = None
    anyres: str | None = None
    pixel_dtype: torch.dtype | None = None  # to which pixels are rounded before the tower


PRESETS = {
    preset.name: preset
    for preset in (Preset("exact"), Preset("published", torch.float16, torch.float32, "paper", torch.float16))
}


def resolve_preset(preset: str | None = None) -> Preset:
    """Return the preset of an argument, else of VISPRUNER_PRESET, else "exact".

    Raises:
        ValueError: unknown name.
    """
    name = preset or os.environ.get(ENVIRONMENT["preset"]) or "exact"
    if name not in PRESETS:
        where = "preset" if preset else f"{ENVIRONMENT['preset']} in the environment"
        raise ValueError(f"{where}: {name!r} is unknown. Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _by_preset(preset: str | None, what: str, argument: Any, parse: Callable[[Any], Any]) -> Any:
    """Return the value of a setting that a preset decides, else `argument`.

    A preset as an argument overrides the environment's setting. What is set at the same level or above has to
    agree with the preset, so that its name in the metadata of an answer is always true.

    Raises:
        ValueError: the two contradict each other.
    """
    chosen = resolve_preset(preset)
    wanted = getattr(chosen, what)
    if wanted is None:
        return argument
    name, value = what, argument
    if not value and not preset and what in ENVIRONMENT:
        name, value = f"{ENVIRONMENT[what]} in the environment", os.environ.get(ENVIRONMENT[what])
    if value and parse(value) not in (None, wanted):
        where = f"preset {chosen.name!r}" + ("" if preset else f" ({ENVIRONMENT['preset']})")
        raise ValueError(
            f"{name}: {value!r} contradicts {where}, which sets {str(wanted).removeprefix('torch.')}. Omit "
            "one of the two; preset 'exact' allows any value."
        )
    return wanted


@dataclass(frozen=True)
class PruningSettings:
    """A pruner, and the anyres protocol if one was chosen."""

    pruner: Pruner
    anyres: str | None


def resolve_pruning(
    config: dict | None = None,
    method: str | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    anyres: str | None = None,
    preset: str | None = None,
) -> PruningSettings:
    """Combine arguments, environment and `config` (entries of config.json), in this order of precedence.

    Tokens without a method mean "vispruner"; so do tokens of a higher precedence than a method "none". A
    preset that sets anyres overrides config.json.

    Raises:
        ValueError: an invalid value; the message names where it was set.
    """
    anyres = _by_preset(preset, "anyres", anyres, str)
    levels = [
        ("argument", {"method": method, "tokens": tokens, "ratio": ratio, "anyres": anyres}),
        ("environment", {k: os.environ.get(v) or None for k, v in ENVIRONMENT.items()}),
        ("config.json", {k: (config or {}).get(v) for k, v in CONFIG_KEYS.items()}),
    ]

    def first(what: str) -> tuple[int, object]:
        for rank, (_, values) in enumerate(levels):
            if values[what] is not None:
                return rank, values[what]
        return len(levels), None

    def name_of(what: str) -> str:
        rank = first(what)[0]
        if rank == 1:
            return f"{ENVIRONMENT[what]} in the environment"
        key = CONFIG_KEYS[what]
        return f"{key} in config.json" if rank == 2 else ARGUMENTS[what]

    method_rank, chosen = first("method")
    tokens_rank, budget = first("tokens")
    budget = None if budget is None else _number(budget, int, name_of("tokens"))
    share = first("ratio")[1]
    share = 0.5 if share is None else _number(share, float, name_of("ratio"))
    if chosen is None or (chosen == "none" and tokens_rank < method_rank):
        chosen = "none" if budget is None else "vispruner"
    protocol = first("anyres")[1]
    if protocol is not None and protocol not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise ValueError(f"{name_of('anyres')}: {protocol!r} is unknown. Choose one of {known}.")
    try:
        pruner = get_pruner(str(chosen), tokens=budget, important_ratio=share)
    except ValueError as error:
        places = {name_of(w) for w in ("method", "tokens", "ratio") if first(w)[0] in (1, 2)}
        raise ValueError(f"{error}" + (f" (set by {', '.join(sorted(places))})" if places else "")) from error
    return PruningSettings(pruner, protocol)


def _number(value: object, kind: type, name: str) -> int | float:
    try:
        number = kind(value)
        if isinstance(value, bool) or (kind is int and not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError):
        expected = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}: {value!r} is not {expected}. Set {expected}.") from None
    return number


def parse_dtype(value: str | torch.dtype | None, name: str = "dtype") -> torch.dtype | None:
    """Parse a torch dtype ("float16", "fp16", "torch.bfloat16" ...); None and "auto" give None."""
    if value is None or value == "auto" or value == "":
        return None
    if isinstance(value, torch.dtype):
        dtype = value
    else:
        dtype = _DTYPES.get(str(value).lower().removeprefix("torch."))
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(
            f"{name}: {value!r} is not a floating point dtype. Choose float32, float16 or bfloat16."
        )
    return dtype


def choose_dtypes(
    dtype: str | torch.dtype | None,
    tower_dtype: str | torch.dtype | None,
    config_dtype: str | torch.dtype | None,
    device: torch.device,
    preset: str | None = None,
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of (language model with projector, tower).

    The default is float32 on CPU, elsewhere that of the checkpoint's config, else float16; on Apple's MPS
    float16 in place of bfloat16. The tower's default is the language model's. A preset decides both, except
    that a language model on a CPU may be float32.

    Raises:
        ValueError: not a dtype, one that contradicts the preset, or float64 on a device without it.
    """
    if device.type != "cpu" or parse_dtype(dtype) not in (None, torch.float32):
        dtype = _by_preset(preset, "dtype", dtype, parse_dtype)
    tower_dtype = _by_preset(preset, "tower_dtype", tower_dtype, parse_dtype)
    chosen = parse_dtype(dtype)
    if chosen is None:
        chosen = torch.float32 if device.type == "cpu" else parse_dtype(config_dtype) or torch.float16
        if device.type == "mps" and chosen == torch.bfloat16:  # not on every macOS; LLaVA runs float16 there
            chosen = torch.float16
    tower = parse_dtype(tower_dtype, "tower_dtype")
    if tower is None:
        tower = parse_dtype(os.environ.get(ENVIRONMENT["tower_dtype"]), ENVIRONMENT["tower_dtype"])
    if torch.float64 in (chosen, tower) and not has_float64(device.type):
        raise ValueError(f"dtype: {device.type} devices have no float64. Choose float32 or float16.")
    return chosen, tower or chosen


def choose_runtime(graphs: bool | None, compile: bool, device: torch.device) -> bool:
    """Return whether stages are captured as CUDA graphs: as asked, else on CUDA unless VISPRUNER_GRAPHS=0.

    Raises:
        ValueError: compiled layers were asked for on a device without CUDA.
    """
    if compile and device.type != "cuda":
        raise ValueError(
            f"compile: the device is {device.type}, and compiled layers need a CUDA device. Omit compile "
            "(--compile)."
        )
    if graphs is not None:
        return graphs
    return device.type == "cuda" and os.environ.get(ENVIRONMENT["graphs"]) != "0"


def choose_attention(requested: str | None, dtype: torch.dtype, tower_dtype: torch.dtype) -> tuple[str, str]:
    """Return the attention kernels of (language model, tower).

    FlashAttention has no float32 kernels: a float32 tower under a half-precision language model runs SDPA.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: the language model is not in half precision.
    """
    kernels = requested or "sdpa"
    if not kernels.startswith("flash"):
        return kernels, kernels
    from importlib.util import find_spec

    if kernels in ("flash_attention_2", "flash_attn_2") and find_spec("flash_attn") is None:
        raise ImportError(
            f"attn_implementation: {kernels!r} needs the flash-attn package. Run `pip install "
            "'vispruner[flash]'` (built from source, needs a CUDA toolchain), or use 'sdpa'."
        )
    half = (torch.float16, torch.bfloat16)
    if dtype not in half:
        raise ValueError(
            f"attn_implementation: {kernels!r} needs half precision, but dtype is {dtype}. Use 'sdpa'."
        )
    return kernels, kernels if tower_dtype in half else "sdpa"
