"""Who decides how much is pruned: argument, environment, config.json; and changing it on a loaded model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.golden_model import DATA
from llava.model.builder import load_pretrained_model
from llava.model.settings import choose_dtypes, parse_dtype, resolve_pruning
from llava.pruning import get_pruner

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chosen(config=None, **kwargs):
    """(method, tokens, ratio, anyres)"""
    settings = resolve_pruning(config, **kwargs)
    pruner = settings.pruner
    return pruner.name, pruner.tokens, pruner.important_ratio, settings.anyres


def test_nothing_means_no_pruning():
    assert chosen() == chosen({}) == ("none", None, 0.5, None)


def test_order_of_places(monkeypatch):
    config = {
        "pruning_method": "random",
        "visual_token_num": 8,
        "important_ratio": 0.25,
        "anyres_protocol": "llava",
    }
    assert chosen(config) == ("random", 8, 0.25, "llava")
    monkeypatch.setenv("VISPRUNER_METHOD", "uniform")
    monkeypatch.setenv("VISPRUNER_TOKENS", "16")
    monkeypatch.setenv("VISPRUNER_RATIO", "0.75")
    monkeypatch.setenv("VISPRUNER_ANYRES", "paper")
    assert chosen(config) == ("uniform", 16, 0.75, "paper")
    assert chosen(config, method="vispruner", tokens=0, ratio=0, anyres="llava") == (
        "vispruner",
        0,
        0.0,
        "llava",
    )
    assert chosen(config, method="none") == ("none", None, 0.75, "paper")


def test_tokens_without_method():
    assert chosen(tokens=64)[:2] == ("vispruner", 64)
    assert chosen({"visual_token_num": 32})[:2] == ("vispruner", 32)


def test_none_is_overruled_only_from_above(monkeypatch):
    monkeypatch.setenv("VISPRUNER_METHOD", "none")
    assert chosen({"visual_token_num": 32})[0] == "none"
    assert chosen(tokens=32)[:2] == ("vispruner", 32)
    assert chosen(tokens=32, method="none")[0] == "none"


def test_empty_variables_are_unset(monkeypatch):
    monkeypatch.setenv("VISPRUNER_TOKENS", "")
    assert chosen()[0] == "none"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VISPRUNER_TOKENS", "many", "VISPRUNER_TOKENS in the environment: 'many' is not an integer"),
        ("VISPRUNER_TOKENS", "-3", "-3.*VISPRUNER_TOKENS"),
        ("VISPRUNER_RATIO", "2", "VISPRUNER_RATIO"),
        ("VISPRUNER_METHOD", "visprune", "did you mean.*VISPRUNER_METHOD"),
        ("VISPRUNER_ANYRES", "both", "VISPRUNER_ANYRES in the environment: 'both'"),
    ],
)
def test_mistakes_name_the_variable(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        resolve_pruning()


def test_mistakes_in_config_and_arguments():
    with pytest.raises(ValueError, match=r"visual_token_num in config\.json: 'x'"):
        resolve_pruning({"visual_token_num": "x"})
    with pytest.raises(ValueError, match=r"visual_token_num: 3\.5 is not an integer"):
        resolve_pruning(tokens=3.5)


def test_dtypes(monkeypatch):
    f16, f32, b16 = torch.float16, torch.float32, torch.bfloat16
    assert choose_dtypes(None, None, "float16", CPU) == (f32, f32)
    assert choose_dtypes(None, None, "bfloat16", GPU) == (b16, b16)
    assert choose_dtypes(None, None, None, GPU) == (f16, f16)
    assert choose_dtypes("fp16", "float32", None, GPU) == (f16, f32)
    monkeypatch.setenv("VISPRUNER_TOWER_DTYPE", "float32")
    assert choose_dtypes(b16, None, None, CPU) == (b16, f32)
    assert choose_dtypes(b16, "bf16", None, CPU) == (b16, b16)
    monkeypatch.setenv("VISPRUNER_TOWER_DTYPE", "wide")
    with pytest.raises(ValueError, match="VISPRUNER_TOWER_DTYPE: 'wide'"):
        choose_dtypes(None, None, None, CPU)
    assert parse_dtype("auto") is None and parse_dtype("torch.float64") is torch.float64


def test_loading_with_settings(monkeypatch, tmp_path):
    path = str(DATA / "ckpt_llava15s")
    model = load_pretrained_model(path, device="cpu", visual_token_num=12, important_ratio=0.25)[1]
    assert model.pruner == get_pruner("vispruner", 12, 0.25) and model.config.anyres_protocol == "paper"
    monkeypatch.setenv("VISPRUNER_TOKENS", "9")
    monkeypatch.setenv("VISPRUNER_METHOD", "uniform")
    model = load_pretrained_model(path, device="cpu")[1]
    assert model.pruner == get_pruner("uniform", 9)
    assert [len(t) for t in model.encode_images(torch.zeros(2, 3, 336, 336))] == [9, 9]
    monkeypatch.delenv("VISPRUNER_TOKENS")
    monkeypatch.delenv("VISPRUNER_METHOD")
    folder = tmp_path / "m"
    shutil.copytree(path, folder)
    shutil.copytree(DATA / "ckpt_clip336p42", tmp_path / "ckpt_clip336p42")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "visual_token_num": 7, "anyres_protocol": "llava"})
    )
    model = load_pretrained_model(str(folder), device="cpu")[1]
    assert model.pruner.tokens == 7 and model.anyres == "llava"


def test_set_pruner(golden):
    model = golden("16s").model
    assert (model.pruner.name, model.anyres) == ("none", "llava")
    model.set_pruner(tokens=8)
    assert (
        model.pruner == get_pruner("vispruner", 8) and model.anyres == model.config.anyres_protocol == "paper"
    )
    model.set_pruner("random", 5, anyres="llava")
    assert (model.pruner.name, model.config.anyres_protocol) == ("random", "llava")
    model.set_pruner(get_pruner("uniform", 3))  # the choice of protocol stays until it is changed
    assert model.pruner.tokens == 3 and model.anyres == "llava"
    model.set_pruner(None, anyres="paper")  # the paper's upper bound: all 5 x N tokens
    assert model.anyres == "paper" and model.pruner.tokens is None
    model.set_pruner(None, anyres="auto")
    assert model.anyres == "llava"
    with pytest.raises(ValueError, match="anyres: 'diagonal'"):
        model.set_pruner("vispruner", 8, anyres="diagonal")
    with pytest.raises(ValueError, match="both given"):
        model.set_pruner(get_pruner("uniform", 3), tokens=4)
    with pytest.raises(ValueError, match="pruner: 16 is neither a Pruner nor a name. .*tokens="):
        model.set_pruner(16)
    assert model.pruner.name == "none"


def test_saved_model_loads_the_same(golden, tmp_path):
    """save_pretrained writes what load_pretrained_model reads back: tower inside, protocol undecided."""
    g = golden("16s")
    g.model.save_pretrained(tmp_path)
    g.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and "anyres_protocol" not in config
    assert g.model.config.anyres_protocol == "llava"
    config["mm_vision_tower"] = str(DATA / "ckpt_clip336p42")
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, again, _, _ = load_pretrained_model(str(tmp_path), device="cpu", visual_token_num=8)
    assert again.anyres == "paper"
    ours, theirs = dict(g.model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_published_preset(monkeypatch):
    half, full = torch.float16, torch.float32
    assert choose_dtypes(None, None, "bfloat16", GPU, "published") == (half, full)
    assert choose_dtypes("fp16", "float32", None, GPU, "published") == (half, full)
    assert choose_dtypes(None, None, "bfloat16", CPU, "published") == (full, full)
    assert choose_dtypes("float16", None, None, CPU, "published") == (half, full)
    assert chosen(preset="published") == ("none", None, 0.5, "paper")
    assert chosen({"anyres_protocol": "llava"}, tokens=8, preset="published")[3] == "paper"
    assert chosen(preset="exact") == ("none", None, 0.5, None)
    monkeypatch.setenv("VISPRUNER_PRESET", "published")
    assert choose_dtypes(None, None, "bfloat16", GPU) == (half, full) and chosen()[3] == "paper"
    assert choose_dtypes(None, None, "bfloat16", GPU, "exact") == (torch.bfloat16, torch.bfloat16)
    assert chosen(anyres="llava", preset="exact")[3] == "llava"


def test_a_preset_as_an_argument_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("VISPRUNER_TOWER_DTYPE", "float16")
    monkeypatch.setenv("VISPRUNER_ANYRES", "llava")
    assert choose_dtypes(None, None, None, GPU, "published") == (torch.float16, torch.float32)
    assert chosen(preset="published")[3] == "paper"


@pytest.mark.parametrize("place", ["argument", "environment"])
def test_what_contradicts_a_preset_is_refused(monkeypatch, place):
    preset, named = "published", "preset 'published'"
    if place == "environment":
        monkeypatch.setenv("VISPRUNER_PRESET", "published")
        preset, named = None, r"preset 'published' \(VISPRUNER_PRESET\)"
    for device, dtype in ((GPU, "bfloat16"), (GPU, "float32"), (CPU, "bfloat16")):
        with pytest.raises(ValueError, match=f"dtype: '{dtype}' contradicts {named}, which sets float16"):
            choose_dtypes(dtype, None, None, device, preset)
    with pytest.raises(ValueError, match=f"tower_dtype: 'float16' contradicts {named}, which sets float32"):
        choose_dtypes(None, "float16", None, GPU, preset)
    with pytest.raises(ValueError, match=f"anyres: 'llava' contradicts {named}, which sets paper"):
        chosen(anyres="llava", preset=preset)
    if place == "environment":
        monkeypatch.setenv("VISPRUNER_TOWER_DTYPE", "float16")
        with pytest.raises(
            ValueError, match="VISPRUNER_TOWER_DTYPE in the environment: 'float16' contradicts"
        ):
            choose_dtypes(None, None, None, GPU)
        assert choose_dtypes(None, "float32", None, GPU)[1] == torch.float32
        monkeypatch.setenv("VISPRUNER_ANYRES", "llava")
        with pytest.raises(ValueError, match="VISPRUNER_ANYRES in the environment: 'llava' contradicts"):
            chosen()


def test_an_unknown_preset_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="preset: 'paper' is unknown. Choose one of exact, published"):
        load_pretrained_model(str(DATA / "ckpt_llava15s"), device="cpu", preset="paper")
    monkeypatch.setenv("VISPRUNER_PRESET", "Published")
    with pytest.raises(ValueError, match="VISPRUNER_PRESET"):
        load_pretrained_model(str(DATA / "ckpt_llava15s"), device="cpu")
