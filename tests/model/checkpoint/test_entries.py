"""JSON files of a checkpoint: a wrong type, range or word is one error that names the file and the key."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.checkpoints import NEXT, SOURCE, load, weights, write
from helpers.golden_model import DATA
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import stored_config
from llava.model.checkpoint.entries import CONFIG, check_entries, read_object

TOWER = DATA / "ckpt_clip336p42"


def edit(path, **changes):
    entries = json.loads(path.read_text()) if path.is_file() else {}
    entries.update(changes)
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with its tower inside."""
    made = write(tmp_path / "m", tower=False)
    shutil.copytree(TOWER, made / TOWER.name)
    for path in (made / TOWER.name).iterdir():
        path.chmod(0o644)
    return made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"hidden_size": 64', "not valid JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got a NoneType"),
        (b'{"a": "\xff"}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 100_000, "nested more than|not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested more than"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than"),
    ],
)
def test_files_that_are_no_json_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: ({message})"):
        stored_config(tmp_path)


def test_a_folder_in_place_of_a_file_and_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        stored_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"hidden_size": 64}')
    assert stored_config(tmp_path) == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 10**6),
        ("num_attention_heads", True),
        ("vocab_size", 640.5),
        ("rope_theta", "10000"),
        ("rope_theta", float("nan")),
        ("rope_theta", 10**30),
        ("rope_scaling", 5),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_scaling", {"type": "unknown", "factor": 2}),
        ("hidden_act", "glue"),
        ("pad_token_id", [1]),
        ("eos_token_id", "</s>"),
        ("torch_dtype", "int8"),
        ("tie_word_embeddings", "false"),
        ("architectures", "LlavaLlamaForCausalLM"),
        ("mm_projector_type", 5),
        ("mm_vision_tower", 5),
        ("mm_vision_tower", "x" * 5000),
        ("mm_vision_select_layer", "-2"),
        ("mm_use_im_start_end", "false"),
        ("mm_patch_merge_type", "spatial_unpadded"),
        ("mm_patch_merge_type", "maxpool2x2"),
        ("image_aspect_ratio", "Anyres"),
        ("image_aspect_ratio", "Pad"),
        ("image_aspect_ratio", "highres"),
        ("image_aspect_ratio", "crop_split"),
        ("image_aspect_ratio", "anyres_max_0"),
        ("image_aspect_ratio", "anyres_max_9x"),
        ("image_aspect_ratio", ["pad"]),
        ("image_grid_pinpoints", 5),
        ("tokenizer_padding_side", "middle"),
        ("tokenizer_model_max_length", "2048"),
        ("top_p", "0.6"),
    ],
)
def test_config_entries(tmp_path, key, value):
    edit(tmp_path / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*, expected "):
        stored_config(tmp_path)
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is "):  # the loader has the same rule
        load(write(tmp_path / "m", config={key: value}))


@pytest.mark.parametrize("value", ["pad", "square", "none", None, "anyres", "anyres_max_9", "anyres_max_16"])
def test_aspect_ratios_of_llava(value):
    check_entries({"image_aspect_ratio": value}, CONFIG, "config.json")


@pytest.mark.parametrize("key", ["num_attention_heads", "rms_norm_eps", "mm_vision_select_layer"])
def test_entries_whose_default_would_be_a_silent_error(tmp_path, key):
    with pytest.raises(CheckpointError, match=rf"config\.json: missing {key}\."):
        load(write(tmp_path / "m", config={key: ...}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (f"{TOWER.name}/config.json", {"hidden_size": "64"}, "hidden_size is '64'"),
        (f"{TOWER.name}/config.json", {"patch_size": 0}, "patch_size is 0"),
        (f"{TOWER.name}/config.json", {"patch_size": 337}, "patch_size 337 is larger than image_size"),
        (f"{TOWER.name}/config.json", {"num_attention_heads": 3}, "not a multiple of num_attention_heads 3"),
        (f"{TOWER.name}/config.json", {"num_attention_heads": ...}, "missing num_attention_heads"),
        (f"{TOWER.name}/config.json", {"vision_config": 5}, "vision_config is 5"),
        (f"{TOWER.name}/preprocessor_config.json", {"resample": "3"}, "resample is '3', expected an integer"),
        (f"{TOWER.name}/preprocessor_config.json", {"do_resize": "true"}, "do_resize is 'true'"),
        (f"{TOWER.name}/preprocessor_config.json", {"image_mean": [0.5]}, "image_mean is .*list of 3"),
        (f"{TOWER.name}/preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std is"),
        (f"{TOWER.name}/preprocessor_config.json", {"image_mean": [122, 116, 104]}, "image_mean is .*0 to 1"),
        (f"{TOWER.name}/preprocessor_config.json", {"size": {"shortest_edge": "336"}}, "size is"),
        (f"{TOWER.name}/preprocessor_config.json", {"size": 24}, "size 24 is smaller than crop_size 336"),
        (
            f"{TOWER.name}/preprocessor_config.json",
            {"crop_size": {"height": 336, "width": 224}},
            "crop_size is .*expected equal",
        ),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("generation_config.json", {"temperature": "0.2"}, "temperature is '0.2'"),
        (
            "generation_config.json",
            {"eos_token_id": 640},
            "eos_token_id is 640, but the model has 640 tokens",
        ),
        ("config.json", {"pad_token_id": 32000}, "pad_token_id is 32000, but the model has 640 tokens"),
        ("config.json", {"eos_token_id": [2, 700]}, "eos_token_id is .*but the model has 640 tokens"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token is 5"),
        ("tokenizer_config.json", {"bos_token": {"content": None}}, "bos_token is"),
        ("tokenizer_config.json", {"add_bos_token": "true"}, "add_bos_token is 'true'"),
        ("tokenizer_config.json", {"model_max_length": "2048"}, "model_max_length is '2048'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("special_tokens_map.json", {"eos_token": ["</s>"]}, "eos_token is"),
        ("added_tokens.json", {"<im_start>": "640"}, "'<im_start>' is '640', expected an id"),
        ("tokenizer.json", {"added_tokens": [{"content": "a"}]}, "added_tokens is"),
    ],
)
def test_other_files(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=rf"{file.replace('.', r'[.]')}.*{message}"):
        load(folder)


def test_what_is_left_out_of_a_transformers_config(folder):
    """Entries of every transformers config that would change what the model returns, or are of no use."""
    edit(folder / "config.json", return_dict=False, id2label=[1], num_labels="x", _attn_implementation="x")
    assert load(folder).config.return_dict


def test_pad_token_id_minus_one_is_none(folder):
    edit(folder / "config.json", pad_token_id=-1)
    assert load(folder).config.pad_token_id is None


def test_deep_objects_within_the_limit(tmp_path):
    (tmp_path / "x.json").write_text('{"a":' * 60 + "1" + "}" * 60)
    assert "a" in read_object(tmp_path / "x.json")


def test_settings_inside_processor_config(folder):
    """Newer transformers save the image processor's settings in processor_config.json, which wins there."""
    flat = folder / TOWER.name / "preprocessor_config.json"
    settings = json.loads(flat.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}
    nested = flat.with_name("processor_config.json")
    nested.write_text(json.dumps({"processor_class": "X", "image_processor": settings}))
    with pytest.warns(UserWarning, match="image_mean differ from preprocessor_config"):
        model = load(folder)
    assert list(model.get_vision_tower().image_processor.image_mean) == [0.5, 0.5, 0.5]
    flat.unlink()
    model = load(folder)
    assert list(model.get_vision_tower().image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert model.loading_notes == ()
    edit(nested, image_processor={**settings, "resample": "3"})
    with pytest.raises(CheckpointError, match=r"processor_config\.json: image_processor: resample is '3'"):
        load(folder)


def test_pinpoints_as_a_range_of_crops(tmp_path):
    model = load(write(tmp_path / "m", source=NEXT, config={"image_grid_pinpoints": "(1x1),...,(2x3)"}))
    sides = [(i, j) for i in (1, 2) for j in (1, 2, 3)]
    assert model.config.image_grid_pinpoints == [[336 * i, 336 * j] for i, j in sides]
    for wrong in ("(1x1),...", "(1x1)-(2x2)", "[[336, 672", [[300, 336]], None, "(0x1),...,(2x2)"):
        if wrong == "(1x1),...":
            continue  # one pair is a range of one
        with pytest.raises(CheckpointError, match=r"config\.json: image_grid_pinpoints"):
            load(write(tmp_path / "x", source=NEXT, config={"image_grid_pinpoints": wrong}))


@pytest.mark.parametrize(
    ("method", "state", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, {"q_proj.qweight": torch.int32}, "by awq to 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, {"q_proj.g_idx": torch.int32}, "by gptq to 4 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"q_proj.weight": torch.int8},
            "bitsandbytes to 8",
        ),
        ({"quant_method": "fp8"}, {"q_proj.weight": torch.float8_e4m3fn}, "by fp8"),
        (None, {"q_proj.weight": torch.int8}, "as torch.int8"),
        (None, {"q_proj.weight.absmax": torch.float32}, "as torch.float32"),
    ],
)
def test_quantized_weights_are_said(tmp_path, method, state, message):
    """The weights decide, with or without quantization_config."""
    mixed = dict(weights(SOURCE))
    for name, dtype in state.items():
        mixed[f"model.layers.0.self_attn.{name}"] = torch.zeros(64, 64).to(dtype)
    config = {} if method is None else {"quantization_config": method}
    folder = write(tmp_path / "m", state=mixed, config=config, form="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"the weights are quantized .*{message}"):
        load(folder)


def test_quantization_config_over_plain_weights(tmp_path):
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.warns(UserWarning, match="quantization_config is ignored"):
        model = load(write(tmp_path / "m", config=config))
    assert "quantization_config" in model.loading_notes[0]
