"""A LoRA folder as LLaVA's training writes it, and a language model for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.checkpoints import DATA, SOURCE, weights, write

SEED = torch.Generator().manual_seed(3)


def language_model(folder: Path, change=None, dtype: torch.dtype = torch.float32) -> Path:
    """Write other language model weights of the reference checkpoint's shapes, without a projector."""
    state = {k: torch.randn(v.shape, generator=SEED).to(dtype) for k, v in weights(SOURCE).items()}
    state = {k: v for k, v in state.items() if "mm_projector" not in k}
    (change or (lambda _: None))(state)
    return write(folder, state=state, config={"model_type": "llama", "mm_vision_tower": ...}, tower=False)


def adapter(folder: Path, dtype: torch.dtype) -> Path:
    """Write an adapter on q_proj and up_proj with a trained projector."""
    folder.mkdir()
    shape, pairs, rank = weights(SOURCE), {}, 2
    for key in shape:
        if key.endswith(("q_proj.weight", "up_proj.weight")) and "model.layers." in key:
            name = f"base_model.model.{key.removesuffix('.weight')}"
            a, b = (
                torch.randn(rank, shape[key].shape[1], generator=SEED),
                torch.randn(shape[key].shape[0], rank, generator=SEED),
            )
            pairs |= {f"{name}.lora_A.weight": a.to(dtype) / 9, f"{name}.lora_B.weight": b.to(dtype) / 9}
    save_file(pairs, folder / "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": 4, "peft_type": "LORA", "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    projector = {f"base_model.model.{k}": v.to(dtype) * 1.5 for k, v in shape.items() if "mm_projector" in k}
    torch.save(projector, folder / "non_lora_trainables.bin")
    entries = json.loads((SOURCE / "config.json").read_text())
    entries |= {"mm_vision_tower": str(DATA / entries["mm_vision_tower"]), "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(entries))
    return folder
