"""Video sets: official tallies of stored replies, what is offline, judging through an endpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.stub_judge import stub_judge
from llava.eval import judge
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.video import parse_reply, tally
from llava.eval.score import main as score_main

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "video"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
msvd = get_benchmark("msvd")


@pytest.mark.parametrize("folder", EXPECTED)
@pytest.mark.parametrize("name", ["merge.jsonl", "judge_replies.json"])
def test_golden_scores(folder, name, capsys):
    data = GOLDEN / f"{folder}_Zero_Shot_QA"
    command = ["--benchmark", folder.lower(), "--answers", str(data / name), "--data"]
    for where in (data, GOLDEN):
        assert score_main([*command, str(where)]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["score"] == pytest.approx(100 * EXPECTED[folder]["accuracy"], abs=1e-9)
        found = {key: document["details"][key] for key in EXPECTED[folder]}
        assert found == pytest.approx(EXPECTED[folder], abs=1e-9)
    benchmark = get_benchmark(folder.lower())
    total = benchmark.per_image_counts(data, benchmark.read_answers(data / name)).counts.sum(0)
    assert benchmark.score_counts(total) == pytest.approx(document["score"])


def test_tally_of_invalid_replies():
    assert tally([{"pred": "yes, mostly", "score": 4.8}, {"pred": "Not sure", "score": "3"}]) == {
        "yes_count": 1,
        "no_count": 1,
        "accuracy": 0.5,
        "average_score": 3.5,
    }
    odd = [{"pred": "maybe", "score": 2}, {"pred": "yes", "score": "2.5"}, {"pred": "yes"}, {"score": 3}, {}]
    assert tally(odd) == {"yes_count": 0, "no_count": 0, "accuracy": None, "average_score": 1.0}


@pytest.fixture
def data(tmp_path) -> Path:
    """The golden set without stored replies."""
    return shutil.copytree(
        GOLDEN / "MSVD_Zero_Shot_QA", tmp_path / "set", ignore=shutil.ignore_patterns("judge_*")
    )


def test_without_a_judge_there_are_only_offline_matches(data):
    rows = [
        {"question_id": "v_toyclip0_10_20_0", "text": "No."},
        {"question_id": "v_toyclip0_10_20_1", "text": "2"},
    ]
    score = msvd.score(data, rows)
    assert score.score is None and "not comparable with papers" in score.warnings[-1]
    assert score.details["offline_exact_match"] == 50 and score.details["offline_normalised_match"] == 100


def test_wrong_answers_stored_with_predictions_are_reported(data):
    path = data / "merge.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answer"] = "something else"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = msvd.score(data, msvd.read_answers(path))
    assert any(
        "1 of 24 answers are stored with another correct answer" in warning for warning in score.warnings
    )
    path.write_text("")
    with pytest.raises(DataError, match="merge.jsonl: contains no answers"):
        msvd.read_answers(path)
    path.write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match="merge.jsonl:1: missing key 'question_id'"):
        msvd.read_answers(path)
    with pytest.raises(DataError, match="1 of 1 answers match no question"):
        msvd.score(data, [{"question_id": "v_other", "text": "x"}])


def test_judging_resumes(data, capsys):
    answers = data / "merge.jsonl"

    def reply(body):
        number = len(stub.asked)
        return 401 if number == 12 else "I think yes" if number < 6 else "{'pred': 'yes', 'score': 4}"

    with stub_judge(reply) as stub:
        command = [
            "--benchmark",
            "msvd",
            "--data",
            str(data),
            "--answers",
            str(answers),
            "--base-url",
            stub.url,
        ]
        assert judge.main(command) == 1 and "rejected (401" in capsys.readouterr().err
        assert len(list((data / "merge_judged").iterdir())) == 6  # the first could not be read, five times
        assert judge.main(command) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["score"] == 100 and document["details"]["average_score"] == 4
        assert len(stub.asked) == 12 + 24 - 6 and stub.asked[0]["model"] == "gpt-3.5-turbo"
        roles = [message["role"] for message in stub.asked[0]["messages"]]
        assert roles == ["system", "user"] and "temperature" not in stub.asked[0]
        assert (
            "Question: is the goat red?\nCorrect Answer: no\nPredicted Answer: Yes, it is.\n"
            in stub.asked[0]["messages"][1]["content"]
        )
    stored = json.loads((data / "merge_judged" / "v_toyclip0_10_20_0.json").read_text())
    assert stored[0] == {"pred": "yes", "score": 4}
    assert stored[1] == {
        "q": "is the goat red?",
        "a": "no",
        "pred": "Yes, it is.",
        "judge": "gpt-3.5-turbo",
        "prompt": "built-in",
    }
    assert msvd.score(data, msvd.read_answers(data / "merge_judged")).score == 100


def test_replies_are_dictionaries():
    assert parse_reply(" {'pred': 'no', 'score': 1}\n") == {"pred": "no", "score": 1}
    assert parse_reply("yes") is parse_reply("[1]") is parse_reply("{'pred': __import__('os')}") is None


def test_reader_finds_videos_by_their_extensions(data):
    (data / "videos").mkdir()
    (data / "videos" / "toyclip0_10_20.avi").touch()
    questions = list(msvd.questions(data, []))
    assert questions[0].image.name == "toyclip0_10_20.avi" and questions[0].text == "is the goat red?"
    assert any(question.image.suffix == ".mp4" for question in questions)
    assert msvd.check_truth(data, questions) == [] and msvd.max_new_tokens == 1024
    activity = get_benchmark("activitynet")
    first = next(activity.questions(GOLDEN / "Activitynet_Zero_Shot_QA", []))
    assert first.image.parent.name == "all_test" and first.image.name == "v_toyACT00000.mp4"


def test_files_with_1000_questions_come_first_and_names_stay_inside(data):
    asked = json.loads((data / "test_q_1k.json").read_text())
    (data / "test_q.json").write_text(json.dumps(asked * 2))
    (data / "test_a.json").write_text((data / "test_a_1k.json").read_text())
    assert len(list(msvd.questions(data, []))) == len(asked)
    assert [path.name for path in msvd.truth_paths(data)] == ["test_a_1k.json", "test_q_1k.json"]
    (data / "test_q_1k.json").unlink()
    assert len(list(msvd.questions(data, []))) == 2 * len(asked)
    assert msvd.truth_paths(data)[0].name == "test_a.json"
    asked[0]["video_name"] = "../../elsewhere"
    (data / "test_q.json").write_text(json.dumps(asked))
    problems = []
    rest = list(msvd.questions(data, problems))
    assert len(rest) == len(asked) - 1 and [one.index for one in rest] == list(range(len(rest)))
    assert "is outside the image folder" in str(problems[0])


def test_exact_matches_per_video(data):
    answers = msvd.read_answers(data / "merge.jsonl")
    counts = msvd.offline_counts(data, answers)
    assert counts.counts[:, 1].sum() == len(answers)
    share = 100 * counts.counts[:, 0].sum() / len(answers)
    assert share == pytest.approx(msvd.score(data, answers).details["offline_exact_match"])
