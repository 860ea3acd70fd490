"""Answer files of several processes: every question exactly once, whoever asked it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llava.eval.benchmarks.base import DataIssue, Question
from llava.eval.store.answer_file import Answer, AnswerFile, AnswerFileError
from llava.eval.store.provenance import Configuration
from llava.eval.store.shards import Parts, Report, write_atomically

QUESTIONS = [Question(index, index // 2, Path(f"{index // 3}.png"), f"{index}?") for index in range(9)]
MADE_BY = Configuration(
    model="m",
    weights="w",
    questions="q",
    pruning=(("method", "none"), ("tokens", None)),
    conv_mode="vicuna_v1",
    dtype="float32",
    tower_dtype="float32",
    attn_implementation="sdpa",
    device="cpu",
    max_new_tokens=4,
)


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path / "run", QUESTIONS, MADE_BY)


def answer(path: Path, indices: list[int], made_by: Configuration = MADE_BY) -> None:
    with AnswerFile(path, QUESTIONS, made_by, "m") as file:
        file.write([Answer(index, f"answer {index}", 1) for index in indices])


def merged(parts: Parts) -> list[int]:
    return [json.loads(line)["metadata"]["index"] for line in parts.whole.read_text().splitlines()]


def test_files_of_any_number_of_processes_make_one_whole(parts):
    answer(parts.whole, [8, 0])
    answer(parts.path(1, 2), [3, 2])
    answer(parts.path(2, 3), [1, 7, 5])
    with parts.path(2, 3).open("ab") as file:
        file.write(b'{"question_id": 3, "pro')  # killed while it wrote
    found = parts.scan()
    parts.check(found)
    assert sorted(found.where) == [0, 1, 2, 3, 5, 7, 8]
    assert found.elsewhere(parts.path(1, 2)) == {0, 1, 5, 7, 8}
    answer(parts.path(0, 2), [4, 6])
    parts.path(0, 2).write_bytes(parts.path(0, 2).read_bytes()[:-1])  # all but the newline
    parts.merge(parts.scan())
    assert merged(parts) == list(range(9))
    before = parts.whole.stat().st_mtime_ns
    again = parts.scan()
    assert not again.elsewhere(parts.whole)
    parts.merge(again)
    assert parts.whole.stat().st_mtime_ns == before


def test_a_whole_beside_its_parts_is_not_answered_twice(parts):
    answer(parts.path(0, 2), [0, 1, 2])
    parts.merge(parts.scan())  # incomplete: as after a picture that cannot be read
    parts.check(parts.scan())
    assert merged(parts) == [0, 1, 2]


def test_doubled_and_foreign_answers_are_counted(parts):
    answer(parts.path(0, 2), [0, 1, 2])
    answer(parts.path(1, 2), [2, 1, 3])
    line = json.loads(parts.path(0, 2).read_text().splitlines()[0])
    foreign = {**line, "prompt": "What else?"}
    with parts.path(0, 2).open("a") as file:
        file.write(json.dumps(foreign) + "\n")
        file.write(json.dumps({**line, "metadata": {**line["metadata"], "index": 70}}) + "\n")
    with pytest.raises(AnswerFileError) as caught:
        parts.merge(parts.scan())
    said = str(caught.value)
    assert "2 questions are answered twice (first: question 1 in " in said
    assert "2_1.jsonl:1 and 2_0.jsonl" in said
    assert "2 answers are to questions that are not asked" in said and "2_0.jsonl:4" in said
    assert not parts.whole.exists()


def test_one_line_twice_in_one_file_is_doubled(parts):
    answer(parts.path(0, 2), [0])
    parts.path(0, 2).write_bytes(2 * parts.path(0, 2).read_bytes())
    with pytest.raises(AnswerFileError, match="1 questions are answered twice"):
        parts.check(parts.scan())


def test_parts_of_another_configuration_are_refused(parts):
    answer(parts.path(0, 2), [0], dataclasses.replace(MADE_BY, seed=1))
    with pytest.raises(AnswerFileError, match="seed is 1 there, 0 here"):
        parts.scan()


def test_other_files_of_the_folder_are_left_alone(parts):
    parts.folder.mkdir()
    for name in ("score.json", "2_0.jsonl.bak", "x2_0.jsonl", "2_0.report.json"):
        (parts.folder / name).write_text("something else")
    assert parts.files() == [] and not parts.scan().where and parts.reports(2) == {}


def test_a_run_with_another_number_of_processes_is_noticed_while_it_is_at_work(parts):
    with AnswerFile(parts.path(0, 2), QUESTIONS, MADE_BY, "m") as file:
        file.write([Answer(0, "yes", 1)])
        parts.check_free(2)  # one of our own company
        for size, alone in ((1, False), (3, False), (2, True)):
            with pytest.raises(AnswerFileError, match="2_0.jsonl: another process is writing"):
                parts.check_free(size, alone)
    parts.check_free(3)


def test_reports_are_of_this_configuration(parts):
    report = Report(MADE_BY.hash(), 3, 1.5, [DataIssue("q.jsonl", 4, "no picture")], [3])
    parts.write_report(1, 2, report)
    assert parts.reports(2) == {1: report} and parts.reports(3) == {}
    parts.write_report(1, 2, dataclasses.replace(report, config="another"))
    assert parts.reports(2) == {}
    parts.clear_report(1, 2)
    parts.clear_report(1, 2)  # nothing left to clear


def test_a_file_changes_at_one_instant(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]
