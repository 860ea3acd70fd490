"""GPU kernels of the selection, imported only where they run; their results equal those of the torch code.

order = run("attention.descending", descending_in_torch, score)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
MAX_RESIDUAL = 2048  # residual tokens per row; longer rows use the torch code
_failed: set[str] = set()  # backends that raised an error in this process


def rounds_backend(device: torch.device | str) -> str:
    """Name what selects tokens on `device`: "triton" (few kernel launches for the batch) or "torch".

    "triton" is the default on CUDA devices if Triton is installed and has not failed in this process. The
    environment variable VISPRUNER_ROUNDS chooses one of them; devices other than CUDA always use "torch".

    Raises:
        ValueError: for another value of VISPRUNER_ROUNDS.
    """
    chosen = os.environ.get("VISPRUNER_ROUNDS")
    if chosen and chosen not in BACKENDS:
        raise ValueError(
            f"VISPRUNER_ROUNDS: unknown value {chosen!r} (choose from {', '.join(BACKENDS)}). "
            "Correct the environment variable or unset it."
        )
    if torch.device(device).type != "cuda" or "triton" in _failed:
        return "torch"
    return chosen or ("triton" if find_spec("triton") else "torch")


def run(kernel: str, in_torch: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    """Return what the function `kernel` of this package ("module.function") makes of the arguments.

    `in_torch`, which takes the same arguments, runs instead where `rounds_backend` is "torch", and after a
    warning if the kernel fails. Kernels get no empty tensors.
    """
    if tensor.numel() and rounds_backend(tensor.device) == "triton":
        module, function = kernel.split(".")
        try:
            with torch.cuda.device_of(tensor):  # Triton launches on the current device
                return getattr(import_module(f"{__name__}.{module}"), function)(tensor, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise any type; the fallback's result is the same
            warnings.warn(
                f"token selection falls back to torch, which is slower but equal: the Triton kernel failed "
                f"({type(error).__name__}: {error})",
                stacklevel=2,
            )
            _failed.add("triton")
    return in_torch(tensor, *args)
