"""Loading Video-LLaVA in its original layout: every form of the files, and what is refused or told."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file

from helpers.video_llava import (
    DATA,
    IMAGE,
    SOURCE,
    VIDEO,
    clip,
    inside,
    load,
    picture,
    tower_config,
    tower_state,
    write_all,
    write_model,
    write_tower,
)
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError, CheckpointWarning
from llava.model.checkpoint.config import conversation_for, stored_config
from llava.model.checkpoint.fingerprint import fingerprint_checkpoint
from llava.model.checkpoint.read import read_folder


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        yield


@torch.no_grad()
def features(model, images=None) -> list[torch.Tensor]:
    images = [clip(), picture()] if images is None else images
    return [one.features for one in model.encode_vision(images)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Features of the towers in their own folders."""
    return features(load(write_all(tmp_path_factory.mktemp("plain"))))


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_towers_of_their_own_classes(tmp_path) -> None:
    tokenizer, model, processor, context = load_pretrained_model(str(write_all(tmp_path)), device="cpu")
    assert type(model.get_video_tower()).__name__ == "VideoTower"
    assert type(model.get_vision_tower()).__name__ == "CLIPVisionTower"
    assert model.get_vision_tower().config.hidden_act == "gelu"
    assert processor.crop_size == {"height": 28, "width": 28} and context == 3072
    assert model.loading_notes == () and len(tokenizer) == 640
    assert not any(p.requires_grad for tower in model.model.towers() for p in tower.parameters())


@pytest.mark.parametrize(
    ("model_type", "form"), [("llava", "model.safetensors"), ("llava_llama", "pytorch_model.bin")]
)
def test_forms_of_files(tmp_path, expected, model_type, form) -> None:
    for kind in (VIDEO, IMAGE):
        write_tower(tmp_path, kind, weights=form)
    assert same(features(load(write_model(tmp_path, model_type=model_type))), expected)


def copies(dtype=None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return both towers as the main checkpoint contains them."""
    return {
        key: value
        for kind in (VIDEO, IMAGE)
        for key, value in inside(kind, tower_state(kind, seed), dtype).items()
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_copies_that_only_differ_by_rounding_are_not_used(tmp_path, expected, dtype) -> None:
    assert same(features(load(write_all(tmp_path, copies(dtype)))), expected)


def test_other_copies_are_told_and_not_used(tmp_path, expected) -> None:
    folder = write_all(tmp_path, copies(seed=5))
    with pytest.warns(CheckpointWarning, match="are not those of .*LanguageBind_") as told:
        model = load(folder)
    assert same(features(model), expected)
    assert len(told) == len(model.loading_notes) == 2


def test_towers_without_weights_take_those_of_the_checkpoint(tmp_path, expected) -> None:
    for kind in (VIDEO, IMAGE):
        write_tower(tmp_path, kind, weights=None)
    assert same(features(load(write_model(tmp_path, copies()))), expected)
    shutil.rmtree(tmp_path / "Video-LLaVA-7B")
    with pytest.raises(CheckpointError, match="LanguageBind_.*: no weights found"):
        load(write_model(tmp_path))


def test_towers_in_the_checkpoints_own_folder(tmp_path, expected) -> None:
    folder = write_model(tmp_path)
    for kind in (VIDEO, IMAGE):
        write_tower(folder, kind)
    assert same(features(load(folder)), expected)


def test_the_towers_folder_is_needed(tmp_path) -> None:
    write_tower(tmp_path, IMAGE)
    with pytest.raises(FileNotFoundError, match="LanguageBind_Video_merge.*") as error:
        load(write_model(tmp_path, copies(), mm_video_tower="missing/LanguageBind_Video_merge_x"))
    assert "mm_video_tower" in str(error.value) or "Looked in" in str(error.value)


@pytest.mark.parametrize(
    "lost",
    [
        "0.temporal_embedding",
        "1.temporal_attn.k_proj.bias",
        "0.temporal_layer_norm1.weight",
        "2.mlp.fc1.bias",
    ],
)
def test_missing_weights_are_refused(tmp_path, lost) -> None:
    state = tower_state(VIDEO)
    del state[f"vision_model.encoder.layers.{lost}"]
    write_tower(tmp_path, VIDEO, state)
    write_tower(tmp_path, IMAGE)
    with pytest.raises(CheckpointError, match="1 missing keys") as error:
        load(write_model(tmp_path))
    assert lost in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (VIDEO, "vision_model.encoder.layers.0.temporal_mlp.fc1.weight"),
        (VIDEO, "vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
        (IMAGE, "vision_model.encoder.layers.0.temporal_embedding"),
    ],
)
def test_unknown_weights_are_refused(tmp_path, kind, name) -> None:
    for one in (VIDEO, IMAGE):
        state = tower_state(one)
        write_tower(tmp_path, one, {**state, name: torch.zeros(3)} if one == kind else state)
    with pytest.raises(CheckpointError, match="1 unexpected keys") as error:
        load(write_model(tmp_path))
    assert name in str(error.value)


def test_a_temporal_embedding_for_other_frames_is_refused(tmp_path) -> None:
    write_tower(tmp_path, VIDEO, config=tower_config(VIDEO, num_frames=4))
    write_tower(tmp_path, IMAGE)
    with pytest.raises(CheckpointError, match=r"shape \(1, 8, 64\), but the model .* \(1, 4, 64\)"):
        load(write_model(tmp_path))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (VIDEO, {"model_type": "clip"}, "model_type is 'clip', but the tower of mm_video_tower"),
        (VIDEO, {"model_type": "LanguageBindImage"}, "must be LanguageBindVideo"),
        (IMAGE, {"model_type": "LanguageBindVideo"}, "would be used without its temporal attention"),
        (IMAGE, {"model_type": "LanguageBindAudio"}, "LanguageBindAudio"),
        (VIDEO, {"hidden_act": ...}, "vision_config: missing hidden_act"),
        (VIDEO, {"add_time_attn": ...}, "vision_config: missing add_time_attn"),
        (VIDEO, {"num_frames": "eight"}, "num_frames is 'eight'"),
        (
            VIDEO,
            {"hidden_size": 32},
            "mm_hidden_size is 64, but the tower .*Video_merge.* has hidden_size 32",
        ),
        (IMAGE, {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
    ],
)
def test_configs_of_towers_that_are_refused(tmp_path, kind, config, message) -> None:
    for one in (VIDEO, IMAGE):
        changed = tower_config(one, **{k: v for k, v in config.items() if one == kind and k != "model_type"})
        if one == kind and "model_type" in config:
            changed["model_type"] = config["model_type"]
        write_tower(tmp_path, one, config=changed)
    with pytest.raises(CheckpointError, match=message):
        load(write_model(tmp_path))


def test_without_temporal_attention_frames_are_apart(tmp_path) -> None:
    state = {key: value for key, value in tower_state(VIDEO).items() if "temporal" not in key}
    write_tower(tmp_path, VIDEO, state, tower_config(VIDEO, add_time_attn=False))
    write_tower(tmp_path, IMAGE)
    model = load(write_model(tmp_path))
    (there,), (back,) = features(model, [clip()]), features(model, [clip().flip(1)])
    assert torch.equal(there, back.flip(0))


@torch.no_grad()
def test_either_tower_may_be_absent(tmp_path, expected) -> None:
    only_video = load(write_all(tmp_path / "a", copies(), mm_image_tower=None))
    assert same(features(only_video, [clip()]), expected[:1])
    assert only_video.get_vision_tower() is only_video.get_video_tower()
    with pytest.raises(ValueError, match=r"images\[1\]: a picture, but the model takes only clips"):
        only_video.encode_vision([clip(), picture()])
    only_image = load(write_all(tmp_path / "b", mm_video_tower=None))
    assert only_image.get_video_tower() is None
    assert same(features(only_image, [picture()]), expected[1:])
    with pytest.raises(CheckpointError, match="names no tower|no mm_vision_tower"):
        load(write_all(tmp_path / "c", mm_video_tower=None, mm_image_tower=None))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio is 'anyres', but Video-LLaVA takes whole images",
        ),
        ({"mm_video_tower": 3}, "mm_video_tower is 3, expected the name"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer: -9"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    ],
)
def test_configs_of_checkpoints_that_are_refused(tmp_path, entries, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write_all(tmp_path, **entries))


def test_a_folder_of_transformers_is_named(tmp_path) -> None:
    config = {"model_type": "video_llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"Video-LLaVA of transformers .*llava\.prune\(model\)"):
        load(tmp_path)


def test_the_template_is_llava_v1() -> None:
    assert conversation_for(stored_config(SOURCE), "Video-LLaVA-7B") == "llava_v1"
    assert conversation_for({**stored_config(SOURCE), "mm_video_tower": None}, "x") == "llava_v1"


@pytest.mark.parametrize("ends", [False, True])
def test_tokens_of_the_tokenizer(tmp_path, ends) -> None:
    folder = write_all(tmp_path, mm_use_im_patch_token=..., mm_use_im_start_end=ends)
    with pytest.warns(CheckpointWarning, match="untrained ones are added"):
        tokenizer = load_pretrained_model(str(folder), device="cpu")[0]
    added = ["<im_patch>", *(["<im_start>", "<im_end>", "<vid_start>", "<vid_end>"] if ends else [])]
    assert tokenizer.convert_tokens_to_ids(added) == list(range(640, 640 + len(added)))


# --- trained parts over a base ---------------------------------------------------------------------------
def base_of(root):
    """Write the language model alone, and return the projector of the checkpoint."""
    state = {key: tensor for key, tensor, _ in read_folder(SOURCE)}
    folder = root / "vicuna"
    folder.mkdir()
    for path in SOURCE.iterdir():
        if path.suffix in (".json", ".model"):
            shutil.copyfile(path, folder / path.name)
    entries = json.loads((SOURCE / "config.json").read_text())
    entries = {k: v for k, v in entries.items() if not k.startswith("mm_")} | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(entries))
    save_file({k: v for k, v in state.items() if "mm_projector" not in k}, folder / "model.safetensors")
    return folder, {k: v for k, v in state.items() if "mm_projector" in k}


@torch.no_grad()
def test_projector_and_lora_over_a_base(tmp_path, expected) -> None:
    for kind in (VIDEO, IMAGE):
        write_tower(tmp_path, kind)
    whole = load(write_model(tmp_path))
    base, projector = base_of(tmp_path)
    part = tmp_path / "projector"
    part.mkdir()
    shutil.copyfile(SOURCE / "config.json", part / "config.json")
    torch.save(projector, part / "mm_projector.bin")
    model = load(part, str(base))
    assert same(features(model), expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    lora = tmp_path / "video-llava-lora"
    lora.mkdir()
    shutil.copyfile(SOURCE / "config.json", lora / "config.json")
    torch.save(
        {f"base_model.model.{key}": value for key, value in projector.items()},
        lora / "non_lora_trainables.bin",
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, lora / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "target_modules": ["q_proj"]}
    settings["layers_to_transform"] = [0]
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    merged = load(lora, str(base))
    assert same(features(merged), expected)
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged.state_dict()[key], whole.state_dict()[key] + 2.0 * b @ a)


# --- other ways in and out -------------------------------------------------------------------------------
@torch.no_grad()
def test_saved_models_load_again(tmp_path, expected) -> None:
    model = load(write_all(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    shutil.copyfile(SOURCE / "tokenizer.model", tmp_path / "b" / "tokenizer.model")
    shutil.rmtree(tmp_path / "a")
    assert same(features(load(tmp_path / "b")), expected)
    assert model.config.mm_video_tower == "LanguageBind/LanguageBind_Video_merge"


def test_auto_classes(tmp_path, expected) -> None:
    from transformers import AutoModelForCausalLM

    import llava.model  # noqa: F401  (teaches transformers)

    model = AutoModelForCausalLM.from_pretrained(write_all(tmp_path))
    assert same(features(model), expected)


@pytest.mark.parametrize("kind", [VIDEO, IMAGE])
def test_the_fingerprint_includes_both_towers(tmp_path, kind) -> None:
    folder = write_all(tmp_path)
    before = fingerprint_checkpoint(folder)
    write_tower(tmp_path, kind, tower_state(kind, seed=9))
    assert fingerprint_checkpoint(folder) != before


def test_published_names_are_found_beside_the_data() -> None:
    assert load(DATA / "Video-LLaVA-7B-split").get_video_tower().num_frames == 8


def test_more_layers_in_a_tower_config_than_in_its_weights(tmp_path) -> None:
    write_tower(tmp_path, VIDEO, config=tower_config(VIDEO, num_hidden_layers=5))
    write_tower(tmp_path, IMAGE)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 5, but the weights have 4 layers"):
        load(write_model(tmp_path))
