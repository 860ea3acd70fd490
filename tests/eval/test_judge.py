"""`python -m llava.eval.judge`: which stored grades belong to a judge, and instructions from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.stub_judge import stub_judge
from llava.eval import judge, score

GOLDEN = Path(__file__).parents[1] / "data" / "benchmarks"
YES, NO = "{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 0}"


@pytest.fixture
def mmvet(tmp_path) -> Path:
    """MM-Vet's golden folder without stored grades."""
    return shutil.copytree(GOLDEN / "mmvet", tmp_path / "mm-vet", ignore=shutil.ignore_patterns("toy_*"))


@pytest.fixture
def msvd(tmp_path) -> Path:
    """MSVD's golden folder without stored replies."""
    ignored = shutil.ignore_patterns("judge_*")
    return shutil.copytree(GOLDEN / "video" / "MSVD_Zero_Shot_QA", tmp_path / "msvd", ignore=ignored)


def ask(capsys, benchmark: str, answers: Path, model: str, reply: str, *more: str):
    """Run the command against a stub; return (exit code, last JSON document, standard error, requests)."""
    command = ["--benchmark", benchmark, "--data", str(answers.parent), "--answers", str(answers)]
    with stub_judge(lambda body: reply) as stub:
        code = judge.main([*command, "--model", model, "--base-url", stub.url, *map(str, more)])
    out, err = capsys.readouterr()
    last = out.splitlines()[-1:]
    return code, json.loads(last[0]) if last and last[0].startswith("{") else None, err, stub.asked


def scored(capsys, benchmark: str, data: Path, answers: Path) -> dict:
    assert score.main(["--benchmark", benchmark, "--data", str(data), "--answers", str(answers)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_mmvet_grades_of_another_judge_are_not_used(mmvet, capsys):
    answers = mmvet / "llava_answers_toy.jsonl"
    code, document, _, asked = ask(capsys, "mmvet", answers, "judge-a", "1.0", "--runs", "2")
    assert (code, document["score"], document["judge"], len(asked)) == (0, 100, "judge-a", 48)
    code, document, _, asked = ask(capsys, "mmvet", answers, "judge-b", "0.0")
    assert (code, document["score"], len(asked)) == (0, 0, 24)
    assert document["judge"] == document["details"]["judge"] == "judge-b"
    document = scored(capsys, "mmvet", mmvet, answers)
    assert document["score"] == 100 and document["details"]["judge"] == "judge-a"
    (warning,) = document["details"]["warnings"]
    assert "judge-a-grade-2runs.json (judge judge-a) is used, not" in warning
    assert "judge-b-grade-1runs.json" in warning


def test_mmvet_grades_of_another_judge_are_not_continued(mmvet, capsys):
    answers, output = mmvet / "llava_answers_toy.jsonl", mmvet / "grades.json"
    given = ("--limit", "3", "--output", output)
    assert ask(capsys, "mmvet", answers, "judge-a", "1.0", *given)[0] == 0
    code, _, err, asked = ask(capsys, "mmvet", answers, "judge-b", "0.0", *given)
    assert code == 1 and asked == [] and "grades of judge 'judge-a', not of 'judge-b'" in err
    prompt = mmvet / "prompt.txt"
    prompt.write_text("Grade {this}:\n")
    code, _, err, asked = ask(capsys, "mmvet", answers, "judge-a", "0.0", *given, "--prompt", prompt)
    assert code == 1 and asked == [] and "'judge-a' with another instruction" in err
    assert ask(capsys, "mmvet", answers, "judge-a", "0.0", *given, "--runs", "2")[0] == 0
    stored = json.loads(output.read_text())
    assert len(stored) == 3 and all(entry["score"] == [1.0, 0.0] for entry in stored.values())


def test_mmvet_grades_without_a_record_belong_to_the_judge_in_their_name(mmvet, capsys):
    answers = mmvet / "results_toy.json"
    (mmvet / "llava_answers_toy.jsonl").rename(mmvet / "other.jsonl")
    stored = mmvet / "results_toy_gpt-4-0613-grade-1runs.json"
    shutil.copy(GOLDEN / "mmvet" / "toy_gpt-4-0613-grade-1runs.json", stored)
    code, document, _, asked = ask(capsys, "mmvet", answers, "gpt-4-0613", "0.0")
    assert code == 0 and asked == [] and document["judge"] == "stub-judge"
    code, _, err, asked = ask(capsys, "mmvet", answers, "judge-b", "0.0", "--output", stored)
    assert code == 1 and asked == [] and "judge 'gpt-4-0613'" in err


def test_video_replies_of_another_judge_are_not_used(msvd, capsys):
    answers = msvd / "merge.jsonl"
    code, document, _, asked = ask(capsys, "msvd", answers, "judge-a", YES)
    assert (code, document["score"], document["judge"], len(asked)) == (0, 100, "judge-a", 24)
    code, document, err, asked = ask(capsys, "msvd", answers, "judge-b", NO)
    assert code == 1 and asked == [] and "merge_judged: contains grades of judge 'judge-a'" in err
    other = msvd / "replies_b"
    code, document, _, asked = ask(capsys, "msvd", answers, "judge-b", NO, "--output", other)
    assert (code, document["score"], document["judge"], len(asked)) == (0, 0, "judge-b", 24)
    assert scored(capsys, "msvd", msvd, answers)["details"]["judge"] == "judge-a"
    assert scored(capsys, "msvd", msvd, other)["details"]["judge"] == "judge-b"


def test_video_replies_without_a_record_are_of_an_unknown_judge(msvd, capsys):
    answers, folder = msvd / "merge.jsonl", msvd / "merge_judged"
    folder.mkdir()
    for line in answers.read_text().splitlines()[:20]:
        row = json.loads(line)
        reply = [{"pred": "yes", "score": 4}, {"q": row["question"], "a": row["answer"], "pred": row["pred"]}]
        (folder / f"{row['id']}.json").write_text(json.dumps(reply))
    assert scored(capsys, "msvd", msvd, answers)["details"]["judge"] == "unknown"
    code, _, err, asked = ask(capsys, "msvd", answers, "judge-a", NO)
    assert code == 1 and asked == [] and f"or --output {folder} to add to these" in err
    code, document, err, asked = ask(capsys, "msvd", answers, "judge-a", NO, "--output", folder)
    assert code == 0 and len(asked) == 4 and document["judge"] == "judge-a, unknown"
    assert "of several judges and not comparable" in err


def test_several_stored_replies_are_named(msvd, capsys):
    answers = msvd / "merge.jsonl"
    shutil.copy(GOLDEN / "video" / "MSVD_Zero_Shot_QA" / "judge_replies.json", msvd)
    assert ask(capsys, "msvd", answers, "judge-a", YES)[1]["score"] == 100
    document = scored(capsys, "msvd", msvd, answers)
    assert document["score"] == 100
    assert (
        "merge_judged (judge judge-a) is used, not judge_replies.json" in document["details"]["warnings"][0]
    )


def test_only_the_replies_of_this_judge_are_scored(msvd, capsys):
    shutil.copy(GOLDEN / "video" / "MSVD_Zero_Shot_QA" / "judge_replies.json", msvd)
    document = ask(capsys, "msvd", msvd / "merge.jsonl", "judge-a", YES, "--limit", "3")[1]
    assert document["details"]["judged"] == 3 and document["judge"] == "judge-a"
    code, document, err, _ = ask(capsys, "msvd", msvd / "merge.jsonl", "b", "?", "--output", msvd / "b")
    assert code == 1 and document["details"]["judged"] == 0 and document["missing"] == 24


def test_an_instruction_may_contain_braces(msvd, capsys):
    prompt = msvd / "prompt.txt"
    text = "{'pred': 'yes'} {0} {} {{x}} {unknown}: {question} / {answer} / {prediction} {"
    prompt.write_text(text)
    code, document, _, asked = ask(capsys, "msvd", msvd / "merge.jsonl", "judge-a", YES, "--prompt", prompt)
    assert code == 0 and document["missing"] == 0
    sent = asked[0]["messages"][1]["content"]
    assert sent == "{'pred': 'yes'} {0} {} {{x}} {unknown}: is the goat red? / no / Yes, it is. {"


def test_an_instruction_needs_its_placeholders(msvd, capsys):
    prompt = msvd / "prompt.txt"
    prompt.write_text("Compare {answer}.")
    code, _, err, asked = ask(capsys, "msvd", msvd / "merge.jsonl", "judge-a", YES, "--prompt", prompt)
    assert code == 1 and asked == []
    assert f"{prompt}: missing placeholder {{question}}, {{prediction}}" in err
