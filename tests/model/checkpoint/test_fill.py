"""Every form a LLaVA checkpoint comes in gives the same model; what is wrong with one is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.checkpoints import IDS, IMAGE, NEXT, SOURCE, load, logits, weights, write
from helpers.golden_model import DATA
from llava.model.checkpoint import CheckpointError, CheckpointWarning


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
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*cannot be read") as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)  # torch advises to switch the protection off


def test_a_pointer_instead_of_weights(tmp_path):
    folder = write(tmp_path / "m", form="pytorch_model.bin")
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Git LFS pointer.*Download it again"):
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
    """Layers after the select layer may be missing; others may not."""
    own = {f"model.vision_tower.vision_tower.{k}": v for k, v in weights(DATA / "ckpt_clip336p42").items()}
    short = {k: v for k, v in own.items() if "layers.3." not in k and "post_layernorm" not in k}
    assert torch.equal(logits(load(write(tmp_path / "a", state={**weights(SOURCE), **short}))), reference)
    broken = {k: v for k, v in own.items() if "layers.2." not in k}
    with pytest.raises(CheckpointError, match=r"vision_tower.*layers\.2\."):
        load(write(tmp_path / "b", state={**weights(SOURCE), **broken}))


def test_known_tower_inside_needs_no_hub(tmp_path, monkeypatch):
    """openai/clip-vit-large-patch14-336 inside the weights: its shape is known, no hub is asked."""
    from llava.model.checkpoint.tower import find_tower

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path))
    source = find_tower("openai/clip-vit-large-patch14-336", tmp_path)
    assert source.folder is None and source.config["hidden_size"] == 1024
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    state = {**weights(SOURCE), "model.mm_projector.0.weight": torch.zeros(64, 1024)}
    with pytest.raises(CheckpointError, match="contains no vision tower weights.*no network"):
        load(write(tmp_path / "m", state=state, config=config))


def test_missing_keys_are_listed(tmp_path):
    lost = ["model.layers.1.mlp.up_proj.weight", "model.mm_projector.2.bias"]
    state = {k: v for k, v in weights(SOURCE).items() if k not in lost}
    with pytest.raises(CheckpointError) as error:
        load(write(tmp_path / "m", state=state))
    assert "2 missing keys" in str(error.value) and all(k in str(error.value) for k in lost)


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
    with pytest.raises(CheckpointError, match=rf"index\.json: 1 missing shards: {shard.name}"):
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
    with pytest.raises(CheckpointError, match=r"index\.json: expected a JSON object, got a list"):
        (folder / "model.safetensors.index.json").write_text("[]")
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_vision_tower": ...}, "no mm_vision_tower.*model_base"),
        ({"model_type": "llava_mpt"}, "'llava_mpt' is not supported"),
        ({"mm_hidden_size": 128}, "mm_hidden_size is 128.*hidden_size 64"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type: 'resampler' is unknown"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer: -9"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_vision_select_layer": 0}, r"m/config\.json: mm_vision_select_layer: 0 is not"),
        ({"mm_vision_select_feature": "Patch"}, r"m/config\.json: .*'Patch', expected 'patch'"),
        ({"hidden_size": "wide"}, r"config\.json"),
    ],
)
def test_config_mistakes(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "m", config=config))


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("config.json", {"model_type": "siglip_vision_model"}, "'siglip_vision_model' is not supported"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "SiglipImageProcessor"},
            "SiglipImageProcessor",
        ),
        ("preprocessor_config.json", {"crop_size": 224, "size": 224}, "crop_size is 224"),
    ],
)
def test_tower_mistakes_name_its_folder(tmp_path, file, entry, message):
    folder = write(tmp_path / "m", config={"mm_vision_tower": "tower"})
    shutil.copytree(DATA / "ckpt_clip336p42", folder / "tower")
    path = folder / "tower" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(CheckpointError, match=f"m/tower: .*{message}"):
        load(folder)


@pytest.mark.parametrize("entries", [{"torch_dtype": "torch.float16"}, {"dtype": "auto"}, {"dtype": None}])
def test_spellings_of_a_dtype(tmp_path, reference, entries):
    model = load(write(tmp_path / "m", config=entries))
    assert torch.equal(logits(model), reference) and model.loading_notes == ()


def test_two_dtypes(tmp_path):
    with pytest.warns(CheckpointWarning, match="dtype is 'bfloat16', torch_dtype is 'float32'"):
        load(write(tmp_path / "m", config={"dtype": "bfloat16"}))


@pytest.mark.parametrize("entry", [{"watermarking_config": {"x": 1}}, {"cache_implementation": "none"}])
def test_generation_config_that_transformers_refuses(tmp_path, entry):
    folder = write(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(entry))
    with pytest.raises(CheckpointError, match=r"m/generation_config\.json: .*Use the file of the original"):
        load(folder)


def test_model_type_llava_and_tied_embeddings(tmp_path, reference):
    """model_type "llava" is ours here; one of the two matrices may be missing, or be a copy, when tied."""
    state = weights(SOURCE)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    config = {"model_type": "llava", "tie_word_embeddings": True}
    without = {k: v for k, v in state.items() if k != head}
    model = load(write(tmp_path / "m", state=without, config=config))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.loading_notes == ()
    double = {**without, head: state[embeddings].clone()}
    same = load(write(tmp_path / "n", state=double, config=config))
    assert torch.equal(logits(model), logits(same))
    assert same.lm_head.weight is same.model.embed_tokens.weight
    only_head = {k: v for k, v in double.items() if k != embeddings}
    assert torch.equal(logits(model), logits(load(write(tmp_path / "o", state=only_head, config=config))))
    # two matrices: the weights decide, whatever the flag claims
    with pytest.warns(CheckpointWarning, match="tie_word_embeddings is true, but"):
        untied = load(write(tmp_path / "p", state=state, config=config))
    assert torch.equal(logits(untied), reference) and not untied.config.tie_word_embeddings
    assert "tie_word_embeddings" in untied.loading_notes[0]


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
