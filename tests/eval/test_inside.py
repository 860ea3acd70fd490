"""Runs and sweeps with methods that prune inside the language model: answers, counts, cost, early errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.answers import without_ids
from helpers.loaded import share_models
from helpers.synthetic_pope import make_pope
from llava.eval import run, sweep
from llava.eval.metrics.scorecard import Scorecard
from llava.model.flops import LanguageShape, llm_prefill_macs
from llava.pruning import get_pruner

MODEL = Path(__file__).parents[1] / "data" / "model" / "ckpt_llava15s"
METHODS = "fastv,sparsevlm,pyramiddrop"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=3, per_category=6)


@pytest.fixture(scope="module", autouse=True)
def jobs():
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


def given(data: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "4", "--batch-size", "8", "--model", str(MODEL), "--data", str(data)]
    return [*fixed, "--output", str(output), *more]


@pytest.fixture(scope="module")
def swept(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sweep")
    argv = ["--benchmarks", "pope", "--methods", METHODS, "--tokens", "16", "--bootstrap-iters", "100"]
    assert sweep.main(given(data, output, *argv)) == 0
    return output / "pope"


@pytest.mark.parametrize("method", METHODS.split(","))
def test_score_cards_have_the_entering_mean_and_its_flops(swept, method):
    depth = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    layers = get_pruner(method, 16).visual_per_layer(depth, 64)
    card = Scorecard.read(swept / f"{method}-16" / "score.json")
    assert card.visual_tokens == pytest.approx(sum(layers) / depth) and 16 < card.visual_tokens < 64
    assert card.prefill["visual_per_layer"] == layers
    shape = LanguageShape(*card.prefill["shape"])
    macs = llm_prefill_macs([round(card.prefill["text_tokens"] + one) for one in layers], shape)
    assert card.llm_gflops == 2 * macs / 1e9
    rows = [json.loads(line) for line in (swept / f"{method}-16" / "answers.jsonl").read_text().splitlines()]
    assert {row["metadata"]["visual_tokens"] for row in rows} == {sum(layers) / depth}
    assert {row["metadata"]["method"] for row in rows} == {method}


@pytest.mark.parametrize("method", METHODS.split(","))
def test_a_run_gives_the_answers_of_the_sweep(swept, data, tmp_path, method, capsys):
    argv = ["--benchmark", "pope", "--method", method, "--tokens", "16", "--no-share-prefix"]
    assert run.main(given(data, tmp_path, *argv)) == 0
    texts = [row["text"] for row in without_ids(tmp_path / "answers.jsonl")]
    assert texts == [row["text"] for row in without_ids(swept / f"{method}-16" / "answers.jsonl")]
    card = Scorecard.read(tmp_path / "score.json")
    assert card.llm_gflops == Scorecard.read(swept / f"{method}-16" / "score.json").llm_gflops
    assert run.main(given(data, tmp_path, *argv)) == 0  # resumes a finished run
    assert Scorecard.read(tmp_path / "score.json").llm_gflops == card.llm_gflops


def test_methods_change_answers(swept):
    said = {tuple(row["text"] for row in without_ids(path)) for path in swept.glob("*/answers.jsonl")}
    assert len(said) > 1


@pytest.mark.parametrize(
    "more, says",
    [
        (("--method", "pyramiddrop", "--tokens", "4"), "cannot have a mean of 4 of 64 visual tokens"),
        (("--method", "fastv", "--tokens", "8", "--num_beams", "2"), "only greedy decoding is supported"),
        (("--method", "fastv", "--tokens", "8", "--temperature", "1"), "got temperature 1 and 1 beams"),
    ],
)
def test_what_cannot_be_done_is_refused_before_loading(data, tmp_path, capsys, jobs, more, says):
    loads = len(jobs)
    assert run.main(given(data, tmp_path / "out", "--benchmark", "pope", *more)) == 1
    assert says in capsys.readouterr().err and len(jobs) == loads


def test_a_setting_of_a_sweep_that_cannot_be_had_stops_no_other(data, tmp_path, capsys):
    argv = ["--benchmarks", "pope", "--methods", "pyramiddrop,fastv,cdpruner", "--tokens", "4"]
    assert sweep.main(given(data, tmp_path, *argv, "--bootstrap-iters", "100")) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert [cell["setting"] for cell in document["tables"][0]["cells"]] == ["fastv-4"]
    assert not document["failures"] and "'pyramiddrop' cannot" in document["unavailable"]["pyramiddrop-4"]
    assert "Download the whole CLIP" in document["unavailable"]["cdpruner-4"]
    assert line.startswith("cdpruner-4: not available: ")


def test_run_llava_prunes_inside(monkeypatch):
    from llava.eval import run_llava
    from llava.model import decode, inside

    kept = []
    prefill = inside.prefill

    def watch(*arguments, **more):
        kept.append(prefill(*arguments, **more))
        return kept[-1]

    monkeypatch.setattr(decode, "prefill", watch)
    monkeypatch.setenv("VISPRUNER_METHOD", "fastv")
    image = next((Path(__file__).parents[2] / "playground" / "tiny").rglob("*.jpg"))
    args = type("args", (), {})()
    fixed = {"model_path": str(MODEL), "model_base": None, "model_name": None, "conv_mode": None, "sep": ","}
    fixed |= {"query": "What is it?", "image_file": str(image), "temperature": 0, "top_p": None}
    for name, value in {**fixed, "num_beams": 1, "max_new_tokens": 4, "visual_token_num": 16}.items():
        setattr(args, name, value)
    run_llava.eval_model(args)
    assert [len(one.ids) for one in kept[0].reductions[0]] == [16]
