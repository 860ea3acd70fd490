"""Models of transformers in `llava.eval.run` and `llava.eval.native`: answers, resumption, refusals,
tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llava
from helpers.answers import without_ids
from helpers.loaded import share_models
from helpers.synthetic_pope import make_pope
from llava.eval import native, run, status
from llava.eval.benchmarks import get_benchmark
from llava.eval.inference.host_engine import load_host
from llava.eval.jobs.host import host_class, host_pruning
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.tables.native import native_tables, published_natives
from llava.integrations.inputs import host_inputs
from llava.integrations.tiny_folder import write_tiny_host

CLASSES = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "internvl": "InternVLForConditionalGeneration"}
OURS = Path(__file__).parents[1] / "data" / "model" / "ckpt_llava15s"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_host(name, folder / name) for name in CLASSES}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=3, per_category=2)


@pytest.fixture(scope="module", autouse=True)
def jobs():
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    command = ["--benchmark", "pope", "--model", str(model), "--data", str(data), "--output", str(output)]
    return [*command, "--max-new-tokens", "3", "--batch-size", "4", *more]


@torch.inference_mode()
def by_hand(model: Path, name: str, data: Path, **budget) -> list[tuple[str, int]]:
    """Ask the questions one by one, without the engine; return texts and numbers of visual tokens."""
    vlm, tokenizer, processor = load_host(str(model), CLASSES[name], "cpu", "float32", "sdpa")
    benchmark, found = get_benchmark("pope"), []
    opening = "<IMG_CONTEXT>\n" if name == "internvl" else "<|vision_start|><|image_pad|><|vision_end|>"
    for question in benchmark.questions(data, []):
        prompt = f"{opening}User: {question.text}\nAnswer: "
        inputs = host_inputs(processor, prompt, [benchmark.load_image(question.image)])
        placeholders = int((inputs["input_ids"] == vlm.config.image_token_id).sum())
        if budget:
            with llava.pruned(vlm, **budget) as pruning:
                out = vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
            placeholders = sum(len(row.kept) for row in pruning.last.rows)
        else:
            out = vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append((tokenizer.decode(new, skip_special_tokens=True).strip(), placeholders))
    return found


def answers(output: Path) -> list[tuple[str, int]]:
    rows = without_ids(output / "answers.jsonl")
    return [(row["text"], row["metadata"]["visual_tokens"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "flags", "budget"),
    [("qwen3_vl", ["--keep", "0.33"], {"keep": 0.33}), ("internvl", [], {})],
)
def test_answers_are_those_of_generate(models, data, tmp_path, name, flags, budget):
    assert run.main(arguments(models[name], data, tmp_path, *flags)) == 0
    assert answers(tmp_path) == by_hand(models[name], name, data, **budget)
    assert len({text for text, _ in answers(tmp_path)}) > 1
    rows = without_ids(tmp_path / "answers.jsonl")
    of = rows[0]["metadata"]
    assert (of["conv_mode"], of["method"]) == ("chat template", "vispruner" if budget else "none")
    assert of.get("keep") == budget.get("keep") and of["tokens"] == budget.get("tokens")
    card = Scorecard.read(tmp_path / "score.json")
    assert card.keep == budget.get("keep") and card.llm_gflops > 0
    # stopped in the middle, and run again
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert run.main(arguments(models[name], data, tmp_path, *flags)) == 0
    assert without_ids(tmp_path / "answers.jsonl") == rows


def test_what_these_models_do_not_have_is_refused(models, data, tmp_path, capsys, jobs):
    before = len(jobs)
    for flags, message in (
        (["--keep", "0.5", "--tokens", "3"], "--tokens 3 is given as well"),
        (["--keep", "0"], "above 0"),
        (["--method", "fastv", "--tokens", "3"], "prunes inside the language model"),
        (["--method", "none", "--keep", "0.5"], "method none keeps all"),
        (["--conv-mode", "vicuna_v1"], "--conv-mode: not for Qwen3VL"),
        (["--server", "http://127.0.0.1:9"], "--server: not for Qwen3VL"),
        (["--preset", "published"], "--preset: not for Qwen3VL"),
    ):
        with pytest.raises(SystemExit):
            run.main(arguments(models["qwen3_vl"], data, tmp_path, *flags))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(arguments(OURS, data, tmp_path, "--keep", "0.5"))
    assert "only for models of transformers" in capsys.readouterr().err
    assert len(jobs) == before
    with pytest.raises(ValueError, match="pruned with seed 0"):
        host_pruning("random", 4, seed=1)


def test_questions_that_cannot_be_asked_are_skipped(models, data, tmp_path, capsys):
    folder = make_pope(tmp_path / "pope", pictures=3, per_category=2)
    file = folder / "llava_pope_test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["text"] = "<|image_pad|> What?"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = next((folder / "val2014").iterdir())
    broken.write_bytes(b"no image")
    lost = {1} | {place for place, line in enumerate(lines) if line["image"] == broken.name}
    assert run.main(arguments(models["qwen3_vl"], folder, tmp_path / "out", "--tokens", "4")) == 1
    error = capsys.readouterr().err
    assert "2 placeholders" in error and broken.name in error
    assert len(answers(tmp_path / "out")) == 6 - len(lost)


def test_classes_are_told_apart(models, tmp_path):
    assert {name: host_class(folder) for name, folder in models.items()} == CLASSES
    assert host_class(OURS) is None and host_class(tmp_path) is None
    for entries, expected in (
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}, None),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "qwen2"}},
            "Llava",
        ),
        ({"architectures": "Qwen3VLForConditionalGeneration"}, None),
        ({"architectures": []}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(entries))
        assert (host_class(tmp_path) or "None").startswith(str(expected))


def test_a_rehearsal_runs_and_resumes(data, tmp_path, capsys):
    command = ["--host", "Qwen3-VL", "--benchmarks", "pope", "--data", str(data), "--output", str(tmp_path)]
    command += ["--settings", "all,50%,8", "--max-new-tokens", "2", "--limit", "3"]
    assert native.main(command) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    assert out[0].startswith(native.REHEARSED) and document["rehearsal"]
    assert [one["setting"] for one in document["scores"]] == [
        "none",
        "vispruner-r0.5-keep=0.5",
        "vispruner-r0.5-8",
    ]
    written = (tmp_path / "tiny-qwen3_vl" / "native.md").read_text()
    assert native.REHEARSED in written and "second hand" in written and "42.6" in written
    file = tmp_path / "tiny-qwen3_vl" / "pope" / "vispruner-r0.5-8" / "answers.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    (found,) = [one for one in status.find_runs(tmp_path) if one[0] == file.parent]
    resume = status.state_of(*found).command.replace("'", "")
    # as it was given, so that it is a rehearsal again
    assert "--settings all,50%,8" in resume and f"--output {tmp_path}" in resume and "--model" not in resume
    assert native.main(command) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["scores"] == document["scores"]
    with pytest.raises(SystemExit):
        native.main([*command, "--model", str(OURS)])
    assert "expected a checkpoint of Qwen3VLForConditionalGeneration" in capsys.readouterr().err
    for settings in ("33", "0%", "x", "101%"):
        if settings != "33":
            with pytest.raises(SystemExit):
                native.main([*command, "--settings", settings])


def test_text_reading_benchmarks_have_columns_of_their_own():
    def card(name: str, score: float, tokens: int | None, details: dict | None = None) -> Scorecard:
        method = "none" if tokens is None else "vispruner"
        ratio = None if tokens is None else 0.5
        return Scorecard(
            name, score, details or {}, "m", method, tokens, ratio, visual_tokens=float(tokens or 900)
        )

    ocr = {"perception": {"subtasks": {"OCR": 100.0, "color": 50.0}}}
    cards = [card("pope", 80.0, None), card("textvqa", 50.0, None), card("mme", 1000.0, None, ocr)]
    half = {"perception": {"subtasks": {"OCR": 25.0}}}
    cards += [card("pope", 78.0, 64), card("textvqa", 25.0, 64), card("mme", 900.0, 64, half)]
    measured, published = native_tables("m", "qwen3_vl", cards)
    head = list(measured.header)
    assert head == ["setting", "visual tokens", "POPE", "MME", "Rel.", "TextVQA", "MME OCR", "Rel. text"]
    rows = [[cell.text for cell in row.cells] for row in measured.rows]
    assert rows[0] == ["all tokens", "900.0", "80.0", "1000.0", "100.0", "50.0", "100.0", "100.0"]
    assert rows[1] == ["vispruner 64", "64.0", "78.0", "900.0", "93.8", "25.0", "25.0", "37.5"]
    beside = {row.cells[1].text: [cell.text for cell in row.cells] for row in published.rows}
    assert beside["64"] == ["vispruner", "64", "85.1", "78.0", "42.6", "25.0", "88.1", "900.0"]
    assert beside["32"][3] == "" or beside["32"][3] == "-"


def test_published_rows_are_whole():
    assert published_natives("qwen2_5_vl") == []
    for host in ("qwen3_vl", "internvl"):
        (table,) = published_natives(host)
        assert table["rows"][0]["method"] == "none" and table["rows"][0]["tokens"] is None
        assert all(
            len(row["values"]) == len(table["columns"]) == len(table["rules"]) for row in table["rows"]
        )
        falls = [row["values"][table["columns"].index("textvqa")] for row in table["rows"]]
        assert falls == sorted(falls, reverse=True)
