"""MM-Vet: the evaluator's scores from stored grades, the submission, grading through an endpoint."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from helpers.stub_judge import stub_judge
from llava.eval import judge
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.judging import Judge
from llava.eval.benchmarks.mmvet import parse_grade
from llava.eval.score import main as score_main

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "mmvet"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
mmvet = get_benchmark("mmvet")


@pytest.fixture
def data(tmp_path) -> Path:
    """The golden folder without stored grades."""
    return shutil.copytree(GOLDEN, tmp_path / "mm-vet", ignore=shutil.ignore_patterns("toy_*"))


@pytest.mark.parametrize("runs", EXPECTED)
def test_golden_scores(runs, capsys):
    path = GOLDEN / f"toy_gpt-4-0613-grade-{runs}.json"
    assert score_main(["--benchmark", "mmvet", "--data", str(GOLDEN), "--answers", str(path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    details = document["details"]
    for part in ("capability", "integration"):
        expected = dict(EXPECTED[runs][part])
        listed = re.sub(r"np\.float64\(([^)]*)\)", r"\1", expected.pop("runs"))
        assert details["runs"] == ast.literal_eval(listed)
        assert document["score"] == details["total"] == expected.pop("total")
        assert details["std"] == expected.pop("std")
        assert details[part] == expected
    assert details["judge"] == "stub-judge" and details["warnings"] == []
    rows = mmvet.read_answers(path)
    total = mmvet.per_image_counts(GOLDEN, rows).counts.sum(0)
    assert mmvet.score_counts(total) == pytest.approx(document["score"], abs=0.06)


@pytest.mark.parametrize("name", ["llava_answers_toy.jsonl", "results_toy.json"])
def test_grades_next_to_the_answers_are_found_with_most_runs_first(name):
    score = mmvet.score(GOLDEN, mmvet.read_answers(GOLDEN / name))
    assert score.score == EXPECTED["5runs"]["capability"]["total"]
    assert score.details["grades"].endswith("5runs.json")


def test_submission_is_llavas():
    made = mmvet.submission(None, mmvet.read_answers(GOLDEN / "llava_answers_toy.jsonl"))
    theirs = (GOLDEN / "results_toy.json").read_bytes()
    assert made.files["mmvet_submission.json"] == theirs.rstrip(b"\n")


def test_ungraded_answers_have_no_score(data):
    score = mmvet.score(data, mmvet.read_answers(data / "llava_answers_toy.jsonl"))
    assert score.score is None and "llava.eval.judge" in score.warnings[0]


def test_grading_resumes(data, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers = data / "llava_answers_toy.jsonl"
    grades = data / "llava_answers_toy_some-judge-grade-2runs.json"

    def reply(body):
        number = len(stub.asked)
        return 400 if number == 9 else "not a number" if number == 2 else "0.5"

    with stub_judge(reply) as stub:
        command = [
            "--benchmark",
            "mmvet",
            "--data",
            str(data),
            "--answers",
            str(answers),
            "--model",
            "some_judge",
            "--runs",
            "2",
            "--base-url",
            stub.url,
        ]
        assert judge.main(command) == 1
        assert "rejected (400" in capsys.readouterr().err
        kept = json.loads(grades.read_text())
        assert sum(len(entry["score"]) for entry in kept.values()) == 7  # of eight replies one was no grade
        partial = mmvet.score(data, mmvet.read_answers(answers))
        assert partial.score is None and "grading is not finished" in partial.warnings[-1]
        assert judge.main(command) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["score"] == 50 and document["missing"] == 0
        assert len(stub.asked) == 9 + 48 - 7
        assert judge.main(command) == 0 and len(stub.asked) == 9 + 48 - 7
    first, second, third = stub.asked[:3]
    assert first["temperature"] == 0 and first["max_tokens"] == 3 and first["model"] == "some_judge"
    assert first["messages"][0]["content"].endswith(
        "What is y in the toy equation? | 1.5 <OR> 3/2 | I cannot tell. | "
    )
    assert second["messages"] == first["messages"] and third["temperature"] == 0.5
    assert third["messages"][0]["content"].endswith(" | \nPredict the correctness of the answer (digit): ")
    assert stub.headers[0]["Authorization"] == "Bearer secret"


def test_a_judge_without_numbers_gives_zero(data):
    def ask(messages, temperature, max_tokens):
        temperatures.append(temperature)
        return "hm", "m"

    temperatures: list[float] = []
    rows = mmvet.read_answers(data / "llava_answers_toy.jsonl")[:1]
    output = data / "x_j-grade-1runs.json"
    steps = list(mmvet.grade(data, rows, Judge("j", ask, "P "), output))
    assert temperatures == [0, 0.5, 1, 1.5, 2]
    assert [path for path, _ in steps] == [output] and not output.exists()
    stored = json.loads(steps[-1][1])
    assert list(stored) == ["v1_0"]
    entry = stored["v1_0"]
    assert entry["score"] == [0.0] and entry["model"] == ["m"] and entry["judge"] == "j"


def test_grades_are_numbers_from_0_to_1():
    table = {"0.3": 0.3, "1.0 | x": 1.0, "1.5": None, "": None, "good": None, "-0.1": None, "nan": None}
    assert {text: parse_grade(text) for text in table} == table


def test_endpoint_retries_transient_errors_only():
    replies = iter([429, 503, "yes"])
    with stub_judge(lambda body: next(replies)) as stub:
        endpoint = judge.Endpoint(stub.url, "m", seconds=0.001)
        assert endpoint.ask([{"role": "user", "content": "?"}], None, None) == ("yes", "stub")
        assert len(stub.asked) == 3 and "temperature" not in stub.asked[0]
        assert "Authorization" not in stub.headers[0]
    with pytest.raises(DataError, match="no answer after 2 attempts"):
        judge.Endpoint(stub.url, "m", seconds=0.001, attempts=2).ask([], None, None)


def test_reader_and_other_answers(data):
    questions = list(mmvet.questions(data, []))
    assert questions[0].text == "What is y in the toy equation?" and mmvet.max_new_tokens == 1024
    assert questions[0].image == data / "images" / "v1_0.png" and mmvet.check_truth(data, questions) == []
    with pytest.raises(DataError, match="1 of 1 answers match no question"):
        mmvet.score(data, [{"question_id": 999, "text": "x"}])
