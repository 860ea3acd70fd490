"""TextVQA: every golden case of the official scorer, the question recovered from prompts, the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.answers import all_answers, score_document
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.textvqa import question_of

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "textvqa"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
textvqa = get_benchmark("textvqa")


def answers(case: str) -> list[dict]:
    return all_answers(textvqa, GOLDEN / f"llava_answers_{case}.jsonl")


@pytest.mark.parametrize("case", EXPECTED)
def test_golden_scores(case, capsys):
    score = textvqa.score(GOLDEN, answers(case))
    assert score.score == pytest.approx(EXPECTED[case]["accuracy_pct"], abs=1e-6)
    assert score.details["samples"] == 60 and score.warnings == []
    values = [mark.value for mark in textvqa.question_scores(GOLDEN, answers(case))]
    assert values == pytest.approx(EXPECTED[case]["per_question"])
    tallies = textvqa.per_image_counts(GOLDEN, answers(case))
    assert textvqa.score_counts(tallies.counts.sum(0)) == pytest.approx(score.score)
    path = GOLDEN / f"llava_answers_{case}.jsonl"
    document = score_document(textvqa, GOLDEN, path, capsys)
    assert f"Accuracy: {document['score']:.2f}%" in EXPECTED[case]["stdout"]


def test_question_is_recovered_from_every_form_of_prompt():
    last = "Answer the question using a single word or phrase."
    for prompt in (
        f"What IS it?\n{last}",
        f"What IS it?\nReference OCR token: a, b\n{last}",
        f"Reference OCR token: a\nWhat IS it?\n{last}",
        "OCR tokens: a, b. Question: What IS it? Short answer:",
    ):
        assert question_of(prompt) == "what is it?"
    for prompt in ("What is it?", f"What is it?\nmore\n{last}", "OCR tokens: a. What is it?"):
        with pytest.raises(ValueError):
            question_of(prompt)


def test_lost_and_repeated_answers_are_counted():
    rows = answers("majority")
    score = textvqa.score(GOLDEN, rows[1:] + rows[5:7])
    assert any("2 answers repeat the image and question of another" in warning for warning in score.warnings)
    assert any("1 of 60 questions have no answer" in warning for warning in score.warnings)
    assert score.details["samples"] == 61
    fixed = textvqa.score(GOLDEN, rows[1:] + rows[5:7], fixed=True)
    assert fixed.details["samples"] == 59
    marks = {one.key: one.value for one in textvqa.question_scores(GOLDEN, rows[1:] + rows[5:7])}
    assert len(marks) == 59 and fixed.score == pytest.approx(100 * sum(marks.values()) / 59)


def test_other_answers_are_refused():
    rows = [{**row, "question_id": f"x{row['question_id']}"} for row in answers("majority")]
    with pytest.raises(DataError, match="60 of 60 answers match no question"):
        textvqa.score(GOLDEN, rows)
    with pytest.raises(DataError, match="has no prompt"):
        textvqa.score(GOLDEN, [{"question_id": "a", "text": "b"}])


def test_reader_prompts_and_checks():
    questions = list(textvqa.questions(GOLDEN, []))
    raw = [json.loads(line) for line in (GOLDEN / "llava_textvqa_val_v051_ocr.jsonl").open()]
    assert [question.text for question in questions] == [row["text"] for row in raw]
    assert questions[0].image == GOLDEN / "train_images" / raw[0]["image"]
    assert textvqa.max_new_tokens == 128
    assert textvqa.check_truth(GOLDEN, questions) == []
    other = [questions[0].__class__(0, "gone", None, questions[0].text, file="q.jsonl", line=1)]
    assert (
        "1 of 1 questions have no ground truth in TextVQA_0.5.1_val.json"
        in textvqa.check_truth(GOLDEN, other)[0]
    )
    with pytest.raises(DataError, match="has no server"):
        textvqa.submission(GOLDEN, answers("majority"))


def test_questions_with_two_sets_of_reference_answers_are_counted(tmp_path):
    truth = json.loads((GOLDEN / "TextVQA_0.5.1_val.json").read_text())
    truth["data"].append({**truth["data"][0], "answers": ["other"] * 10})
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps(truth))
    (warning,) = textvqa.score(tmp_path, answers("majority")).warnings
    assert warning.startswith("1 questions of TextVQA_0.5.1_val.json occur again with other answers")
