"""Reading files: ground truth is parsed once per version of its files, and shared read-only."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from llava.eval.benchmarks import get_benchmark
from llava.eval.benchmarks.files import parse_once, read_json

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks"
SETS = {
    "pope": ("pope", "llava_answers_clean.jsonl", "llava_answers_phrases.jsonl"),
    "gqa": ("gqa", "llava_answers_correct.jsonl", "llava_answers_mixed.jsonl"),
    "textvqa": ("textvqa", "llava_answers_majority.jsonl", "llava_answers_sampled.jsonl"),
    "vqav2": ("vqav2", "llava_answers_majority.jsonl", "llava_answers_noisy.jsonl"),
    "vizwiz": ("vizwiz", "llava_answers_majority.jsonl", "llava_answers_noisy.jsonl"),
    "scienceqa": ("scienceqa", "llava_answers_letters_full.jsonl", "llava_answers_letter_text_full.jsonl"),
    "mme": ("mme", "answers/clean.jsonl", "answers/correct_phrases.jsonl"),
    "mmbench": ("mmbench", "mmbench_dev_20230712/all_A.jsonl", "mmbench_dev_20230712/formats.jsonl"),
    "mmvet": ("mmvet", "toy_gpt-4-0613-grade-1runs.json", "toy_gpt-4-0613-grade-5runs.json"),
    "msvd": ("video/MSVD_Zero_Shot_QA", "merge.jsonl", "judge_replies.json"),
}


@pytest.mark.parametrize("name", SETS)
def test_scoring_several_answer_files_parses_the_ground_truth_once(name, tmp_path, monkeypatch):
    folder, *names = SETS[name]
    data = shutil.copytree(GOLDEN / folder, tmp_path / "data")
    rows = [get_benchmark(name).read_answers(data / one) for one in names]
    opened: Counter[str] = Counter()
    real = io.open

    def counting(file, *args, **kwargs):
        opened[str(file)] += 1
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", counting)
    found = []
    for answers in (*rows, *rows):
        benchmark = get_benchmark(name)  # each setting of a sweep may use an instance of its own
        score = benchmark.score(data, answers)
        counts = benchmark.per_image_counts(data, answers)
        found.append((score.score, len(benchmark.question_scores(data, answers)), counts.counts.sum()))
    assert opened and set(opened.values()) == {1}, opened
    assert found[:2] == found[2:]


def test_a_changed_file_is_parsed_again(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text('{"a": 1}')
    assert parse_once(_document, path)["a"] == 1
    path.write_text('{"a": 22}')
    assert parse_once(_document, path)["a"] == 22
    path.write_text('{"a": 33}')  # of the same size
    os.utime(path, ns=(0, 0))
    assert parse_once(_document, path)["a"] == 33
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "1.txt").write_text("x")
    assert parse_once(_names, folder) == ("1.txt",)
    (folder / "2.txt").write_text("y")
    assert parse_once(_names, folder) == ("1.txt", "2.txt")


def test_shared_ground_truth_cannot_be_modified(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text('{"a": {"b": [1, 2]}}')
    truth = parse_once(_document, path)
    assert truth["a"]["b"] == (1, 2)
    with pytest.raises(TypeError):
        truth["a"]["c"] = 1


def _document(path: Path) -> dict:
    return read_json(path, dict)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
