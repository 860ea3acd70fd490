"""Question files as people have them are read, or refused in one line that says what was found."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.base import check_questions
from llava.eval.benchmarks.files import read_answers, read_json, read_jsonl, read_rows
from llava.eval.benchmarks.questions import read_questions

ROWS = [
    {"question_id": 1, "image": "a.png", "text": "Is it é?", "category": "x"},
    {"question_id": "2", "image": ["b.png"], "text": "Zwei\nZeilen"},
    {"question_id": 3, "text": "No image"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
TEXT = "\n".join(LINES) + "\n"
FORMS = {
    "plain": TEXT.encode(),
    "no newline at the end": TEXT.rstrip().encode(),
    "byte order mark": TEXT.encode("utf-8-sig"),
    "two files with a byte order mark": b"".join((line + "\n").encode("utf-8-sig") for line in LINES),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 without a mark": TEXT.encode("utf-16-le"),
    "utf-16, big end first": TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "cr": TEXT.replace("\n", "\r").encode(),
    "cr in utf-16": TEXT.replace("\n", "\r").encode("utf-16"),
    "blank lines": ("\n  \n" + TEXT.replace("\n", "\n\n")).encode(),
    "list": json.dumps(ROWS).encode(),
    "indented list": json.dumps(ROWS, indent=2).encode(),
    "list in utf-16": json.dumps(ROWS).encode("utf-16"),
    "list with a byte order mark": json.dumps(ROWS).encode("utf-8-sig"),
}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "q.jsonl"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_questions(file, form):
    file.write_bytes(FORMS[form])
    issues = []
    questions = list(read_questions(file, "/images", issues))
    assert not issues and [one.index for one in questions] == [0, 1, 2]
    assert [one.question_id for one in questions] == [1, "2", 3]
    assert [one.image for one in questions] == [Path("/images/a.png"), Path("/images/b.png"), None]
    assert [one.text for one in questions] == [row["text"] for row in ROWS]


def test_answers_are_read_in_every_form_too(file):
    rows = [{"question_id": 1, "text": "ja"}, {"question_id": 2, "text": "é"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    for content in (text.encode("utf-16"), text.encode("utf-8-sig"), json.dumps(rows).encode()):
        file.write_bytes(content)
        assert read_answers(file) == rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "contains no questions"),
        (b" \n\r\n", "contains no questions"),
        (b"[]", "contains no questions"),
        (gzip.compress(TEXT.encode()), "compressed with gzip"),
        (b"PK\x03\x04....", "a zip archive or Excel table"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"index\tquestion\timage\n1\thi\tabc\n", "a CSV or TSV table"),
        ("question_id,image,text\n1,a.jpg,hi\n".encode("utf-16"), "a CSV or TSV table"),
        (b"<!DOCTYPE html>\n<html>", "an HTML or XML page"),
        (
            json.dumps({"questions": ROWS}, indent=1).encode(),
            "one JSON object over several lines (keys 'questions')",
        ),
        (json.dumps(ROWS).encode()[:-9], "not a JSON list"),
        (TEXT.encode("utf-16")[:-1], "not UTF-16"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ],
)
def test_other_files_are_refused_in_one_line(file, content, says):
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_questions(file, "/images", []))
    assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 300


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        unix.bind("socket")
    (tmp_path / "folder").mkdir()
    found = {
        "pipe": "a pipe",
        "socket": "socket",
        "folder": "a folder",
        "gone": "no such",
        "x" * 300: "name too long",
    }
    for name, says in found.items():
        for read in (
            read_rows,
            read_answers,
            lambda path: read_json(path, dict),
            lambda p: list(read_jsonl(p, [])),
        ):
            with pytest.raises(DataError, match=f"(?i){says}"):
                read(tmp_path / name)
    with pytest.raises(DataError, match="a pipe"):
        list(read_questions("/dev/null", "/", []))


def test_a_bad_line_costs_that_line(file):
    names = [
        "x" * 300,
        "x" * 5000 + ".jpg",
        "é" * 130 + ".jpg",
        "a/" * 2100 + "b",
        "a\0b",
        "",
        5,
        {},
        [],
        ["a.png", "b.png"],
        [["a.png"]],
        "../secret.png",
        "sub/../../secret.png",
        "/etc/passwd",
    ]
    rows = [{"question_id": 1, "text": "?", "image": name} for name in names]
    rows += [
        {"question_id": [1], "text": "?"},
        {"question_id": None, "text": "?"},
        {"question_id": True, "text": "?"},
        {"question_id": 1, "text": 5},
        {"question_id": 1, "text": None},
        {"question_id": 1},
    ]
    bad = [json.dumps(row).encode() for row in rows]
    bad += [b"{" * 3, b"[" * 100_000, b'{"a":' * 100_000, b'{"question_id": 1, "text": "\xff"}']
    bad += [b'{"question_id": 1, "text": "\\ud800"}', b"null", b"[1]", b'"x"', b"1" * 5000]
    good = json.dumps(ROWS[0]).encode()
    file.write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    issues = []
    questions = list(read_questions(file, "/images", issues))
    assert [one.line for one in questions] == [1, len(bad) + 2]
    assert [issue.line for issue in issues] == list(range(2, len(bad) + 2))
    assert max(len(str(issue)) for issue in issues) < 400
    said = [issue.message for issue in issues]
    assert "too long" in said[0] and "too long" in said[3] and "list of 2 names" in said[9]
    assert all("outside the image folder" in one and "--allow-outside-images" in one for one in said[11:14])


def test_paths_that_stay_inside_and_outside_with_leave(file):
    inside = ["sub/../a.png", "/images/sub/a.png", "..a.png", "a..png", "sub/a.png"]
    outside = ["../a.png", "/elsewhere/a.png"]
    file.write_text(
        "".join(json.dumps({"question_id": 1, "text": "?", "image": one}) + "\n" for one in inside + outside)
    )
    issues = []
    assert len(list(read_questions(file, "/images", issues))) == 5 and len(issues) == 2
    questions = list(read_questions(file, "/images", issues, allow_outside=True))
    assert len(questions) == 7 and questions[-1].image == Path("/elsewhere/a.png")


def test_every_benchmark_with_image_names_refuses_outside_ones(tmp_path):
    turn = [{"from": "human", "value": "<image>\nWhich?"}]
    files = {
        "gqa": (
            "llava_gqa_testdev_balanced.jsonl",
            json.dumps({"question_id": "1", "image": "/x.png", "text": "?"}),
        ),
        "vizwiz_val": ("val.json", json.dumps([{"image": "../x.png", "question": "?"}])),
        "scienceqa": (
            "llava_test_CQM-A.json",
            json.dumps([{"id": "1", "image": "../x.png", "conversations": turn}]),
        ),
    }
    for name, (file, content) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content + "\n")
        benchmark, issues = get_benchmark(name), []
        assert not list(benchmark.questions(tmp_path / name, issues))
        assert len(issues) == 1 and "outside the image folder" in issues[0].message
        benchmark.allow_outside = True
        assert len(list(benchmark.questions(tmp_path / name, []))) == 1


def test_images_that_are_no_files_are_counted_as_missing(tmp_path, file):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{"question_id": 1, "text": "?", "image": name} for name in ("a.png", "pipe.png", "x" * 200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings = check_questions("q", list(read_questions(file, tmp_path, [])))
    assert (
        warnings[1].startswith("2 of 3 images are missing") if len(warnings) > 1 else "2 of 3" in warnings[0]
    )
