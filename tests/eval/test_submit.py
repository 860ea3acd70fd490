"""Submissions from the command line and from the converters that LLaVA's users call: the golden files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from openpyxl import load_workbook

from llava.eval.submit import main

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "benchmarks"


def submit(capsys, *command: str) -> tuple[int, dict | None, str]:
    code = main(list(map(str, command)))
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err


def convert(name: str, *arguments: str | Path, cwd: Path) -> None:
    """Run scripts/<name>.py as a user does, from another folder and without an installation."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "benchmark, answers, theirs",
    [
        ("vqav2", "vqav2/llava_answers_noisy.jsonl", "vqav2/results_noisy_llava_upload.json"),
        ("vizwiz", "vizwiz/llava_answers_noisy.jsonl", "vizwiz/answers_upload_noisy.json"),
        ("gqa", "gqa/llava_answers_mixed.jsonl", "gqa/testdev_balanced_predictions_mixed.json"),
        ("mmvet", "mmvet/llava_answers_toy.jsonl", "mmvet/results_toy.json"),
    ],
)
def test_json_submissions(benchmark, answers, theirs, tmp_path, capsys):
    output = tmp_path / "new" / "upload.json"
    code, document, _ = submit(
        capsys,
        "--benchmark",
        benchmark,
        "--data",
        GOLDEN / benchmark,
        "--answers",
        GOLDEN / answers,
        "--output",
        output,
    )
    expected = (GOLDEN / theirs).read_bytes()
    assert code == 0 and output.read_bytes() == expected.rstrip(b"\n")
    assert document["rows"] == len(json.loads(expected)) and document["output"] == str(output)


def test_default_output_is_next_to_the_answers(tmp_path, capsys):
    shutil.copy(GOLDEN / "mmbench" / "mmbench_dev_20230712" / "all_A.jsonl", tmp_path / "answers.jsonl")
    code, document, _ = submit(
        capsys,
        "--benchmark",
        "mmbench",
        "--data",
        GOLDEN / "mmbench",
        "--answers",
        tmp_path / "answers.jsonl",
    )
    assert code == 0 and document["output"] == str(tmp_path / "answers_submission.xlsx")
    assert load_workbook(document["output"]).active.max_row == 74


def test_answers_and_questions_are_not_overwritten(tmp_path, capsys):
    answers = shutil.copy(GOLDEN / "gqa" / "llava_answers_mixed.jsonl", tmp_path / "answers.jsonl")
    before = answers.read_bytes()
    command = ["--benchmark", "gqa", "--answers", answers, "--output"]
    assert "answers.jsonl: is read by this command" in submit(capsys, *command, answers)[2]
    assert "a folder, expected a file to write" in submit(capsys, *command, tmp_path)[2]
    mme = GOLDEN / "mme"
    command = [
        "--benchmark",
        "mme",
        "--data",
        mme,
        "--answers",
        mme / "answers" / "clean.jsonl",
        "--output",
    ]
    assert "answers.jsonl: a file, expected a folder" in submit(capsys, *command, answers)[2]
    assert answers.read_bytes() == before


def test_missing_servers_files_and_malformed_answers_are_errors(tmp_path, capsys):
    answers = GOLDEN / "textvqa" / "llava_answers_noisy.jsonl"
    assert "has no server" in submit(capsys, "--benchmark", "textvqa", "--answers", answers)[2]
    answers = GOLDEN / "vqav2" / "llava_answers_noisy.jsonl"
    assert "give --data" in submit(capsys, "--benchmark", "vqav2", "--answers", answers)[2]
    assert (
        "no such file"
        in submit(
            capsys, "--benchmark", "vqav2", "--answers", answers, "--questions", tmp_path / "gone.jsonl"
        )[2]
    )
    truncated = tmp_path / "truncated.jsonl"
    truncated.write_text(answers.read_text() + '{"question_id": 1, "te')
    command = ["--benchmark", "vqav2", "--data", GOLDEN / "vqav2", "--answers", truncated]
    assert "truncated.jsonl:73: not a JSON line" in submit(capsys, *command)[2]
    for option in ("--skip-invalid", "--skip-damaged"):
        code, document, _ = submit(capsys, *command, option)
        assert code == 0 and "1 malformed lines are left out" in document["warnings"][0]


def test_convert_vqav2(tmp_path):
    answers = tmp_path / "answers" / "test-dev" / "model" / "merge.jsonl"
    answers.parent.mkdir(parents=True)
    shutil.copy(GOLDEN / "vqav2" / "llava_answers_sampled.jsonl", answers)
    shutil.copy(GOLDEN / "vqav2" / "llava_vqav2_val.jsonl", tmp_path / "llava_vqav2_mscoco_test2015.jsonl")
    convert(
        "convert_vqav2_for_submission",
        "--dir",
        tmp_path,
        "--ckpt",
        "model",
        "--split",
        "test-dev",
        cwd=tmp_path,
    )
    made = json.loads((tmp_path / "answers_upload" / "test-dev" / "model.json").read_text())
    assert made == json.loads((GOLDEN / "vqav2" / "results_sampled_llava_upload.json").read_text())


def test_convert_vizwiz(tmp_path):
    convert(
        "convert_vizwiz_for_submission",
        "--annotation-file",
        GOLDEN / "vizwiz" / "llava_val.jsonl",
        "--result-file",
        GOLDEN / "vizwiz" / "llava_answers_majority.jsonl",
        "--result-upload-file",
        "upload.json",
        cwd=tmp_path,
    )
    theirs = (GOLDEN / "vizwiz" / "answers_upload_majority.json").read_text()
    assert json.loads((tmp_path / "upload.json").read_text()) == json.loads(theirs)


@pytest.mark.parametrize(
    "name, source, theirs",
    [
        (
            "convert_gqa_for_eval",
            "gqa/llava_answers_correct.jsonl",
            "gqa/testdev_balanced_predictions_correct.json",
        ),
        ("convert_mmvet_for_eval", "mmvet/llava_answers_toy.jsonl", "mmvet/results_toy.json"),
    ],
)
def test_convert_with_source_and_destination(name, source, theirs, tmp_path):
    convert(name, "--src", GOLDEN / source, "--dst", tmp_path / "to" / "made.json", cwd=tmp_path)
    made = json.loads((tmp_path / "to" / "made.json").read_text())
    assert made == json.loads((GOLDEN / theirs).read_text())


def test_convert_mmbench(tmp_path):
    for name in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003"):
        convert(
            "convert_mmbench_for_submission",
            "--annotation-file",
            GOLDEN / "mmbench" / f"{name}.tsv",
            "--result-dir",
            GOLDEN / "mmbench" / name,
            "--upload-dir",
            tmp_path / name,
            "--experiment",
            "letters_95",
            cwd=tmp_path,
        )
        ours = load_workbook(tmp_path / name / "letters_95.xlsx").active
        theirs = load_workbook(GOLDEN / "mmbench" / name / "letters_95_upload.xlsx").active
        assert list(ours.iter_rows(values_only=True)) == list(theirs.iter_rows(values_only=True))


def test_convert_mme(tmp_path):
    data = shutil.copytree(GOLDEN / "mme", tmp_path / "MME", ignore=shutil.ignore_patterns("eval_tool*"))
    convert("convert_answer_to_mme", "--experiment", "clean", cwd=data)
    theirs = GOLDEN / "mme" / "eval_tool_answers" / "clean"
    for path in theirs.iterdir():
        assert (data / "eval_tool" / "answers" / "clean" / path.name).read_bytes() == path.read_bytes()
