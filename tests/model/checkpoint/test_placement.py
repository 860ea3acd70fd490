"""Where parameters go when there are several devices; decided without memory, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.checkpoint.placement import main_device, place

LAYERS = {"model.layers.0": 0, "model.layers.1": 1}


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.fixture(scope="module")
def model():
    config = LlavaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=8,
        mm_hidden_size=4,
        mm_projector_type="linear",
    )
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
        model.model.vision_tower = torch.nn.Linear(2, 2)
    return model


def test_several_gpus(two_gpus, monkeypatch, model):
    """The parts that make visual tokens stay with the embeddings, wherever accelerate puts them."""
    split = {
        "model.embed_tokens": 0, **LAYERS, "model.norm": 1, "lm_head": 1, "model.mm_projector": 1,
        "model.vision_tower.weight": 1, "model.vision_tower.bias": 1,
    }  # fmt: skip
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *a, **k: split)
    placement = place(model, "auto", None, torch.float16)
    where = {n: placement.device_of(n).index for n, _ in model.named_parameters()}
    assert where["model.layers.0.mlp.up_proj.weight"] == 0 and where["model.layers.1.mlp.up_proj.weight"] == 1
    assert where["model.embed_tokens.weight"] == where["model.mm_projector.weight"] == 0
    assert where["model.vision_tower.weight"] == 0 and where["lm_head.weight"] == 1
    assert placement.main == torch.device("cuda:0")


def test_too_large_for_the_gpus(two_gpus, monkeypatch, model):
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *a, **k: {"model": 0, "lm_head": "disk"})
    with pytest.raises(ValueError, match="does not fit.*load_4bit"):
        place(model, "auto", None, torch.float16)


def test_a_named_device_is_not_spread(two_gpus, model):
    assert place(model, "auto", "cuda:1", torch.float16).parts is None
    assert place(model, "cuda:1", None, torch.float16).main == torch.device("cuda:1")
    assert place(model, {"": 1}, None, torch.float16).main == torch.device("cuda:1")


def test_main_device(two_gpus):
    assert main_device("auto", None) == torch.device("cuda:0")
    assert main_device("auto", "cpu") == main_device("cpu", None) == torch.device("cpu")
    assert main_device({"": "cpu", **LAYERS}, None) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"finds 2 GPUs"):
        main_device("cuda:5", None)
