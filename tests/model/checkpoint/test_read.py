"""Which of several sets of weights is read, and indices that are not what they claim."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.checkpoints import NEXT, SOURCE, load, logits, weights, write
from llava.model.checkpoint import CheckpointError, CheckpointWarning
from llava.model.checkpoint.read import find_weight_files


@pytest.fixture(scope="module")
def reference():
    return logits(load(SOURCE))


def other_weights():
    return {k: v * 0.5 for k, v in weights(SOURCE).items()}


SHARDS = ("model.safetensors", 2)


@pytest.mark.parametrize(
    ("used", "ignored"),
    [
        ("model.safetensors", SHARDS),
        (SHARDS, "pytorch_model.bin"),
        ("model.safetensors", "pytorch_model.bin"),
        ("pytorch_model.bin", ("pytorch_model.bin", 2)),
    ],
)
def test_two_sets_of_weights(tmp_path, reference, used, ignored):
    """The order is that of transformers, and the choice is said."""
    folder = write(tmp_path / "m", form=used)
    write(folder, form=ignored, state=other_weights())
    with pytest.warns(CheckpointWarning, match="several sets of weights"):
        model = load(folder)
    assert torch.equal(logits(model), reference) and "is read" in model.loading_notes[0]
    for path in folder.glob("*-of-*"):  # an old index without its shards
        path.unlink()
    if isinstance(used, str):
        with pytest.warns(CheckpointWarning, match="several sets of weights"):
            assert torch.equal(logits(load(folder)), reference)
    else:
        with pytest.raises(
            CheckpointError, match=r"2 missing shards.*remove the index to read pytorch_model"
        ):
            load(folder)


def test_an_index_of_the_single_file_is_not_a_second_set(tmp_path):
    folder = write(tmp_path / "m")
    names = dict.fromkeys(weights(SOURCE), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert load(folder).loading_notes == ()


def test_shards_without_an_index(tmp_path):
    folder = write(tmp_path / "m", form=SHARDS)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no weights found.*shards without an index \(model-00001"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../other/x.bin", "/somewhere/x.bin", "C:\\x.bin", "a/../../x.bin", "..\\x.bin"]
)
def test_an_index_that_leaves_its_folder(tmp_path, name):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json: .* is outside of the checkpoint's folder"):
        find_weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="1 missing shards"):
        find_weight_files(tmp_path, allow_outside=True)


def test_outside_files_can_be_allowed(tmp_path, reference, monkeypatch):
    folder = write(tmp_path / "m", form=SHARDS)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for shard in set(names.values()):
        (folder / shard).rename(tmp_path / shard)
    index.write_text(json.dumps({"weight_map": {k: f"../{v}" for k, v in names.items()}}))
    with pytest.raises(CheckpointError, match="allow_outside=True"):
        load(folder)
    assert torch.equal(logits(load(folder, allow_outside=True)), reference)
    monkeypatch.setenv("VISPRUNER_ALLOW_OUTSIDE", "1")
    assert torch.equal(logits(load(folder)), reference)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["a"]}, "weight_map is"),
        ({"weight_map": {"a": 5}}, "weight_map is"),
        ({"weight_map": {"a": "x" * 300}}, "weight_map is"),
        ({"weight_map": {"a": None}}, "a file without name"),
        ({"weight_map": {"a": ""}}, "a file without name"),
    ],
)
def test_indices_that_are_malformed(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{message}"):
        find_weight_files(tmp_path)


def test_one_key_in_two_places(tmp_path):
    folder = write(tmp_path / "m", form=("pytorch_model.bin", 2))
    for shard in folder.glob("*-of-*"):
        state = torch.load(shard) | {"model.norm.weight": torch.ones(64)}
        torch.save(state, shard)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is also in pytorch_model-00001"):
        load(folder)
    state = weights(SOURCE)
    state["model.model.norm.weight"] = state["model.norm.weight"].clone()
    with pytest.raises(CheckpointError, match=r"a second tensor for model\.norm\.weight"):
        load(write(tmp_path / "n", state=state))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(64, dtype=torch.int32),
        torch.zeros(64, dtype=torch.complex64),
        torch.zeros(64, dtype=torch.bool),
    ],
)
def test_numbers_that_are_no_weights(tmp_path, tensor):
    state = {**weights(SOURCE), "model.mm_projector.0.bias": tensor}
    with pytest.raises(CheckpointError, match=r"model\.mm_projector\.0\.bias: torch\."):
        load(write(tmp_path / "m", state=state, form="pytorch_model.bin"))


def test_a_left_over_newline(tmp_path):
    """LLaVA-NeXT's files have image_newline, whatever mm_patch_merge_type is now."""
    state = {**weights(SOURCE), "model.image_newline": torch.zeros(64)}
    for merge_type in ("flat", "spatial"):
        folder = write(tmp_path / merge_type, state=state, config={"mm_patch_merge_type": merge_type})
        model = load(folder)
        assert not hasattr(model.model, "image_newline") and model.loading_notes == ()


def test_a_merge_type_that_is_missing(tmp_path):
    folder = write(tmp_path / "m", source=NEXT, config={"mm_patch_merge_type": ...})
    with pytest.warns(CheckpointWarning, match="mm_patch_merge_type is missing"):
        load(folder)


def test_values_of_the_language_model_that_are_not_finite(tmp_path):
    """A warning: the value may never be used, and the logits of every answer are checked."""
    state, name = weights(SOURCE), "model.layers.1.mlp.up_proj.weight"
    for value, options, message in (
        (torch.nan, {}, "NaN or infinite values. Download"),
        (-torch.inf, {}, "NaN or infinite values. Download"),
        (1e6, {"dtype": "float16"}, ".* or beyond float16. .*dtype='bfloat16'"),
    ):
        state[name] = state[name].clone()
        state[name][3, 3] = value
        folder = write(tmp_path / str(value), state=state)
        with pytest.warns(CheckpointWarning, match=rf"model\.safetensors: {name}: {message}"):
            assert len(load(folder, **options).loading_notes) == 1
    assert load(folder, dtype="bfloat16").loading_notes == ()


@pytest.mark.parametrize("name", ["model.mm_projector.0.weight", "model.vision_tower"])
def test_values_of_visual_parts_that_are_not_finite(tmp_path, name):
    state = weights(NEXT)
    key = next(key for key in state if key.startswith(name) and state[key].ndim == 2)
    state[key] = state[key].clone()
    state[key][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{key}: NaN or infinite values"):
        load(write(tmp_path / "m", source=NEXT, state=state))


def test_shards_that_the_index_does_not_name(tmp_path, reference):
    folder = write(tmp_path / "m", form=("model.safetensors", 2))
    torch.save({}, folder / "pytorch_model-00001-of-00003.bin")
    with pytest.warns(CheckpointWarning, match=r"1 shards are not in it \(pytorch_model-00001-of-00003"):
        model = load(folder)
    assert torch.equal(logits(model), reference) and len(model.loading_notes) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava-q4.gguf", r"format that is not supported \(llava-q4\.gguf\)"),
        ("tf_model.h5", "format that is not supported"),
        ("model.fp16.safetensors", "format that is not supported"),
        ("consolidated.safetensors", "format that is not supported"),
        ("checkpoint-100/", r"checkpoints of a run.*checkpoint-100"),
        ("model.safetensors@", r"links to files that do not exist \(model\.safetensors\)"),
    ],
)
def test_a_folder_with_something_other_than_weights(tmp_path, name, said):
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    if name.endswith("/"):
        (folder / name).mkdir()
    elif name.endswith("@"):
        (folder / name[:-1]).symlink_to("nowhere")
    else:
        (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"no weights found.*{said}"):
        load(folder)


@pytest.mark.parametrize(
    ("method", "key", "how"),
    [
        ("hqq", "W_q", "by hqq"),
        ("quanto", "weight._data", "by quanto"),
        ("awq", "qweight", "by awq to 4 bits"),
        ("aqlm", "codes", "by aqlm"),
        ("unheard-of", "blob", "quantization_config: 'unheard-of'"),
    ],
)
def test_other_ways_of_quantizing(tmp_path, recwarn, method, key, how):
    state = weights(SOURCE)
    name = "model.layers.0.self_attn.q_proj"
    state.pop(f"{name}.weight")
    state[f"{name}.{key}"] = torch.zeros(8, 8, dtype=torch.uint8)
    config = {"quantization_config": {"quant_method": method, "w_bit": 4 if method == "awq" else None}}
    with pytest.raises(CheckpointError, match=how):
        load(write(tmp_path / "m", state=state, config=config))
    assert not [one for one in recwarn if "quantization_config is ignored" in str(one.message)]
