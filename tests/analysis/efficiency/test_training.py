"""Seconds and memory of a training step: real steps of a tiny model, and how they are summarized."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.efficiency import run
from llava.analysis.efficiency import training
from llava.analysis.efficiency.__main__ import main
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, DummyModel, build_model

COMMAND = (
    "training --device cpu --dummy-model tiny --tokens 64,4 --batch-size 1 --text-tokens 16 --rounds 1 "
    "--steps 1 --warmup 0"
)
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
TOWER = DUMMY_MODELS["smol"].tower | {"hidden_size": 48, "num_hidden_layers": 2, "image_size": 112}


def here(args: argparse.Namespace, trained: str, tokens: int) -> dict:
    return training.measure_pass(argparse.Namespace(**vars(args), trained=trained, kept=tokens))


def test_steps_are_measured_and_compared_with_all_tokens(capsys, monkeypatch) -> None:
    monkeypatch.setitem(DUMMY_MODELS, "tiny", DummyModel(LANGUAGE, TOWER))
    monkeypatch.setattr(training, "_in_process", here)
    out, document = run(capsys, COMMAND)
    rows = {(row["train"], row["tokens"]): row for row in document["rows"]}
    assert set(rows) == {(trained, tokens) for trained in ("full", "lora") for tokens in (64, 4)}
    for (trained, tokens), row in rows.items():
        assert row["visual_tokens"] == tokens and row["measured_steps"] == 1
        assert 0 < row["tower_seconds"] < row["processor_seconds"] and row["peak_bytes"] > 1e8
        most = rows[trained, 64]
        assert row["speedup_processor"] == round(most["processor_seconds"] / row["processor_seconds"], 3)
    assert rows["full", 4]["trained_parameters"] > rows["lora", 4]["trained_parameters"] > 48 * 64 + 64 * 64
    assert "visual tokens" in out and "peak GB" in out


def test_passes_take_turns_and_medians_are_over_all_of_them(capsys, monkeypatch) -> None:
    order = []

    def fake(args, trained, tokens):
        order.append((trained, tokens))
        slow = len(order) * 1.0
        times = {"seconds": [slow, slow + 2], "processor": [slow, slow], "tower": [0.5, 0.5]}
        return {**times, "peak_bytes": 1000 * len(order), "visual_tokens": tokens, "trained_parameters": 1}

    monkeypatch.setattr(training, "_in_process", fake)
    _, document = run(capsys, "training --device cpu --tokens 576,64 --rounds 2 --train full")
    assert order == [("full", 576), ("full", 64), ("full", 64), ("full", 576)]
    first, second = document["rows"]
    assert (first["seconds"], second["seconds"]) == (3.5, 3.5)  # of 1, 3, 4, 6 and of 2, 4, 3, 5
    assert (first["processor_seconds"], second["processor_seconds"]) == (2.5, 2.5)
    assert (first["peak_bytes"], second["peak_bytes"]) == (4000, 3000) and second["memory_ratio"] == 0.75


def test_smol_has_the_sizes_of_its_parts() -> None:
    sizes = DUMMY_MODELS["smol"]
    assert sizes.patches == 576 and sizes.tower["hidden_size"] == 384
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(**sizes.language))
    assert sum(p.numel() for p in language.parameters()) == 134_515_008  # of SmolLM2-135M


def test_tied_weights_stay_tied() -> None:
    model = build_model(DummyModel(LANGUAGE, TOWER))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.lm_head.weight.is_meta and model.get_vision_tower().num_patches == 64


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--train half", "--train: 'half' is unknown"),
        ("--tokens 0", "integers >= 1"),
        ("--model nowhere", "no config.json"),
        ("--dummy-model smol --model nowhere", "not allowed with"),
    ],
)
def test_invalid_arguments(more: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["training", *more.split()])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("VISPRUNER_SLOW") != "1", reason="starts processes (VISPRUNER_SLOW=1)")
def test_every_pass_is_a_process_of_its_own(capsys) -> None:
    _, document = run(capsys, COMMAND + " --train full")
    assert [row["visual_tokens"] for row in document["rows"]] == [64, 4]
