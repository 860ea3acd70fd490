"""What training saves can be loaded from everywhere and resumed; precision, loss and DeepSpeed's settings."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.train_runs import BASE, LORA, STAGE_1, TOWER, command, losses, write_data
from llava.model.builder import load_pretrained_model
from llava.model.merge_lora import merge_lora
from llava.train.arguments import parse_arguments
from llava.train.setup import build_model
from llava.train.train import main, train

peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
# Every process draws budgets and dropout, so that a resumed run that forgets a state gives another curve.
KINDS = {
    "full": ("itiiti", ["--visual_token_num", "8,64"]),
    "lora": ("itiiti", [*LORA, "--lora_dropout", "0.1", "--mm_projector_lr", "2e-3"]),
    "projector": ("iiiiii", [*STAGE_1, "--visual_token_num", "8,64"]),
}
SAVING = "--save_strategy steps --save_steps 1 --per_device_train_batch_size 1".split()


def words(folder: Path, kind: str, *more: str) -> list[str]:
    """Return the arguments of a run of three steps into `folder`/KIND, which saves every step."""
    kinds, arguments = KINDS[kind]
    files = write_data(folder / f"data-{kind}", kinds, "plain" if kind == "projector" else "v1")
    given = [*files, *arguments, *SAVING, "--output_dir", str(folder / kind), *more]
    return command(1, given)[2:]


@pytest.fixture(scope="module", autouse=True)
def no_plot():
    """Drawing a curve takes as long as such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.train.train.plot_loss", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train in this process, once per kind; return the folder of the runs."""
    folder, done = tmp_path_factory.mktemp("runs"), set()

    def get(kind: str) -> Path:
        if kind == "lora":
            pytest.importorskip("peft")
        if kind not in done:
            # Names relative to the working directory: what is saved must be found from elsewhere.
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(BASE.parent)
                train(words(folder, kind, "--model_name_or_path", BASE.name, "--vision_tower", TOWER.name))
            done.add(kind)
        return folder / kind

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_the_unbroken_curve(runs, kind: str, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, random state and the place in the order of samples are saved."""
    whole = runs(kind)
    shutil.copytree(whole / "checkpoint-1", tmp_path / kind / "checkpoint-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(BASE.parent)
        train(words(tmp_path, kind, "--model_name_or_path", BASE.name, "--vision_tower", TOWER.name,
                    "--data_path", str(whole.parent / f"data-{kind}" / "data.json"),
                    "--image_folder", str(whole.parent / f"data-{kind}" / "images")))  # fmt: skip
    assert len(losses(whole)) == 3
    assert losses(tmp_path / kind) == pytest.approx(losses(whole), abs=1e-6)


def test_saved_models_have_the_tokenizer_of_the_base_and_no_tower(runs) -> None:
    folder = runs("full")
    for place in (folder, folder / "checkpoint-1"):
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            assert (place / name).read_bytes() == (BASE / name).read_bytes()
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        assert config["use_cache"] is True and config["architectures"] == ["LlavaLlamaForCausalLM"]
        with safe_open(place / "model.safetensors", "pt") as file:
            names = list(file.keys())
        assert (
            not [name for name in names if "vision_tower" in name] and "model.mm_projector.0.weight" in names
        )
    before = load_pretrained_model(BASE, None, "llava", device="cpu", dtype="float32")[1]
    after = load_pretrained_model(folder, None, "llava", device="cpu", dtype="float32")[1]
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    tower = [next(iter(m.get_vision_tower().parameters())) for m in (before, after)]
    assert torch.equal(*tower)


@peft
def test_lora_is_in_the_decoder_only_and_its_folder_loads_with_its_projector(runs, tmp_path: Path) -> None:
    folder = runs("lora")
    for place in (folder, folder / "checkpoint-1"):
        settings = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
        assert settings["base_model_name_or_path"] == str(BASE)
        with safe_open(place / "adapter_model.safetensors", "pt") as file:
            names = list(file.keys())
        linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        assert len(names) == 3 * len(linears) * 2
        assert all(".layers." in name and name.split(".")[-3] in linears for name in names)
        projector = torch.load(place / "non_lora_trainables.bin", weights_only=True)
        assert len(projector) == 4 and all("mm_projector" in name for name in projector)
    merge_lora(folder, BASE, tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 4]])
    loaded = load_pretrained_model(folder, BASE, "llava-lora", device="cpu", dtype="float32")[1]
    merged = load_pretrained_model(tmp_path / "merged", None, "llava", device="cpu", dtype="float32")[1]
    base = load_pretrained_model(BASE, None, "llava", device="cpu", dtype="float32")[1]
    with torch.no_grad():
        logits = [model(ids).logits for model in (loaded, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)
    assert torch.equal(
        loaded.get_model().mm_projector[0].weight.float(), merged.get_model().mm_projector[0].weight.float()
    )


def test_stage_1_saves_four_tensors_and_the_state_of_the_trainer(runs) -> None:
    folder = runs("projector")
    for place in (folder, folder / "checkpoint-2"):
        saved = torch.load(place / "mm_projector.bin", weights_only=True)
        assert sorted(saved) == [f"model.mm_projector.{i}.{n}" for i in (0, 2) for n in ("bias", "weight")]
        assert (place / "config.json").is_file() and (place / "trainer_state.json").is_file()
    assert not list(folder.rglob("model*.safetensors"))


def test_a_checkpoint_that_was_not_finished_is_not_resumed(runs, tmp_path: Path, capsys) -> None:
    shutil.copytree(runs("projector") / "checkpoint-2", tmp_path / "projector" / "checkpoint-2")
    (tmp_path / "projector" / "checkpoint-2" / "complete.json").unlink()
    given = words(tmp_path, "projector", "--max_steps", "1")
    summary = train(given)
    assert summary["steps"] == 1 and len(losses(tmp_path / "projector")) == 1
    assert "checkpoint-2: incomplete" in capsys.readouterr().err
    # A run with other arguments is another run.
    assert main([*given, "--learning_rate", "0.5"]) == 1
    message = capsys.readouterr().err
    assert "cannot resume: learning_rate is 0.001 there, 0.5 in this run" in message


def test_a_step_is_the_mean_of_the_means_of_its_batches(tmp_path: Path) -> None:
    """Not the mean over all tokens, as in transformers: answers of other lengths would weigh more."""
    files = write_data(tmp_path / "data", "itii")
    still = [
        "--learning_rate",
        "0",
        "--train_sampling_strategy",
        "sequential",
        "--group_by_modality_length",
        "False",
    ]
    found = {}
    for steps in (1, 2):
        given = [
            *files,
            *still,
            "--per_device_train_batch_size",
            "2",
            "--output_dir",
            str(tmp_path / str(steps)),
        ]
        train(command(1, [*given, "--gradient_accumulation_steps", str(steps)])[2:])
        found[steps] = losses(tmp_path / str(steps))
    assert found[1][0] != pytest.approx(found[1][1], abs=1e-3)
    assert found[2] == pytest.approx([sum(found[1]) / 2], abs=1e-6)


@pytest.mark.parametrize("part", [[], LORA], ids=["full", "lora"])
def test_bf16_keeps_trained_weights_in_float32(tmp_path: Path, part: list[str]) -> None:
    """An update of 2e-5 on a bfloat16 weight of 0.02 is lost."""
    if part:
        pytest.importorskip("peft")
    files = write_data(tmp_path / "data", "ii")
    given = [*files, *part, "--bf16", "True", "--output_dir", str(tmp_path / "out")]
    model, _, _ = build_model(parse_arguments(command(1, given)[2:]))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32} and frozen <= {torch.bfloat16}
    assert not any("vision_tower" in name for name, _ in model.named_parameters())
    assert not hasattr(model, "hf_device_map")


@deepspeed
def test_a_deepspeed_file_that_replaces_our_optimizer_gets_a_warning(tmp_path: Path, capsys) -> None:
    files = write_data(tmp_path / "data", "ii")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}))
    from llava.train.arguments import _check_deepspeed

    _check_deepspeed(str(path))
    assert (
        "mine.json: the sections optimizer and scheduler replace --learning_rate" in capsys.readouterr().err
    )
    path.write_text("{")
    with pytest.raises(ValueError, match="mine.json: is not valid JSON"):
        _check_deepspeed(str(path))
    del files
