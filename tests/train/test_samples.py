"""The data file of a training: every form of JSON, and every sample that cannot be used is named."""

import gzip
import json
import os

import pytest

from llava.train import samples as module
from llava.train.preprocess import training_template
from llava.train.samples import SampleError, SampleFile

V1, PLAIN = training_template("v1"), training_template("plain")


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def sample(*turns, **more):
    return {"conversations": list(turns), **more}


GOOD = [
    sample(human("<image>\nWas ist das?"), gpt("Ein Hund 🐕."), id="a", image="x.png"),
    sample(human('["]}, {"'), gpt('\\" 水果\n]'), id=7),
    sample(gpt("dropped, as in LLaVA"), human("Hi"), gpt("Hello")),
]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("chunk", [1, 3, 50, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("form", ["compact", "indented", "bom", "lines", "lines_bom"])
def test_samples_are_found_in_every_form_of_json(tmp_path, monkeypatch, form, chunk, ascii_only):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    text = json.dumps(GOOD, ensure_ascii=ascii_only, indent=2 if form == "indented" else None)
    if "lines" in form:
        text = "\n\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in GOOD) + "\r\n"
    bom = b"\xef\xbb\xbf" if "bom" in form else b""
    found = SampleFile(write(tmp_path / "data.json", bom + text.encode()), V1)
    assert [found[index] for index in range(len(found))] == GOOD
    assert found.bad == {} and list(found.has_image) == [1, 0, 0]
    assert list(found.words) == [7, 5, 6]
    assert found.name(0) == f"{tmp_path / 'data.json'}: sample 0 (id 'a')"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "contains no samples"),
        ("", "contains no samples"),
        ("hello", "is not JSON: it starts with b'hello'"),
        ('[{"a": 1}\n{"a": 2}]', r"data.json:2: .*expected ',' or '\]' after sample 0, got '{'"),
        ('[{"a": 1},\n{"a": ', "data.json:2: .*sample 1: Expecting value.*cut off"),
        ('[{"a": 1}', "after sample 0, got the end of the file"),
        ('[{"a": 1}] x', "unexpected 'x' after the list"),
        ('{\n "a": 1}', "data.json:1: is not JSON"),
        ("[" * 100000, "nested too deeply"),
        (json.dumps(GOOD).encode("utf-16"), "is UTF-16 text, not JSON"),
        (gzip.compress(b"[]", mtime=0), "is compressed with gzip"),
        ('[{"a": "ä"}]'.encode("latin-1"), "is not UTF-8 .*near byte"),
    ],
)
def test_files_that_are_not_a_list_of_samples_are_refused(tmp_path, content, message):
    with pytest.raises(SampleError, match=message):
        SampleFile(write(tmp_path / "data.json", content), V1)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file. Check --data_path"):
        SampleFile(tmp_path / "none.json", V1)
    with pytest.raises(SampleError, match="cannot be read"):
        SampleFile(tmp_path, V1)


def test_a_file_that_changes_during_the_training_is_refused(tmp_path):
    path = write(tmp_path / "data.json", json.dumps(GOOD))
    found = SampleFile(path, V1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(SampleError, match="has changed since it was checked"):
        found[0]


BAD = {
    "format": [
        5, None, "x", [], {}, sample(), {"conversations": "x"}, sample("x", "y"),
        sample(human(3), gpt("y")), sample(human(None), gpt("y")), sample(human(float("nan")), gpt("y")),
        sample(human("\ud83d"), gpt("y")),
    ],
    "keys": [
        sample({"role": "user", "content": "x"}), sample(human("x"), {**gpt("y"), "weight": 0}),
        sample({"from": "human"}, gpt("y")),
    ],
    "role": [
        sample({"from": "system", "value": "x"}, human("x"), gpt("y")),
        sample({"from": "Human", "value": "x"}, gpt("y")),
        sample({"from": None, "value": "x"}, gpt("y")),
        sample({"from": ["human"], "value": "x"}, gpt("y")),
    ],
    "order": [
        sample(human("x"), human("y"), gpt("z")), sample(human("x"), gpt("y"), gpt("z")),
        sample(gpt("x"), gpt("y")),
    ],
    "no answer": [sample(human("x")), sample(gpt("x")), sample(human("x"), gpt("y"), human("z"))],
    "empty answer": [sample(human("x"), gpt("")), sample(human("x"), gpt(" \n"))],
    "empty question": [sample(human(""), gpt("y"))],
    "tags": [
        sample(human("<image>x"), gpt("y")), sample(human("x"), gpt("y"), image="x.png"),
        sample(human("<image><image>x"), gpt("y"), image="x.png"),
        sample(human("<image>x"), gpt("y"), human("<image>x"), gpt("y"), image="x.png"),
        sample(human("x"), gpt("<image>y"), image="x.png"),
    ],
    "image": [
        sample(human("<image>x"), gpt("y"), image=wrong)
        for wrong in (None, float("nan"), "", 3, ["x.png"], {"path": "x.png"}, True)
    ],
    "missing image": [
        sample(human("<image>x"), gpt("y"), image=wrong) for wrong in ("no.png", "sub/x.png", "a\0b.png", ".")
    ],
}  # fmt: skip


@pytest.mark.parametrize("listed", [0, 1 << 30])
def test_every_bad_sample_is_named_with_its_kind(tmp_path, monkeypatch, listed):
    monkeypatch.setattr(module, "_LISTED", listed)  # images by listing their folder, or one by one
    (tmp_path / "x.png").touch()
    data = [*GOOD, *(one for group in BAD.values() for one in group), *GOOD]
    found = SampleFile(write(tmp_path / "data.json", json.dumps(data)), V1, str(tmp_path))
    kinds = [kind for kind, group in BAD.items() for _ in group]
    assert {index: error.kind for index, error in found.bad.items()} == dict(enumerate(kinds, 3))
    text = found.describe()
    assert text.startswith(f"{len(kinds)} of {len(data)} samples are bad: 12 x format, ")
    assert text.count("\n") == 6 and text.endswith(f"... and {len(kinds) - 5} more")
    with pytest.raises(SampleError, match="leave them out by --bad_samples skip"):
        found.require(skip=False, has_tower=True)
    found.require(skip=True, has_tower=True)


def test_a_broken_line_is_a_bad_sample(tmp_path):
    lines = [json.dumps(GOOD[1]), "{broken", json.dumps(GOOD[2]), json.dumps(GOOD[0])[:-9]]
    found = SampleFile(write(tmp_path / "data.jsonl", "\n".join(lines)), V1)
    assert sorted(found.bad) == [1, 3] and found.bad[1].kind == "json"
    assert "line 2 is not JSON" in str(found.bad[1]) and found[2] == GOOD[2]


def test_captions_need_a_question_with_an_image_and_one_answer(tmp_path):
    data = [
        sample(human("<image>"), gpt("y"), image="x.png"),
        sample(human("<image>"), gpt("y"), human("x"), gpt("y"), image="x.png"),
        sample(human("x"), gpt("y")),
    ]
    found = SampleFile(write(tmp_path / "data.json", json.dumps(data)), PLAIN)
    assert {index: error.kind for index, error in found.bad.items()} == {1: "order", 2: "order"}


def test_images_need_a_tower_and_a_folder(tmp_path):
    path = write(tmp_path / "data.json", json.dumps(GOOD))
    with pytest.raises(SampleError, match=r"sample 0 \(id 'a'\): has an image.*Set --vision_tower"):
        SampleFile(path, V1).require(skip=True, has_tower=False)
    with pytest.raises(SampleError, match="Set --image_folder"):
        SampleFile(path, V1).require(skip=True, has_tower=True)
