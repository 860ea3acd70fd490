"""`python -m llava.eval.video`: answers of other programs, named or found by their setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.eval import video
from llava.eval.metrics.scorecard import Scorecard

DATA = Path(__file__).parents[1] / "data" / "benchmarks" / "video"
MSVD = DATA / "MSVD_Zero_Shot_QA"


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_named_file_is_scored(tmp_path, capsys):
    given = ["--benchmark", "msvd", "--data", str(DATA), "--output-dir", str(tmp_path)]
    assert video.main([*given, "--answers", str(MSVD / "merge.jsonl")]) == 0
    document = last(capsys)
    assert document["score"] == pytest.approx(100 * 10 / 24) and document["details"]["judged"] == 24
    assert "method" not in document  # their setting is unknown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["--tokens", "227", "--ratio", "0.5"], "vispruner-r0.5-227"),
        ([], "none"),
        (["--tokens", "227", "--method", "fastervlm"], "fastervlm-227"),
        (["--tokens", "full"], "none"),
    ],
)
def test_answers_are_found_by_their_setting_and_the_tables_can_read_them(tmp_path, capsys, given, folder):
    from llava.eval.tables.collect import read_results

    place = tmp_path / "msvd" / "Video-LLaVA-7B" / folder
    place.mkdir(parents=True)
    for name in ("merge.jsonl", "judge_replies.json"):
        shutil.copy(MSVD / name, place)
    there = ["--benchmark", "msvd", "--data", str(DATA), "--output-dir", str(tmp_path)]
    assert video.main([*there, *given]) == 0
    document = last(capsys)
    card = Scorecard.read(place / "score.json")
    assert (card.answered, card.answers_file) == (24, document["answers"]) and card.setting == folder
    (result,), warnings = read_results([tmp_path])
    card = result.card
    assert not warnings and card.score == document["score"] and card.model == "Video-LLaVA-7B"
    assert (card.method, card.tokens) == (folder.split("-")[0], None if folder == "none" else 227)


def test_without_answers_the_model_is_asked(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("llava.eval.run.main", lambda argv: asked.append(argv) or 0)
    given = ["--benchmark", "tgif", "--tokens", "64", "--output-dir", str(tmp_path)]
    assert video.main([*given, "--model", "ckpts/other-7b", "--limit", "3"]) == 0
    assert video.main(["--benchmark", "tgif", "--output", str(tmp_path)]) == 0
    place = f"--output={tmp_path}/tgif/other-7b/vispruner-r0.5-64"
    rest = ["--method", "vispruner", "--ratio", "0.5", "--model=ckpts/other-7b", "--limit", "3"]
    assert asked == [
        ["--benchmark", "tgif", place, "--tokens", "64", *rest],
        ["--benchmark", "tgif", f"--output={tmp_path}", "--tokens", "none"],
    ]


@pytest.mark.parametrize("line", ["", '{"question_id": "x", "promp', '{"metadata": {"config": "0"}}\n'])
def test_answers_of_a_run_are_resumed_not_scored(tmp_path, monkeypatch, line):
    place = tmp_path / "tgif" / "Video-LLaVA-7B" / "vispruner-r0.5-64"
    place.mkdir(parents=True)
    (place / "answers.jsonl").write_text(line)
    monkeypatch.setattr("llava.eval.run.main", lambda argv: 7)
    assert video.main(["--benchmark", "tgif", "--tokens", "64", "--output-dir", str(tmp_path)]) == 7


def test_data_and_settings_are_checked(tmp_path, capsys):
    assert video.main(["--benchmark", "msvd", "--answers", str(MSVD / "merge.jsonl")]) == 1
    assert "Set --data (DATA_DIR) to the folder above GPT_Zero_Shot_QA" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        video.main(["--benchmark", "msvd", "--tokens", "64", "--method", "nosuch"])
    assert "nosuch" in capsys.readouterr().err


def test_a_judge_is_asked_with_what_is_given(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("llava.eval.judge.main", lambda argv: asked.append(argv) or 3)
    answers = str(MSVD / "merge.jsonl")
    given = ["--benchmark", "msvd", "--data", str(DATA), "--answers", answers, "--judge", "a-model"]
    assert video.main(given) == 3  # what the judge ends with
    assert asked == [["--benchmark", "msvd", "--data", str(MSVD), "--answers", answers, "--model", "a-model"]]
