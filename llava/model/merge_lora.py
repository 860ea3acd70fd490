"""Merge a LoRA folder into its base and save one complete checkpoint, as LLaVA's merge_lora_weights.py.

    python scripts/merge_lora_weights.py --model-path llava-v1.5-7b-lora --model-base vicuna-7b-v1.5 \\
        --save-model-path llava-v1.5-7b-merged

The merged folder contains the vision tower and gives the logits of the LoRA folder over its base in every
dtype: weights are saved in the checkpoint's dtype where that loses nothing, else in float32. The model is
loaded in float32 (28 GB for 7B parameters).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.folder import CheckpointFolder
from llava.model.checkpoint.write import TOKENIZER_FILES, check_target, copy_files, exit_code, write_config
from llava.model.settings import parse_dtype


def merge_lora(model_path: str | Path, model_base: str | Path | None, save_model_path: str | Path) -> None:
    """Merge the LoRA or projector-only folder `model_path` over `model_base`, or over the one that it names.

    Raises:
        ValueError, FileNotFoundError: as `load_pretrained_model`; `CheckpointError` if `save_model_path`
            already contains weights.
    """
    from llava.model.builder import load_pretrained_model

    folder = resolve_checkpoint(model_path)
    checkpoint = CheckpointFolder(folder, resolve_checkpoint(model_base) if model_base else None)
    checkpoint.kind()
    base = checkpoint.base
    target = Path(save_model_path).expanduser()
    check_target(target, folder, base)
    model = load_pretrained_model(folder, base, device="cpu", dtype="float32", tower_dtype="float32")[1]
    stored = checkpoint.config()
    named = stored.get("dtype") or stored.get("torch_dtype") or "float16"
    _narrow(model, parse_dtype(named) or torch.float16)
    model.save_pretrained(target)
    write_config(target, {**read_config(target), "dtype": named})
    copy_files(checkpoint.tokenizer(), target, TOKENIZER_FILES)
    print(f"{target}: merged")


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Store every parameter in `dtype` whose values do not change by it."""
    for parameter in model.parameters():
        narrow = parameter.data.to(dtype)
        if torch.equal(narrow.to(parameter.dtype), parameter.data):
            parameter.data = narrow


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model-path", required=True, help="LoRA folder")
    parser.add_argument(
        "--model-base", help="the model that it was trained on (default: the one that its files name)"
    )
    parser.add_argument("--save-model-path", required=True, help="new folder")
    args = parser.parse_args(argv)
    return exit_code(merge_lora, args.model_path, args.model_base, args.save_model_path)


if __name__ == "__main__":
    sys.exit(main())
