"""check_data says what a data set contains, and exits with 1 for samples that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers.golden_model import DATA
from llava.model.tokenizer import load_tokenizer
from llava.train import check_data


def sample(question, answer, **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    return tmp_path


def run(folder, data, capsys, *more):
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    argv = ["--data_path", str(folder / "data.json"), "--image_folder", str(folder)]
    code = check_data.main([*argv, *more])
    out = capsys.readouterr().out
    return code, out, json.loads(out.splitlines()[-1])


GOOD = [sample("<image>\nWhat?", "A dog.", image="a.png"), sample("Hi", "Hello."), sample("x " * 90, "y")]


def test_a_good_data_set(folder, capsys, monkeypatch):
    more = ("--model_name_or_path", str(DATA / "ckpt_llava15"), "--model_max_length", "300")
    code, out, found = run(folder, GOOD, capsys, *more, "--image_tokens", "64")
    assert code == 0 and "no bad samples" in out
    assert (found["samples"], found["with_image"], found["without_image"], found["bad"]) == (3, 1, 2, 0)
    assert found["longer"] == 0 and found["image_sizes"]["most_common"] == [[60, 40, 1]]
    assert "ASSISTANT:[[ A dog.</s>]]" in out and "USER: <image> \nWhat?" in out and "\x1b" not in out
    _, _, longer = run(folder, GOOD, capsys, *more, "--image_tokens", "576")
    assert longer["bad_samples"] == {"too long": [0]}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert (
        "ASSISTANT:\x1b[32m A dog.</s>\x1b[0m" in run(folder, GOOD, capsys, *more, "--image_tokens", "64")[1]
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(folder, GOOD, capsys, *more, "--image_tokens", "64")[1]


def test_dropped_first_answers_are_counted(folder, capsys):
    first = sample("Hi", "Hello.")
    first["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    code, out, found = run(folder, [first, *GOOD], capsys)
    assert code == 0 and found["first_answers_dropped"] == 1
    assert "1 samples start with an answer, which is dropped" in out


def test_bad_samples_are_listed_by_kind(folder, capsys):
    data = [*GOOD, sample("x", ""), sample("<image>x", "y", image="broken.png", id="b"), *[5] * 11]
    code, out, found = run(folder, data, capsys)
    assert code == 1 and found["bad"] == 13
    assert found["bad_samples"] == {"empty answer": [3], "broken image": [4], "format": list(range(5, 16))}
    assert "sample 4 (id 'b')" in out and "... and 1 more" in out
    assert "tokens were not counted: set --model_name_or_path" in out and "tokens" not in found


def test_files_that_cannot_be_read_are_one_error(folder, capsys):
    assert check_data.main(["--data_path", str(folder / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    (folder / "data.json").write_text("[", encoding="utf-8")
    assert check_data.main(["--data_path", str(folder / "data.json")]) == 1
    assert "is not valid JSON" in capsys.readouterr().err


def test_targets_keep_their_spaces():
    tokenizer = load_tokenizer(DATA / "ckpt_llava15")
    ids = [1, -200, *tokenizer("a b", add_special_tokens=False).input_ids]
    labels = [-100, -100, *ids[2:]]
    assert check_data.marked_text(ids, labels, tokenizer, colored=False) == "<s><image>[[ a b]]"
