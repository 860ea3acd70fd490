"""Training data in LLaVA's format: what is written, resumed and refused."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava.tiny import build, chat, training_data, world
from llava.tiny.world import conversations
from llava.tiny.world.questions import SHORT
from llava.tiny.world.scenes import Scene, SceneObject


def scene(*objects, size=(300, 300)) -> Scene:
    """A scene of (kind, name, color, left, top, side)."""
    made = [SceneObject(k, n, (x, y, x + s, y + s), c) for k, n, c, x, y, s in objects]
    return Scene(0, size, made)


FARM = scene(
    ("sprite", "dog", None, 10, 10, 90),
    ("sprite", "bus", None, 200, 10, 50),
    ("sprite", "bus", None, 200, 70, 50),
    ("shape", "circle", "red", 10, 200, 40),
    ("word", "STOP", None, 200, 200, 30),
)


def test_a_caption_names_every_object_the_largest_first():
    assert conversations.phrases(FARM) == ["a dog", "two buses", "a red circle", "a sign with the word STOP"]
    listed = "a dog, two buses, a red circle and a sign with the word STOP"
    rs = np.random.RandomState(0)
    assert all(listed in conversations.caption(FARM, rs).replace("A dog", "a dog") for _ in range(9))
    question, answer = conversations.description(FARM, rs)
    assert question in conversations.DESCRIBE and listed in answer and answer.endswith((".", "image."))
    assert conversations.enumeration([]) == "nothing"


@pytest.mark.parametrize(
    "maker, found",
    [
        (
            conversations.what_kind,
            {("What animal is in the image?", "dog"), ("What vehicle is in the image?", "bus")},
        ),
        (conversations.what_largest, {("What is the largest object in the image?", "dog")}),
        (conversations.what_shape, {("What is the red shape?", "circle")}),
        (
            conversations.what_where,
            {
                ("What is in the top left of the image?", "dog"),
                ("What is in the top right of the image?", "bus"),
                ("What is in the bottom left of the image?", "circle"),
            },
        ),
    ],
)
def test_questions_that_start_with_what(maker, found):
    rs = np.random.RandomState(0)
    assert {maker(FARM, rs) for _ in range(40)} == {(f"{text}{SHORT}", answer) for text, answer in found}
    assert maker(scene(), rs) is None


@pytest.mark.parametrize(
    "question, answer, words",
    [
        ("Is there an apple in the image?", "Yes", "Yes, there is an apple in the image."),
        ("Is there a red circle in the image?", "No", "No, there is no red circle in the image."),
        ("Is the circle red?", "No", "No, the circle is not red."),
        ("Is the dog to the left of the bus?", "Yes", "Yes, the dog is to the left of the bus."),
        ("How many buses are there in the image?", "1", "There is one bus in the image."),
        ("How many sheep are there in the image?", "3", "There are three sheep in the image."),
        ("What color is the ring?", "blue", "The ring is blue."),
        ("What animal is in the image?", "owl", "The animal in the image is an owl."),
        ("What is in the top left of the image?", "dog", "There is a dog in the top left of the image."),
    ],
)
def test_a_question_without_its_instruction_is_answered_in_a_sentence(question, answer, words):
    assert conversations.in_words(question + SHORT, answer) == (question, words)
    assert conversations.in_words(question, answer) is None  # asks for no short answer


def test_conversations_are_balanced_and_what_names_everything_comes_last():
    answers, asked = Counter(), Counter()
    for seed in range(150):
        rs = np.random.RandomState(seed)
        turns = conversations.turns(FARM, rs, 8)
        assert len({text for text, _ in turns}) == len(turns) <= 9
        listing = (*conversations.DESCRIBE, "What things are in the image?")
        whole = [place for place, (text, _) in enumerate(turns) if text in listing]
        assert whole in ([], [len(turns) - 1])
        asked[len(turns) == 1] += 1
        answers.update(answer for text, answer in turns if text.startswith("Is there a"))
    assert abs(answers["Yes"] - answers["No"]) < 0.15 * (answers["Yes"] + answers["No"])
    assert 5 < asked[True] < 30


def test_files_are_those_of_llava_and_a_run_resumes(tmp_path, monkeypatch, capsys):
    command = ["--train", "3", "--seed", "40", "--output", str(tmp_path / "once")]
    assert build.main(command) == 0
    assert json.loads(capsys.readouterr().out)["answers"]["captions"] == 3
    for name, entries in (
        (name, json.loads((tmp_path / "once" / f"{name}.json").read_text()))
        for name in ("captions", "instruct")
    ):
        for entry in entries:
            assert Image.open(tmp_path / "once" / entry["image"]).size in ((336, 336), (336, 252), (252, 336))
            texts = [turn["value"] for turn in entry["conversations"]]
            assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"] * (len(texts) // 2)
            assert "".join(texts).count("<image>") == texts[0].count("<image>") == 1 and all(texts)
            assert name == "instruct" or len(texts) == 2

    again = tmp_path / "again"
    training_data.write(again, 2, seed=40)
    with (again / "scenes.jsonl").open("a") as log:
        log.write('{"seed": 42, "obj')  # killed while it wrote a line
    drawn = []
    draw = world.draw
    monkeypatch.setattr(world, "draw", lambda seed, kind: drawn.append(seed) or draw(seed, kind))
    training_data.write(again, 3, seed=40)
    assert drawn == [42]
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "once")).read_bytes()
    training_data.write(again, 1, seed=40, files=("captions",))
    assert len(json.loads((again / "captions.json").read_text())) == 1
    (again / "images" / "000000041.webp").unlink()
    training_data.write(again, 3, seed=40)
    assert drawn == [42, 41, 42]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "DIR", "--seed", "7"], "seed 0 .*expected 7"),
        (["--output", "DIR", "--world", "few-large"], "few-large"),
        (["--output", "DIR", "--kind", "captions,nothing"], "unknown kind. Choose from captions, instruct"),
        (["--output", "DIR", "--seed", "999999999"], "the first seed of benchmarks"),
        (["--seed", "1"], "--output is missing"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, arguments, message):
    (tmp_path / "scenes.jsonl").write_text(training_data._line(FARM))
    try:
        status = build.main(["--train", "2", *(str(tmp_path) if one == "DIR" else one for one in arguments)])
    except SystemExit as stop:
        status = stop.code
    assert status and re.search(message, capsys.readouterr().err)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "scenes.jsonl").write_text('{"seed": 0}\n')
    with pytest.raises(training_data.TrainingDataError, match=r"scenes\.jsonl:1: not a scene"):
        training_data.read_scenes(tmp_path, 0)


def test_chat_prompts_are_many_and_a_stopped_run_reuses_its_answers(tmp_path, monkeypatch):
    asked = chat.prompts()
    assert len(set(asked)) == len(asked) >= 300 and {len(one) for one in asked} == {1, 2}
    calls = []

    def answered(missing, folder, batch_size):
        for number, turns in enumerate(missing):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(turns)
            row = [
                {"from": who, "value": text}
                for text in turns
                for who, text in (("human", text), ("gpt", "A."))
            ]
            yield [(number, row)]

    monkeypatch.setattr(chat, "answer_all", answered)
    output = tmp_path / "chat.json"
    with pytest.raises(KeyboardInterrupt):
        chat.write(output, tmp_path, asked[:3], 1)
    assert not output.exists()

    def silent(missing, folder, batch_size):
        row = [{"from": "human", "value": missing[0][0]}, {"from": "gpt", "value": ""}]
        return [[(0, row)]]

    monkeypatch.setattr(chat, "answer_all", silent)
    assert chat.write(output, tmp_path, asked[:3], 1) == 2  # the empty answer is left out
    entries = json.loads(output.read_text())
    assert [entry["conversations"][0]["value"] for entry in entries] == [asked[0][0], asked[1][0]]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    "text, ended, tidied",
    [
        (" Paris.", True, "Paris."),
        ("One. Two thr", False, "One."),
        ("No end", False, "No end"),
        ("3.5 m", False, "3.5 m"),
    ],
)
def test_an_answer_ends_with_a_sentence(text, ended, tidied):
    assert chat.tidy(text, ended) == tidied
