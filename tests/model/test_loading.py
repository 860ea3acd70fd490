"""Every form a LLaVA checkpoint comes in gives the same model; what is wrong with one is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from helpers.golden_model import DATA
from llava.model.builder import load_pretrained_model
from llava.model.weights import CheckpointError, read_folder

SOURCE = DATA / "ckpt_llava15s"
NEXT = DATA / "ckpt_llava16s"
IMAGE = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 292, -200, 554, 13]])


def weights(folder):
    return {k: v for k, v, _ in read_folder(folder)}


def write(folder, source=SOURCE, state=None, config=None, form="model.safetensors", tower=True):
    """A variant of a reference checkpoint in `folder`. `form`: file name, or (name, number of shards)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model") and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    settings = json.loads((source / "config.json").read_text())
    if tower:
        settings["mm_vision_tower"] = str(DATA / settings["mm_vision_tower"])
    settings.update(config or {})
    settings = {k: v for k, v in settings.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    state = weights(source) if state is None else state
    name, shards = (form, 1) if isinstance(form, str) else form
    save = save_file if name.endswith(".safetensors") else torch.save
    if shards == 1:
        save(state, folder / name)
        return folder
    stem, suffix = name.split(".")
    mapping = {}
    for n in range(shards):
        part = {k: v for i, (k, v) in enumerate(state.items()) if i % shards == n}
        shard = f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / shard)
        mapping.update(dict.fromkeys(part, shard))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def load(folder, *args, **kwargs):
    return load_pretrained_model(str(folder), *args, device="cpu", **kwargs)[1]


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, images=IMAGE, image_sizes=[(336, 336)], **kwargs).logits


@pytest.fixture(scope="module")
def reference():
    return logits(load(SOURCE))


@pytest.mark.parametrize(
    "form",
    ["model.safetensors", "pytorch_model.bin", ("model.safetensors", 4), ("pytorch_model.bin", 2)],
    ids=["safetensors", "bin", "safetensors-shards", "bin-shards"],
)
def test_file_forms(tmp_path, reference, form):
    assert torch.equal(logits(load(write(tmp_path / "m", form=form))), reference)


def test_old_pickle_layout(tmp_path, reference):
    folder = write(tmp_path / "m", form="pytorch_model.bin")
    torch.save(weights(SOURCE), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(load(folder)), reference)


def test_bin_files_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    folder = write(tmp_path / "m", form="pytorch_model.bin")
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*cannot be read"):
        load(folder)


def test_tower_beside_inside_and_in_both(tmp_path, reference):
    beside = write(tmp_path / "m", tower=False)
    shutil.copytree(DATA / "ckpt_clip336p42", tmp_path / "ckpt_clip336p42")
    assert torch.equal(logits(load(beside)), reference)
    # as a subfolder of the checkpoint
    shutil.move(tmp_path / "ckpt_clip336p42", beside / "ckpt_clip336p42")
    assert torch.equal(logits(load(beside)), reference)
    # inside the weights: wins over the folder's
    own = {f"model.vision_tower.vision_tower.{k}": v for k, v in weights(DATA / "ckpt_clip336p42").items()}
    inside = write(tmp_path / "i", state={**weights(SOURCE), **{k: v * 1.25 for k, v in own.items()}})
    assert not torch.allclose(logits(load(inside)), reference)
    inside = write(tmp_path / "j", state={**weights(SOURCE), **own})
    assert torch.equal(logits(load(inside)), reference)


def test_tower_inside_with_layers_cut(tmp_path, reference):
    """Layers behind the select layer may be missing; others may not."""
    own = {f"model.vision_tower.vision_tower.{k}": v for k, v in weights(DATA / "ckpt_clip336p42").items()}
    short = {k: v for k, v in own.items() if "layers.3." not in k and "post_layernorm" not in k}
    assert torch.equal(logits(load(write(tmp_path / "a", state={**weights(SOURCE), **short}))), reference)
    broken = {k: v for k, v in own.items() if "layers.2." not in k}
    with pytest.raises(CheckpointError, match=r"vision_tower.*layers\.2\."):
        load(write(tmp_path / "b", state={**weights(SOURCE), **broken}))


def test_known_tower_inside_needs_no_hub(tmp_path, monkeypatch):
    """openai/clip-vit-large-patch14-336 inside the weights: its shape is known, no hub is asked."""
    from llava.model.multimodal_encoder.builder import find_tower

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path))
    source = find_tower("openai/clip-vit-large-patch14-336", tmp_path)
    assert source.folder is None and source.config["hidden_size"] == 1024
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    state = {**weights(SOURCE), "model.mm_projector.0.weight": torch.zeros(64, 1024)}
    with pytest.raises(CheckpointError, match="holds no vision tower weights.*no network"):
        load(write(tmp_path / "m", state=state, config=config))


def test_missing_keys_are_listed(tmp_path):
    lost = ["model.layers.1.mlp.up_proj.weight", "model.mm_projector.2.bias"]
    state = {k: v for k, v in weights(SOURCE).items() if k not in lost}
    with pytest.raises(CheckpointError) as error:
        load(write(tmp_path / "m", state=state))
    assert "2 weight(s)" in str(error.value) and all(k in str(error.value) for k in lost)


def test_unexpected_keys_are_listed(tmp_path):
    state = {
        **weights(SOURCE),
        "model.vision_resampler.query": torch.zeros(2),
        "lm_head.bias": torch.zeros(2),
    }
    with pytest.raises(CheckpointError) as error:
        load(write(tmp_path / "m", state=state))
    assert "model.vision_resampler.query" in str(error.value) and "lm_head.bias" in str(error.value)


def test_harmless_keys_are_ignored(tmp_path, reference):
    state = {**weights(SOURCE), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert torch.equal(logits(load(write(tmp_path / "m", state=state))), reference)


def test_wrong_shape_names_both(tmp_path):
    state = {**weights(SOURCE), "model.norm.weight": torch.zeros(65)}
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: model\.norm\.weight: shape \(65,\).*\(64,\)"
    ):
        load(write(tmp_path / "m", state=state))


@pytest.mark.parametrize("form", [("model.safetensors", 3), ("pytorch_model.bin", 3)])
def test_damaged_and_absent_shards(tmp_path, form):
    folder = write(tmp_path / "m", form=form)
    shard = next(folder.glob("*-00002-of-00003.*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: cannot be read.*download it again"):
        load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names 1 shard.*{shard.name}"):
        load(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load(tmp_path)
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"index\.json: not a weight index"):
        (folder / "model.safetensors.index.json").write_text("[]")
        load(folder)


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_vision_tower": ...}, "no mm_vision_tower.*model_base"),
        ({"model_type": "llava_mpt"}, "'llava_mpt' is not supported"),
        ({"mm_hidden_size": 128}, "mm_hidden_size is 128.*hidden_size 64"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type='resampler' is unknown"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer=-9"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"hidden_size": "wide"}, r"config\.json"),
    ],
)
def test_config_mistakes(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m", config=config))


def test_model_type_llava_and_tied_embeddings(tmp_path):
    """model_type "llava" is ours here; lm_head may be missing or doubled when it is tied."""
    state = weights(SOURCE)
    without = {k: v for k, v in state.items() if k != "lm_head.weight"}
    config = {"model_type": "llava", "tie_word_embeddings": True}
    model = load(write(tmp_path / "m", state=without, config=config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(write(tmp_path / "n", state=state, config=config))))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_projectors(tmp_path, kind):
    state = {k: v for k, v in weights(SOURCE).items() if "mm_projector" not in k}
    make = {"linear": [""], "mlp1x_gelu": ["0."], "mlp3x_gelu": ["0.", "2.", "4."], "identity": []}[kind]
    generator = torch.Generator().manual_seed(0)
    for place in make:
        state[f"model.mm_projector.{place}weight"] = torch.randn(64, 64, generator=generator) / 8
        state[f"model.mm_projector.{place}bias"] = torch.randn(64, generator=generator)
    model = load(write(tmp_path / "m", state=state, config={"mm_projector_type": kind}))
    (vision,) = model.encode_vision(IMAGE)
    want = vision.features[0]
    for n, place in enumerate(make):
        want = torch.nn.functional.gelu(want) if n else want
        want = want @ state[f"model.mm_projector.{place}weight"].T + state[f"model.mm_projector.{place}bias"]
    torch.testing.assert_close(model.encode_images(IMAGE)[0], want, atol=1e-4, rtol=1e-5)


def test_identity_needs_equal_widths(tmp_path):
    config = {"mm_projector_type": "identity", "hidden_size": 128}
    with pytest.raises(ValueError, match="identity.*64 and 128"):
        load(write(tmp_path / "m", config=config))


def test_mistral(tmp_path):
    from transformers import MistralForCausalLM

    from llava.model import LlavaMistralForCausalLM

    config = {
        "model_type": "llava_mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "sliding_window": None,
    }
    folder = write(tmp_path / "m", source=NEXT, config=config)
    model = load(folder)
    assert isinstance(model, LlavaMistralForCausalLM) and isinstance(model, MistralForCausalLM)
    # without a window Mistral is Llama
    crops = torch.randn(1, 5, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    other = load(NEXT)
    kwargs = {"images": crops, "image_sizes": [(640, 640)], "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(model.generate(IDS, **kwargs), other.generate(IDS, **kwargs))


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
    with pytest.raises(CheckpointError, match="holds only a projector.*model_base"):
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
    with pytest.raises(CheckpointError, match="LoRA adapter: pass .* model_base"):
        load(folder)


@pytest.mark.parametrize(
    ("adapter", "keys", "message"),
    [
        ({"use_dora": True}, ["q_proj.lora_A", "q_proj.lora_B"], "use_dora is not supported"),
        ({"r": None}, ["q_proj.lora_A", "q_proj.lora_B"], "not a LoRA configuration"),
        ({}, ["q_proj.lora_A"], "one half of a pair"),
        (
            {},
            ["z_proj.lora_A", "z_proj.lora_B"],
            r"does not have:\s+model\.layers\.0\.self_attn\.z_proj\.weight",
        ),
        ({}, ["q_proj.magnitude"], "is no LoRA weight"),
    ],
)
def test_lora_mistakes(tmp_path, adapter, keys, message):
    pairs = {f"base_model.model.model.layers.0.self_attn.{k}.weight": torch.zeros(4, 4) for k in keys}
    base, folder = lora_folder(tmp_path, adapter, pairs)
    with pytest.raises(CheckpointError, match=message):
        load(folder, str(base))


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
        ({"model.nothing": "cpu"}, r"does not have: model\.nothing"),
        ({"model.layers": "cpu"}, "names no device for"),
        ("teapot", "'teapot' is no device"),
    ],
)
def test_device_map_mistakes(device_map, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(SOURCE), device_map=device_map)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        load_pretrained_model(str(SOURCE), device="cuda")


def test_arguments_are_checked_before_loading(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for kwargs, error, message in (
        ({"load_8bit": True, "load_4bit": True}, ValueError, "exclude each other"),
        ({"visual_token_num": -1}, ValueError, "tokens"),
        ({"important_ratio": 1.5, "visual_token_num": 8}, ValueError, "important_ratio"),
        ({"method": "vispruna", "visual_token_num": 8}, ValueError, "did you mean 'vispruner'"),
        ({"anyres": "square"}, ValueError, "anyres.*paper, llava"),
        ({"dtype": "int8"}, ValueError, "dtype='int8'"),
        ({"tower_dtype": "single"}, ValueError, "tower_dtype='single'"),
        ({"visual_token_nums": 8}, TypeError, "'visual_token_nums'; did you mean visual_token_num"),
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
    with pytest.raises(ImportError, match="load_4bit=True needs the bitsandbytes package"):
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
