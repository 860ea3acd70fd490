"""The state of every run below a folder, whatever else is in it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llava.eval import status
from llava.eval.benchmarks import Answer, DataIssue, Question
from llava.eval.store.answer_file import AnswerFile
from llava.eval.store.provenance import Configuration
from llava.eval.store.run_record import FAILURES, RUN, RunRecord, beside, read_failures, update_failures

QUESTIONS = [
    Question(number, f"q{number}", None, f"What {number}?", file="q.jsonl", line=number + 1)
    for number in range(9)
]
PRUNING = (("method", "vispruner"), ("tokens", 64), ("important_ratio", 0.5))
FULL = (("method", "none"), ("tokens", None))
BASE = Configuration("llava", "w", "q", PRUNING, "vicuna_v1", "float32", "float32", "sdpa", "cpu", 16)


def record(configuration: Configuration = BASE, asked: int = 9, **more) -> RunRecord:
    command = ["llava.eval.run", "--benchmark", "pope", "--output", "/some where/out"]
    return RunRecord(
        command, {}, "pope", asked, 0, configuration.hash(), configuration.flat(), "2026", **more
    )


def answered(path: Path, indices, configuration: Configuration = BASE) -> Path:
    with AnswerFile(path, QUESTIONS, configuration) as file:
        file.write([Answer(index, f"text {index}", 64) for index in indices])
    return path


def made(folder: Path, indices=range(9), configuration: Configuration = BASE) -> Path:
    record(configuration).write(folder / RUN)
    return answered(folder / "answers.jsonl", indices, configuration)


def states(folder: Path, capsys) -> dict[str, dict]:
    assert status.main([str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert status.main([str(folder)]) == 0  # the table of the same
    text, err = capsys.readouterr()
    assert not err and "Traceback" not in text
    runs = json.loads(out)["runs"]
    assert f"{len(runs)} runs: " in text or text == f"{folder}: no runs\n"
    return {os.path.relpath(one["path"], folder): one for one in runs}


def test_states_of_runs_with_a_record(tmp_path, capsys):
    made(tmp_path / "finished")
    made(tmp_path / "interrupted", [3, 4, 0])
    made(tmp_path / "unordered", [*range(1, 9), 0])
    made(tmp_path / "nothing", [])
    made(tmp_path / "failed", range(7))
    issues = [DataIssue("q.jsonl", line, "no image") for line in (8, 9)]
    update_failures(tmp_path / "failed" / FAILURES, QUESTIONS, [], set(range(7)), issues)
    made(tmp_path / "stale")
    update_failures(tmp_path / "stale" / FAILURES, QUESTIONS, [], set(range(7)), issues)
    truncated = made(tmp_path / "truncated")
    truncated.write_bytes(truncated.read_bytes()[:-9])
    record().write(tmp_path / "shards" / RUN)
    for rank in range(2):
        answered(tmp_path / "shards" / f"2_{rank}.jsonl", range(rank, 9, 2))
    found = states(tmp_path, capsys)
    assert {name: (one["state"], one["answered"]) for name, one in found.items()} == {
        "finished": ("finished", 9),
        "interrupted": ("interrupted", 3),
        "unordered": ("interrupted", 9),
        "nothing": ("interrupted", 0),
        "failed": ("failed questions", 7),
        "stale": ("finished", 9),
        "truncated": ("interrupted", 8),
        "shards": ("interrupted", 9),
    }
    assert {one["asked"] for one in found.values()} == {9} and found["failed"]["failed"] == 2
    assert found["finished"]["command"] is None
    said = found["failed"]["command"]
    assert said.endswith(f"-m llava.eval.run --benchmark pope --output {tmp_path / 'failed'})")


def test_a_run_in_progress(tmp_path, capsys):
    made(tmp_path)
    with AnswerFile(tmp_path / "answers.jsonl", QUESTIONS, BASE):
        assert states(tmp_path, capsys)["."]["state"] == "running"


def test_files_of_the_question_loops(tmp_path, capsys):
    for chunk in range(2):
        path = answered(tmp_path / f"2_{chunk}.jsonl", range(4 * chunk, 4 * chunk + 4))
        record(asked=4 + chunk).write(beside(path, RUN))
    record().write(tmp_path / "gone.run.json")
    (tmp_path / "merge.jsonl").write_bytes(
        b"".join(path.read_bytes() for path in sorted(tmp_path.glob("2_?.jsonl")))
    )
    found = states(tmp_path, capsys)
    assert {name: (one["state"], one["answered"], one["asked"]) for name, one in found.items()} == {
        "2_0.jsonl": ("finished", 4, 4),
        "2_1.jsonl": ("interrupted", 4, 5),
        "gone.jsonl": ("interrupted", 0, 9),
        "merge.jsonl": ("unknown", 8, None),
    }


def test_folders_of_earlier_versions(tmp_path, capsys):
    for name, questions in (("finished", 9), ("failed", 11)):
        answered(tmp_path / name / "answers.jsonl", range(9))
        card = {"benchmark": "pope", "score": 50.0, "questions": questions, "config": BASE.hash()}
        (tmp_path / name / "score.json").write_text(json.dumps(card))
    answered(tmp_path / "unknown" / "answers.jsonl", range(9))
    answered(tmp_path / "unordered" / "answers.jsonl", [2, 1])
    answered(tmp_path / "shards" / "2_0.jsonl", range(3))
    found = states(tmp_path, capsys)
    assert {name: one["state"] for name, one in found.items()} == {
        "finished": "finished",
        "failed": "failed questions",
        "unknown": "unknown",
        "unordered": "interrupted",
        "shards": "interrupted",
    }
    assert found["failed"]["failed"] == 2 and found["finished"]["score"] == 50.0
    assert "run the original command" in found["shards"]["notes"][-1] and found["shards"]["model"] == "llava"


def test_another_configuration_than_its_neighbors(tmp_path, capsys):
    for tokens in (32, 64, 128):
        pruning = (PRUNING[0], ("tokens", tokens), PRUNING[2])
        made(tmp_path / f"{tokens}", configuration=dataclasses.replace(BASE, pruning=pruning))
    made(tmp_path / "full", configuration=dataclasses.replace(BASE, pruning=FULL))
    made(tmp_path / "half", configuration=dataclasses.replace(BASE, dtype="float16"))
    made(tmp_path / "other", configuration=dataclasses.replace(BASE, model="llava-13b", weights="v"))
    found = states(tmp_path, capsys)
    assert found.pop("half")["differs"] == ['dtype is "float16", "float32" in other runs']
    assert not any(one["differs"] for one in found.values())


def test_foreign_answers(tmp_path, capsys):
    made(tmp_path / "two", range(5))
    other = answered(tmp_path / "x.jsonl", range(5, 9), dataclasses.replace(BASE, seed=1))
    with (tmp_path / "two" / "answers.jsonl").open("ab") as file:
        file.write(other.read_bytes())
    other.unlink()
    (tmp_path / "llavas").mkdir()
    row = {
        "question_id": 1,
        "prompt": "?",
        "text": "no",
        "answer_id": "a",
        "model_id": "llava",
        "metadata": {},
    }
    (tmp_path / "llavas" / "answers.jsonl").write_text(json.dumps(row) + "\n")
    made(tmp_path / "grown")
    with (tmp_path / "grown" / "answers.jsonl").open("ab") as file:
        file.write(json.dumps(row).encode() + b"\n")
    found = states(tmp_path, capsys)
    assert {one["state"] for one in found.values()} == {"foreign answers"} and len(found) == 3
    assert found["two"]["notes"] == ["4 answers of another configuration"]
    assert found["grown"]["notes"] == [f"{tmp_path}/grown/answers.jsonl:10: not an answer of this program"]


HOSTILE = {
    "empty": b"",
    "zeros": b"\0" * 5000,
    "deep": b"[" * 100_000,
    "list": b"[1, 2]",
    "text": "è così\n".encode("latin-1") * 3,
    "wrong": b'{"command": 5, "benchmark": [], "score": "1", "question_id": {}, "text": 0, "metadata": []}\n',
    "large": b'{"benchmark": "pope", "score": 1' + b"0" * 500 + b"}",
    "nan": b'{"benchmark": "pope", "score": NaN, "question_id": 1, "text": "", "metadata": {"index": "x"}}\n',
    "odd": b'{"question_id": 1, "text": "", "metadata": {"index": -5, "config": "\\ud800"}}\n' * 2,
    "huge": b'{"question_id": 1, "text": "' + b"x" * 3_000_000,
}


@pytest.mark.parametrize(
    "name",
    ["answers.jsonl", "2_0.jsonl", RUN, FAILURES, "score.json", "server.json", "x.run.json", "x.jsonl"],
)
def test_nothing_in_a_folder_stops_the_report(tmp_path, capsys, name):
    made(tmp_path / "good")
    for kind, content in HOSTILE.items():
        if name != "answers.jsonl":
            made(tmp_path / kind)
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name).write_bytes(content)
    os.mkfifo(made(tmp_path / "pipe").with_name("5_0.jsonl"))
    for kind in ("pipe", "folder", "link", "loop"):
        folder = tmp_path / f"a {kind}"
        folder.mkdir()
        if kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("nowhere" if kind == "link" else name)
    (tmp_path / "circle").symlink_to(tmp_path)
    found = states(tmp_path, capsys)
    assert (found["good"]["state"], found["good"]["answered"]) == ("finished", 9)
    assert all(one["state"] in status.STATES for one in found.values())


def test_a_name_that_is_not_text(tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    made(folder)
    assert len(states(tmp_path, capsys)) == 1


def test_a_command_is_never_what_the_file_says_only(tmp_path, capsys):
    made(tmp_path, [1])
    document = json.loads((tmp_path / RUN).read_text())
    document["command"][1] = "; rm -rf /"
    document["environment"] = {"VISPRUNER_TOKENS": "$(x)", "LD_PRELOAD": "y", "VISPRUNER_A; x": "z"}
    (tmp_path / RUN).write_text(json.dumps(document))
    said = states(tmp_path, capsys)["."]["command"]
    assert (
        "'; rm -rf /'" in said
        and "VISPRUNER_TOKENS='$(x)'" in said
        and "PRELOAD" not in said
        and "z" not in said
    )
    document["command"][0] = "http.server"
    (tmp_path / RUN).write_text(json.dumps(document))
    assert states(tmp_path, capsys)["."]["command"] is None


def test_the_command_follows_a_folder_that_was_moved(tmp_path, capsys):
    """With the recorded folder, it would start from the beginning somewhere else."""
    made(tmp_path / "a" / "run", [1])
    sweep = ["llava.eval.sweep", "--output", "/some where/sweep", "--tokens", "64"]
    for name in ("none", "random-64"):
        answers = str(Path("/some where/sweep/pope", name, "answers.jsonl"))
        one = dataclasses.replace(record(), command=sweep, answers=answers)
        one.write(tmp_path / "b" / "pope" / ("out" if name == "none" else name) / RUN)
    loop = ["llava.eval.model_vqa_loader", "--answers-file", "/some where/q.jsonl", "--seed", "1"]
    dataclasses.replace(record(), command=loop).write(tmp_path / "c" / f"q.{RUN}")
    found = states(tmp_path, capsys)
    said = {name: one["command"] and one["command"].split("llava.eval.")[1] for name, one in found.items()}
    assert said == {
        "a/run": f"run --benchmark pope --output {tmp_path}/a/run)",
        "b/pope/out": None,
        "b/pope/random-64": f"sweep --tokens 64 --output {tmp_path}/b)",
        "c/q.jsonl": f"model_vqa_loader --seed 1 --answers-file {tmp_path}/c/q.jsonl)",
    }


def test_a_question_that_is_answered_twice(tmp_path, capsys):
    """The command that resumes refuses such a file; a merged file beside its shards is fine."""
    for name in ("run", "shards"):
        made(tmp_path / name, range(8))
    path = tmp_path / "run" / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[3])
    (tmp_path / "shards" / "2_0.jsonl").write_bytes((tmp_path / "shards" / "answers.jsonl").read_bytes())
    found = states(tmp_path, capsys)
    assert found["run"]["state"] == "unreadable" and found["run"]["command"] is None
    assert found["run"]["notes"] == [f"{path}:9: a second answer to a question. Delete one of them"]
    assert (found["shards"]["state"], found["shards"]["notes"]) == ("interrupted", [])


def test_the_settings_of_a_sweep_share_one_line(tmp_path, capsys):
    for number in range(5):
        folder = tmp_path / "sweep" / "pope" / f"random-{number}"
        command = ["llava.eval.sweep", "--output", str(tmp_path)]
        one = dataclasses.replace(record(), command=command, answers=str(folder / "answers.jsonl"))
        one.write(folder / RUN)
    assert status.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("llava.eval.sweep") == 1
    assert "to resume sweep/pope/random-0, sweep/pope/random-1, sweep/pope/random-2 and 2 more:" in text


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    assert status.main([str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not states(tmp_path, capsys)


def test_failures_of_other_questions_are_dropped(tmp_path):
    path = tmp_path / FAILURES
    update_failures(
        path, QUESTIONS, [DataIssue("q.jsonl", 99, "not JSON")], {5}, [DataIssue("q.jsonl", 4, "why")]
    )
    assert [(one.index, one.question_id, one.line) for one in read_failures(path)] == [
        (None, None, 99),
        (3, "q3", 4),
    ]
    others = [dataclasses.replace(question, question_id=f"other {question.index}") for question in QUESTIONS]
    update_failures(path, others, [], set(), [])
    assert not path.exists()
    path.mkdir()  # whatever it is, it does not stop a run
    assert read_failures(path) == []
    update_failures(path, QUESTIONS, [], set(), [DataIssue("q.jsonl", 4, "why")])
    assert path.is_dir()
