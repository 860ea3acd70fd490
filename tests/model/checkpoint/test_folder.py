"""Checkpoints that are only a part: a projector or a LoRA adapter over `model_base`."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import SOURCE, load, logits, weights, write
from helpers.golden_model import DATA
from llava import paths
from llava.eval.jobs.job import _weights
from llava.model.checkpoint import CheckpointError, CheckpointWarning
from llava.model.checkpoint.config import stored_config
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.folder import CheckpointFolder


@pytest.fixture(scope="module")
def reference():
    return logits(load(SOURCE))


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
    with pytest.raises(CheckpointError, match="contains only a projector.*model_base"):
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
    with pytest.raises(CheckpointError, match="LoRA adapter. Pass .* model_base"):
        load(folder)


@pytest.mark.parametrize(
    ("adapter", "keys", "message"),
    [
        ({"use_dora": True}, ["q_proj.lora_A", "q_proj.lora_B"], "use_dora is not supported"),
        ({"r": None}, ["q_proj.lora_A", "q_proj.lora_B"], r"adapter_config\.json: missing r\."),
        ({}, ["q_proj.lora_A"], "1 unpaired lora_A/lora_B"),
        (
            {},
            ["z_proj.lora_A", "z_proj.lora_B"],
            r"does not have.*\s+model\.layers\.0\.self_attn\.z_proj\.weight",
        ),
        ({}, ["q_proj.magnitude"], "is not a LoRA weight"),
    ],
)
def test_lora_mistakes(tmp_path, adapter, keys, message):
    pairs = {f"base_model.model.model.layers.0.self_attn.{k}.weight": torch.zeros(4, 4) for k in keys}
    base, folder = lora_folder(tmp_path, adapter, pairs)
    with pytest.raises(CheckpointError, match=message):
        load(folder, str(base))


# --- adapters against their configuration and their base ---------------------------------------------------
PROJECTIONS = ("q_proj", "v_proj")


def pairs_for(names, rank=4, prefix="base_model.model."):
    """Random pairs, and what they add to each weight under alpha 8."""
    generator, state = torch.Generator().manual_seed(0), weights(SOURCE)
    pairs, added = {}, {}
    for name in names:
        rows, columns = state[f"{name}.weight"].shape
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        pairs |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        added[f"{name}.weight"] = 8 / rank * (b @ a)
    return pairs, added


ALL = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in PROJECTIONS]


def over_llava(tmp_path, pairs, trained=..., adapter=None):
    """An adapter over a complete LLaVA. `trained`: of non_lora_trainables.bin; None: no such file."""
    base = write(tmp_path / "base")
    folder = tmp_path / "lora"
    folder.mkdir()
    if trained is ...:
        trained = {f"base_model.model.{k}": v for k, v in weights(SOURCE).items() if "mm_projector" in k}
    if trained is not None:
        torch.save(trained, folder / "non_lora_trainables.bin")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **(adapter or {})}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(pairs, folder / "adapter_model.bin")
    return folder, str(base)


@pytest.mark.parametrize("trained", [None, {}])
def test_a_borrowed_projector_is_said(tmp_path, trained):
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0], trained)
    with pytest.warns(
        CheckpointWarning, match=r"non_lora_trainables\.bin: .*projector is that of model_base"
    ):
        model = load(folder, base)
    assert len(model.loading_notes) == 1 and "non_lora_trainables.bin" in model.loading_notes[0]


def test_parts_of_two_projectors_are_not_mixed(tmp_path):
    part = {"base_model.model.model.mm_projector.0.weight": torch.zeros(64, 64)}
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0], part)
    with pytest.raises(CheckpointError, match=r"(?s)3 missing keys.*mm_projector\.2\.weight"):
        load(folder, base)
    (folder / "non_lora_trainables.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: cannot be read"):
        load(folder, base)


def test_an_empty_projector_file(tmp_path):
    base = write(tmp_path / "base")
    folder = write(tmp_path / "pretrain")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin: contains no weight of a projector"):
        load(folder, str(base))


@pytest.mark.parametrize(
    ("pairs", "adapter", "message"),
    [
        ({}, {}, r"adapter_model\.bin: the adapter is empty"),
        (pairs_for(ALL, rank=8)[0], {}, r"adapter_model\.bin: .*\(8, 64\).*but r is 4"),
        (
            {f"{ALL[0]}.lora_A.weight": torch.zeros(0, 64), f"{ALL[0]}.lora_B.weight": torch.zeros(64, 0)},
            {},
            r"adapter_model\.bin: .*\(0, 64\).*but r is 4",
        ),
        (pairs_for(ALL)[0], {"r": 0}, r"adapter_config\.json: r is 0"),
        (pairs_for(ALL)[0], {"r": "4"}, r"adapter_config\.json: r is '4'"),
        (pairs_for(ALL)[0], {"lora_alpha": "8"}, r"adapter_config\.json: lora_alpha is '8'"),
        (pairs_for(ALL)[0], {"peft_type": "IA3"}, r"adapter_config\.json: peft_type is 'IA3'"),
        (pairs_for(ALL)[0], {"target_modules": 5}, r"adapter_config\.json: target_modules is 5"),
        (pairs_for(ALL)[0], {"target_modules": "(q"}, r"target_modules is not a regular expression"),
        ({k: v.to(torch.int8) for k, v in pairs_for(ALL)[0].items()}, {}, r"is torch\.int8"),
    ],
)
def test_adapters_that_are_not_what_they_claim(tmp_path, pairs, adapter, message):
    folder, base = over_llava(tmp_path, pairs, adapter=adapter)
    with pytest.raises(CheckpointError, match=message):
        load(folder, base)


@pytest.mark.parametrize(
    ("names", "adapter", "said"),
    [
        (ALL[:2], {}, "4 weights .* in 2 layers"),
        (ALL[::2], {}, "3 weights .* in 3 layers"),  # one of two target modules
        (ALL, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, "3 weights .* in 3 layers"),
        (ALL[:2], {"target_modules": r".*\.(q|v)_proj"}, "4 weights .* in 2 layers"),
        (ALL[:2], {"layers_to_transform": [0]}, None),
        (ALL, {}, None),
        (ALL, {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"}, None),
    ],
)
def test_layers_and_modules_without_a_pair_are_counted(tmp_path, names, adapter, said):
    folder, base = over_llava(tmp_path, pairs_for(names)[0], adapter=adapter)
    if said is None:
        assert load(folder, base).loading_notes == ()
        return
    with pytest.warns(CheckpointWarning, match=rf"adapter_model\.bin: the adapter is incomplete: {said}"):
        load(folder, base)


def test_full_weights_beside_an_adapter(tmp_path, reference):
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0])
    write(folder)
    with pytest.warns(CheckpointWarning, match="contains full weights and a LoRA adapter"):
        assert torch.equal(logits(load(folder)), reference)
    with pytest.raises(CheckpointError, match="full weights as well as a LoRA adapter.*Leave model_base out"):
        load(folder, base)


@pytest.mark.parametrize("name", ["mm_projector.bin", "non_lora_trainables.bin"])
def test_full_weights_beside_a_trained_part(tmp_path, reference, name):
    folder = write(tmp_path / "m")
    torch.save({}, folder / name)
    with pytest.warns(CheckpointWarning, match=rf"full weights and a trained part \({name}\)"):
        assert torch.equal(logits(load(folder)), reference)


@pytest.mark.parametrize("inside", [True, False])
def test_adapters_reach_into_the_vision_tower(tmp_path, inside):
    """The tower's weights are in the base, or in the tower's own folder."""
    own = weights(DATA / "ckpt_clip336p42")
    name = "vision_model.encoder.layers.{}.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    pairs, _ = pairs_for(ALL)
    prefix = "model.vision_tower.vision_tower."
    merged = {f"{prefix}{k}": v.clone() for k, v in own.items()}
    for layer in (0, 3):  # the last layer is after the select layer and not used
        a, b = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
        module = prefix + name.format(layer)
        pairs |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        merged[f"{module}.weight"] += 2 * (b @ a)
    folder, base = over_llava(tmp_path, pairs)
    if inside:
        write(tmp_path / "base", state={**weights(SOURCE), **{f"{prefix}{k}": v for k, v in own.items()}})
    found = load(folder, base)
    whole = {**weights(SOURCE), **merged}
    whole |= {k: whole[k] + v for k, v in pairs_for(ALL)[1].items()}
    torch.testing.assert_close(logits(found), logits(load(write(tmp_path / "merged", state=whole))))
    pairs[f"base_model.model.{prefix}encoder.x.lora_A.weight"] = torch.zeros(4, 64)
    pairs[f"base_model.model.{prefix}encoder.x.lora_B.weight"] = torch.zeros(64, 4)
    torch.save(pairs, folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"(?s)1 adapters for weights that model_base does not have.*encoder\.x"
    ):
        load(folder, base)


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.", "base_model.model.model."])
def test_prefixes_of_saved_keys(tmp_path, prefix):
    state = weights(SOURCE)
    changed = {k: v + 0.01 for k, v in state.items() if "mm_projector" in k or k == "lm_head.weight"}
    trained = {
        prefix.removesuffix("model." if k.startswith("lm_head") else "") + k: v for k, v in changed.items()
    }
    folder, base = over_llava(tmp_path, pairs_for(ALL, prefix="base_model.model.")[0], trained)
    merged = {**state, **changed} | {k: state[k] + v for k, v in pairs_for(ALL)[1].items()}
    want = logits(load(write(tmp_path / "merged", state=merged)))
    torch.testing.assert_close(logits(load(folder, base)), want)


def test_a_vocabulary_that_grew(tmp_path):
    """Both matrices come from the adapter's folder; if one is missing, both files are named."""
    state = weights(SOURCE)
    extra = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) / 10
    grown = {k: torch.cat([state[k], extra]) for k in ("model.embed_tokens.weight", "lm_head.weight")}
    projector = {k: v for k, v in state.items() if "mm_projector" in k}
    trained = {f"base_model.model.{k}": v for k, v in (grown | projector).items()}
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0], trained)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 643}))
    model = load(folder, base)
    assert model.loading_notes == () and model.config.vocab_size == 643
    assert torch.equal(model.lm_head.weight, grown["lm_head.weight"])
    (folder / "config.json").unlink()  # the base's config is used, and the weights decide
    with pytest.warns(CheckpointWarning, match="vocab_size is 640, but the weights are for 643 tokens"):
        assert load(folder, base).get_input_embeddings().num_embeddings == 643
    trained.pop("base_model.model.lm_head.weight")
    torch.save(trained, folder / "non_lora_trainables.bin")
    with pytest.raises(
        CheckpointError, match=r"non_lora_trainables\.bin.*vocabulary of 643.*model\.safetensors.*640"
    ):
        load(folder, base)


def test_a_tower_beside_the_base(tmp_path):
    """Neither the adapter's folder nor its parent has the tower."""
    (tmp_path / "runs").mkdir()
    folder, _ = over_llava(tmp_path / "runs", pairs_for(ALL)[0])
    base = write(tmp_path / "models" / "base", tower=False)
    shutil.copytree(DATA / "ckpt_clip336p42", tmp_path / "models" / "ckpt_clip336p42")
    assert load(folder, str(base)).get_vision_tower().hidden_size == 64


# --- adapters of other kinds, and what an adapter lacks ----------------------------------------------------
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "'olora', which changed the weights below"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    ],
)
def test_adapters_that_are_not_added_to_the_weights(tmp_path, adapter, message):
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0], adapter=adapter)
    with pytest.raises(CheckpointError, match=message):
        load(folder, base)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"init_lora_weights": "gaussian", "bias": "all"}, None),
        ({"target_modules": ".*self_attn.(q|v)_proj"}, None),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]}, None),
        ({"target_modules": ["q_proj"]}, r"3 lora_A/lora_B pairs .* \(first: model\.layers\.0.*v_proj\)"),
        ({"layers_to_transform": [0]}, r"4 lora_A/lora_B pairs .*layers\.1"),
    ],
)
def test_pairs_that_the_configuration_does_not_name(tmp_path, adapter, said):
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0], adapter=adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = load(folder, base).loading_notes
    assert len(notes) == (said is not None)
    assert said is None or re.search(said, notes[0])


def test_an_adapter_of_zeros(tmp_path):
    pairs = {key: value * ("lora_A" in key) for key, value in pairs_for(ALL)[0].items()}
    folder, base = over_llava(tmp_path, pairs)
    with pytest.warns(CheckpointWarning, match=r"adapter_model\.bin: every lora_B is zero"):
        load(folder, base)


@pytest.mark.parametrize("where", ["lora_B", "mm_projector.0.weight"])
def test_a_trained_part_with_nan(tmp_path, where):
    pairs = pairs_for(ALL)[0]
    trained = {f"base_model.model.{k}": v for k, v in weights(SOURCE).items() if "mm_projector" in k}
    broken = next(v for k, v in [*pairs.items(), *trained.items()] if where in k)
    broken[0, 0] = torch.nan
    folder, base = over_llava(tmp_path, pairs, trained)
    file = "adapter_model" if where == "lora_B" else "non_lora_trainables"
    with pytest.raises(CheckpointError, match=rf"{file}\.bin: .*NaN or infinite values"):
        load(folder, base)


def test_trainables_missing_over_a_language_model(tmp_path):
    base, folder = lora_folder(tmp_path, pairs=pairs_for(ALL)[0])
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"non_lora_trainables\.bin: no such file, and model_base has no"
    ):
        load(folder, str(base))
    torch.save({"0.weight": torch.zeros(2)}, folder / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: contains no weight of a projector"):
        load(folder, str(base))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"trained part has no config\.json"):
        load(folder, str(base))


def test_a_base_that_is_only_a_trained_part(tmp_path):
    _, folder = lora_folder(tmp_path, pairs=pairs_for(ALL)[0])
    with pytest.raises(CheckpointError, match="model_base is itself only a trained part"):
        load(folder, str(folder))


def test_tokenizers_of_a_trained_part_and_its_base(tmp_path):
    folder, base = over_llava(tmp_path, pairs_for(ALL)[0])
    for file in SOURCE.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    assert load(folder, base).loading_notes == ()
    (folder / "added_tokens.json").write_text('{"<seg>": 640}')
    with pytest.warns(CheckpointWarning, match="not that of model_base, and has '<seg>'"):
        load(folder, base)


def test_a_projector_of_another_type_names_the_entry(tmp_path):
    base = write(tmp_path / "base")
    folder = write(tmp_path / "pretrain")
    (folder / "model.safetensors").unlink()
    torch.save({"model.mm_projector.weight": torch.zeros(64, 64)}, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"unexpected keys.*mm_projector_type: 'mlp2x_gelu'"):
        load(folder, str(base))


# --- bases that are not passed ------------------------------------------------------------------------------
def named(tmp_path, name, **adapter):
    """A LoRA folder that names its base, and the base in a folder of its own."""
    prefix = f"base_model.model.{ALL[0]}"
    pairs = {f"{prefix}.lora_A.weight": torch.ones(4, 64), f"{prefix}.lora_B.weight": torch.ones(64, 4)}
    base, folder = lora_folder(tmp_path, {"base_model_name_or_path": name, **adapter}, pairs)
    return base, folder


@pytest.mark.parametrize(
    "name, place",
    [
        ("vicuna", "beside"),
        ("lmsys/vicuna", "beside"),
        ("/elsewhere/models/vicuna/", "beside"),
        ("C:\\models\\vicuna", "beside"),
        ("vicuna", "cache"),
        ("PATH", "far"),
    ],
)
def test_a_lora_folder_finds_the_base_that_it_names(tmp_path, monkeypatch, name, place):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    base, folder = named(tmp_path, name.replace("PATH", str(tmp_path / "far" / "vicuna")))
    if place != "beside":
        (tmp_path / place).mkdir()
        base = base.rename(tmp_path / place / "vicuna")
    found = CheckpointFolder(folder)
    assert found.base == base and found.kind() == "lora"
    assert CheckpointFolder(folder, tmp_path / "other").base == tmp_path / "other"


def test_it_loads_like_the_base_that_is_passed_and_has_its_fingerprint(tmp_path):
    base, folder = named(tmp_path, "vicuna")
    assert torch.equal(logits(load(folder)), logits(load(folder, str(base))))
    assert _weights(folder, None) == _weights(folder, str(base))
    (folder / "config.json").unlink()
    assert stored_config(folder)["model_type"] == "llama"


def test_a_projector_finds_the_base_that_its_config_names(tmp_path):
    base = write(tmp_path / "vicuna", config={"model_type": "llama"})
    folder = write(tmp_path / "pretrain", config={"_name_or_path": "lmsys/vicuna"})
    (folder / "model.safetensors").rename(folder / "mm_projector.bin")
    assert CheckpointFolder(folder).base == base
    shutil.rmtree(base)
    assert CheckpointFolder(folder).base is None


@pytest.mark.parametrize(
    "name, message",
    [
        (None, r"model_base\.$"),
        ("", r"model_base\.$"),
        ("lmsys/vicuna-7b", r"It names 'lmsys/vicuna-7b', which is in none of:\n  .*vicuna-7b"),
        ("llava-lora", "It names 'llava-lora'"),  # itself
        ("smollm2-135m-instruct", r"run `python -m llava\.tiny\.base` once"),
        (7, r"adapter_config\.json: base_model_name_or_path is 7"),
    ],
)
def test_a_base_that_is_not_there_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    _, folder = named(tmp_path, name)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder(folder).kind()


def test_folders_without_weights_and_whole_checkpoints_have_no_base(tmp_path):
    base, folder = named(tmp_path, "vicuna")
    shutil.copy(base / "model.safetensors", folder)
    assert CheckpointFolder(folder).base is None  # complete
    (folder / "model.safetensors").unlink()
    (base / "model.safetensors").unlink()
    assert CheckpointFolder(folder).base is None


def test_bundled_models_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("llava-tiny") == paths.BUNDLED_MODEL
    (tmp_path / "llava-tiny").mkdir()
    assert resolve_checkpoint("llava-tiny") == Path("llava-tiny")  # the user's own
    missing = (tmp_path / "clone" / "smol",)
    monkeypatch.setattr(paths, "BUNDLED_MODELS", missing)
    with pytest.raises(FileNotFoundError, match="repository clone"):
        resolve_checkpoint("smol")
