"""`auto_upgrade`, under LLaVA's name: for config.json files of LLaVA's first release."""

from __future__ import annotations

import os
from pathlib import Path

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.write import write_config


def auto_upgrade(config: str | os.PathLike) -> None:
    """Give an old checkpoint, whose config.json calls a LLaVA a Llama, LLaVA's model_type; ask before.

    Nothing here needs it: the loader reads such folders as they are. Other programs do.

    Args:
        config: a folder or owner/name with "llava" in its name, as in LLaVA; others are left alone.

    Raises:
        CheckpointError: config.json is unreadable or of another model, or the upgrade was declined.
    """
    if "llava" not in str(config).lower():
        return
    folder = resolve_checkpoint(config)
    path, entries = folder / "config.json", read_config(folder)
    kind = str(entries.get("model_type"))
    if "llava" in kind:
        return
    if kind != "llama":
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, expected 'llama' or a LLaVA. Use another folder."
        )
    print(f"{path}: model_type is 'llama', as in LLaVA's first release. Newer programs expect 'llava'.")
    try:
        answer = input("Change it in this file? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise CheckpointError(f"{path}: not upgraded. Set model_type to 'llava', or answer y.")
    write_config(Path(folder), {**entries, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})
