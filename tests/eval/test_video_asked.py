"""The video sets, asked by a small Video-LLaVA of the original layout: scores, budgets, resumption, judge."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.answers import without_ids
from helpers.stub_judge import stub_judge
from helpers.video_llava import write_all
from llava.eval import run, sweep, video
from llava.eval.inference.engine import Engine
from llava.model.builder import load_pretrained_model
from llava.paths import BUNDLED_CLIPS

pytest.importorskip("av")
ROOT = Path(__file__).parents[2]
SET = Path("GPT_Zero_Shot_QA", "MSVD_Zero_Shot_QA")
CLIPS, EACH, TOKENS = 2, 6, 13
FAST = ["--max-new-tokens", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("model"))


def write_set(root: Path, clips: int = CLIPS, each: int = EACH) -> Path:
    """Write the first questions about the first bundled clips."""
    asked, answers = (
        json.loads((BUNDLED_CLIPS / SET / name).read_text()) for name in ("test_q.json", "test_a.json")
    )
    videos = list(dict.fromkeys(row["video_name"] for row in asked))[:clips]
    chosen = [row for name in videos for row in [one for one in asked if one["video_name"] == name][:each]]
    ids = {row["question_id"] for row in chosen}
    folder = root / SET
    (folder / "videos").mkdir(parents=True)
    (folder / "test_q.json").write_text(json.dumps(chosen))
    rows = [row for row in answers if row["question_id"] in ids]
    (folder / "test_a.json").write_text(json.dumps(rows[::-1]))  # joined by id, not by place
    for name in videos:
        shutil.copy(BUNDLED_CLIPS / SET / "videos" / f"{name}.mp4", folder / "videos")
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    return write_set(tmp_path / "data")


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ["--benchmark", "msvd", "--model", str(model), "--data", str(data), "--output", str(output)]
    return [*given, "--tokens", str(TOKENS), *FAST, *more]


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_set_is_asked_scored_and_resumed(model, data, tmp_path, capsys, monkeypatch):
    encoded, encode = [], Engine._encode_pixels
    count = lambda self, pixels, sizes: encoded.extend(map(len, pixels)) or encode(self, pixels, sizes)  # noqa: E731
    monkeypatch.setattr(Engine, "_encode_pixels", count)
    output = tmp_path / "out"
    assert video.main(command(model, data, output)) == 0
    document = last(capsys)
    assert document["score"] is None and document["answered"] == CLIPS * EACH
    assert "offline_exact_match" in document["details"] and document["details"]["judged"] == 0
    assert encoded == [3] * CLIPS  # the questions of a clip share its encoding
    rows = without_ids(output / "answers.jsonl")
    assert [row["question_id"] for row in rows] == [
        row["question_id"] for row in json.loads((data / SET / "test_q.json").read_text())
    ]
    assert {row["metadata"]["visual_tokens"] for row in rows} == {TOKENS}
    assert {row["metadata"]["clip_budget"] for row in rows} == {"total"}

    tokenizer, loaded, processor, _ = load_pretrained_model(str(model), device="cpu", visual_token_num=TOKENS)
    engine = Engine(loaded, tokenizer, processor, "llava_v1", clip_budget="total")
    from llava.conversation import conv_templates
    from llava.eval.benchmarks import get_benchmark
    from llava.mm_utils import tokenizer_image_token

    benchmark = get_benchmark("msvd")
    question = list(benchmark.questions(data / SET, []))[EACH]
    asked = conv_templates["llava_v1"].copy()
    asked.append_message(asked.roles[0], "<image>" * 8 + "\n" + question.text)
    asked.append_message(asked.roles[1], None)
    assert engine.prompt(question) == asked.get_prompt() and engine.prompt_ids(question).count(-200) == 1
    ids = torch.tensor([tokenizer_image_token(asked.get_prompt(), tokenizer)])
    loaded.set_pruner("vispruner", tokens=TOKENS, clip_budget="total")
    pixels = processor.preprocess_clip(benchmark.load_image(question.image))
    new = loaded.generate(ids, images=[pixels], max_new_tokens=3, do_sample=False)
    text = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    assert text == rows[EACH]["text"]

    (output / "answers.jsonl").write_text(
        "".join((output / "answers.jsonl").read_text().splitlines(True)[: EACH + 1])
    )
    encoded.clear()
    assert video.main(command(model, data, output)) == 0 and encoded == [3]
    assert without_ids(output / "answers.jsonl") == rows
    assert video.main(command(model, data, output, "--clip-budget", "clip")) == 1
    assert "clip_budget is 'total' in the file, 'clip' in this run" in capsys.readouterr().err
    assert run.main(command(model, data, tmp_path / "clip", "--clip-budget", "clip")) == 0
    whole = without_ids(tmp_path / "clip" / "answers.jsonl")
    assert {row["metadata"]["visual_tokens"] for row in whole} == {TOKENS}


def test_missing_videos_are_counted(model, data, tmp_path, capsys):
    (data / SET / "videos" / "tinyclip_0002.mp4").unlink()
    assert video.main(command(model, data, tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert f"1 of {CLIPS} videos are missing; {EACH} questions use them" in said.err
    assert (
        f"{EACH} questions were not answered" in said.err and "tinyclip_0002.mp4: no such video" in said.err
    )
    assert json.loads(said.out.splitlines()[-1])["answered"] == EACH
    shutil.rmtree(data / SET / "videos")
    assert video.main(command(model, data, tmp_path / "none")) == 1
    assert f"2 of 2 videos are missing; {CLIPS * EACH} questions use them" in capsys.readouterr().err


def test_the_judge_is_asked_and_the_answers_are_scored_again(model, data, tmp_path, capsys, monkeypatch):
    with stub_judge(lambda body: "{'pred': 'yes', 'score': 4}") as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        assert video.main(command(model, data, tmp_path / "out", "--judge", "a-judge")) == 0
        assert len(stub.asked) == CLIPS * EACH
    document = last(capsys)
    assert (document["score"], document["details"]["judge"]) == (100, "a-judge")
    assert json.loads((tmp_path / "out" / "score.json").read_text())["score"] == 100


def test_models_get_only_what_they_take(model, data, tmp_path, capsys):
    image_model = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
    for main, name in ((video.main, "--benchmark"), (run.main, "--benchmark"), (sweep.main, "--benchmarks")):
        given = [name, "msvd", "--model", str(image_model), "--data", str(data), "--tokens", "4"]
        assert main([*given, "--output", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert "MSVD-QA: asks about videos" in said and "takes images only" in said
    only_videos = write_all(tmp_path, mm_image_tower=...)
    assert run.main(["--benchmark", "pope", "--model", str(only_videos), "--tokens", "4"]) == 1
    assert "POPE: asks about images" in capsys.readouterr().err


def test_a_missing_decoder_is_told_before_the_model_is_loaded(model, data, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else found(name))
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert video.main(command(model, data, tmp_path / "out")) == 1
    assert "Run: pip install 'vispruner[video]'" in capsys.readouterr().err


def test_options_of_run_are_passed_on_or_refused(model, data, tmp_path, capsys):
    given = command(model, data, tmp_path / "out", "--limit", "1")
    assert video.main(given) == 0 and last(capsys)["limit"] == 1
    answers = tmp_path / "merge.jsonl"
    answers.write_text('{"id": "v_tinyclip_0001_0", "pred": "no"}\n')
    with pytest.raises(SystemExit):
        video.main([*given, "--answers", str(answers)])
    assert "--limit 1: not used to score" in capsys.readouterr().err.replace(
        "--max-new-tokens 3 ", ""
    ).replace("--batch-size 4 ", "")


def test_killed_in_the_middle_and_started_again(model, tmp_path):
    data = write_set(tmp_path / "data", clips=6, each=8)
    arguments = command(model, data, tmp_path / "cut")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    answers = tmp_path / "cut" / "answers.jsonl"
    for _ in range(3):  # a busy machine may let the run finish before we look
        shutil.rmtree(answers.parent, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "llava.eval.video", *arguments], env=environment, stdout=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                if answers.exists() and answers.read_bytes().count(b"\n") >= 8:
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        if process.returncode == -signal.SIGKILL:
            break
    left = answers.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 8 <= left < 6 * 8
    answers.write_bytes(answers.read_bytes()[:-25])  # as if it had been killed within a write
    assert video.main(arguments) == 0
    assert video.main(command(model, data, tmp_path / "straight")) == 0
    assert without_ids(answers) == without_ids(tmp_path / "straight" / "answers.jsonl")
