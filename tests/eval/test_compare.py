"""Paired comparison: the exact test against a plain sum, flips and intervals on golden answers, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest

from llava.eval.benchmarks import get_benchmark
from llava.eval.benchmarks.base import DataError
from llava.eval.compare import main
from llava.eval.metrics.comparison import compare, exact_test

DATA = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
POPE, TEXTVQA = DATA / "pope", DATA / "textvqa"


def plain_test(a: int, b: int) -> float:
    """Every outcome that is not more likely than the observed one."""
    number = a + b
    ways = [comb(number, k) for k in range(number + 1)]
    return float(Fraction(sum(way for way in ways if way <= ways[a]), 2**number))


def test_exact_test_equals_the_plain_sum():
    for a in range(25):
        for b in range(25):
            assert exact_test(a, b) == pytest.approx(plain_test(a, b), abs=1e-15)


def test_exact_test_at_known_values():
    assert exact_test(0, 0) == exact_test(7, 7) == 1.0
    assert exact_test(0, 5) == 2 / 2**5 and exact_test(5, 1) == exact_test(1, 5) == 14 / 64
    assert exact_test(10_000, 10_400) == pytest.approx(0.005211, abs=2e-5)
    assert exact_test(0, 5000) == 0.0  # too small for a float, and no error
    with pytest.raises(ValueError, match="negative"):
        exact_test(-1, 3)


def answers(folder: Path, name: str) -> list[dict]:
    return get_benchmark(folder.name).read_answers(folder / f"llava_answers_{name}.jsonl")


def test_pope_against_a_plain_count():
    pope = get_benchmark("pope")
    a, b = answers(POPE, "clean"), answers(POPE, "phrases")
    found = compare(pope, POPE, a, b)
    right = [{mark.key: mark.value for mark in pope.question_scores(POPE, rows)} for rows in (a, b)]
    flips = [(right[0][key], right[1][key]) for key in right[0]]
    assert len(found.better_a) == flips.count((1.0, 0.0)) > 0
    assert len(found.better_b) == flips.count((0.0, 1.0)) > 0
    assert found.binary and len(found.pairs) == len(a)
    assert found.p_value == exact_test(flips.count((1.0, 0.0)), flips.count((0.0, 1.0)))
    assert found.score_a == pytest.approx(pope.score(POPE, a, fixed=True).score)
    assert found.score_b == pytest.approx(pope.score(POPE, b).score)
    assert found.difference.difference == pytest.approx(found.score_a - found.score_b)
    assert found.difference.ci_low < found.difference.difference < found.difference.ci_high


def test_sides_are_symmetric_and_order_is_no_matter():
    pope = get_benchmark("pope")
    a, b = answers(POPE, "clean"), answers(POPE, "phrases")
    there, back = compare(pope, POPE, a, b), compare(pope, POPE, b[::-1], a)
    assert there.p_value == back.p_value
    assert len(there.better_a) == len(back.better_b)
    assert there.difference.difference == pytest.approx(-back.difference.difference)


def test_equal_answers_do_not_differ():
    found = compare(get_benchmark("pope"), POPE, answers(POPE, "clean"), answers(POPE, "clean"))
    assert found.p_value == 1.0 and not found.better_a and not found.better_b
    assert (found.difference.ci_low, found.difference.ci_high) == (
        0.0,
        0.0,
    ) and not found.difference.significant


def test_graded_marks_take_the_sign_test():
    majority, noisy = answers(TEXTVQA, "majority"), answers(TEXTVQA, "noisy")
    found = compare(get_benchmark("textvqa"), TEXTVQA, majority, noisy)
    assert not found.binary
    grades = [(a.value, b.value) for a, b in found.pairs]
    assert any(0 < a < b for a, b in grades)  # a step between grades is no flip, and counts
    assert len(found.better_b) == sum(b > a for a, b in grades)
    mean = 100 * sum(a - b for a, b in grades) / len(grades)
    assert found.difference.difference == pytest.approx(mean)


@pytest.mark.parametrize("left, right, side", [(slice(None), slice(20), "A"), (slice(20), slice(None), "B")])
def test_other_questions_are_refused(left, right, side):
    rows = answers(TEXTVQA, "majority")
    with pytest.raises(DataError, match="answer different questions") as caught:
        compare(get_benchmark("textvqa"), TEXTVQA, rows[left], rows[right])
    ids = {row["question_id"] for row in rows}
    both = len({row["question_id"] for row in rows[:20]})
    counts = (len(ids) - both, 0) if side == "A" else (0, len(ids) - both)
    assert f"{counts[0]} only in A, {counts[1]} only in B, {both} in both" in str(caught.value)
    assert f"only in {side}. " in str(caught.value)


def test_a_missing_question_of_a_shared_id_is_noticed():
    rows = answers(TEXTVQA, "majority")  # two questions share the id of their picture
    with pytest.raises(DataError, match="1 only in A, 0 only in B, 59 in both"):
        compare(get_benchmark("textvqa"), TEXTVQA, rows, rows[:-1])


def test_command(tmp_path, capsys):
    files = [POPE / "llava_answers_clean.jsonl", POPE / "llava_answers_phrases.jsonl"]
    out = tmp_path / "new" / "pairs.csv"
    code = main(
        [*map(str, files), "--benchmark", "pope", "--data", str(POPE), "--flips", "3", "--output", str(out)]
    )
    printed, errors = capsys.readouterr()
    document = json.loads(printed.splitlines()[-1])
    assert code == 0 and errors == "" and "McNemar" in printed
    assert document["test"] == "mcnemar" and document["questions"] == 120 and document["images"] == 7
    assert document["better_a"] + document["better_b"] == document["flips"]
    assert document["flips"] + document["alike"] == 120
    assert document["p"] == exact_test(document["better_a"], document["better_b"])
    assert len(document["differing"]["a"]) == len(document["differing"]["b"]) == 3
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 120
    assert sum(float(row["difference"]) > 0 for row in rows) == document["better_a"]


def test_command_takes_folders_of_runs_and_says_what_they_were(tmp_path, capsys):
    for name, tokens in (("a", 64), ("b", 32)):
        (tmp_path / name).mkdir()
        metadata = {"model": "m", "method": "vispruner", "tokens": tokens}
        lines = [json.dumps({**row, "metadata": metadata}) for row in answers(POPE, "clean")]
        (tmp_path / name / "answers.jsonl").write_text("\n".join(lines) + "\n")
    code = main([str(tmp_path / "a"), str(tmp_path / "b"), "--benchmark", "pope", "--data", str(POPE)])
    printed, _ = capsys.readouterr()
    assert code == 0 and "m vispruner 64" in printed and "m vispruner 32" in printed
    assert json.loads(printed.splitlines()[-1])["a"]["answers"] == str(tmp_path / "a" / "answers.jsonl")


def test_command_reads_the_benchmark_from_the_scores_beside_the_answers(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(POPE / "llava_answers_clean.jsonl", tmp_path / name / "answers.jsonl")
    folders = [str(tmp_path / name) for name in "ab"]
    assert main([*folders, "--data", str(POPE)]) == 1
    assert "no score.json beside them. Set --benchmark" in capsys.readouterr().err
    (tmp_path / "b" / "score.json").write_text('{"benchmark": "pope", "score": 1}')
    assert main([*folders, "--data", str(POPE)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "pope"
    (tmp_path / "a" / "score.json").write_text('{"benchmark": "gqa", "score": 1}')
    assert main([*folders, "--data", str(POPE)]) == 1
    assert "name gqa, pope" in capsys.readouterr().err


def test_command_warns_of_other_prompts(capsys):
    files = [TEXTVQA / "llava_answers_majority.jsonl", TEXTVQA / "llava_answers_noocr_prompt.jsonl"]
    assert main([*map(str, files), "--benchmark", "textvqa", "--data", str(TEXTVQA)]) == 0
    assert "60 questions of A have a different prompt in B" in capsys.readouterr().err


def test_command_reports_errors_in_a_line(tmp_path, capsys):
    good = POPE / "llava_answers_clean.jsonl"
    assert main([str(good), str(tmp_path / "no.jsonl"), "--benchmark", "pope", "--data", str(POPE)]) == 1
    assert f"error: {tmp_path / 'no.jsonl'}: no such answer file" in capsys.readouterr().err
    short = tmp_path / "short.jsonl"
    short.write_text("".join(good.read_text().splitlines(keepends=True)[:50]))
    assert main([str(good), str(short), "--benchmark", "pope", "--data", str(POPE)]) == 1
    captured = capsys.readouterr()
    assert "70 only in A, 0 only in B, 50 in both" in captured.err and captured.out == ""
    before = short.read_bytes()
    command = [str(short), str(short), "--benchmark", "pope", "--data", str(POPE), "--output", str(short)]
    assert main(command) == 1 and short.read_bytes() == before
    assert f"error: {short}: is read by this command" in capsys.readouterr().err
