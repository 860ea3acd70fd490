"""Stages run on every kind of model: the crops of LLaVA-NeXT and the frames of Video-LLaVA."""

from dataclasses import replace

import pytest

from helpers.efficiency import run
from helpers.golden_model import DATA
from llava.analysis.efficiency.__main__ import build_parser
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS
from llava.analysis.efficiency.stages import PipelineStages, load_model


@pytest.mark.parametrize(
    "name, full, budget, kept", [("llava-next-7b", 2880, 32, 160), ("video-llava-7b", 2048, 14, 112)]
)
def test_crops_and_frames_are_counted(name, full, budget, kept, monkeypatch):
    tiny, published = DUMMY_MODELS["tiny"], DUMMY_MODELS[name]
    small = replace(
        published,
        language={**tiny.language, "num_hidden_layers": 1},
        tower={**tiny.tower, "num_hidden_layers": 2, "image_size": published.tower["image_size"]},
    )
    monkeypatch.setitem(DUMMY_MODELS, "small", small)
    options = f"--dummy-model small --device cpu --tokens none,{budget} --repeats 1 --warmup 0 --new-tokens 1"
    args = build_parser("whole").parse_args([*options.split(), "--vs", "baseline"])
    rows = PipelineStages.prepare(load_model(args), args).measure(args)
    assert [row["visual_tokens"] for row in rows] == [full, kept]
    assert rows[1]["flops"]["vision_tower"] == rows[0]["flops"]["vision_tower"]
    assert rows[1]["flops"]["selection"] > 0 == rows[0]["flops"]["selection"]
    assert all(row["speedup"] > 0 for row in rows)


def test_a_checkpoint_is_measured(capsys):
    model = DATA / "ckpt_llava16s"
    command = f"--model {model} --device cpu --tokens 8 --repeats 1 --warmup 0 --new-tokens 1 --anyres llava"
    _, document = run(capsys, command)
    assert (document["weights"], document["crops"], document["anyres"]) == ("loaded", 5, "llava")
    assert document["rows"][0]["visual_tokens"] > 0 and "speedup" not in document
