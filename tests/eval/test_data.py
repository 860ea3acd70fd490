"""`python -m llava.eval.data check`: present, missing and mismatched data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.synthetic_pope import make_pope
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.data import main

GOLDEN = Path(__file__).parents[1] / "data" / "benchmarks"
PAPER = {
    "vqav2",
    "gqa",
    "vizwiz",
    "scienceqa",
    "textvqa",
    "pope",
    "mme",
    "mmbench",
    "mmbench_cn",
    "mmvet",
    "tgif",
    "msvd",
    "msrvtt",
    "activitynet",
}


def check(capsys, *arguments: str) -> tuple[int, str, dict]:
    code = main(["check", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])["benchmarks"]


def test_every_benchmark_of_the_paper_says_what_it_needs():
    assert PAPER <= set(list_benchmarks())
    for name in list_benchmarks():
        benchmark = get_benchmark(name)
        assert benchmark.name == name and benchmark.files and benchmark.sizes
        assert all(file.source and file.what for file in benchmark.files)
        assert benchmark.max_new_tokens == (
            1024 if name[:2] in ("mm", "sc", "tg", "ms", "ac") and name != "mme" else 128
        )
    assert [benchmark_name(text) for text in ("SQA", "mm-vet", "MMBench-CN", "pope", "what")] == [
        "scienceqa",
        "mmvet",
        "mmbench_cn",
        "pope",
        "what",
    ]


def test_an_empty_folder(tmp_path, capsys):
    code, text, found = check(capsys, "all", "--data", tmp_path)
    assert code == 0 and {report["status"] for report in found.values()} == {"absent"}
    assert set(found) == set(list_benchmarks())
    assert "missing: TextVQA_0.5.1_val.json (reference answers, for scoring); from TextVQA 0.5.1" in text
    assert check(capsys, "pope", "--data", tmp_path)[0] == 1
    assert main(["check", "all", "--data", str(tmp_path / "gone")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_golden_folders(tmp_path, capsys):
    for name, folder in (("mme", "MME"), ("mmbench", "mmbench"), ("gqa", "gqa"), ("mmvet", "mm-vet")):
        shutil.copytree(GOLDEN / name, tmp_path / folder)
    shutil.copytree(GOLDEN / "video", tmp_path / "GPT_Zero_Shot_QA")
    code, text, found = check(capsys, "all", "--data", tmp_path)
    assert code == 1 and found["textvqa"]["status"] == "absent"
    assert found["mmbench"] == {**found["mmbench"], "status": "complete", "questions": 73, "missing": []}
    assert found["mmbench_cn"]["status"] == "complete" and found["mmbench_cn"]["images"] == 1
    assert [file["file"] for file in found["gqa"]["missing"]] == ["data/images"]
    assert "Put the images into" in found["gqa"]["warnings"][0]
    assert found["msvd"]["status"] == "incomplete" and found["tgif"]["status"] == "absent"
    assert "73 questions about 1 images (not a full release: dev 20230712 has 4,377" in text


def test_a_complete_set_and_a_broken_one(tmp_path, capsys, monkeypatch):
    data = make_pope(tmp_path / "pope")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    code, text, found = check(capsys, "pope")
    assert code == 0 and found["pope"]["status"] == "complete" and found["pope"]["images"] == 4
    path = data / "llava_pope_test.jsonl"
    path.write_text(path.read_text() + "{\n")
    (data / "coco" / "coco_pope_popular.json").write_text("")
    code, text, found = check(capsys, "pope")
    assert code == 1 and "1 malformed lines" in text and "popular" in text


def test_folders_are_found_under_their_names(tmp_path):
    shutil.copytree(GOLDEN / "mme", tmp_path / "MME", ignore=shutil.ignore_patterns("eval_tool*", "answers"))
    mme = get_benchmark("mme")
    for given in (tmp_path, tmp_path / "MME", tmp_path / "mme"):
        assert mme.locate(given).samefile(tmp_path / "MME")
    with pytest.raises(DataError, match="no such folder"):
        get_benchmark("gqa").locate(tmp_path / "gqa")


def test_a_closed_pipe_is_not_an_error():
    code = "import sys, llava.eval.data as module; sys.exit(module.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "check", "all"],
        cwd=GOLDEN.parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()
