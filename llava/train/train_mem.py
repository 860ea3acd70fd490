"""`train.py` with flash attention where it is installed, under the name that LLaVA's scripts use."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from importlib.util import find_spec

from llava.train.train import main


def kernels() -> str | None:
    """Return flash_attention_2 if it can run here, else None: sdpa."""
    import torch

    return "flash_attention_2" if find_spec("flash_attn") and torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main(attn_implementation=kernels()))
