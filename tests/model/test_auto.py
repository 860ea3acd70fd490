"""transformers' Auto classes and `from_pretrained`: the calls that LLaVA's users make."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
)
from transformers import LlavaConfig as TransformersLlavaConfig

import llava
from helpers.checkpoints import DATA, IDS, IMAGE, NEXT, SOURCE, load, logits, weights, write
from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
    LlavaMptForCausalLM,
)
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.tokenizer import load_tokenizer

TOWER = DATA / "ckpt_clip336p42"
ENTRIES = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
MISTRAL = {
    "model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "num_key_value_heads": 4,
    "sliding_window": None, "attention_bias": ..., "mlp_bias": ...,
}  # fmt: skip


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Llama without tower and projector, of the size of the reference checkpoint."""
    entries = json.loads((SOURCE / "config.json").read_text())
    entries = {key: value for key, value in entries.items() if "mm_" not in key and "image" not in key}
    entries |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    folder = tmp_path_factory.mktemp("bare") / "vicuna"
    state = {k: v for k, v in weights(SOURCE).items() if "mm_projector" not in k and "vision_tower" not in k}
    write(folder, state=state, tower=False)
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


def arguments(**more: object) -> SimpleNamespace:
    given = {
        "vision_tower": str(TOWER), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", "pretrain_mm_mlp_adapter": None,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **more})


# --- AutoConfig ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"model_type": "llava"}, LlavaConfig),
        (ENTRIES, LlavaConfig),
        ({**ENTRIES, "architectures": ...}, LlavaConfig),
        ({**ENTRIES, "mm_vision_tower": ...}, LlavaConfig),
        ({"model_type": "llava_llama"}, LlavaConfig),
        (MISTRAL, LlavaMistralConfig),
        ({**MISTRAL, "model_type": "llava"}, LlavaMistralConfig),
    ],
)
def test_auto_config_reads_llavas_own_folders(tmp_path, entries, expected):
    folder = write(tmp_path / "c", state={}, config=entries)
    config, unused = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, use_cache=False, foo=1)
    assert type(config) is expected and config.model_type == expected.model_type
    assert config.image_aspect_ratio == "pad" and config.mm_vision_select_layer == -2
    assert config.use_cache is False and unused == {"foo": 1} and config.name_or_path == str(folder)
    config.save_pretrained(tmp_path / "again")
    assert type(AutoConfig.from_pretrained(tmp_path / "again")) is expected


def test_auto_config_leaves_other_models_to_transformers(tmp_path):
    ours = LlavaConfig  # of the same name as transformers'
    for number, config in enumerate(
        (TransformersLlavaConfig(), LlavaNextConfig(), LlamaConfig(), BertConfig())
    ):
        config.save_pretrained(tmp_path / str(number))
        found = AutoConfig.from_pretrained(tmp_path / str(number))
        assert type(found) is type(config) and type(found) is not ours
    assert type(AutoConfig.for_model("llava")) is TransformersLlavaConfig
    assert type(AutoConfig.for_model("llava_mistral", hidden_size=32)) is LlavaMistralConfig
    with pytest.raises(OSError, match="no-such-folder"):
        AutoConfig.from_pretrained(tmp_path / "no-such-folder")


def test_the_model_of_transformers_still_loads_its_own_folder(tmp_path):
    """The reference checkpoint in the layout of llava-hf, once by transformers and once by us."""
    config = TransformersLlavaConfig(
        text_config=LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                num_attention_heads=2, vocab_size=64),
        vision_config={"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is LlavaForConditionalGeneration
    ours = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is LlavaLlamaForCausalLM
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "first", ["import llava, transformers", "import transformers, llava", "import llava"]
)
def test_the_order_of_imports_does_not_matter(first):
    code = (
        f"{first}; from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"config = AutoConfig.from_pretrained({str(SOURCE)!r})\n"
        "assert type(config).__module__ == 'llava.model.language_model.llava_llama', type(config)\n"
        "assert type(config) in AutoModelForCausalLM._model_mapping\n"
        "assert not any(type(finder).__name__ == '_AfterImport' for finder in __import__('sys').meta_path)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- from_pretrained -------------------------------------------------------------------------------------
def test_auto_model_gives_a_model_with_its_tower():
    expected = logits(load(SOURCE))
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto.from_pretrained(SOURCE, low_cpu_mem_usage=True, torch_dtype=torch.float32)
        assert type(model) is LlavaLlamaForCausalLM and model.get_vision_tower().is_loaded
        assert not model.training and torch.equal(logits(model), expected)


def test_from_pretrained_takes_the_usual_arguments(tmp_path):
    expected = logits(load(SOURCE))
    model, info = LlavaLlamaForCausalLM.from_pretrained(
        SOURCE, low_cpu_mem_usage=True, device_map="cpu", attn_implementation="eager", torch_dtype="float32",
        use_cache=False, cache_dir=str(tmp_path), trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    assert model.config._attn_implementation == "eager" and model.config.use_cache is False
    assert not any(info.values()) and torch.allclose(logits(model), expected, atol=1e-4)
    half = write(tmp_path / "half", config={"torch_dtype": "float16"})
    assert LlavaLlamaForCausalLM.from_pretrained(half).dtype == torch.float32
    assert LlavaLlamaForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.float16
    assert LlavaLlamaForCausalLM.from_pretrained(half, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(SOURCE)
    config.image_aspect_ratio = "square"
    assert LlavaLlamaForCausalLM.from_pretrained(SOURCE, config=config).config.image_aspect_ratio == "square"
    pruned = LlavaLlamaForCausalLM.from_pretrained(SOURCE, visual_token_num=16, important_ratio=0.25)
    assert (pruned.get_visual_token_num(), pruned.get_important_ratio()) == (16, 0.25)
    assert pruned.encode_images(IMAGE)[0].shape[0] == 16
    assert model.get_visual_token_num() == model.get_vision_tower().num_patches == 64
    with pytest.raises(ValueError, match=r"quantization_config: .* Set load_in_8bit or load_in_4bit"):
        LlavaLlamaForCausalLM.from_pretrained(SOURCE, quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="'meta' has no memory"):
        LlavaLlamaForCausalLM.from_pretrained(SOURCE, device_map="meta")
    with pytest.raises(TypeError, match="unknown argument 'low_cpu_memory'"):
        LlavaLlamaForCausalLM.from_pretrained(SOURCE, low_cpu_memory=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_from_pretrained_needs_no_tokenizer_and_keeps_a_subclass(tmp_path):
    class Mine(LlavaLlamaForCausalLM):
        pass

    folder = write(tmp_path / "c")
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    model = Mine.from_pretrained(folder)
    assert type(model) is Mine and torch.equal(logits(model), logits(load(SOURCE)))


def test_the_class_must_be_that_of_the_checkpoint(tmp_path):
    folder = write(tmp_path / "m", config=MISTRAL)
    with pytest.raises(
        CheckpointError, match=r"is a LlavaMistralForCausalLM.* Use LlavaMistralForCausalLM\.from"
    ):
        LlavaLlamaForCausalLM.from_pretrained(folder)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlavaMistralForCausalLM
    with pytest.raises(NotImplementedError, match="MPT is not supported"):
        LlavaMptForCausalLM.from_pretrained(
            "liuhaotian/LLaVA-Lightning-MPT-7B-preview", low_cpu_mem_usage=True
        )
    with pytest.raises(NotImplementedError, match="MPT is not supported"):
        LlavaMptForCausalLM(object())


@pytest.mark.parametrize("source", [SOURCE, NEXT], ids=["llava-1.5", "llava-next"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}], ids=["whole", "sharded"])
def test_a_saved_model_loads_again_wherever_it_is(tmp_path, monkeypatch, source, options):
    model = LlavaLlamaForCausalLM.from_pretrained(source, visual_token_num=16)
    expected = logits(model)
    named = model.config.mm_vision_tower
    model.save_pretrained(tmp_path / "saved", **options)
    assert model.config.mm_vision_tower == named
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "saved").rename(tmp_path / "elsewhere" / "saved")
    monkeypatch.chdir(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "elsewhere" / "saved", visual_token_num=16)
    assert torch.equal(logits(again), expected)
    assert again.config.image_aspect_ratio == model.config.image_aspect_ratio
    processors = [one.get_vision_tower().image_processor.to_dict() for one in (model, again)]
    assert processors[0] == processors[1]
    load_tokenizer(source).save_pretrained(tmp_path / "elsewhere" / "saved")
    assert torch.equal(logits(load(tmp_path / "elsewhere" / "saved", visual_token_num=16)), expected)


def test_a_saved_model_keeps_its_sampling_settings(tmp_path):
    """LLaVA-1.5's generation_config.json has top_p without do_sample, which transformers does not save."""
    folder = write(tmp_path / "c")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    model.generation_config.top_k = 7  # transformers checks what was changed after loading
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.top_k == 7
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert (again.temperature, again.top_p, again.top_k) == (0.9, 0.6, 7)
    assert not again.do_sample


# --- towers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["mm_vision_tower", "vision_tower"])
def test_a_tower_is_loaded_when_it_is_asked_to(key):
    expected = load(SOURCE).get_vision_tower()
    tower = build_vision_tower(
        SimpleNamespace(**{key: str(TOWER)}, mm_vision_select_layer=-2), delay_load=True
    )
    assert not tower.is_loaded and tower.config.hidden_size == tower.hidden_size == expected.hidden_size
    assert (tower.num_patches, tower.num_patches_per_side) == (64, 8)
    with pytest.raises(ValueError, match=r"not loaded\. Call load_model"):
        tower(IMAGE)
    tower.load_model()
    assert tower.is_loaded and (tower.dtype, tower.device.type) == (torch.float32, "cpu")
    assert not any(p.requires_grad for p in tower.parameters())
    assert torch.equal(tower(IMAGE)[0], expected(IMAGE)[0])
    before = next(tower.parameters())
    tower.load_model(device_map="auto")  # again: nothing happens
    assert next(tower.parameters()) is before
    dummy = tower.dummy_feature
    assert dummy.shape == (1, tower.hidden_size) and not dummy.any() and dummy.dtype == tower.dtype
    assert build_vision_tower(SimpleNamespace(vision_tower=str(TOWER))).is_loaded


def test_a_tower_without_a_name_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vision_tower is not set"):
        build_vision_tower(SimpleNamespace(vision_tower=None))
    with pytest.raises(FileNotFoundError, match="no folder with a config.json"):
        build_vision_tower(SimpleNamespace(vision_tower="nothing-here"), delay_load=True)


# --- training's way: a language model first, then the tower ------------------------------------------------
def test_vision_modules_on_a_bare_language_model(bare, tmp_path):
    projector = {k: v for k, v in weights(SOURCE).items() if "mm_projector" in k}
    torch.save(projector, tmp_path / "mm_projector.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LlavaLlamaForCausalLM.from_pretrained(bare, torch_dtype=torch.float32)
    assert model.get_vision_tower() is None and model.get_visual_token_num() is None
    with pytest.raises(ValueError, match="no vision tower"):
        model.encode_images(IMAGE)
    model.get_model().initialize_vision_modules(
        arguments(pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin")), fsdp=[]
    )
    assert model.get_vision_tower().is_loaded and model.config.use_mm_proj
    assert torch.equal(logits(model), logits(load(SOURCE)))
    assert all(p.requires_grad for p in model.get_model().mm_projector.parameters())
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "trained")), logits(model))


def test_vision_modules_are_kept_and_checked(bare, tmp_path):
    model = LlavaLlamaForCausalLM.from_pretrained(SOURCE)
    inner, tower, projector = model.get_model(), model.get_vision_tower(), model.get_model().mm_projector
    name = model.config.mm_vision_tower
    inner.initialize_vision_modules(arguments(vision_tower=name, mm_projector_type="linear"))
    assert inner.vision_tower is tower and inner.mm_projector is projector
    assert model.config.mm_projector_type == "mlp2x_gelu"  # that of the projector in use
    inner.initialize_vision_modules(arguments(vision_tower=name, mm_patch_merge_type="spatial_unpad"))
    assert inner.image_newline.shape == (model.config.hidden_size,)
    with pytest.raises(ValueError, match="fsdp"):
        inner.initialize_vision_modules(arguments(), fsdp="full_shard")
    state = {k: v for k, v in weights(SOURCE).items() if "mm_projector" in k}
    wrong = {
        "lacking.bin": {k: v for k, v in state.items() if "bias" not in k},
        "narrow.bin": {k: v[:-1] for k, v in state.items()},
        "empty.bin": {},
        "deep.bin": {**state, "model.mm_projector.4.weight": torch.ones(2, 2)},
    }
    for file, content in wrong.items():
        torch.save(content, tmp_path / file)
        with pytest.raises(CheckpointError, match=rf"{file}: \d weights do not fit mm_projector_type"):
            inner.initialize_vision_modules(arguments(pretrain_mm_mlp_adapter=str(tmp_path / file)))


def test_lora_by_hand_starts_with_the_base_and_the_adapters_config(bare):
    """The config of another folder over a bare language model: the tower is found, and loaded on demand."""
    config = LlavaConfig.from_pretrained(SOURCE)
    config.mm_vision_tower = str(TOWER)
    with pytest.warns(UserWarning, match="that of the model is untrained"):
        model = LlavaLlamaForCausalLM.from_pretrained(bare, low_cpu_mem_usage=True, config=config)
    assert not model.get_vision_tower().is_loaded
    trainables = {k: v for k, v in weights(SOURCE).items() if "mm_projector" in k}
    model.load_state_dict(trainables, strict=False)
    model.get_vision_tower().load_model()
    assert torch.equal(logits(model), logits(load(SOURCE)))


@pytest.mark.parametrize("patch", [False, True])
def test_vision_tokenizer(tmp_path, patch):
    model, tokenizer = LlavaLlamaForCausalLM.from_pretrained(SOURCE), load_tokenizer(SOURCE)
    rows, tokens = len(model.get_input_embeddings().weight), len(tokenizer)
    assert rows == tokens
    before = model.get_input_embeddings().weight.detach().clone()
    args = arguments(mm_use_im_start_end=True, mm_use_im_patch_token=patch, tune_mm_mlp_adapter=True)
    model.initialize_vision_tokenizer(args, tokenizer)
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(tokenizer) == len(weight) == len(head) == model.config.vocab_size == rows + 2 + patch
    assert torch.equal(weight[:rows], before) and torch.allclose(weight[rows], before.mean(0), atol=1e-6)
    assert weight.requires_grad and not head.requires_grad
    model.initialize_vision_tokenizer(args, tokenizer)
    assert len(model.get_input_embeddings().weight) == rows + 2 + patch


def test_vision_tokenizer_with_trained_embeddings(tmp_path):
    width = LlavaConfig.from_pretrained(SOURCE).hidden_size
    for count, works in ((2, True), (5, False)):
        model, tokenizer = LlavaLlamaForCausalLM.from_pretrained(SOURCE), load_tokenizer(SOURCE)
        trained = torch.arange(count * width).view(count, width).float()
        torch.save({"model.embed_tokens.weight": trained}, tmp_path / "p.bin")
        args = arguments(mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "p.bin"))
        if works:
            model.initialize_vision_tokenizer(args, tokenizer)
            assert torch.equal(model.get_input_embeddings().weight[-2:], trained)
        else:
            with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \(5, "):
                model.initialize_vision_tokenizer(args, tokenizer)


# --- load_pretrained_model -------------------------------------------------------------------------------
def test_load_pretrained_model_by_position():
    """(path, base, name, load_8bit, load_4bit, device_map, device, use_flash_attn, tokens, ratio)."""
    given = (str(SOURCE), None, "llava-v1.5-7b", False, False, "auto", "cpu")
    _, model, processor, length = load_pretrained_model(
        *given, False, visual_token_num=16, important_ratio=0.25
    )
    assert (model.get_visual_token_num(), model.get_important_ratio()) == (16, 0.25) and length > 0
    assert (
        model.config._attn_implementation == "sdpa" and processor is model.get_vision_tower().image_processor
    )
    model = load_pretrained_model(*given, False, 8, 0.75)[1]
    assert (model.get_visual_token_num(), model.get_important_ratio()) == (8, 0.75)
    with pytest.raises((ImportError, ValueError), match="attn_implementation: 'flash_attention_2' needs"):
        load_pretrained_model(*given, True)
    assert llava.load_pretrained_model is load_pretrained_model and IDS.shape == (1, 5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"image_aspect_ratio": "Pad"}, "config: image_aspect_ratio is 'Pad'"),
        ({"vocab_size": "x"}, "config: vocab_size is 'x'"),
        ({"mm_vision_select_layer": 0}, "mm_vision_select_layer: 0 is not"),
    ],
)
def test_entries_given_to_from_pretrained_are_checked(entries, message):
    with pytest.raises(CheckpointError, match=message):
        LlavaLlamaForCausalLM.from_pretrained(SOURCE, **entries)


@pytest.mark.parametrize(
    "given", [{"mm_patch_merge_type": "Spatial"}, {"mm_vision_select_layer": "-2"}, {"mm_projector_type": 5}]
)
def test_training_arguments_are_checked(bare, given):
    model = LlavaLlamaForCausalLM.from_pretrained(bare)
    with pytest.raises(CheckpointError, match=f"model_args: {next(iter(given))} is "):
        model.get_model().initialize_vision_modules(arguments(**given))


def test_trained_parts_for_training_are_checked(bare, tmp_path):
    projector = {k: v * torch.nan for k, v in weights(SOURCE).items() if "mm_projector" in k}
    torch.save(projector, tmp_path / "nan.bin")
    for name, message in (
        ("nan.bin", "NaN or infinite values"),
        ("none.bin", r"cannot be read \(No such file or directory\)"),
        ("", r"cannot be read \(Is a directory\)"),
    ):
        model = LlavaLlamaForCausalLM.from_pretrained(bare)
        with pytest.raises(CheckpointError, match=message):
            model.get_model().initialize_vision_modules(
                arguments(pretrain_mm_mlp_adapter=str(tmp_path / name))
            )


def test_a_model_saved_over_its_own_shards(tmp_path):
    model = LlavaLlamaForCausalLM.from_pretrained(SOURCE)
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path / "m")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "m")
    assert again.loading_notes == () and torch.equal(logits(again), logits(model))
