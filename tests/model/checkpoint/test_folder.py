"""Checkpoints that are only a part: a projector or a LoRA adapter over `model_base`."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import SOURCE, load, logits, weights, write
from llava.model.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def reference():
    return logits(load(SOURCE))


def test_projector_only_over_a_language_model(tmp_path, reference):
    state = weights(SOURCE)
    projector = {k: v for k, v in state.items() if "mm_projector" in k}
    base = write(
        tmp_path / "vicuna",
        state={k: v for k, v in state.items() if k not in projector},
        config={"model_type": "llama", "mm_vision_tower": ..., "architectures": ["LlamaForCausalLM"]},
    )
    folder = write(tmp_path / "pretrain", state={"model.layers": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    torch.save(projector, folder / "mm_projector.bin")
    assert torch.equal(logits(load(folder, str(base))), reference)
    with pytest.raises(CheckpointError, match="contains only a projector.*model_base"):
        load(folder)
    with pytest.raises(CheckpointError, match="no mm_vision_tower"):
        load(base)
    with pytest.raises(CheckpointError, match="leave model_base out"):
        load(SOURCE, str(base))


def lora_folder(tmp_path, adapter=None, pairs=None):
    state = weights(SOURCE)
    trained = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k}
    base = write(
        tmp_path / "vicuna",
        state={k: v for k, v in state.items() if "mm_projector" not in k},
        config={"model_type": "llama", "mm_vision_tower": ...},
    )
    folder = write(tmp_path / "llava-lora")
    (folder / "model.safetensors").unlink()
    torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, **(adapter or {})}))
    torch.save(pairs, folder / "adapter_model.bin")
    return base, folder


def test_lora_is_merged(tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    prefix = f"base_model.model.{name}"
    base, folder = lora_folder(tmp_path, pairs={f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b})
    merged = load(folder, str(base), "llava-lora")
    want = weights(SOURCE)[f"{name}.weight"] + 2.0 * (b @ a)
    assert torch.allclose(merged.get_parameter(f"{name}.weight"), want, atol=1e-6)
    assert torch.isfinite(logits(merged)).all()
    with pytest.raises(CheckpointError, match="LoRA adapter. Pass .* model_base"):
        load(folder)


@pytest.mark.parametrize(
    ("adapter", "keys", "message"),
    [
        ({"use_dora": True}, ["q_proj.lora_A", "q_proj.lora_B"], "use_dora is not supported"),
        ({"r": None}, ["q_proj.lora_A", "q_proj.lora_B"], r"adapter_config\.json: missing r\."),
        ({}, ["q_proj.lora_A"], "1 unpaired lora_A/lora_B"),
        (
            {},
            ["z_proj.lora_A", "z_proj.lora_B"],
            r"does not have.*\s+model\.layers\.0\.self_attn\.z_proj\.weight",
        ),
        ({}, ["q_proj.magnitude"], "is not a LoRA weight"),
    ],
)
def test_lora_mistakes(tmp_path, adapter, keys, message):
    pairs = {f"base_model.model.model.layers.0.self_attn.{k}.weight": torch.zeros(4, 4) for k in keys}
    base, folder = lora_folder(tmp_path, adapter, pairs)
    with pytest.raises(CheckpointError, match=message):
        load(folder, str(base))
