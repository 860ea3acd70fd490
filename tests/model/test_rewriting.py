"""Commands that write checkpoints: apply_delta, make_delta, consolidate, merge_lora_weights, auto_upgrade."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import NEXT, SOURCE, load, logits, weights, write
from helpers.lora import adapter, language_model
from llava.model import apply_delta, consolidate, make_delta, merge_lora
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint import write as writing
from llava.model.tokenizer import load_tokenizer
from llava.model.utils import auto_upgrade

ROOT = Path(__file__).parents[2]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def deltas(base: Path, target: Path, delta: Path) -> list[str]:
    return ["--base-model-path", str(base), "--target-model-path", str(target), "--delta-path", str(delta)]


# --- deltas ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["model.safetensors", ("pytorch_model.bin", 3)], ids=["one", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_delta_there_and_back(tmp_path, monkeypatch, form, dtype):
    base = language_model(tmp_path / "base", dtype=dtype)
    state = {k: v.to(dtype) for k, v in weights(SOURCE).items()}
    target = write(tmp_path / "llava", state=state, form=form)
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    assert make_delta.main(deltas(base, target, tmp_path / "delta")) == 0
    assert len(list((tmp_path / "delta").glob("model-*.safetensors"))) > 1
    below, difference = weights(base), weights(tmp_path / "delta")
    for key, tensor in difference.items():
        expected = state[key] - below[key] if key in below else state[key]
        assert torch.equal(tensor, expected) and tensor.dtype == dtype
    assert apply_delta.main(deltas(base, tmp_path / "again", tmp_path / "delta")) == 0
    for key, tensor in weights(tmp_path / "again").items():
        assert torch.allclose(tensor, state[key], atol=1e-2 if dtype == torch.float16 else 1e-5)
    model = load(tmp_path / "again")
    assert torch.allclose(logits(model), logits(load(SOURCE)), atol=0.3 if dtype == torch.float16 else 1e-2)
    entries = json.loads((tmp_path / "again" / "config.json").read_text())
    assert entries["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert not list((tmp_path / "again").glob(".*"))


def test_a_vocabulary_that_grew_keeps_its_own_rows(tmp_path):
    base, state = language_model(tmp_path / "base"), weights(SOURCE)
    for key in (EMBED, HEAD):
        state[key] = torch.cat([state[key], torch.ones(2, state[key].shape[1])])
    rows = len(state[EMBED])
    target = write(tmp_path / "llava", state=state, config={"vocab_size": rows})
    make_delta.make_delta(base, target, tmp_path / "delta")
    difference = weights(tmp_path / "delta")[EMBED]
    assert torch.equal(difference[-2:], torch.ones(2, difference.shape[1]))
    apply_delta.apply_delta(base, tmp_path / "again", tmp_path / "delta")
    assert torch.allclose(weights(tmp_path / "again")[EMBED], state[EMBED], atol=1e-5)


def _drop(key: str):
    return lambda state: state.pop(key)


def _put(key: str, tensor: torch.Tensor):
    return lambda state: state.update({key: tensor})


LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put(LAYER, torch.ones(8, 8)), rf"{LAYER}: \(\d+, \d+\) torch.float32 over \(8, 8\)"),
        (
            _put("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)),
            "model.layers.9.mlp.up_proj.weight: missing",
        ),
        (_drop(LAYER), f"{LAYER}: .* over nothing"),
        (lambda state: _put(EMBED, torch.ones(len(state[EMBED]) + 1, state[EMBED].shape[1]))(state), EMBED),
        (lambda state: _put(EMBED, state[EMBED][:, :-1].clone())(state), EMBED),
        (_put(LAYER, torch.ones(64, 64, dtype=torch.int8)), "int8"),
    ],
    ids=["shape", "more layers", "fewer layers", "vocabulary shrank", "narrower", "quantized"],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys, change, message):
    base, target = language_model(tmp_path / "base", change), write(tmp_path / "llava")
    for command, result in ((make_delta, "delta"), (apply_delta, "target")):
        paths = {"target": target, "delta": target, result: tmp_path / "new"}
        assert command.main(deltas(base, paths["target"], paths["delta"])) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "weights do not fit" in error and "Traceback" not in error
        assert re.search(message, error)
        assert not (tmp_path / "new").exists()


def test_another_base_that_overflows_is_refused(tmp_path):
    base = language_model(
        tmp_path / "base", _put(HEAD, torch.full(weights(SOURCE)[HEAD].shape, float("inf")))
    )
    with pytest.raises(CheckpointError, match="lm_head.weight: NaN or infinite values"):
        apply_delta.apply_delta(base, tmp_path / "new", write(tmp_path / "llava"))
    assert not (tmp_path / "new").exists()


def test_make_delta_does_not_upload(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make_delta.main([*deltas(SOURCE, SOURCE, tmp_path / "d"), "--hub-repo-id", "me/delta"])
    assert stop.value.code == 2 and "hf upload me/delta" in capsys.readouterr().err


# --- consolidate -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [SOURCE, NEXT], ids=["llava-1.5", "llava-next"])
def test_consolidate_writes_float16(tmp_path, monkeypatch, source):
    assert consolidate.main(["--src", str(source), "--dst", str(tmp_path / "half")]) == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    expected = {k: v.half() for k, v in weights(source).items()}
    assert stored.keys() == expected.keys() and all(torch.equal(stored[k], expected[k]) for k in stored)
    monkeypatch.chdir(tmp_path)
    model = load(tmp_path / "half")  # the tower came along
    assert torch.allclose(logits(model), logits(load(source)), atol=0.05)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    assert (
        consolidate.main(["--src", str(source), "--dst", str(tmp_path / "half")]) == 1
    )  # never over weights


def test_consolidate_refuses_quantized_weights(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    state = {**weights(SOURCE), f"{name}.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    state.pop(f"{name}.weight")
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    source = write(tmp_path / "awq", state=state, config=config)
    with pytest.raises(CheckpointError, match="quantized by awq to 4 bits"):
        consolidate.consolidate_ckpt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_consolidate_refuses(tmp_path, capsys):
    state = weights(SOURCE)
    state[LAYER] = state[LAYER] * 1e9
    large = write(tmp_path / "large", state=state)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    (lora / "config.json").write_text((SOURCE / "config.json").read_text())
    for source, target, message in (
        (large, tmp_path / "new", "beyond float16"),
        (lora, tmp_path / "new", "contains only a LoRA adapter"),
        (large, large, "not a folder to write to"),
        (tmp_path / "nothing", tmp_path / "new", "no such folder"),
    ):
        assert consolidate.main(["--src", str(source), "--dst", str(target)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ")
        assert not (tmp_path / "new").exists()


# --- merge_lora_weights ----------------------------------------------------------------------------------
@pytest.mark.parametrize("base_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("lora_type", [torch.float16, torch.bfloat16, torch.float32])
def test_a_merged_folder_gives_the_logits_of_the_lora_folder(tmp_path, monkeypatch, base_type, lora_type):
    torch.manual_seed(5)
    base = language_model(tmp_path / "base", dtype=base_type)
    lora = adapter(tmp_path / "llava-lora", lora_type)
    monkeypatch.setattr(
        sys, "argv",
        ["merge_lora_weights.py", "--model-path", str(lora), "--model-base", str(base),
         "--save-model-path", str(tmp_path / "merged")],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "merge_lora_weights.py"), run_name="__main__")
    assert stop.value.code == 0
    (tmp_path / "merged").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    for dtype in ("float32", "float16", "bfloat16"):
        expected = load_pretrained_model(lora, base, "llava-lora", device="cpu", dtype=dtype)[1]
        merged = load_pretrained_model(tmp_path / "moved", device="cpu", dtype=dtype)[1]
        for (name, one), (_, other) in zip(
            merged.named_parameters(), expected.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        if dtype == "float32":
            assert torch.equal(logits(merged), logits(expected))
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["dtype"] == "float16"
    text = "A chat. USER: hi  there</s>"
    assert load_tokenizer(tmp_path / "moved")(text).input_ids == load_tokenizer(base)(text).input_ids
    if base_type == lora_type == torch.float16:
        kinds = {tensor.dtype for key, tensor in weights(tmp_path / "moved").items() if "tower" not in key}
        assert kinds == {torch.float16}


def test_merging_refuses(tmp_path, capsys):
    base, lora = language_model(tmp_path / "base"), adapter(tmp_path / "lora", torch.float32)

    def merge(model: Path, base: Path, target: Path) -> str:
        arguments = ["--model-path", str(model), "--model-base", str(base), "--save-model-path", str(target)]
        assert merge_lora.main(arguments) == 1
        return capsys.readouterr().err

    other = language_model(tmp_path / "other", _put(LAYER, torch.ones(8, 8)))
    assert "Pass the model the adapter was trained on" in merge(lora, other, tmp_path / "new")
    assert "neither a LoRA adapter" in merge(SOURCE, base, tmp_path / "new")
    assert "already contains weights" in merge(lora, base, other)
    assert "not a folder to write to" in merge(lora, base, base)
    assert not (tmp_path / "new").exists()


# --- auto_upgrade ----------------------------------------------------------------------------------------
def test_auto_upgrade_asks_and_changes_old_folders_only(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "llava-old", config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    expected = logits(load(old))  # read as it is
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with pytest.raises(CheckpointError, match="not upgraded"):
        auto_upgrade(str(old))
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    auto_upgrade(str(old))
    entries = json.loads((old / "config.json").read_text())
    assert (entries["model_type"], entries["architectures"]) == ("llava", ["LlavaLlamaForCausalLM"])
    assert "first release" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked again"))
    auto_upgrade(str(old))
    auto_upgrade("vicuna-7b")  # not a LLaVA by its name
    assert torch.equal(logits(load(old)), expected)
    other = write(tmp_path / "llava-other", config={"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'"):
        auto_upgrade(other)
