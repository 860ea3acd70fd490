"""GQA: every golden case of the evaluation script, the conversion, missing predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.answers import all_answers, score_document
from llava.eval.benchmarks import DataError, get_benchmark

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "gqa"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = [case for case in EXPECTED if not case.startswith("missing")]
gqa = get_benchmark("gqa")


def answers(case: str) -> list[dict]:
    return all_answers(gqa, GOLDEN / f"llava_answers_{case}.jsonl")


@pytest.mark.parametrize("case", CASES)
def test_golden_scores(case, capsys):
    expected = {
        key: value
        for key, value in EXPECTED[case].items()
        if key != "stdout_tail" and not key.startswith("lmms")
    }
    files = [GOLDEN / f"llava_answers_{case}.jsonl", GOLDEN / f"testdev_balanced_predictions_{case}.json"]
    for path in files:
        document = score_document(gqa, GOLDEN, path, capsys)
        details = document["details"]
        assert document["score"] == pytest.approx(expected["accuracy"], abs=1e-6)
        for key, value in expected.items():
            if key.startswith("accuracyPer"):
                assert details[key].keys() == value.keys()
                for kind, pair in value.items():
                    assert details[key][kind] == pytest.approx(pair, abs=1e-6)
            else:
                assert details[key] == pytest.approx(value, abs=1e-6), key
        tail = [
            f"{key.capitalize()}: {details[key]:.2f}"
            for key in ("binary", "open", "accuracy", "validity", "plausibility", "distribution")
        ]
        assert all(line in EXPECTED[case]["stdout_tail"] for line in tail)
    total = gqa.per_image_counts(GOLDEN, answers(case)).counts.sum(0)
    assert gqa.score_counts(total) == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("case", CASES)
def test_conversion_is_llavas(case):
    made = gqa.submission(None, answers(case))
    theirs = (GOLDEN / f"testdev_balanced_predictions_{case}.json").read_text()
    assert json.loads(made.files["testdev_balanced_predictions.json"]) == json.loads(theirs)


def test_a_missing_prediction_matters_only_where_it_is_balanced():
    rows = gqa.read_answers(GOLDEN / "testdev_balanced_predictions_missing_unbalanced.json")
    score = gqa.score(GOLDEN, rows)
    expected = EXPECTED["missing_unbalanced"]
    assert {key: score.details[key] for key in expected} == pytest.approx(expected) and score.warnings == []
    rows = gqa.read_answers(GOLDEN / "testdev_balanced_predictions_missing_one.json")
    score = gqa.score(GOLDEN, rows)
    assert score.score is None and score.details["raises"] == EXPECTED["missing_one"]["raises"]
    assert "1 of 62 questions have no answer" in score.warnings[0]
    fixed = gqa.score(GOLDEN, rows, fixed=True)
    assert fixed.score == 100 and fixed.details["answered"] == 61


def test_reader_and_answers_to_other_questions():
    questions = list(gqa.questions(GOLDEN, []))
    assert len(questions) == 66 and questions[0].image == GOLDEN / "data" / "images" / "n500000.jpg"
    assert gqa.check_truth(GOLDEN, questions) == []
    with pytest.raises(DataError, match="66 of 66 answers match no question"):
        gqa.score(GOLDEN, [{**row, "question_id": "9" + row["question_id"]} for row in answers("mixed")])


@pytest.mark.parametrize(
    "form", [" {}", "the {}", "({})", "{}!", "{},", "<s> {}</s>", "{}\uff0e", "Answer: {}"]
)
def test_answers_that_the_exact_match_does_not_read(form):
    rows = [{**row, "text": form.format(row["text"])} for row in answers("correct")]
    score, fixed = gqa.score(GOLDEN, rows), gqa.score(GOLDEN, rows, fixed=True)
    assert score.score == 0 and score.unreadable == len(rows)
    assert fixed.score == gqa.score(GOLDEN, answers("correct")).score == 100


def test_questions_without_a_balanced_one_are_refused(tmp_path):
    truth = json.loads((GOLDEN / "testdev_balanced_questions.json").read_text())
    other = {key: {**entry, "isBalanced": False} for key, entry in truth.items()}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="no question is balanced"):
        gqa.score(tmp_path, answers("correct"))
