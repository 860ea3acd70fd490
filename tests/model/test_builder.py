"""Options of `load_pretrained_model`: dtypes, devices, kernels, quantisation, hub, and mistakes in them."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from helpers.checkpoints import IMAGE, NEXT, SOURCE, load, logits, weights, write
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.find import fetch
from llava.model.settings import choose_runtime


@pytest.fixture(scope="module")
def reference():
    return logits(load(SOURCE))


def test_hub_names_offline(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="liuhaotian/llava-v1.5-7b.*hub.*copy the repository"):
        load("liuhaotian/llava-v1.5-7b")


def test_hub_snapshot_takes_one_form_of_weights(monkeypatch, tmp_path, reference):
    """No safetensors in the repository: the .bin files are asked for in a second call."""
    calls = []
    folder = write(tmp_path / "snapshot", form="pytorch_model.bin")

    def download(name, allow_patterns, revision=None):
        calls.append((name, allow_patterns[-1], revision))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert torch.equal(logits(load("some/llava", revision="main")), reference)
    assert calls == [("some/llava", "*.safetensors", "main"), ("some/llava", "*.bin", "main")]


def test_trained_parts_of_a_hub_repository_are_downloaded(monkeypatch, tmp_path):
    """An adapter in safetensors has its projector in a .bin file."""
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("some/lora") == tmp_path
    assert {"non_lora_trainables.bin", "mm_projector.bin", "*.safetensors"} <= set(asked)
    assert "*.bin" not in asked


def test_a_method_without_budget_is_said(tmp_path):
    with pytest.warns(UserWarning, match="'vispruner' without a token budget keeps every"):
        _, model, _, _ = load_pretrained_model(str(SOURCE), device="cpu", method="vispruner")
    assert model.pruner.tokens is None


def test_start_and_end_tokens(tmp_path):
    """mm_use_im_start_end: the tokenizer knows the tokens; a checkpoint without rows for them gets some."""
    folder = write(tmp_path / "m", config={"mm_use_im_start_end": True, "mm_use_im_patch_token": True})
    with pytest.warns(UserWarning, match="643 tokens.*embeddings for 640"):
        tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    ids = tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"])
    assert ids == [640, 641, 642]
    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape[0] == model.lm_head.weight.shape[0] == model.config.vocab_size == 643
    assert torch.allclose(embeddings[641], embeddings[:640].mean(0), atol=1e-6)
    ids = torch.tensor([[1, 641, -200, 642, 13]])
    assert model.generate(ids, images=IMAGE, do_sample=False, max_new_tokens=3).shape == (1, 3)


def test_dtypes(tmp_path):
    model = load(SOURCE, dtype="bfloat16", tower_dtype=torch.float32)
    tower = model.get_vision_tower()
    assert model.dtype == torch.bfloat16 and tower.dtype == torch.float32
    (vision,) = model.encode_vision(IMAGE.half())
    assert vision.features.dtype == torch.bfloat16 and vision.attention.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(logits(model).float()).all()
    model = load(SOURCE, torch_dtype="float64")
    assert model.dtype == model.get_vision_tower().dtype == torch.float64
    folder = write(tmp_path / "m", state={k: v.half() for k, v in weights(SOURCE).items()})
    assert load(folder).dtype == torch.float32  # CPU default, whatever the file holds


def test_device_maps(reference):
    for kwargs in (
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto", "device": torch.device("cpu")},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    ):
        model = load_pretrained_model(str(SOURCE), **kwargs)[1]
        assert model.device.type == "cpu" and torch.equal(logits(model), reference)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({}, "empty"),
        ({"model.nothing": "cpu"}, r"unknown modules model\.nothing"),
        ({"model.layers": "cpu"}, "no device for"),
        ("teapot", "'teapot' is not a device"),
    ],
)
def test_device_map_mistakes(device_map, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(SOURCE), device_map=device_map)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU"):
        load_pretrained_model(str(SOURCE), device="cuda")


def test_arguments_are_checked_before_loading(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for kwargs, error, message in (
        ({"load_8bit": True, "load_4bit": True}, ValueError, "both set"),
        ({"visual_token_num": -1}, ValueError, "tokens"),
        ({"important_ratio": 1.5, "visual_token_num": 8}, ValueError, "important_ratio"),
        ({"method": "vispruna", "visual_token_num": 8}, ValueError, "did you mean 'vispruner'"),
        ({"anyres": "square"}, ValueError, "anyres.*paper, llava"),
        ({"dtype": "int8"}, ValueError, "dtype: 'int8'"),
        ({"tower_dtype": "single"}, ValueError, "tower_dtype: 'single'"),
        ({"visual_token_nums": 8}, TypeError, "'visual_token_nums'. The nearest.* visual_token_num"),
        ({"trust_remote_code": True}, ValueError, "trust_remote_code.*no remote code"),
    ):
        with pytest.raises(error, match=message):
            load_pretrained_model(nowhere, device="cpu", **kwargs)


def test_attention_kernels(reference):
    model = load(SOURCE, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model.get_vision_tower().attn_implementation == "eager"
    torch.testing.assert_close(logits(model), reference, atol=2e-5, rtol=1e-5)
    assert load(SOURCE, attn_implementation=None).config._attn_implementation == "sdpa"


def test_flash_attention_needs_its_package_and_half_precision(monkeypatch):
    from llava.model import settings

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(ImportError, match=r"flash-attn.*vispruner\[flash\]"):
        settings.choose_attention("flash_attention_2", torch.float16, torch.float16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: object())
    with pytest.raises(ValueError, match="half precision"):
        settings.choose_attention("flash_attention_2", torch.float32, torch.float32)
    choose = settings.choose_attention
    assert choose("flash_attention_2", torch.float16, torch.float32) == ("flash_attention_2", "sdpa")
    assert choose("flash_attention_2", torch.float16, torch.float16) == (
        "flash_attention_2",
        "flash_attention_2",
    )


def test_quantisation_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="load_4bit: the bitsandbytes package is missing"):
        load(SOURCE, load_4bit=True)


def test_what_is_trainable():
    model = load(SOURCE)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "model.mm_projector.0.weight" in trainable and "lm_head.weight" in trainable
    assert not any("vision_tower" in n for n in trainable)
    assert not model.training


def test_context_length_and_generation_config():
    _, model, processor, context = load_pretrained_model(str(NEXT), device="cpu")
    assert context == 4096 and processor.crop_size["height"] == 336
    assert model.generation_config.pad_token_id == 0 and model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised(monkeypatch, bits):
    """A stand-in for bitsandbytes: only the decoder's linear layers are swapped."""
    made = []

    class Linear(torch.nn.Linear):
        def __init__(self, inputs, outputs, bias, **kwargs):
            super().__init__(inputs, outputs, bias)
            made.append(kwargs)

    def parameter(tensor, requires_grad, **kwargs):
        return torch.nn.Parameter(tensor.clone(), requires_grad)

    nn = types.SimpleNamespace(
        Linear8bitLt=Linear, Linear4bit=Linear, Int8Params=parameter, Params4bit=parameter
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(nn=nn))
    model = load(SOURCE, load_4bit=bits == 4, load_8bit=bits == 8)
    swapped = {n for n, m in model.named_modules() if isinstance(m, Linear)}
    assert len(swapped) == len(made) == 3 * 7 and all(n.startswith("model.layers.") for n in swapped)
    assert made[0] == (
        {"has_fp16_weights": False, "threshold": 6.0}
        if bits == 8
        else {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": True}
    )
    assert not any(model.get_submodule(n).weight.requires_grad for n in swapped)
    torch.testing.assert_close(logits(model), logits(load(SOURCE)))


def test_graphs_and_compiled_layers_are_passed_to_the_model(monkeypatch):
    asked = []

    def set_runtime(self, graphs=None, compiled=False):
        asked.append((graphs, compiled))

    monkeypatch.setattr("llava.model.llava_arch.LlavaMetaForCausalLM.set_runtime", set_runtime)
    load(SOURCE), load(SOURCE, graphs=True), load(SOURCE, graphs=False)
    assert asked == [(None, False), (True, False), (False, False)]


def test_compiled_layers_without_cuda_are_refused_before_loading():
    with pytest.raises(ValueError, match=r"compile: the device is cpu, .*\(--compile\)"):
        load_pretrained_model("nowhere", device="cpu", compile=True)


@pytest.mark.parametrize(
    ("graphs", "variable", "device", "expected"),
    [
        (None, None, "cuda", True),
        (None, "1", "cuda", True),
        (None, "0", "cuda", False),
        (None, "", "cuda", True),
        (False, "1", "cuda", False),
        (True, "0", "cuda", True),
        (None, None, "cpu", False),
        (None, "1", "cpu", False),
        (None, None, "mps", False),
    ],
)
def test_where_graphs_are_on(graphs, variable, device, expected, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("VISPRUNER_GRAPHS", variable)
    assert choose_runtime(graphs, False, torch.device(device)) is expected
