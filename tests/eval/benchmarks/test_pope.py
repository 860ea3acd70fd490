"""POPE: every golden case of the official scorer, its bugs, and the reader's checks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from helpers.answers import other_warnings
from helpers.synthetic_pope import make_pope
from llava.eval.benchmarks import DataError, get_benchmark, list_benchmarks
from llava.eval.benchmarks.base import check_questions, read_answers
from llava.eval.benchmarks.pope import parse_answer
from llava.eval.score import main as score_main

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "pope"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = [name for name in EXPECTED if name != "parse_table"]
CATEGORIES = ("adversarial", "popular", "random")
pope = get_benchmark("pope")


def answers(case: str) -> list[dict]:
    return read_answers(GOLDEN / f"llava_answers_{case}.jsonl")


@pytest.mark.parametrize("case", [case for case in CASES if "mean_f1" in EXPECTED[case]])
def test_golden_scores(case):
    score = pope.score(GOLDEN, answers(case))
    assert score.score == pytest.approx(100 * EXPECTED[case]["mean_f1"], abs=1e-9)
    for category in CATEGORIES:
        expected = {key: value for key, value in EXPECTED[case][category].items() if key != "parsed"}
        assert score.details[category] == pytest.approx(expected, abs=1e-12)
    assert other_warnings(score) == []
    assert (score.empty, score.unreadable) == {"phrases": (3, 54)}.get(case, (0, 0))


def test_golden_parsing():
    for row in EXPECTED["parse_table"]:
        assert parse_answer(row["in"]) == row["parsed"], row["in"]
    rows = answers("phrases")
    for category, start in (("adversarial", 0), ("popular", 20_000_000), ("random", 10_000_000)):
        said = [parse_answer(row["text"]) for row in rows if 0 < row["question_id"] - start < 10_000_000]
        assert said == EXPECTED["phrases"][category]["parsed"]


def test_all_no_has_no_official_number_and_fixed_gives_zero():
    score = pope.score(GOLDEN, answers("all_no"))
    assert score.score is None
    for category in CATEGORIES:
        raised = EXPECTED["all_no"][category]["raises"].split(":")[0]
        assert score.details[category]["raises"].startswith(raised)
    assert sum("--fixed" in warning and "no answer is a yes" in warning for warning in score.warnings) == 3
    fixed = pope.score(GOLDEN, answers("all_no"), fixed=True)
    assert fixed.score == 0.0 and fixed.details["random"]["accuracy"] == 0.5


def test_shuffled_answers_misreport_by_position_and_not_by_id():
    rows = answers("clean")
    random.Random(1).shuffle(rows)
    official, fixed = pope.score(GOLDEN, rows), pope.score(GOLDEN, rows, fixed=True)
    assert official.score < 100 * EXPECTED["clean"]["mean_f1"] - 10
    assert len(official.warnings) == 3
    assert all("joins by position" in warning for warning in official.warnings)
    assert fixed.score == pytest.approx(100 * EXPECTED["clean"]["mean_f1"]) and fixed.warnings == []


def test_another_release_of_the_random_labels_is_named(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "pope")
    path = data / "coco" / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    more = [{**rows[0], "question_id": number, "label": "no"} for number in range(1, 3001)]
    path.write_text("".join(json.dumps(row) + "\n" for row in more))
    score = pope.score(data, answers("clean"))
    assert any("2,910" in warning and warning.startswith("random") for warning in score.warnings)


def test_a_subset_of_the_questions_is_scored_by_id():
    part = answers("clean")[:42]  # adversarial only
    score = pope.score(GOLDEN, part, fixed=True)
    assert score.score == pytest.approx(100 * EXPECTED["clean"]["adversarial"]["f1"])
    assert "random" not in score.details and any(
        "of 120 questions have no answer" in warning for warning in score.warnings
    )
    assert pope.score_counts(pope.per_image_counts(GOLDEN, part).counts.sum(0)) == pytest.approx(score.score)


def test_a_missing_answer_shifts_the_others_and_warns():
    rows = answers("clean")
    score = pope.score(GOLDEN, rows[:5] + rows[6:])
    assert any("1 of 120 questions have no answer" in warning for warning in score.warnings)
    assert any(
        warning.startswith("adversarial: 41 answers, 42 labels; 36 answers, from position 6 on")
        for warning in score.warnings
    )


def test_answers_to_other_questions_are_an_error():
    rows = [{**row, "question_id": row["question_id"] + 500} for row in answers("clean")]
    with pytest.raises(DataError, match="120 of 120 answers match no question in .*llava_pope_test.jsonl"):
        pope.score(GOLDEN, rows)


def test_per_image_counts_reproduce_the_score():
    tallies = pope.per_image_counts(GOLDEN, answers("clean"))
    total = tallies.counts.sum(0)
    assert pope.score_counts(total) == pytest.approx(100 * EXPECTED["clean"]["mean_f1"])
    images = {json.loads(line)["image"] for line in (GOLDEN / "llava_pope_test.jsonl").open()}
    assert set(tallies.images) == images and total.sum() == 120


def test_command_line_prints_one_json_document_last(capsys):
    arguments = ["--benchmark", "pope", "--data", str(GOLDEN)]
    assert score_main([*arguments, "--answers", str(GOLDEN / "llava_answers_phrases.jsonl")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document) == {"benchmark", "score", "empty", "unreadable", "details"}
    assert document["benchmark"] == "pope"
    assert document["score"] == pytest.approx(100 * EXPECTED["phrases"]["mean_f1"])
    assert score_main([*arguments, "--answers", str(GOLDEN / "nothing.jsonl")]) == 1
    assert "no such answer file" in capsys.readouterr().err


def test_malformed_answers_are_rejected_with_file_and_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "text": "yes"}\n{"question_id": 2, "te\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:2: not a JSON line"):
        read_answers(path)


def test_reader_continues_after_malformed_lines(tmp_path):
    data = make_pope(tmp_path / "pope")
    path = data / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    lines[4] = json.dumps({"question_id": 5, "image": "x.png"})
    lines[6] = json.dumps({"question_id": [7], "image": "x.png", "text": "?"})
    lines[8] = "[]"
    lines[10] = json.dumps({"question_id": 11, "image": "x.png", "text": "half a \ud83d character"})
    path.write_text("\n".join(lines) + "\n")
    problems = []
    questions = list(pope.questions(data, problems))
    assert [problem.line for problem in problems] == [3, 5, 7, 9, 11]
    assert str(problems[0]).startswith(f"{path}:3: not a JSON line") and "'text'" in str(problems[1])
    assert len(questions) == 31 and [question.index for question in questions] == list(range(31))
    assert questions[2].line == 4


def test_errors_about_missing_files_name_content_and_source(tmp_path):
    with pytest.raises(DataError, match="Put the images into .*val2014"):
        pope.check(GOLDEN, list(pope.questions(GOLDEN, [])))
    data = make_pope(tmp_path / "pope")
    (data / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(DataError, match="coco_pope_popular.json: not found. Add the labels from POPE"):
        pope.score(data, answers("clean"))
    (data / "llava_pope_test.jsonl").unlink()
    with pytest.raises(
        DataError, match="llava_pope_test.jsonl: not found. Add the questions from eval.zip of LLaVA"
    ):
        pope.questions(data, [])
    with pytest.raises(DataError, match="no such folder"):
        pope.locate(tmp_path / "nowhere")
    assert pope.locate(tmp_path / "pope") == data


def test_duplicates_and_missing_images_are_counted(tmp_path):
    data = make_pope(tmp_path / "pope")
    path = data / "llava_pope_test.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    questions = list(pope.questions(data, []))
    gone = questions[0].image
    gone.unlink()
    warnings = check_questions("POPE", questions)
    assert "1 questions occur more than once (first: question_id 1)" in warnings[0]
    asking = sum(question.image == gone for question in questions)
    assert f"1 of 4 images are missing; {asking} questions use them" in warnings[1]
    shutil.rmtree(data / "val2014")
    (data / "val2014").mkdir()
    with pytest.raises(DataError, match="Put the images into .*val2014"):
        check_questions("POPE", questions)


def test_official_rule_is_the_default_of_the_command_line(capsys):
    command = [
        "--benchmark",
        "pope",
        "--data",
        str(GOLDEN),
        "--answers",
        str(GOLDEN / "llava_answers_all_no.jsonl"),
    ]
    scores = []
    for more in ([], ["--strict"], ["--fixed"]):
        assert score_main([*command, *more]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1])["score"])
    assert scores == [None, None, 0.0]


def test_labels_of_another_release_are_reported_before_inference(tmp_path):
    data = make_pope(tmp_path / "pope")
    questions = list(pope.questions(data, []))
    assert pope.check(data, questions) == []
    path = data / "coco" / "coco_pope_random.json"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text("".join(json.dumps({**row, "question_id": n}) + "\n" for n in range(5001, 8001)))
    warnings = pope.check(data, questions)
    assert "questions have no ground truth in" in warnings[0] and "2,910" in warnings[1]


def test_questions_without_image_are_counted(tmp_path):
    data = make_pope(tmp_path / "pope")
    path = data / "llava_pope_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[0]["image"], rows[1]["image"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (warning,) = pope.check(data, list(pope.questions(data, [])))
    assert f"2 of {len(rows)} questions have no image" in warning and "llava_pope_test.jsonl:1" in warning


def test_registry():
    assert "pope" in list_benchmarks()
    with pytest.raises(ValueError, match="unknown benchmark 'pop'; choose from .*pope"):
        get_benchmark("pop")


@pytest.mark.parametrize("form", ["NO", "No\n", "No</s>", "No!", "no\n\nThere is none", "**No**", "Nope"])
def test_no_that_the_official_rule_reads_as_yes_is_counted(form):
    rows = answers("clean")
    other = [{**row, "text": form if row["text"] == "No" else row["text"]} for row in rows]
    no = sum(row["text"] == "No" for row in rows)
    official, fixed = pope.score(GOLDEN, other), pope.score(GOLDEN, other, fixed=True)
    assert official.unreadable == no and official.details["popular"]["yes_ratio"] == 1
    assert fixed.score == pope.score(GOLDEN, rows).score and fixed.unreadable == no


def test_answers_that_are_neither_yes_nor_no_are_wrong_when_fixed():
    rows = answers("clean")
    rows[:3] = [
        {**row, "text": text} for row, text in zip(rows, ("Maybe", "a kite", "I am not sure."), strict=False)
    ]
    before = pope.score(GOLDEN, [*answers("clean")]).details["adversarial"]
    score = pope.score(GOLDEN, rows, fixed=True)
    found = score.details["adversarial"]
    assert score.unreadable == 3
    assert found["TP"] + found["TN"] < before["TP"] + before["TN"]


def test_empty_answers_are_wrong_when_fixed():
    rows = [{**row, "text": row["text"] if n % 3 else ""} for n, row in enumerate(answers("clean"))]
    score = pope.score(GOLDEN, rows, fixed=True)
    assert (score.empty, score.unreadable) == (40, 0)
    assert score.details["popular"]["yes_ratio"] < pope.score(GOLDEN, rows).details["popular"]["yes_ratio"]
    assert score.score < pope.score(GOLDEN, rows).score


def test_labels_may_have_ids_as_text(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "pope")
    for path in (data / "coco").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps({**row, "question_id": str(row["question_id"])}) + "\n" for row in rows)
        )
    for fixed in (False, True):
        theirs = pope.score(GOLDEN, answers("clean"), fixed).document()
        assert pope.score(data, answers("clean"), fixed).document() == theirs


@pytest.mark.parametrize("change", ["text", "image", "rotated", "swapped"])
@pytest.mark.parametrize("fixed", [False, True])
def test_labels_of_other_questions_with_the_same_ids_are_named(change, fixed, tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "pope")
    path, other = data / "coco" / "coco_pope_random.json", data / "coco" / "coco_pope_popular.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if change == "swapped":
        path.write_text(other.read_text())
    elif change == "rotated":
        ids = [row["question_id"] for row in rows]
        rows = [{**row, "question_id": one} for row, one in zip(rows[3:] + rows[:3], ids, strict=True)]
    else:
        rows = [{**row, change: "Is there a zebra?"} for row in rows]
    if change != "swapped":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings = pope.score(data, answers("clean"), fixed=fixed).warnings
    (warning,) = [one for one in warnings if one.startswith("random")]
    assert "with the label of another question" in warning


def test_labels_with_repeated_ids_are_refused(tmp_path):
    data = shutil.copytree(GOLDEN, tmp_path / "pope")
    path = data / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    with pytest.raises(DataError, match="coco_pope_random.json: .* occurs more than once"):
        pope.score(data, answers("clean"))
