"""MME: the official calculator's scores on every golden case, its text files, its bugs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.answers import all_answers, other_warnings, score_document
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.mme import RELEASE, parse_answer

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "mme"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = [case for case in EXPECTED if case != "parse_table"]
mme = get_benchmark("mme")


def answers(case: str) -> list[dict]:
    return all_answers(mme, GOLDEN / "answers" / f"{case}.jsonl")


@pytest.mark.parametrize("case", [case for case in CASES if "raises" not in EXPECTED[case]])
def test_golden_scores(case, capsys):
    expected = EXPECTED[case]
    path = GOLDEN / "answers" / f"{case}.jsonl"
    document = score_document(mme, GOLDEN, path, capsys)
    details = document["details"]
    assert document["unreadable"] == {"clean": 0, "correct_phrases": 17}[case]
    assert other_warnings(mme.score(GOLDEN, answers(case))) == []
    assert document["score"] == pytest.approx(expected["perception"]["total"], abs=1e-6)
    for part in ("perception", "cognition"):
        assert details[part]["total"] == pytest.approx(expected[part]["total"], abs=1e-6)
        assert details[part]["subtasks"] == pytest.approx(expected[part]["subtasks"], abs=1e-6)
    assert details["detail"].keys() == expected["detail"].keys()
    for task, counts in expected["detail"].items():
        assert details["detail"][task] == pytest.approx(counts, abs=1e-9)
    tallies = mme.per_image_counts(GOLDEN, answers(case))
    assert mme.score_counts(tallies.counts.sum(0)) == pytest.approx(document["score"])
    fixed = mme.score(GOLDEN, answers(case), fixed=True).score
    assert fixed == pytest.approx({"clean": document["score"], "correct_phrases": 2000}[case])
    right = sum(counts["TP"] + counts["TN"] for counts in expected["detail"].values())
    assert sum(mark.value for mark in mme.question_scores(GOLDEN, answers(case))) == right


def test_empty_answers_stop_the_official_calculator_only():
    expected = EXPECTED["empty"]
    score = mme.score(GOLDEN, answers("empty"))
    assert score.score is None and "is a yes or no" in score.details["raises"]
    for task, counts in expected["detail"].items():
        assert score.details["detail"][task] == pytest.approx(counts)
    assert mme.score(GOLDEN, answers("empty"), fixed=True).score == 0


def test_parse_table():
    for row in EXPECTED["parse_table"]:
        assert parse_answer(row["in"]) == row["official_from_txt_line"], row["in"]


@pytest.mark.parametrize("case", CASES)
def test_text_files_are_llavas(case):
    made = mme.submission(GOLDEN, answers(case))
    theirs = {path.name: path.read_bytes() for path in (GOLDEN / "eval_tool_answers" / case).glob("*.txt")}
    assert made.files == theirs and made.warnings == []


def test_answers_out_of_order_are_paired_by_image_when_fixed():
    rows = answers("clean")
    official = mme.score(GOLDEN, rows)
    shifted = sorted(rows, key=lambda row: row["text"])
    score = mme.score(GOLDEN, shifted)
    assert score.score != official.score and any("pairs are not of one image" in w for w in score.warnings)
    fixed = mme.score(GOLDEN, shifted, fixed=True)
    assert fixed.score == pytest.approx(official.score) and fixed.warnings == []


def test_tabs_lost_answers_and_other_questions():
    rows = answers("clean")
    broken = [{**rows[0], "text": f"{rows[0]['text']}\tof course"}, *rows[1:]]
    assert "tab or a line break" in mme.score(GOLDEN, broken).details["raises"]
    assert "tab or a line break" in mme.submission(GOLDEN, broken).warnings[0]
    assert mme.score(GOLDEN, broken, fixed=True).score == mme.score(GOLDEN, rows).score
    odd = mme.score(GOLDEN, rows[1:])
    assert odd.score is None and "odd number" in odd.details["raises"]
    few = [row for row in rows if not row["question_id"].startswith("OCR")]
    assert any("9 of 10 tasks" in warning for warning in mme.score(GOLDEN, few).warnings)
    with pytest.raises(DataError, match="1 of .* answers match no question"):
        mme.score(GOLDEN, [*rows, {**rows[0], "prompt": "Is it?"}])
    with pytest.raises(DataError, match="has no prompt"):
        mme.score(GOLDEN, [{"question_id": "OCR/1.png", "text": "yes"}])


def test_reader_labels_and_two_spaces(tmp_path):
    questions = list(mme.questions(GOLDEN, []))
    raw = [json.loads(line) for line in (GOLDEN / "llava_mme.jsonl").open()]
    assert [question.text for question in questions] == [row["text"] for row in raw]
    assert questions[0].image == GOLDEN / RELEASE / raw[0]["image"] and questions[0].category == "existence"
    assert mme.check_truth(GOLDEN, questions) == []
    data = shutil.copytree(GOLDEN, tmp_path / "mme", ignore=shutil.ignore_patterns("eval_tool*"))
    path = data / RELEASE / "color" / "0001.txt"
    path.write_text(path.read_text().replace("shown? Please", "shown?  Please"))
    assert mme.score(data, answers("clean")).score == mme.score(GOLDEN, answers("clean")).score
    path.write_text("Is it?\tMaybe\n")
    with pytest.raises(DataError, match=r"0001.txt:1: expected a question, a tab, and Yes or No"):
        mme.score(data, answers("clean"))
    shutil.rmtree(data / RELEASE)
    assert "cannot be scored" in mme.check_truth(data, questions)[0]


@pytest.mark.parametrize(
    "form",
    [
        "{} Please answer yes or no.\nAnswer the question using a single word or phrase.",
        "{} Please answer yes or no.",
        "{}  Please answer yes or no.",
        "{} please answer Yes or No",
        "<image>\n{}",
        "{}",
    ],
)
def test_prompts_may_have_the_official_instruction(form):
    rows = answers("clean")
    asked = [row["prompt"].split("\n")[0] for row in rows]
    other = [{**row, "prompt": form.format(text)} for row, text in zip(rows, asked, strict=True)]
    assert mme.score(GOLDEN, other).document() == mme.score(GOLDEN, rows).document()
    assert mme.submission(GOLDEN, other).files == mme.submission(GOLDEN, rows).files


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_label_files_of_any_encoding_and_hidden_ones(encoding, end, tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "mme", ignore=shutil.ignore_patterns("eval_tool*"))
    path = data / RELEASE / "color" / "0001.txt"
    path.write_bytes(path.read_text().replace("\n", end).encode(encoding))
    path.with_name("._0001.txt").write_bytes(b"\0\x05\x16\x07\0\xb0 not a label")
    assert mme.score(data, answers("clean")).document() == mme.score(GOLDEN, answers("clean")).document()
    path.write_bytes("Is it?\tYes\nIs it a caf\u00e9?\tNo\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"0001.txt:2: not utf-8 text \(byte 0xe9\). Save the file as UTF-8."):
        mme.score(data, answers("clean"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("Is it?\t1\tYes", "got 'Is it"),
        ("Is\tit?\tYes", "got 'Is"),
        ("Is it?\tyes", "got 'Is it"),
        ("Labels of this task", "got 'Labels"),
        ("Is it?\tYes\nIs it?\tNo", "0001.txt:2: repeats a question with another label"),
    ],
)
def test_label_lines_that_are_not_two_cells_are_named(line, message, tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "mme", ignore=shutil.ignore_patterns("eval_tool*"))
    (data / RELEASE / "color" / "0001.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        mme.score(data, answers("clean"))


def test_answers_with_line_breaks_are_unreadable():
    rows = [{**row, "text": f"{row['text']}\n"} for row in answers("clean")]
    score = mme.score(GOLDEN, rows)
    assert score.score is None and score.unreadable == len(rows)
    assert mme.score(GOLDEN, rows, fixed=True).score == mme.score(GOLDEN, answers("clean"), fixed=True).score
    twice = mme.score(GOLDEN, answers("clean") * 2)
    assert any("the official calculator counts each" in warning for warning in twice.warnings)
