"""VQAv2: official numbers of both result files of every golden case, the upload, the traps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.answers import all_answers, score_document
from llava.eval.benchmarks import DataError, get_benchmark

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "vqav2"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
vqav2 = get_benchmark("vqav2")


def answers(case: str) -> list[dict]:
    return all_answers(vqav2, GOLDEN / f"llava_answers_{case}.jsonl")


def check(details: dict, expected: dict) -> None:
    assert details["overall"] == pytest.approx(expected["accuracy"]["overall"], abs=0.0101)
    for group in ("perQuestionType", "perAnswerType"):
        assert details[group] == pytest.approx(expected["accuracy"][group], abs=0.0101)


@pytest.mark.parametrize("case", EXPECTED)
def test_golden_scores(case, capsys):
    upload, raw = EXPECTED[case]["official_on_llava_upload"], EXPECTED[case]["official_on_raw_text"]
    path = GOLDEN / f"llava_answers_{case}.jsonl"
    document = score_document(vqav2, GOLDEN, path, capsys)
    assert document["score"] == document["details"]["overall"] and document["details"]["warnings"] == []
    check(document["details"], upload)
    check(document["details"]["raw_text"], raw)
    for expected, is_raw in ((upload, False), (raw, True)):
        rows = answers(case)
        if is_raw:  # rows of a result file are scored as they are
            rows = [{"question_id": row["question_id"], "answer": row["text"]} for row in rows]
        marks = vqav2.question_scores(GOLDEN, rows)
        assert {mark.key: round(100 * mark.value, 2) for mark in marks} == pytest.approx(expected["evalQA"])
        mean = 100 * sum(mark.value for mark in marks) / len(marks)
        assert mean == pytest.approx(expected["accuracy"]["overall"], abs=0.0101)
    for kind, expected in (("raw", raw), ("llava_upload", upload)):
        rows = all_answers(vqav2, GOLDEN / f"results_{case}_{kind}.json")
        check(vqav2.score(GOLDEN, rows).details, expected)
    tallies = vqav2.per_image_counts(GOLDEN, answers(case))
    assert len(tallies.images) == 24
    assert vqav2.score_counts(tallies.counts.sum(0)) == pytest.approx(document["score"], abs=0.0101)


@pytest.mark.parametrize("case", EXPECTED)
def test_upload_is_llavas(case):
    made = vqav2.submission(GOLDEN, answers(case))
    (content,) = made.files.values()
    assert json.loads(content) == json.loads((GOLDEN / f"results_{case}_llava_upload.json").read_text())
    assert made.rows == 72 and made.warnings == []


def test_upload_covers_all_ids_in_their_order(tmp_path):
    ids = [row["question_id"] for row in answers("majority")]
    path = tmp_path / "llava_vqav2_mscoco_test2015.jsonl"
    path.write_text("".join(json.dumps({"question_id": key}) + "\n" for key in [5, *reversed(ids), 6]))
    made = vqav2.submission(tmp_path, answers("majority"))
    rows = json.loads(made.files["vqav2_submission.json"])
    assert [row["question_id"] for row in rows] == [5, *reversed(ids), 6]
    assert rows[0]["answer"] == rows[-1]["answer"] == "" and "2 of 74" in made.warnings[0]
    with pytest.raises(DataError, match="1 of 73 answers match no question"):
        vqav2.submission(tmp_path, [*answers("majority"), {"question_id": 1, "text": "no"}])


def test_unanimous_answers_switch_normalising_off():
    assert (
        vqav2.accuracy("t shirt", ["t-shirt"] * 10) == 0
        and vqav2.accuracy("t-shirt\n", ["t-shirt "] * 10) == 1
    )
    assert vqav2.accuracy("t shirt", ["t-shirt"] * 9 + ["shirt"]) == 1
    assert vqav2.accuracy("Yes", ["yes"] * 10) == 0


def test_missing_answers_stop_the_official_program_only():
    score = vqav2.score(GOLDEN, answers("majority")[1:])
    assert score.score is None and "1 of 72 questions have no answer" in score.warnings[0]
    fixed = vqav2.score(GOLDEN, answers("majority")[1:], fixed=True)
    assert fixed.details["answered"] == 71 and fixed.score > 70
    with pytest.raises(DataError, match="72 of 72 answers match no question"):
        vqav2.score(GOLDEN, [{**row, "question_id": row["question_id"] + 7} for row in answers("majority")])


def test_test_dev_is_asked_where_it_is_and_goes_to_the_server(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "vqav2")
    row = {"question_id": 7, "image": "COCO_test2015_000000000007.jpg", "text": "What?"}
    (data / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = vqav2.questions(data, [])
    assert question.image == data / "test2015" / row["image"]
    assert "test2015.jsonl is missing" in vqav2.check_truth(data, [question])[0]
    score = vqav2.score(data, [{"question_id": 7, "text": "kite"}])
    assert score.score is None and "llava.eval.submit" in score.warnings[0]
    assert vqav2.score(data, answers("majority")).score == 81.39
    assert next(get_benchmark("vqav2_val").questions(data, [])).question_id == 900000000


def test_official_questions_are_asked_as_llava_asks(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "vqav2")
    theirs = [(one.question_id, one.image, one.text) for one in vqav2.questions(data, [])]
    (data / "llava_vqav2_val.jsonl").unlink()
    questions = list(vqav2.questions(data, []))
    assert [(one.question_id, one.image, one.text) for one in questions] == theirs
    assert vqav2.check_truth(data, questions) == []
    (data / "v2_mscoco_val2014_annotations.json").unlink()
    assert "Add the validation annotations from VQA v2" in vqav2.check_truth(data, questions)[0]
