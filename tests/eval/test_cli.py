"""Checkpoint folders of the command line: accepted and refused by the loader's own rule."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import torch

from helpers.checkpoints import SOURCE, load, weights, write
from helpers.golden_model import DATA
from helpers.synthetic_pope import make_pope
from llava.eval import cli, run
from llava.model.checkpoint import CheckpointError


@pytest.fixture
def folders(tmp_path):
    """A complete LLaVA, and a LoRA folder of the middle of a run: no config.json, no trainables."""
    base = write(tmp_path / "base")
    lora = tmp_path / "lora" / "checkpoint-1000"
    lora.mkdir(parents=True)
    name = "model.layers.{}.self_attn.q_proj"
    pairs = {}
    for layer in range(3):
        pairs[f"base_model.model.{name.format(layer)}.lora_A.weight"] = torch.full((4, 64), 0.01)
        pairs[f"base_model.model.{name.format(layer)}.lora_B.weight"] = torch.full((64, 4), 0.01)
    torch.save(pairs, lora / "adapter_model.bin")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    return base, lora


def model_folder(model, base=None):
    args = argparse.Namespace(model=str(model), model_base=None if base is None else str(base))
    return cli.model_folder(args, argparse.ArgumentParser())


def test_the_same_folders_as_the_loader(folders, tmp_path, capsys):
    base, lora = folders
    projector = tmp_path / "projector"
    projector.mkdir()
    torch.save({k: v for k, v in weights(SOURCE).items() if "projector" in k}, projector / "mm_projector.bin")
    for given in ((base,), (lora, base), (projector, base)):
        assert model_folder(*given) == given[0]
        load(given[0], *map(str, given[1:]))
    wrong = write(tmp_path / "wrong", config={"image_aspect_ratio": "highres"})
    empty = tmp_path / "empty"
    empty.mkdir()
    sampling = write(tmp_path / "sampling")
    (sampling / "generation_config.json").write_text('{"top_p": "0.6"}')
    for given in ((lora,), (projector,), (base, lora), (wrong,), (empty,), (sampling,)):
        with pytest.raises(SystemExit):
            model_folder(*given)
        said = capsys.readouterr().err
        with pytest.raises(CheckpointError) as caught:
            load(given[0], *map(str, given[1:]))
        assert str(caught.value) in said.replace("\n", " ")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "a/b/c", "~/nowhere-at-all", "owner/"])
def test_names_that_are_nothing(folders, tmp_path, name, capsys):
    for given, option in (((name,), "--model"), ((folders[0], name), "--model-base")):
        with pytest.raises(SystemExit):
            model_folder(*given)
        assert f"{option} {name}: no such folder" in capsys.readouterr().err
    assert model_folder("owner/name") == "owner/name"
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for given, said in ((folders[0] / "config.json", "a file, not"), (loop, "a link that"), ("", "no such")):
        with pytest.raises(SystemExit):
            model_folder(given)
        assert said in capsys.readouterr().err


def test_what_the_loader_noted_is_in_the_metadata(folders, tmp_path, recwarn):
    """An adapter without its projector: the warning reaches the user and every answer."""
    base, lora = folders
    data = make_pope(tmp_path / "pope", pictures=2, per_category=2)
    shutil.copytree(DATA / "ckpt_clip336p42", base / "ckpt_clip336p42")
    out = tmp_path / "out"
    given = ["--benchmark", "pope", "--data", str(data), "--output", str(out), "--model", str(lora)]
    given += ["--model-base", str(base), "--tokens", "8", "--max-new-tokens", "2", "--device", "cpu"]
    assert run.main(given) == 0
    assert any("non_lora_trainables.bin" in str(one.message) for one in recwarn)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert lines and all("non_lora_trainables.bin" in line["metadata"]["notes"][0] for line in lines)
    # the notes are not part of the configuration: the run resumes
    (out / "answers.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert run.main(given) == 0
    assert len((out / "answers.jsonl").read_text().splitlines()) == len(lines)
