"""`python -m llava.eval.video`: answers made elsewhere, named or found by their setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.eval import video

DATA = Path(__file__).parents[1] / "data" / "benchmarks" / "video"
MSVD = DATA / "MSVD_Zero_Shot_QA"


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_named_file_is_scored(tmp_path, capsys):
    given = ["--benchmark", "msvd", "--data", str(DATA), "--output-dir", str(tmp_path)]
    assert video.main([*given, "--answers", str(MSVD / "merge.jsonl")]) == 0
    document = last(capsys)
    assert document["score"] == pytest.approx(100 * 10 / 24) and document["details"]["judged"] == 24
    assert "method" not in document  # nobody said how they were made
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
    (result,), warnings = read_results([tmp_path])
    card = result.card
    assert not warnings and card.score == document["score"] and card.model == "Video-LLaVA-7B"
    assert (card.method, card.tokens) == (folder.split("-")[0], None if folder == "none" else 227)


def test_no_answers_are_told_in_one_line(tmp_path, capsys):
    given = ["--benchmark", "tgif", "--tokens", "64", "--model", "ckpts/other-7b"]
    assert video.main([*given, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: TGIF-QA: no model here takes videos yet")
    assert f"{tmp_path}/tgif/other-7b/vispruner-r0.5-64 (answers.jsonl or merge.jsonl)" in said


def test_data_and_settings_are_checked(tmp_path, capsys):
    assert video.main(["--benchmark", "msvd", "--answers", str(MSVD / "merge.jsonl")]) == 1
    assert "give --data (DATA_DIR), the folder above GPT_Zero_Shot_QA" in capsys.readouterr().err
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
