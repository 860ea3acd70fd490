"""Answer files of several processes: every question exactly once, whoever asked it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llava.eval.benchmarks import Answer
from llava.eval.benchmarks.base import DataIssue, Question
from llava.eval.store.answer_file import AnswerFile, AnswerFileError
from llava.eval.store.provenance import Configuration
from llava.eval.store.shards import ShardReport, Shards

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
def shards(tmp_path) -> Shards:
    return Shards(tmp_path / "run", QUESTIONS, MADE_BY)


def answer(path: Path, indices: list[int], made_by: Configuration = MADE_BY) -> None:
    with AnswerFile(path, QUESTIONS, made_by) as file:
        file.write([Answer(index, f"answer {index}", 1) for index in indices])


def merged_indices(shards: Shards) -> list[int]:
    return [json.loads(line)["metadata"]["index"] for line in shards.merged.read_text().splitlines()]


def test_files_of_any_number_of_processes_make_one_whole(shards):
    answer(shards.merged, [8, 0])
    answer(shards.path(1, 2), [3, 2])
    answer(shards.path(2, 3), [1, 7, 5])
    with shards.path(2, 3).open("ab") as file:
        file.write(b'{"question_id": 3, "pro')  # killed while it wrote
    found = shards.scan()
    assert sorted(found) == [0, 1, 2, 3, 5, 7, 8]
    assert found.elsewhere(shards.path(1, 2)) == {0, 1, 5, 7, 8}
    answer(shards.path(0, 2), [4, 6])
    shards.path(0, 2).write_bytes(shards.path(0, 2).read_bytes()[:-1])  # all but the newline
    shards.merge(shards.scan())
    assert merged_indices(shards) == list(range(9))
    before = shards.merged.stat().st_mtime_ns
    again = shards.scan()
    assert not again.elsewhere(shards.merged)
    shards.merge(again)
    assert shards.merged.stat().st_mtime_ns == before


def test_a_whole_beside_its_parts_is_not_answered_twice(shards):
    answer(shards.path(0, 2), [0, 1, 2])
    shards.merge(shards.scan())  # incomplete: as after a picture that cannot be read
    shards.scan()
    assert merged_indices(shards) == [0, 1, 2]


def test_doubled_and_foreign_answers_are_counted(shards):
    answer(shards.path(0, 2), [0, 1, 2])
    answer(shards.path(1, 2), [2, 1, 3])
    line = json.loads(shards.path(0, 2).read_text().splitlines()[0])
    foreign = {**line, "prompt": "What else?"}
    with shards.path(0, 2).open("a") as file:
        file.write(json.dumps(foreign) + "\n")
        file.write(json.dumps({**line, "metadata": {**line["metadata"], "index": 70}}) + "\n")
    with pytest.raises(AnswerFileError) as caught:
        shards.scan()
    said = str(caught.value)
    assert "2 questions are answered twice (first: question 1 in " in said
    assert "2_1.jsonl:1 and 2_0.jsonl" in said
    assert "2 answers are to questions that are not asked" in said and "2_0.jsonl:4" in said
    assert not shards.merged.exists()


def test_one_line_twice_in_one_file_is_doubled(shards):
    answer(shards.path(0, 2), [0])
    shards.path(0, 2).write_bytes(2 * shards.path(0, 2).read_bytes())
    with pytest.raises(AnswerFileError, match="1 questions are answered twice"):
        shards.scan()


def test_parts_of_another_configuration_are_refused(shards):
    answer(shards.path(0, 2), [0], dataclasses.replace(MADE_BY, seed=1))
    with pytest.raises(AnswerFileError, match="seed is 1 in the file, 0 in this run"):
        shards.scan()


def test_other_files_of_the_folder_are_left_alone(shards):
    shards.folder.mkdir()
    for name in ("score.json", "2_0.jsonl.bak", "x2_0.jsonl", "2_0.report.json"):
        (shards.folder / name).write_text("something else")
    assert shards.files() == [] and not shards.scan() and shards.reports(2) == {}


def test_a_run_with_another_number_of_processes_is_noticed_while_it_is_at_work(shards):
    with AnswerFile(shards.path(0, 2), QUESTIONS, MADE_BY) as file:
        file.write([Answer(0, "yes", 1)])
        shards.check_free(2)  # one of our own company
        for size, alone in ((1, False), (3, False), (2, True)):
            with pytest.raises(AnswerFileError, match="2_0.jsonl: another process is writing"):
                shards.check_free(size, alone)
    shards.check_free(3)


def test_reports_are_of_this_configuration(shards):
    report = ShardReport(MADE_BY.hash(), 3, 1.5, [DataIssue("q.jsonl", 4, "no picture")], [3])
    shards.write_report(1, 2, report)
    assert shards.reports(2) == {1: report} and shards.reports(3) == {}
    shards.write_report(1, 2, dataclasses.replace(report, config="another"))
    assert shards.reports(2) == {}
    path = shards.folder / "2_1.report.json"
    for change in ({"failed": [99]}, {"failed": [[]]}, {"asked": "3"}, {"seconds": None}, {"failures": [5]}):
        path.write_text(json.dumps({**dataclasses.asdict(report), **change}))
        assert shards.reports(2) == {}, change
    for content in ("5", "[]", "{}", "[" * 100_000):
        path.write_text(content)
        assert shards.reports(2) == {}
    shards.clear_report(1, 2)
    shards.clear_report(1, 2)  # nothing left to clear
    os.mkfifo(path)
    os.mkfifo(shards.folder / "2_1.jsonl")
    assert shards.reports(2) == {} and shards.files() == []


def test_a_merge_never_copies_by_stale_offsets(shards):
    answer(shards.path(0, 2), [4, 1, 0])
    found = shards.scan()
    with AnswerFile(shards.path(0, 2), QUESTIONS, MADE_BY) as file:
        file.finalize()  # the process finishes between the scan and the merge: other offsets
    with pytest.raises(AnswerFileError, match="2_0.jsonl: the file changed while it was merged"):
        shards.merge(found)
    assert not shards.merged.exists()
    shards.merge(shards.scan())
    assert merged_indices(shards) == [0, 1, 4]
