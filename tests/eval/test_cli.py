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
from llava.eval import cli, model_vqa_loader, run, run_llava, sweep
from llava.eval.jobs import session
from llava.eval.jobs.job import Task
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import stored_config
from llava.pruning import get_pruner


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


QUESTIONS = ["--question-file", "none.jsonl", "--answers-file", "a.jsonl"]
COMMANDS = {
    "run": (run, ["--benchmark", "pope", "--model"]),
    "sweep": (sweep, ["--model"]),
    "model_vqa_loader": (model_vqa_loader, [*QUESTIONS, "--model-path"]),
    "run_llava": (run_llava, ["--image-file", "a.png", "--query", "?", "--model-path"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_graphs_and_compiled_layers_of_every_command(name, folders, tmp_path, monkeypatch):
    """What is asked for reaches the loader, and the metadata."""
    module, given = COMMANDS[name]
    parser = module.build_parser()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = stored_config(folders[0])
    for options, graphs, compiled in (
        ([], True, False),
        (["--no-graphs"], False, False),
        (["--compile"], True, True),
        (["--compile", "--no-graphs"], False, True),
    ):
        args = parser.parse_args([*given, str(folders[0]), "--device", "cuda", *options])
        job = cli.job_of(args, folders[0], config, None)
        assert (job.graphs, job.compile) == (graphs, compiled)
        metadata = job.configuration(Task(()), get_pruner("none")).metadata()
        assert metadata.get("graphs", False) is graphs and metadata.get("compile", False) is compiled
        assert set(cli.command_of(parser, args)) & {"--no-graphs", "--compile"} == {*options}
        asked: dict = {}

        def load_nothing(*_, asked=asked, **more):
            asked.update(more)
            return None, None, None, 0

        monkeypatch.setattr("llava.model.builder.load_pretrained_model", load_nothing)
        session.load_model(job)
        assert (asked["graphs"], asked["compile"]) == (graphs, compiled)
    args = parser.parse_args([*given, str(folders[0]), "--device", "cpu"])
    job = cli.job_of(args, folders[0], config, None)
    metadata = job.configuration(Task(()), get_pruner("none")).metadata()
    assert not job.graphs and not {"graphs", "compile"} & metadata.keys()
    args.compile = True
    with pytest.raises(ValueError, match="compile: the device is cpu"):
        cli.job_of(args, folders[0], config, None)
    monkeypatch.setenv("VISPRUNER_GRAPHS", "off")
    args.compile = False
    with pytest.raises(ValueError, match="VISPRUNER_GRAPHS: 'off'"):
        cli.job_of(args, folders[0], config, None)
    args.graphs = False  # overrides the variable, which may be invalid then
    assert cli.job_of(args, folders[0], config, None).graphs is False
