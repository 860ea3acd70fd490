"""VizWiz: official numbers of every golden case, the upload, its quirks, both splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.answers import all_answers, score_document
from llava.eval.benchmarks import DataError, get_benchmark

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "vizwiz"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
vizwiz = get_benchmark("vizwiz")


def answers(case: str) -> list[dict]:
    return all_answers(vizwiz, GOLDEN / f"llava_answers_{case}.jsonl")


def check(details: dict, expected: dict) -> None:
    assert details["accuracy"] == pytest.approx(expected["accuracy_overall"], abs=0.0101)
    assert details["perAnswerType"] == pytest.approx(expected["accuracy_per_answer_type"], abs=0.0101)
    assert details["said_unanswerable"] == expected["n_pred_unanswerable"]
    assert details["unanswerability_from_text"] == pytest.approx(
        expected["unanswerability_from_answer_text"], abs=0.0101
    )


@pytest.mark.parametrize("case", EXPECTED)
def test_golden_scores(case, capsys):
    upload, raw = EXPECTED[case]["official_on_llava_upload"], EXPECTED[case]["official_on_raw_text"]
    path = GOLDEN / f"llava_answers_{case}.jsonl"
    document = score_document(vizwiz, GOLDEN, path, capsys)
    assert document["score"] == document["details"]["accuracy"] and document["details"]["warnings"] == []
    check(document["details"], upload)
    check(document["details"]["raw_text"], raw)
    images = vizwiz.keys(GOLDEN, answers(case))
    for expected, is_raw in ((upload, False), (raw, True)):
        rows = answers(case)
        if is_raw:  # rows of a result file are scored as they are
            rows = [{"image": image, "answer": row["text"]} for image, row in zip(images, rows, strict=True)]
        marks = vizwiz.question_scores(GOLDEN, rows)
        assert {mark.key: round(100 * mark.value, 2) for mark in marks} == pytest.approx(expected["evalQA"])
    uploaded = all_answers(vizwiz, GOLDEN / f"answers_upload_{case}.json")
    check(vizwiz.score(GOLDEN, uploaded).details, upload)
    total = vizwiz.per_image_counts(GOLDEN, answers(case)).counts.sum(0)
    assert total[1] == 64 and vizwiz.score_counts(total) == pytest.approx(document["score"], abs=0.0101)


@pytest.mark.parametrize("case", EXPECTED)
def test_upload_is_llavas(case):
    made = vizwiz.submission(GOLDEN, answers(case))
    (content,) = made.files.values()
    assert json.loads(content) == json.loads((GOLDEN / f"answers_upload_{case}.json").read_text())


def test_only_the_prediction_is_normalised():
    assert vizwiz.accuracy("The Cat", ["cat"] * 10) == 1 and vizwiz.accuracy("cat", ["Cat"] * 10) == 0
    assert vizwiz.accuracy("dont know", ["don't know"] * 10) == 0


def test_missing_answers():
    rows = answers("majority")[2:]
    score = vizwiz.score(GOLDEN, rows)
    assert score.details["answered"] == 62 and "2 of 64 questions have no answer" in score.warnings[0]
    with pytest.raises(DataError, match="2 of 64 questions have no answer .first: VizWiz_val_00000000.jpg"):
        vizwiz.submission(GOLDEN, rows)
    with pytest.raises(DataError, match="no question file .* has all ids"):
        vizwiz.score(GOLDEN, [{**row, "question_id": row["question_id"] + 5000} for row in rows])


def test_test_set_is_asked_where_it_is_and_told_apart_by_its_prompts(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "vizwiz")
    theirs = [(one.question_id, one.image, one.text) for one in vizwiz.questions(data, [])]
    row = {"question_id": 0, "image": "VizWiz_test_00000000.jpg", "text": "Which?\nAnswer."}
    (data / "llava_test.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = vizwiz.questions(data, [])
    assert question.image == data / "test" / row["image"] and vizwiz.check_truth(data, [question]) == []
    score = vizwiz.score(data, [{"question_id": 0, "prompt": row["text"], "text": "x"}])
    assert score.score is None and "llava.eval.submit" in score.warnings[0]
    assert vizwiz.score(data, answers("majority")).score == 88.91
    (data / "llava_val.jsonl").unlink()
    val = get_benchmark("vizwiz_val")
    questions = list(val.questions(data, []))
    assert [(one.question_id, one.image, one.text) for one in questions] == theirs
    assert val.check_truth(data, questions) == []
    assert val.score(data, answers("noisy")).score == 66.56


def test_ids_of_another_file_are_joined_by_prompt_or_by_picture(tmp_path):
    asked = ["What color?", "Which brand?", "How many?", "What is it?"]
    truth = [
        {"image": f"VizWiz_val_{n:08d}.jpg", "question": text, "answers": [{"answer": f"a{n}"}] * 10}
        for n, text in enumerate(asked)
    ]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    val = get_benchmark("vizwiz_val")
    order = (2, 0, 3, 1)
    rows = [
        {"question_id": place, "prompt": f"{asked[n]}\nAnswer.", "text": f"a{n}"}
        for place, n in enumerate(order)
    ]
    assert val.score(tmp_path, rows).score == 100
    for form in ("VizWiz_val_{:08d}.jpg", "VizWiz_val_{:08d}", "val/VizWiz_val_{:08d}.jpg"):
        named = [{"question_id": form.format(n), "text": f"a{n}"} for n in order]
        assert val.score(tmp_path, named).score == 100
    truth[0]["question"] = truth[1]["question"] = "What is this?"  # the prompt of two images
    (tmp_path / "val.json").write_text(json.dumps(truth))
    rows = [{**row, "prompt": f"{truth[n]['question']}\nAnswer."} for row, n in zip(rows, order, strict=True)]
    with pytest.raises(DataError, match="val.json: 3 of 4 answers have the prompt of another question"):
        val.score(tmp_path, rows)


def test_a_submission_is_joined_by_prompt_and_by_image():
    rows = answers("noisy")
    images = vizwiz.keys(GOLDEN, rows)
    theirs = vizwiz.submission(GOLDEN, rows).files
    by_image = [{"question_id": image, "text": row["text"]} for image, row in zip(images, rows, strict=True)]
    assert vizwiz.submission(GOLDEN, by_image).files == theirs
    results = json.loads(next(iter(theirs.values())))
    assert vizwiz.submission(GOLDEN, results).files == theirs
    with pytest.raises(DataError, match="have the prompt of another question"):
        vizwiz.submission(GOLDEN, [{**row, "question_id": 63 - row["question_id"]} for row in rows])


def test_images_are_named_with_and_without_extension(tmp_path):
    rows = answers("noisy")
    expected = vizwiz.score(GOLDEN, rows).score
    named = [{**row, "image": one} for row, one in zip(rows, vizwiz.keys(GOLDEN, rows), strict=True)]
    for form in (lambda name: Path(name).stem, "val/{}".format):
        assert vizwiz.score(GOLDEN, [{**row, "image": form(row["image"])} for row in named]).score == expected
    data = shutil.copytree(GOLDEN, tmp_path / "vizwiz")
    truth = json.loads((data / "val.json").read_text())
    bare = [{**row, "image": Path(row["image"]).stem} for row in truth]
    (data / "val.json").write_text(json.dumps(bare))
    assert vizwiz.score(data, rows).score == vizwiz.score(data, named).score == expected
