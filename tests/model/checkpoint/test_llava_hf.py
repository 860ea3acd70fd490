"""llava-hf folders: the same logits as transformers' own LLaVA and LLaVA-NeXT, from either layout of keys."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from helpers.golden_model import DATA
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError

IMAGE_ID = 95
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56,
    patch_size=14, projection_dim=16,
)  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 640, "pad_token_id": 0,
}  # fmt: skip
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]  # (height, width), and not symmetric


def native(kind: str):
    """transformers' own small model, random weights."""
    torch.manual_seed(0)
    text = MistralConfig(**TEXT, sliding_window=None) if "mistral" in kind else LlamaConfig(**TEXT)
    parts = {"vision_config": VISION, "text_config": text, "image_token_index": IMAGE_ID}
    if "next" in kind:
        config = LlavaNextConfig(**parts, image_grid_pinpoints=PINPOINTS)
        return LlavaNextForConditionalGeneration(config).eval()
    return LlavaForConditionalGeneration(LlavaConfig(**parts)).eval()


OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.image_newline", "image_newline"),
)
NEW_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.", "model.vision_tower."),
    ("image_newline", "model.image_newline"),
)


def rename(folder, names):
    def new(key):
        return next((b + key.removeprefix(a) for a, b in names if key.startswith(a)), key)

    path = folder / "model.safetensors"
    save_file({new(k): v for k, v in load_file(path).items()}, path, {"format": "pt"})
    return set(load_file(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder("llava", "old") -> (native model, its saved folder) with keys in that layout."""
    made = {}

    def make(kind: str, layout: str):
        if (kind, layout) in made:
            return made[kind, layout]
        place = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        model = native(kind)
        model.save_pretrained(place)
        shutil.copyfile(DATA / "ckpt_llava15" / "tokenizer.model", place / "tokenizer.model")
        processor = {
            "image_processor_type": "LlavaNextImageProcessor" if "next" in kind else "CLIPImageProcessor",
            "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "resample": 3,
            "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "image_grid_pinpoints": PINPOINTS,
        }  # fmt: skip
        (place / "preprocessor_config.json").write_text(json.dumps(processor))
        if layout == "old":
            assert "language_model.model.norm.weight" in rename(place, OLD_NAMES)
        elif layout == "new":
            assert "model.language_model.norm.weight" in rename(place, NEW_NAMES)
        made[kind, layout] = model, place
        return made[kind, layout]

    return make


def prompt(count: int) -> torch.Tensor:
    """ids with `count` image tokens, as transformers wants them."""
    return torch.tensor([[1, 20, 21, *[IMAGE_ID] * count, 22, 23, 24]])


@pytest.mark.parametrize("layout", ["old", "new", "as saved"])
def test_llava_equals_transformers(folder, layout):
    theirs, place = folder("llava", layout)
    tokenizer, ours, processor, context = load_pretrained_model(str(place), device="cpu")
    assert isinstance(ours, LlavaLlamaForCausalLM) and ours.config.image_aspect_ratio == "pad"
    assert list(processor.image_mean) == [0.5, 0.4, 0.3] and ours.get_vision_tower().num_patches == 16
    assert context == ours.config.max_position_embeddings
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 20, 21, -200, 22, 23, 24]])
    with torch.no_grad():
        want = theirs(input_ids=prompt(16), pixel_values=image).logits
        got = ours(input_ids=ids, images=image).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    kwargs = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 639}
    want = theirs.generate(input_ids=prompt(16), pixel_values=image, **kwargs)[0, 22:]
    assert torch.equal(ours.generate(ids, images=image, **kwargs)[0], want)


@pytest.mark.parametrize("level", ["top", "text_config"])
@pytest.mark.parametrize("layout", ["old", "new"])
def test_a_tied_flag_over_two_matrices(folder, tmp_path, layout, level):
    """The weights decide, whichever level of the config has the flag."""
    theirs, place = folder("llava", layout)
    shutil.copytree(place, tmp_path / "m")
    config = json.loads((place / "config.json").read_text())
    (config if level == "top" else config["text_config"])["tie_word_embeddings"] = True
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="tie_word_embeddings is true, but"):
        ours = load_pretrained_model(str(tmp_path / "m"), device="cpu")[1]
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight) and ours.loading_notes


@pytest.mark.parametrize("size", [(112, 112), (200, 100), (90, 112), (170, 50)])
@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("kind", ["next llama", "next mistral"])
def test_next_equals_transformers(folder, kind, layout, size):
    theirs, place = folder(kind, layout)
    _, ours, _, _ = load_pretrained_model(str(place), device="cpu")
    assert isinstance(ours, LlavaMistralForCausalLM if "mistral" in kind else LlavaLlamaForCausalLM)
    assert ours.config.image_grid_pinpoints[3] == [168, 56]  # (width, height) with us
    columns, rows = ours._grid(5, size)
    crops = torch.randn(1 + columns * rows, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    (tokens,) = ours.encode_images([crops], [size])
    with torch.no_grad():
        want = theirs(
            input_ids=prompt(len(tokens)), pixel_values=crops[None], image_sizes=torch.tensor([size[::-1]])
        ).logits
        got = ours(
            input_ids=torch.tensor([[1, 20, 21, -200, 22, 23, 24]]), images=crops[None], image_sizes=[size]
        ).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_onevision"}, "'llava_onevision'.*not supported"),
        ({"projector_hidden_act": "relu"}, "Only two layers with GELU"),
        ({"vision_feature_layer": [-2, -5]}, "only one layer"),
        ({"vision_feature_select_strategy": "full"}, "'full', expected 'default'"),
        ({"vision_feature_layer": 9}, r"config\.json: mm_vision_select_layer: 9 is not"),
    ],
)
def test_unsupported(folder, tmp_path, change, message):
    _, place = folder("llava", "old")
    shutil.copytree(place, tmp_path / "m")
    config = json.loads((place / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(tmp_path / "m"), device="cpu")


def test_without_tower_weights(folder, tmp_path):
    _, place = folder("llava", "old")
    shutil.copytree(place, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "vision" not in k}, path)
    with pytest.raises(CheckpointError, match="llava-hf folders contain their own tower"):
        load_pretrained_model(str(tmp_path / "m"), device="cpu")


def test_transformers_own_llava_is_left_alone():
    """Importing ours changes nothing in transformers' registries."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert CONFIG_MAPPING["llava"] is LlavaConfig
    assert type(AutoConfig.for_model("llava")) is LlavaConfig
