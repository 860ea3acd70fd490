"""ScienceQA: every golden case of LLaVA's scorer, letters it accepts, prompts, missing images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.answers import all_answers, other_warnings, score_document
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.scienceqa import choice_index, parse_answer

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "scienceqa"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
PROBLEMS = json.loads((GOLDEN / "problems.json").read_text())
scienceqa = get_benchmark("scienceqa")
full = get_benchmark("scienceqa_full")


def answers(case: str) -> list[dict]:
    return all_answers(scienceqa, GOLDEN / f"llava_answers_{case}.jsonl")


@pytest.mark.parametrize("case", EXPECTED)
def test_golden_scores(case, capsys):
    expected = EXPECTED[case]
    path = GOLDEN / f"llava_answers_{case}.jsonl"
    document = score_document(scienceqa, GOLDEN, path, capsys)
    details = document["details"]
    assert document["score"] == details["img_accuracy"] == pytest.approx(expected["img_acc"], abs=1e-6)
    assert details["accuracy"] == pytest.approx(expected["acc"], abs=1e-6)
    for key in ("correct", "count", "img_correct", "img_count"):
        assert details[key] == expected[key]
    line = (
        f"Total: {details['count']}, Correct: {details['correct']}, "
        f"Accuracy: {details['accuracy']:.2f}%, IMG-Accuracy: {document['score']:.2f}%"
    )
    assert line == expected["stdout"]
    rows = {row["question_id"]: row["text"] for row in answers(case)}
    letters = {key: parse_answer(rows[key]) if key in rows else "FAILED" for key in expected["parsed"]}
    assert letters == expected["parsed"]
    assert {
        key: choice_index(letter, PROBLEMS[key]["choices"]) for key, letter in letters.items()
    } == expected["pred_idx"]
    total = scienceqa.per_image_counts(GOLDEN, answers(case)).counts.sum(0)
    assert scienceqa.score_counts(total) == pytest.approx(expected["img_acc"])
    warnings = other_warnings(scienceqa.score(GOLDEN, answers(case)))
    assert len(warnings) == {"missing": 2, "only": 1}.get(case.split("_")[-1], 0)


def test_accepted_letters():
    table = {
        "A": "A",
        "E": "E",
        "F": "FAILED",
        "AB": "FAILED",
        "": "FAILED",
        "A. txt": "A",
        "A.": "FAILED",
        " A": "FAILED",
        "a": "FAILED",
        "The answer is C.": "C",
        "The answer is C": "FAILED",
        "The answer is C!": "C",
        "So The answer is B. The answer is B.": "FAILED",
        "The answer is Z.": "Z",
        "(A) txt": "FAILED",
    }
    assert {text: parse_answer(text) for text in table} == table
    assert choice_index("Z", list("abcde")) == choice_index("D", list("abc")) == -1


@pytest.mark.parametrize("benchmark, count", [(scienceqa, 26), (full, 54)])
def test_prompts_are_llavas(benchmark, count):
    theirs = {row["question_id"]: row["prompt"] for row in answers("letters_full")}
    problems = []
    questions = list(benchmark.questions(GOLDEN, problems))
    assert len(questions) == count and problems == [] and benchmark.max_new_tokens == 1024
    for question in questions:
        assert question.extra["prompt"] == theirs[question.question_id]
        assert question.text == theirs[question.question_id].removeprefix("<image>\n")
        assert (question.image is None) == ("<image>" not in theirs[question.question_id])
    assert benchmark.check_truth(GOLDEN, questions) == []


def test_missing_answers_to_image_questions_are_counted():
    score = scienceqa.score(GOLDEN, answers("letters_missing"))
    assert any("4 of 26 questions with an image have no answer" in warning for warning in score.warnings)
    fixed = scienceqa.score(GOLDEN, answers("letters_missing"), fixed=True)
    assert fixed.score == score.score and fixed.details["accuracy"] > score.details["accuracy"]
    bare = [{**row, "prompt": row["prompt"].replace("<image>", "")} for row in answers("letters_full")]
    assert scienceqa.score(GOLDEN, bare).score is None
    with pytest.raises(DataError, match="54 of 54 answers match no question"):
        scienceqa.score(GOLDEN, [{**row, "question_id": "x" + row["question_id"]} for row in bare])


def test_malformed_entries_are_named(tmp_path):
    rows = [
        {"id": "1", "conversations": []},
        {"id": "2", "image": "2/image.png", "conversations": [{"from": "human", "value": "Which?"}]},
        {"id": "3", "image": "3/image.png", "conversations": [{"from": "human", "value": "<image>\nWhich?"}]},
    ]
    (tmp_path / "llava_test_CQM-I.json").write_text(json.dumps(rows))
    problems = []
    (question,) = scienceqa.questions(tmp_path, problems)
    assert question.question_id == "3" and [problem.line for problem in problems] == [1, 2]
    (tmp_path / "llava_test_CQM-I.json").write_text("{}")
    with pytest.raises(DataError, match="contains a JSON dict, expected a list"):
        list(scienceqa.questions(tmp_path, []))


def test_answers_without_prompt_are_refused_and_a_lost_image_is_said():
    rows = answers("letters_full")
    bare = [{key: value for key, value in row.items() if key != "prompt"} for row in rows[:3]]
    with pytest.raises(DataError, match="the answer to question_id '3' has no prompt"):
        scienceqa.score(GOLDEN, bare + rows[3:])
    place = next(place for place, row in enumerate(rows) if "<image>" in row["prompt"])
    lost = [*rows]
    lost[place] = {**rows[place], "prompt": rows[place]["prompt"].removeprefix("<image>\n")}
    score, fixed = scienceqa.score(GOLDEN, lost), scienceqa.score(GOLDEN, lost, fixed=True)
    assert score.details["img_count"] == 25 and fixed.details["img_count"] == 26
    assert any("1 answers have <image> in their prompt" in warning for warning in score.warnings)
    assert fixed.score == scienceqa.score(GOLDEN, rows).score


def test_what_the_official_rule_reads_is_not_read_again():
    rows = [{**row, "text": f"The answer is {row['text']}, really"} for row in answers("letters_full")]
    score, fixed = scienceqa.score(GOLDEN, rows), scienceqa.score(GOLDEN, rows, fixed=True)
    assert score.score == fixed.score > 50
    assert score.unreadable == scienceqa.score(GOLDEN, answers("letters_full")).unreadable


@pytest.mark.parametrize(
    "text, letter",
    [
        (" A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("A.", "A"),
        ("A.tree 0", "A"),
        ("B) tree", "B"),
        ("**B**", "B"),
        ("Answer: C", "C"),
        ("the correct answer is (B)", "B"),
        ("Liquid", "C"),
        ("liquid!", "C"),
        ("C liquid", "C"),
        ("B, because it is in the air", "B"),
        ("[B]", "B"),
        ("B!", "B"),
        ("B\ngas", "B"),
        ("\u7b54\u6848\uff1aB\u3002", "B"),
        ("\u200fA\u200e", "A"),
        ("A, B", None),
        ("A and B", None),
        ("A</s>", "A"),
        ("A or B", None),
        ("a tree", None),
        ("E", None),
        ("bird", None),
    ],
)
def test_letters_that_a_person_reads(text, letter):
    assert scienceqa.careful({"choices": ["rock", "gas", "liquid"]}, text) == letter
