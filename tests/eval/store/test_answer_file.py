"""The answer file: resumes from any state it can be left in, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.benchmarks import Answer
from llava.eval.benchmarks.base import Question
from llava.eval.store.answer_file import AnswerFile, AnswerFileError
from llava.eval.store.provenance import Configuration, fingerprint_questions

CONFIGURATION = Configuration(
    model="toy",
    weights="w",
    questions="q",
    conv_mode="vicuna_v1",
    dtype="float32",
    tower_dtype="float32",
    pruning=(("method", "vispruner"), ("tokens", 64), ("important_ratio", 0.5)),
    attn_implementation="sdpa",
    device="cpu",
    max_new_tokens=8,
)
# one id for two questions, and the same question twice: neither is a key
QUESTIONS = [Question(index, index // 2, Path("a.png"), f"q{index % 4 // 2} é\u2028?") for index in range(8)]


def opened(path: Path, configuration: Configuration = CONFIGURATION, questions=QUESTIONS) -> AnswerFile:
    return AnswerFile(path, questions, configuration)


def said(index: int) -> Answer:
    return Answer(index, f"answer {index}\né\u2028", 64)


def without_ids(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in row.items() if key != "answer_id"} for row in rows]


def finish(path: Path) -> None:
    with opened(path) as file:
        for index in file.missing:
            file.write([said(index)])
        file.finalize()


@pytest.fixture
def whole(tmp_path) -> Path:
    finish(tmp_path / "whole.jsonl")
    return tmp_path / "whole.jsonl"


def test_a_line_is_llavas_and_says_how_it_was_made(whole):
    row = json.loads(whole.read_bytes().splitlines()[3])
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["question_id"], row["prompt"], row["text"]) == (1, QUESTIONS[3].text, said(3).text)
    assert len(row["answer_id"]) == 22 and row["model_id"] == "toy"
    metadata = row["metadata"]
    assert metadata["config"] == CONFIGURATION.hash() and metadata["index"] == 3
    assert (metadata["method"], metadata["tokens"], metadata["important_ratio"]) == ("vispruner", 64, 0.5)
    assert metadata["visual_tokens"] == 64 and metadata["dtype"] == metadata["tower_dtype"] == "float32"
    assert metadata["attn_implementation"] == "sdpa" and metadata["seed"] == 0
    assert set(metadata["versions"]) == {"vispruner", "torch", "transformers", "pillow"}
    assert whole.read_bytes().isascii()


def test_finalize_restores_question_order(tmp_path, whole):
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.write([said(5), said(1), said(6)])
        assert file.missing == [0, 2, 3, 4, 7] and not file.wants(5) and file.wants(0)
        file.write([said(7), said(0), said(4), said(5)])  # 5 is not written twice
        file.write([said(3), said(2)])
        file.finalize()
        assert file.missing == []
    assert without_ids(path) == without_ids(whole)
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "whole.jsonl"]


def test_every_cut_of_the_file_is_resumed(tmp_path, whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    scattered = lines[4] + lines[1] + lines[6]
    places = {0, 1, 5, len(scattered)}
    places |= {len(lines[4]) + shift for shift in (-1, 0, 1, 7, 40)}
    places |= {len(scattered) - shift for shift in (1, 2, 30)}
    for number, cut in enumerate(sorted(places)):
        path = tmp_path / f"cut{number}.jsonl"
        path.write_bytes(scattered[:cut])
        intact = scattered[:cut].count(b"\n") + any(
            cut == end - 1 for end in (len(lines[4]), len(lines[4] + lines[1]), len(scattered))
        )
        with opened(path) as file:
            assert file.answered == intact, cut
        finish(path)
        assert without_ids(path) == without_ids(whole), cut


def test_zeros_of_a_power_cut_are_cut_off(tmp_path, whole):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole.read_bytes().splitlines(keepends=True)[0] + b"\0" * 300)
    finish(path)
    assert without_ids(path) == without_ids(whole)


def test_a_finished_file_is_not_touched(whole):
    before = whole.stat()
    finish(whole)
    after = whole.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"pruning": (("method", "vispruner"), ("tokens", 32), ("important_ratio", 0.5))},
            "tokens is 64 in the file, 32 in this run",
        ),
        (
            {"pruning": (("method", "none"), ("tokens", None))},
            "method is 'vispruner' in the file, 'none' in this run",
        ),
        ({"dtype": "float16"}, "dtype is 'float32' in the file, 'float16' in this run"),
        ({"weights": "retrained"}, "weights is 'w' in the file, 'retrained' in this run"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(whole, change, says):
    before = whole.read_bytes()
    with pytest.raises(AnswerFileError, match=says) as caught:
        opened(whole, dataclasses.replace(CONFIGURATION, **change))
    assert "new --output" in str(caught.value) and whole.read_bytes() == before


def test_other_questions_are_refused(whole):
    others = [dataclasses.replace(question, text="other?") for question in QUESTIONS]
    with pytest.raises(AnswerFileError, match="whole.jsonl:1: .*not question number 0"):
        opened(whole, questions=others)
    with pytest.raises(
        AnswerFileError, match="whole.jsonl:5: .*question number 4, but 4 questions are known"
    ):
        opened(whole, questions=QUESTIONS[:4])


@pytest.mark.parametrize(
    "content",
    [
        b'{"question_id": 1, "image": "a.png", "text": "?"}',
        b"hello",
        b"[1]\n",
        b"[" * 100_000,
        b'{"question_id": 1, "prompt": "", "text": "", "metadata": {}}\n',
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, content):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(AnswerFileError, match=r"questions\.jsonl:1: .*Use a new --output"):
        opened(path)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_named(whole):
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join([*lines[:2], lines[2][:30] + b"\n", *lines[3:]]))
    with pytest.raises(AnswerFileError, match="whole.jsonl:3: a corrupt line in the middle"):
        opened(whole)


@pytest.mark.parametrize("index", [[], {}, None, "1", 99])
def test_an_index_that_is_none_is_refused(whole, index):
    lines = whole.read_text().splitlines(keepends=True)
    row = json.loads(lines[2])
    row["metadata"]["index"] = index
    whole.write_text("".join([*lines[:2], json.dumps(row) + "\n", *lines[3:]]))
    with pytest.raises(AnswerFileError, match=r"whole.jsonl:3: answers question number"):
        opened(whole)


def test_what_is_not_a_file_is_refused_and_kept(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(AnswerFileError, match="expected a file"):
            opened(path)
        assert path.exists()


def test_retried_answers_are_marked_and_resume(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, QUESTIONS, CONFIGURATION, retried=[1, 5]) as file:
        file.write([said(index) for index in range(3)])
    finish(path)
    marks = [row["metadata"].get("retried") for row in without_ids(path)]
    assert marks == [None, True, *[None] * 6]


def test_a_second_answer_is_refused(whole):
    whole.write_bytes(whole.read_bytes() + whole.read_bytes().splitlines(keepends=True)[2])
    with pytest.raises(AnswerFileError, match="whole.jsonl:9: a second answer"):
        opened(whole)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.write([said(1), said(0)])
        with pytest.raises(AnswerFileError, match="another process is writing"):
            opened(path)
        file.finalize()  # closes the file
    with opened(path) as file:
        assert file.answered == 2


def test_nothing_written_leaves_no_file(tmp_path):
    with opened(tmp_path / "new" / "answers.jsonl"):
        pass
    assert os.listdir(tmp_path / "new") == []
    with opened(tmp_path / "empty.jsonl", questions=[]) as file:
        file.finalize()
    assert (tmp_path / "empty.jsonl").read_bytes() == b""  # an empty chunk is a file that can be concatenated


def test_a_full_disk_keeps_what_was_written(tmp_path, whole, monkeypatch):
    path, write = tmp_path / "answers.jsonl", os.write
    with opened(path) as file:
        file.write([said(0), said(1)])
        room = [50]

        def full(descriptor, data):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, bytes(data)[: room.pop()])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(AnswerFileError, match="disk is full.*2 answers in it are safe.*same command"):
            file.write([said(2), said(3)])
        monkeypatch.undo()
    assert len(path.read_bytes().splitlines()) == 2  # the half line is gone
    finish(path)
    assert without_ids(path) == without_ids(whole)


def test_a_file_size_limit_while_finalising(tmp_path, whole):
    """In a process of its own, as the limit cannot be raised again."""
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.write([said(index) for index in reversed(range(8))])
    before = path.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\nfrom test_answer_file import *\n"
        f"with opened(Path({str(path)!r})) as file:\n    file.finalize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode != 0 and "the disk is full" in done.stderr and "8 answers" in done.stderr
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["answers.jsonl", "whole.jsonl"]
    finish(path)
    assert without_ids(path) == without_ids(whole)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_killed_while_finalising(tmp_path, whole, monkeypatch, call):
    """What a kill -9 leaves at any step of it: the old file or the new one, and at most a temporary one."""
    path = tmp_path / "answers.jsonl"
    with opened(path) as file:
        file.write([said(index) for index in reversed(range(8))])
    code = (
        "import os, signal, sys; sys.path[:0] = [{here!r}]\nfrom test_answer_file import *\n"
        "file = opened(Path({path!r}))\ncount = [0]\nreal = os.{call}\n"
        "def die(*arguments):\n    count[0] += 1\n"
        "    if count[0] == {times}: os.kill(os.getpid(), signal.SIGKILL)\n    return real(*arguments)\n"
        "os.{call} = die\nfile.finalize()"
    ).format(here=str(Path(__file__).parent), path=str(path), call=call, times=1 if call == "replace" else 2)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert any(name.startswith(".answers.jsonl.") for name in os.listdir(tmp_path))
    finish(path)
    assert without_ids(path) == without_ids(whole)
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "whole.jsonl"]


def test_the_fingerprint_of_questions_ignores_folders():
    moved = [dataclasses.replace(question, image=Path("/elsewhere/a.png")) for question in QUESTIONS]
    assert fingerprint_questions(moved) == fingerprint_questions(QUESTIONS)
    assert fingerprint_questions(QUESTIONS[:-1]) != fingerprint_questions(QUESTIONS)
